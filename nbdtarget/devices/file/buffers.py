# SPDX-License-Identifier: Apache-2.0
"""`AlignedBuffers`: memory that direct I/O takes, page-aligned, for use again and again."""

import mmap
from typing import Final

__all__ = ["ALIGNED_BUFFERS", "KEPT_MAX", "AlignedBuffers"]

KEPT_MAX: Final = 16 << 20  # bytes that wait for their next use; more is given back


class _Shelf:
    """Buffers of one size. The last one that came is the first to be taken, so those that nothing needs lie at the bottom.

    Attributes: low: the least number of them since the last `take_spare`.
    """

    __slots__ = ("buffers", "low")

    def __init__(self) -> None:
        self.buffers: list[memoryview] = []
        self.low = 0


class AlignedBuffers:
    """Buffers of 2^n bytes, a page at least. Any thread may take and give.

    What is in use is bounded by the requests in flight, and what is not by KEPT_MAX.

    Attributes: nr_kept_bytes: of all that are not in use.
    """

    def __init__(self) -> None:
        self._shelves: dict[int, _Shelf] = {}
        self.nr_kept_bytes = 0

    def take(self, length: int) -> memoryview:
        """Return a buffer of at least `length` bytes with any content."""
        size = max(mmap.PAGESIZE, 1 << (length - 1).bit_length())
        try:
            shelf = self._shelves[size]
            buffer = shelf.buffers.pop()
        except (KeyError, IndexError):
            return memoryview(mmap.mmap(-1, size))
        shelf.low = min(shelf.low, len(shelf.buffers))
        self.nr_kept_bytes -= size
        return buffer

    def give(self, buffer: memoryview) -> None:
        """It is used no more."""
        # Two threads may pass here at once and keep a buffer each: so much more than the bound is harmless.
        if self.nr_kept_bytes + len(buffer) <= KEPT_MAX:
            self.nr_kept_bytes += len(buffer)
            self._shelves.setdefault(len(buffer), _Shelf()).buffers.append(buffer)

    def take_spare(self) -> list[memoryview]:
        """Return the buffers that nothing has needed since the last call. They are kept no longer, and their memory goes back with the list."""
        spare: list[memoryview] = []
        for size, shelf in list(self._shelves.items()):
            for _ in range(shelf.low):
                try:
                    spare.append(shelf.buffers.pop(0))
                except IndexError:
                    break  # a thread has taken some meanwhile
                self.nr_kept_bytes -= size
            shelf.low = len(shelf.buffers)
        return spare


ALIGNED_BUFFERS: Final = AlignedBuffers()
