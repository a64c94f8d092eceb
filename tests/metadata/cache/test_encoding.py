# SPDX-License-Identifier: Apache-2.0
"""How a cache's changes are written: what fits, and values as they were at a pre_commit."""

from array import array
from collections.abc import Iterable

import pytest
from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.cache import encoding
from nbdtarget_metadata.cache.encoding import CacheEncoding
from nbdtarget_metadata.cache.records import (
    OBLOCK_SHIFT,
    VALID,
    Words,
    apply_arena_record,
    decode_arena_record,
)
from nbdtarget_metadata.log.chain import RECORD_MAGIC, Chain
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, open_envelope
from nbdtarget_metadata.operations import Operation, Write

NR_CBLOCKS = 20


def value(oblock: int) -> int:
    return oblock << OBLOCK_SHIFT | VALID


def make_values() -> Words:
    return array("Q", [value(cblock + 100) for cblock in range(NR_CBLOCKS)])


def bits(*cblocks: int) -> bitarray:
    found = zeros(NR_CBLOCKS, "little")
    for cblock in cblocks:
        found[cblock] = 1
    return found


def empty_chain() -> Chain:
    return Chain(block=0, end=1000, digest=bytes(16))


def read_back(steps: Iterable[Operation | tuple[Operation, ...]]) -> dict[int, int]:
    """Return what the records that are written say, by cache block."""
    values: Words = array("Q")
    for write in steps:
        if isinstance(write, Write):
            block = write.offset // BLOCK_SIZE
            body = open_envelope(RECORD_MAGIC, block, memoryview(write.data), "").body
            record = decode_arena_record(body, "")
            apply_arena_record(
                values, record, "", nr_cblocks_max=NR_CBLOCKS, begin_min=0
            )
    return {cblock: each for cblock, each in enumerate(values) if each}


def test_records_say_what_blocks_were_at_the_pre_commit() -> None:
    values = make_values()
    before = {3: value(7)}
    written = CacheEncoding(values, NR_CBLOCKS, before).records(
        empty_chain(), 1, bits(3, 5)
    )
    assert read_back(written) == {3: value(7), 5: values[5]}


@pytest.mark.parametrize("chunk", [4, NR_CBLOCKS])
def test_snapshot_says_what_blocks_were_at_the_pre_commit(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(encoding, "CHUNK_CBLOCKS", chunk)
    values = make_values()
    before = {3: value(7), 11: 0}
    written = CacheEncoding(values, NR_CBLOCKS, before).snapshot(empty_chain(), 1)
    expected = dict(enumerate(values)) | {3: value(7)}
    del expected[11]
    assert read_back(written) == expected


def test_union_of_changes_before_and_after_the_cache_grew() -> None:
    encoding_ = CacheEncoding(make_values(), NR_CBLOCKS)
    small = bitarray("01", endian="little")
    for first, second in ((small, bits(5)), (bits(5), small)):
        union = encoding_.union(first, second)
        assert union == bits(1, 5)
        assert encoding_.count(union) == 2
    assert encoding_.union(encoding_.nothing(), bits(4)) == bits(4)


def test_changes_that_do_not_fit_before_the_end_are_left_and_nothing_is_written() -> (
    None
):
    encoding_ = CacheEncoding(make_values(), NR_CBLOCKS)
    chain = empty_chain()
    steps = encoding_.records_before(0, chain, 1, bits(1, 2))
    with pytest.raises(StopIteration) as stop:
        next(steps)
    assert stop.value.value == bits(1, 2)
    assert chain.block == 0
