# SPDX-License-Identifier: Apache-2.0
import random

import pytest

from nbdtarget.policies.smq.allocator import Allocator
from nbdtarget.policies.smq.block_table import BlockTable
from nbdtarget.policies.smq.multi_level_queue import Links


@pytest.mark.parametrize("nr_entries", [1, 2, 3, 100])
def test_table_is_a_dict(nr_entries: int) -> None:
    rng, table = random.Random(1), BlockTable(nr_entries)
    model: dict[int, int] = {}
    for _ in range(2000):
        block = rng.choice([rng.randrange(200), rng.randrange(1 << 48)])
        if block in model:
            table.remove(model.pop(block))
        elif free := sorted(set(range(nr_entries)) - set(model.values())):
            model[block] = rng.choice(free)
            table.insert(model[block], block)
        assert table.find(block) == model.get(block, -1)
    assert {block: table.find(block) for block in model} == model


@pytest.mark.parametrize("stride", [1, 8, 4096, 1 << 20])
def test_blocks_at_any_stride_spread_over_the_buckets(stride: int) -> None:
    table = BlockTable(1024)
    for entry in range(1024):
        table.insert(entry, entry * stride)
    assert sum(bucket < 1024 for bucket in table.buckets) > 350


def test_entry_that_is_not_inserted_cannot_be_removed() -> None:
    table = BlockTable(2)
    table.insert(0, 0)
    with pytest.raises((AssertionError, IndexError)):
        table.remove(1)


def test_allocator_gives_fresh_entries_first_then_freed_ones_in_their_order() -> None:
    allocator = Allocator(Links(5, Allocator.NR_MARKS))
    allocator.allocate_particular(1)
    allocator.free(1)
    allocator.allocate_particular(3)
    assert [allocator.allocate() for _ in range(4)] == [0, 2, 4, 1]
    assert allocator.nr_free == 0
    allocator.free(4)
    allocator.free(0)
    allocator.free(2)
    allocator.allocate_particular(0)
    assert [allocator.allocate() for _ in range(2)] == [4, 2]
    with pytest.raises(AssertionError, match="there is a free entry"):
        allocator.allocate()
