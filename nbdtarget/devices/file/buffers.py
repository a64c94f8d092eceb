# SPDX-License-Identifier: Apache-2.0
"""`AlignedBuffers`: memory that direct I/O takes, page-aligned, for use again and again."""

import mmap
from typing import Final

__all__ = ["KEPT_MAX", "AlignedBuffers"]

KEPT_MAX: Final = 16 << 20  # bytes that wait for their next use; more is given back


class AlignedBuffers:
    """Buffers of 2^n bytes, a page at least. Any thread may take and give.

    What is in use is bounded by the requests in flight, and what is not by KEPT_MAX.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[memoryview]] = {}
        self._kept = 0

    def take(self, length: int) -> memoryview:
        """Return a buffer of at least `length` bytes with any content."""
        size = max(mmap.PAGESIZE, 1 << (length - 1).bit_length())
        try:
            buffer = self._free[size].pop()
        except (KeyError, IndexError):
            return memoryview(mmap.mmap(-1, size))
        self._kept -= size
        return buffer

    def give(self, buffer: memoryview) -> None:
        """It is used no more."""
        # Two threads may pass here at once and keep a buffer each: so much more than the bound is harmless.
        if self._kept + len(buffer) <= KEPT_MAX:
            self._kept += len(buffer)
            self._free.setdefault(len(buffer), []).append(buffer)
