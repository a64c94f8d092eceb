# SPDX-License-Identifier: Apache-2.0
"""`HEAP`: pages of the C library's heap that hold nothing go back to the system, and clients wait no longer than for a short step.

glibc gives back the end of its heap by itself. Free pages in the middle stay resident, because a small piece that is still used lies
behind it: 1,000 clients that had replies of 64 KiB waiting left 30 MiB, and 100 MiB where a READ goes to the disk.

There are two ways, and `SpareMemory` decides when each is used:

    steps   Of the heap that the event loop uses, in short steps. malloc hands out pieces that are free before it makes the
            heap longer. So free pieces are taken from it, the largest first. The whole pages inside of them go back to the kernel. All pieces
            are held until the end, so that none comes twice, and are then freed.
    trim    Of all heaps, also those of other threads, by malloc_trim in a thread. It holds the lock of a heap all the while, and a thread that
            allocates waits for it.

Measured with 100 MiB free between used pieces, and steps that took pieces of up to 512 KiB: 64 KiB each, malloc_trim held the lock for 10 ms, and the
longest of 96 steps took 0.35 ms; 16 KiB each, 14 ms and 0.26 ms of 392 steps. With 400 MiB in such pieces malloc_trim took 72 ms. Both leave as much
resident. `mallinfo2`, which each run begins with, takes 0.02 to 0.3 ms, and 4 ms with 25,000 free pieces.

Mappings instead of a heap for pieces of 64 KiB would leave no such holes, but a fresh one costs 37 us more for each READ, in page faults.
"""

import ctypes
import logging
import threading
from collections.abc import Iterator
from mmap import MADV_DONTNEED, PAGESIZE
from typing import ClassVar, Final

__all__ = ["HEAP", "LEFT_ALONE", "Heap", "ProcessHeap"]

log = logging.getLogger(__name__)

FREE_MIN: Final = 4 << 20  # bytes; less is left where it is
STEP_PIECES: Final = 16  # taken in one step: 2 MiB at most
STEP_FREES: Final = 256  # pieces that are freed in one step
HEADER: Final = 16  # bytes of a piece that are malloc's own, at most

_malloc_trim: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)


_MALLINFO_FIELDS: Final = (
    "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
)


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2`; see mallinfo(3)."""

    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in _MALLINFO_FIELDS.split()]
    fordblks: int  # free bytes


class Heap:
    """That of a process which is not ours: it is left alone."""

    def steps(self) -> Iterator[None]:
        """Give free pages of the heap of this thread back, some at each step. The iterator may be closed before its end."""
        return iter(())

    def trim(self) -> None:
        """Begin to give back all of them."""


class ProcessHeap(Heap):
    """See the module head. Other C libraries than glibc do without; glibc before 2.33 has no steps."""

    def __init__(self) -> None:
        # Calls that do not release the interpreter's lock: each is shorter than the wait for it would be.
        library = ctypes.PyDLL(None)
        self._maybe_mallinfo = getattr(library, "mallinfo2", None)
        if self._maybe_mallinfo is not None:
            self._maybe_mallinfo.restype = _Mallinfo
            self._malloc, self._free = library.malloc, library.free
            self._malloc.restype = ctypes.c_void_p
            self._malloc.argtypes = (ctypes.c_size_t,)
            self._free.argtypes = (ctypes.c_void_p,)
            self._free.restype = None
            self._madvise = library.madvise
            self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
            self._sbrk = library.sbrk
            self._sbrk.argtypes = (ctypes.c_ssize_t,)
            self._sbrk.restype = ctypes.c_void_p

    def steps(self) -> Iterator[None]:
        if self._maybe_mallinfo is None:
            return
        if self._maybe_mallinfo().fordblks < FREE_MIN:
            return
        held: list[int] = []
        try:
            yield from self._take(held, self._sbrk(0))
            while held:
                yield
                for _ in range(min(STEP_FREES, len(held))):
                    self._free(held.pop())
        finally:
            for piece in held:
                self._free(piece)

    def _take(self, held: list[int], end: int) -> Iterator[None]:
        """Take all large free pieces of the heap, which ends at the address `end`, and give their pages back."""
        for size in _sizes():
            while piece := self._malloc(size - HEADER):
                if piece + size > end:
                    # No free piece is so large: malloc made the heap longer, or a mapping.
                    self._free(piece)
                    break
                held.append(piece)
                begin = -(-piece // PAGESIZE) * PAGESIZE
                pages = (piece + size - HEADER - begin) // PAGESIZE
                if pages > 0:
                    self._madvise(begin, pages * PAGESIZE, MADV_DONTNEED)
                if len(held) % STEP_PIECES == 0:
                    yield

    def trim(self) -> None:
        """As `Heap`, in a thread. A process that gets no more threads does without."""
        if _malloc_trim is not None:
            name = "nbdtarget-trim"
            thread = threading.Thread(
                target=_malloc_trim, args=(0,), name=name, daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                log.debug("the heap is not trimmed: %s", error)


def _sizes() -> Iterator[int]:
    """Of the pieces that are taken, bytes, the largest first: 32 pages, 24, 16, 12 … 2."""
    pages = 32
    while pages > 2:
        yield pages * PAGESIZE
        yield pages * 3 // 4 * PAGESIZE
        pages //= 2
    yield pages * PAGESIZE


LEFT_ALONE: Final = Heap()
HEAP: Final = ProcessHeap()
