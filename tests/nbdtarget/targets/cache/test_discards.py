# SPDX-License-Identifier: Apache-2.0
"""The discard bits: which dblocks a DISCARD marks, and what takes that back."""

import pytest

from nbdtarget.targets.cache.discards import DiscardBits
from nbdtarget_metadata.cache.load import Discarded

BLOCK = 96 << 10  # no power of two
MANY = 1 << 14


def discards(nr_blocks: int = 8, tail: int = 512) -> DiscardBits:
    return DiscardBits(BLOCK, nr_blocks * BLOCK + tail)


@pytest.mark.parametrize(
    ("origin_size", "dblock_size", "nr_dblocks"),
    [
        (512, BLOCK, 1),
        (BLOCK, BLOCK, 1),
        (BLOCK + 512, BLOCK, 2),
        (MANY * BLOCK, BLOCK, MANY),
        (MANY * BLOCK + 512, BLOCK, MANY + 1),
        ((MANY + 1) * BLOCK, 2 * BLOCK, MANY // 2 + 1),
        (4 * MANY * BLOCK, 4 * BLOCK, MANY),
    ],
)
def test_dblock_is_doubled_until_there_are_few(
    origin_size: int, dblock_size: int, nr_dblocks: int
) -> None:
    bits = DiscardBits(BLOCK, origin_size)
    assert (bits.dblock_size, bits.nr_dblocks) == (dblock_size, nr_dblocks)
    assert len(bits.bits) == nr_dblocks


@pytest.mark.parametrize(
    ("offset", "length", "marked"),
    [
        (0, BLOCK, [0]),
        (0, BLOCK - 512, []),
        (512, BLOCK, []),
        (BLOCK - 512, BLOCK + 1024, [1]),
        (BLOCK - 512, 3 * BLOCK, [1, 2]),
        (2 * BLOCK, 3 * BLOCK, [2, 3, 4]),
        (0, 8 * BLOCK + 512, list(range(8))),  # never the short tail
        (8 * BLOCK, 512, []),
        (0, 0, []),
    ],
)
def test_whole_dblocks_are_marked(offset: int, length: int, marked: list[int]) -> None:
    bits = discards()
    bits.set_range(offset, length)
    assert [oblock for oblock in range(8) if bits.is_discarded(oblock)] == marked
    assert bits.nr_discarded == len(marked)


def test_overlapping_ranges_count_once() -> None:
    bits = discards()
    bits.set_range(0, 4 * BLOCK)
    bits.set_range(2 * BLOCK, 4 * BLOCK)
    assert bits.nr_discarded == 6


def test_clear_takes_the_whole_dblock_back() -> None:
    bits = DiscardBits(BLOCK, 4 * MANY * BLOCK)
    bits.set_range(0, 12 * BLOCK)
    assert bits.nr_discarded == 3
    bits.clear(6)
    assert [bits.is_discarded(oblock) for oblock in (3, 4, 7, 8)] == [
        True,
        False,
        False,
        True,
    ]
    bits.clear(5)
    bits.clear(100)
    assert bits.nr_discarded == 2


def test_what_is_recorded_is_loaded_again() -> None:
    bits = discards()
    bits.set_range(2 * BLOCK, 3 * BLOCK)
    recorded = bits.as_recorded()
    bits.clear(3)
    assert recorded.bits.count() == 3
    again = discards()
    again.load(recorded)
    assert again.nr_discarded == 3
    assert [oblock for oblock in range(8) if again.is_discarded(oblock)] == [2, 3, 4]
    again.load(None)
    assert again.nr_discarded == 0
    assert not again.is_discarded(3)


def test_dblocks_of_another_size_are_rounded_inward_and_clipped() -> None:
    small = DiscardBits(BLOCK, MANY * BLOCK)
    small.set_range(BLOCK, 6 * BLOCK)
    large = DiscardBits(BLOCK, 2 * MANY * BLOCK)
    large.load(small.as_recorded())
    assert [nr for nr in range(10) if large.is_discarded(nr)] == [2, 3, 4, 5]
    tiny = DiscardBits(BLOCK, 4 * BLOCK)
    tiny.load(Discarded(large.dblock_size, large.bits))
    assert tiny.nr_discarded == 2
    assert tiny.is_discarded(3)
