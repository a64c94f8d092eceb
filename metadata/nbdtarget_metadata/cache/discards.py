# SPDX-License-Identifier: Apache-2.0
"""Discard blocks: how large they are, and recorded ones as others of another size."""

from typing import Final

from bitarray import bitarray
from bitarray.util import intervals, zeros

from nbdtarget_metadata.cache.load import Discarded

__all__ = ["convert_discards", "discard_block_size_for"]

# The kernel's: they are doubled while the origin has more of them than this.
NR_DBLOCKS_DOUBLED: Final = 1 << 14


def discard_block_size_for(block_size: int, origin_size: int) -> int:
    """Return the bytes of a discard block, as the kernel chooses it."""
    size = block_size
    while origin_size // size > NR_DBLOCKS_DOUBLED:
        size *= 2
    return size


def convert_discards(
    recorded: Discarded, *, block_size: int, nr_dblocks: int
) -> bitarray:
    """Return which of `nr_dblocks` discard blocks of `block_size` bytes are discarded in full.

    What is discarded in part only, is not; what lies behind the end, does not count.
    """
    bits = zeros(nr_dblocks, "little")
    for value, first, last in intervals(recorded.bits):
        if value:
            begin = -(-first * recorded.block_size // block_size)
            end = min(last * recorded.block_size // block_size, nr_dblocks)
            if begin < end:
                bits[begin:end] = 1
    return bits
