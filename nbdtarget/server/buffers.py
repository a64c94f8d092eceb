# SPDX-License-Identifier: Apache-2.0
"""`BufferPool`: large buffers for the payloads of READs and WRITEs, which are used again and again.

A fresh buffer costs a page fault for every 4 KiB, as much as copying 4 KiB. There are two kinds:

    take             a bytearray, for a READ: its device fills it at once, and it may be looked through for zeroes
    take_untouched   an anonymous mapping, for a WRITE whose payload has not arrived yet: the kernel provides each page
                     when it is first written to, so the buffer costs nothing until then

Buffers of a size lie on a `_Shelf`, and the last one that came is the first to be taken. So those that were not needed for a while lie at
the bottom. The shelf notes how low it has been, and `drop_spare` drops that many.
"""

import mmap
from collections.abc import Callable
from typing import Final

__all__ = ["HEADER_ROOM", "Buffer", "BufferPool", "untouched"]

HEADER_ROOM: Final = (
    64  # bytes before the data in a pooled buffer: a reply's header fits
)
CLASS_MIN: Final = 64 << 10  # smallest size of a pooled buffer's data

Buffer = bytearray | mmap.mmap


def untouched(size: int) -> mmap.mmap:
    """Return memory of zeroes of which the kernel provides a page when it is first used, and which goes back to it at once."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class _Shelf:
    """Buffers of one kind and size.

    Attributes: low: the least number of them since the last `drop_spare`.
    """

    __slots__ = ("buffers", "low")

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.low = 0


class BufferPool:
    """See the module head.

    Sizes are powers of two, so that a buffer that was given back fits the next request of about that size.

    Attributes:
        nr_kept_bytes: of all buffers that are kept.
        begins_to_keep: is called when the first buffer is kept.
    """

    __slots__ = ("_free", "_kept_max", "_untouched", "begins_to_keep", "nr_kept_bytes")

    def __init__(self, kept_max: int) -> None:
        self._free: dict[int, _Shelf] = {}
        self._untouched: dict[int, _Shelf] = {}
        self.nr_kept_bytes = 0
        self._kept_max = kept_max
        self.begins_to_keep: Callable[[], None] = _nothing

    def take(self, length: int) -> bytearray:
        """Return a buffer of at least HEADER_ROOM + `length` bytes. Its content is undefined."""
        size = self._size_for(length)
        buffer = self._maybe_kept(self._free, size)
        return buffer if isinstance(buffer, bytearray) else bytearray(size)

    def take_untouched(self, length: int) -> mmap.mmap:
        """As `take`, but a page takes memory only when it is first written to."""
        size = self._size_for(length)
        buffer = self._maybe_kept(self._untouched, size)
        return buffer if isinstance(buffer, mmap.mmap) else untouched(size)

    def _maybe_kept(self, shelves: dict[int, _Shelf], size: int) -> Buffer | None:
        shelf = shelves.get(size)
        if shelf is None or not shelf.buffers:
            return None
        buffer = shelf.buffers.pop()
        shelf.low = min(shelf.low, len(shelf.buffers))
        self.nr_kept_bytes -= size
        return buffer

    def give_back(self, buffer: Buffer) -> None:
        size = len(buffer)
        if self.nr_kept_bytes + size > self._kept_max:
            return
        if not self.nr_kept_bytes:
            self.begins_to_keep()
        self.nr_kept_bytes += size
        shelves = self._free if isinstance(buffer, bytearray) else self._untouched
        shelf = shelves.get(size)
        if shelf is None:
            shelf = shelves[size] = _Shelf()
        shelf.buffers.append(buffer)

    def drop_spare(self) -> int:
        """Drop the buffers that nothing has needed since the last call; return how many bytes they have."""
        nr_dropped = 0
        for shelves in (self._free, self._untouched):
            for size, shelf in shelves.items():
                nr_dropped += size * shelf.low
                del shelf.buffers[: shelf.low]
                shelf.low = len(shelf.buffers)
        self.nr_kept_bytes -= nr_dropped
        return nr_dropped

    def _size_for(self, length: int) -> int:
        size = HEADER_ROOM + max(CLASS_MIN, 1 << (length - 1).bit_length())
        # A buffer that is too large to be kept is not rounded up.
        return size if size <= self._kept_max else HEADER_ROOM + length


def _nothing() -> None:
    """Nothing is done about what is kept."""
