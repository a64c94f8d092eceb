# SPDX-License-Identifier: Apache-2.0
"""`BufferPool`: large buffers for the payloads of READs and WRITEs, which are used again and again.

A fresh buffer costs a page fault for every 4 KiB, as much as copying 4 KiB. There are two kinds:

    take             a bytearray, for a READ: its device fills it at once, and it may be looked through for zeroes
    take_untouched   an anonymous mapping, for a WRITE whose payload has not arrived yet: the kernel provides each page
                     when it is first written to, so the buffer costs nothing until then
"""

import mmap
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


class BufferPool:
    """See the module head.

    Sizes are powers of two, so that a buffer that was given back fits the next request of about that size.
    """

    __slots__ = ("_free", "_kept", "_kept_max", "_untouched")

    def __init__(self, kept_max: int) -> None:
        self._free: dict[int, list[bytearray]] = {}
        self._untouched: dict[int, list[mmap.mmap]] = {}
        self._kept = 0
        self._kept_max = kept_max

    def take(self, length: int) -> bytearray:
        """Return a buffer of at least HEADER_ROOM + `length` bytes. Its content is undefined."""
        size = self._size_for(length)
        free = self._free.get(size)
        if free:
            self._kept -= size
            return free.pop()
        return bytearray(size)

    def take_untouched(self, length: int) -> mmap.mmap:
        """As `take`, but a page takes memory only when it is first written to."""
        size = self._size_for(length)
        free = self._untouched.get(size)
        if free:
            self._kept -= size
            return free.pop()
        return untouched(size)

    def give_back(self, buffer: Buffer) -> None:
        size = len(buffer)
        if self._kept + size > self._kept_max:
            return
        self._kept += size
        if isinstance(buffer, bytearray):
            self._free.setdefault(size, []).append(buffer)
        else:
            self._untouched.setdefault(size, []).append(buffer)

    def _size_for(self, length: int) -> int:
        size = HEADER_ROOM + max(CLASS_MIN, 1 << (length - 1).bit_length())
        # A buffer that is too large to be kept is not rounded up.
        return size if size <= self._kept_max else HEADER_ROOM + length
