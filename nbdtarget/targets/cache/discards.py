# SPDX-License-Identifier: Apache-2.0
"""Which parts of the origin are discarded, so that migrations of them copy nothing.

One bit for each discard block (dblock): one block or more, doubled until there are at most 2^15
or so. A bit is set by a DISCARD of the whole dblock, and cleared by a write to, or a promotion
from, any part of it. An origin's last dblock, if it is cut short, is never set: the origin may
grow, and what it grows by was never discarded.

Nothing here is durable before a full sync records it, and after a crash there is nothing.
"""

from typing import Final

from bitarray.util import zeros

from nbdtarget_metadata.cache.discards import convert_discards, discard_block_size_for
from nbdtarget_metadata.cache.load import Discarded

__all__ = ["DiscardBits"]


class DiscardBits:
    """The discard bits of one cache. `block_size`, `origin_size`: bytes.

    Attributes:
        dblock_size: bytes; a power of two times `block_size`.
        bits: one for each dblock. Others only read it.
        nr_discarded: how many of them are set.
    """

    def __init__(self, block_size: int, origin_size: int) -> None:
        self.dblock_size: Final = discard_block_size_for(block_size, origin_size)
        self.nr_dblocks: Final = -(-origin_size // self.dblock_size)
        self.bits = zeros(self.nr_dblocks, "little")
        self.nr_discarded = 0
        self._origin_size = origin_size
        self._shift: Final = (self.dblock_size // block_size).bit_length() - 1

    def is_discarded(self, oblock: int) -> bool:
        """Tell whether what `oblock` has on the origin, or in the cache, is not needed any more."""
        # hot: one call for each miss; almost always nothing is discarded.
        return bool(self.nr_discarded and self.bits[oblock >> self._shift])

    def clear(self, oblock: int) -> None:
        """Some of `oblock` is about to be written, or has been cached: its dblock counts again."""
        # hot: one call for each write.
        if self.nr_discarded and self.bits[oblock >> self._shift]:
            self.bits[oblock >> self._shift] = 0
            self.nr_discarded -= 1

    def set_range(self, offset: int, length: int) -> None:
        """A DISCARD of these bytes was asked for: mark the dblocks that lie wholly in it."""
        assert offset >= 0
        assert offset + length <= self._origin_size
        begin = -(-offset // self.dblock_size)
        end = (offset + length) // self.dblock_size
        if begin < end:
            self.nr_discarded += end - begin - self.bits.count(1, begin, end)
            self.bits[begin:end] = 1

    def load(self, recorded: Discarded | None) -> None:
        """Start with what a clean shutdown recorded, maybe in dblocks of another size."""
        if recorded is None:
            self.bits.setall(0)
        else:
            self.bits = convert_discards(
                recorded, block_size=self.dblock_size, nr_dblocks=self.nr_dblocks
            )
        self.nr_discarded = self.bits.count()

    def as_recorded(self) -> Discarded:
        """Return the copy that a clean shutdown records. Later changes here do not change it."""
        return Discarded(self.dblock_size, self.bits.copy())
