# SPDX-License-Identifier: Apache-2.0
"""Where the source reads as zeroes: one window of its extents, asked for in large pieces.

A window is at most `window_bytes_max` long (or one region), holds at most `EXTENTS_MAX` extents, and is asked
for in shorter lengths where the source is in small pieces. Zeroes shorter than `HOLE_BYTES_MIN` count as data: to
copy them is cheaper than to split the copy.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import EXTENT_ZERO, Device, Extent

__all__ = ["HOLE_BYTES_MIN", "WINDOW_BYTES_MAX", "Holes", "Piece"]

WINDOW_BYTES_MAX: Final = 1 << 30
WINDOW_BYTES_MIN: Final = 1 << 24
EXTENTS_MAX: Final = 1024
HOLE_BYTES_MIN: Final = 64 << 10

Piece = tuple[int, int, bool]  # begin, end in bytes; zero


class Holes:
    """The source's zeroes around where hydration is at work."""

    def __init__(
        self,
        source: Device,
        *,
        length: int,
        region_size: int,
        window_bytes_max: int = WINDOW_BYTES_MAX,
    ) -> None:
        self.source = source
        self.length = length
        self.region_size = region_size
        self.window_bytes_max = window_bytes_max
        self._window_bytes = window_bytes_max
        self._begin = self._end = 0
        self._pieces: list[Piece] = []

    def covers(self, offset: int) -> bool:
        """Whether the window says what `offset` is."""
        return self._begin <= offset < self._end

    async def look(self, offset: int) -> None:
        """Have the window cover `offset` and what follows."""
        if self.covers(offset):
            return
        length = max(self._window_bytes, self.region_size)
        length = min(length, self.length - offset)
        try:
            extents = await self.source.extents(offset, length)
        except DeviceError:
            # Only advice: what cannot be described is copied, and says itself what is wrong.
            self._pieces = [(offset, offset + length, False)]
        else:
            self._pieces = _pieces(offset, extents[:EXTENTS_MAX])
            length = self._pieces[-1][1] - offset  # the source may tell less
            if len(extents) > EXTENTS_MAX:
                self._window_bytes = max(WINDOW_BYTES_MIN, self._window_bytes // 4)
            else:
                self._window_bytes = min(self.window_bytes_max, self._window_bytes * 4)
        self._begin, self._end = offset, offset + length

    def pieces(self, begin: int, end: int) -> list[Piece]:
        """Cut a range into data and zeroes; beyond the window it is data."""
        cut: list[Piece] = []
        covered = begin
        for at in range(self._index(begin), len(self._pieces)):
            piece_begin, piece_end, zero = self._pieces[at]
            if piece_begin >= end or piece_begin > covered:
                break
            covered = min(piece_end, end)
            cut.append((max(piece_begin, begin), covered, zero))
        if covered < end:
            cut.append((covered, end, False))
        return _joined(cut)

    def zero_until(self, offset: int) -> int:
        """Return the end of the zeroes that `offset` lies in; `offset` if it is data."""
        at = self._index(offset)
        if at < len(self._pieces):
            begin, end, zero = self._pieces[at]
            if begin <= offset and zero:
                return end
        return offset

    def _index(self, offset: int) -> int:
        """Return the number of the first piece that ends behind `offset`."""
        return bisect_right(self._pieces, offset, key=_end_of)


def _end_of(piece: Piece) -> int:
    return piece[1]


def _pieces(offset: int, extents: Sequence[Extent]) -> list[Piece]:
    pieces = []
    for length, flags in extents:
        pieces.append((offset, offset + length, bool(flags & EXTENT_ZERO)))
        offset += length
    joined = _joined(pieces)
    return _joined([(b, e, z and e - b >= HOLE_BYTES_MIN) for b, e, z in joined])


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for begin, end, zero in pieces:
        if joined and joined[-1][2] == zero:
            joined[-1] = (joined[-1][0], end, zero)
        else:
            joined.append((begin, end, zero))
    return joined
