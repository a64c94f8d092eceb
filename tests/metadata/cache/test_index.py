# SPDX-License-Identifier: Apache-2.0
"""OblockIndex against a dict, in tables so small and full that everything collides."""

import random
from array import array

import pytest

from nbdtarget_metadata.cache.index import OblockIndex
from nbdtarget_metadata.cache.records import OBLOCK_SHIFT, VALID, Words
from tests.support.metadata.store import read_image


def empty(nr_cblocks: int) -> tuple[Words, OblockIndex]:
    values: Words = array("Q", [0] * nr_cblocks)
    return values, read_image(b"", OblockIndex.new(values))


@pytest.mark.parametrize("nr_cblocks", [1, 5, 6, 12, 13, 25, 100])
def test_index_finds_what_is_there_and_nothing_else(nr_cblocks: int) -> None:
    rng = random.Random(nr_cblocks)
    values, index = empty(nr_cblocks)
    model: dict[int, int] = {}
    oblocks = [rng.randrange(1 << 48) for _ in range(2 * nr_cblocks)]
    for _ in range(40 * nr_cblocks):
        cblock, oblock = rng.randrange(nr_cblocks), rng.choice(oblocks)
        if values[cblock]:
            index.remove(cblock)
            del model[values[cblock] >> OBLOCK_SHIFT]
            values[cblock] = 0
        elif oblock not in model:
            values[cblock] = oblock << OBLOCK_SHIFT | VALID
            assert index.add(cblock) is None
            model[oblock] = cblock
        found = {oblock: index.maybe_find(oblock) for oblock in oblocks}
        assert found == {oblock: model.get(oblock) for oblock in oblocks}


def test_second_holder_of_a_block_is_told_of_the_first() -> None:
    values, index = empty(10)
    values[3] = values[7] = 9 << OBLOCK_SHIFT | VALID
    assert index.add(3) is None
    assert index.add(7) == 3
    assert index.maybe_find(9) == 3


def test_what_was_not_added_is_not_removed() -> None:
    values, index = empty(10)
    values[3] = 9 << OBLOCK_SHIFT | VALID
    with pytest.raises(AssertionError):
        index.remove(3)


@pytest.mark.parametrize("nr_cblocks", range(1, 30))
def test_index_has_room_for_what_it_was_made_for_and_an_empty_slot(
    nr_cblocks: int,
) -> None:
    _, index = empty(nr_cblocks)
    assert index.has_room_for(nr_cblocks)
    assert not index.has_room_for(len(index._slots))
