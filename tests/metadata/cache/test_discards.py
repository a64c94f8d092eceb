# SPDX-License-Identifier: Apache-2.0
"""Discard blocks of one size as those of another."""

import pytest
from bitarray import bitarray

from nbdtarget_metadata.cache.discards import convert_discards, discard_block_size_for
from nbdtarget_metadata.cache.load import Discarded


@pytest.mark.parametrize(
    ("origin_blocks", "factor"),
    [(1, 1), (1 << 14, 1), ((1 << 14) + 1, 2), (1 << 20, 64)],
)
def test_discard_blocks_are_as_large_as_the_kernels(
    origin_blocks: int, factor: int
) -> None:
    size = discard_block_size_for(98304, 98304 * origin_blocks)
    assert size == factor * 98304


@pytest.mark.parametrize(
    ("recorded", "block_size", "converted"),
    [
        ("0110", 100, "0110"),
        ("0110", 50, "00111100"),
        ("1110", 200, "10"),
        ("0110", 200, "00"),
        ("1111", 300, "10"),
        ("1111", 100, "11"),  # the origin has shrunk
        ("1111", 100, "111100"),  # or grown
    ],
)
def test_conversion_rounds_inward_and_clips(
    recorded: str, block_size: int, converted: str
) -> None:
    before = Discarded(100, bitarray(recorded, endian="little"))
    after = convert_discards(before, block_size=block_size, nr_dblocks=len(converted))
    assert after.to01() == converted
