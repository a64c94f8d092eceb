# SPDX-License-Identifier: Apache-2.0
"""Windows: the parts of files that are mapped, so that long READs are copied once and not twice.

Theory of operation. `nbdtarget/fast/nbdtarget_map.pyx` tells what they are for and what keeps them safe. All files of an event loop share
them. A file may have some if it lies in the page cache (not `direct:`), if the kernel tells this process which of its pages are in memory, and if
its file system is one of those whose mmap asks no server and no other process (`maps_at_once`; block devices, too).

*Why only there.* Everything here runs on the event loop, with `takes`. Of the calls:

    mmap       calls the file system. NFS and SMB ask their server whether the file has changed, and NFS may write dirty pages back first; FUSE may wait for
               writes, and a cluster file system for a lock. On a dead mount none of this ends. A thread would not help: the memory of the whole process is
               locked meanwhile, so the loop would wait in its next page fault. On the file systems that are taken, mmap does what an inline read does, too:
               it may change the access time
    mincore    looks into the page cache, and does not wait
    madvise    (MADV_DONTFORK) changes a flag of the mapping
    munmap     changes page tables, and lets go of a file that is open elsewhere
    sendmsg    copies pages that `mincore` has just found. If one is evicted in between, the loop waits for the local disk, see `nbdtarget_map.pyx`

`fstatfs` and `fstat`, which ask the server, too, are called when the device is made, in a worker.

They are given back

    in time          by a sweep every SWEEP_S seconds, if they were not used since the sweep before it: the pages of a file that is mapped count in the
                     resident memory of this process, and stay in the page cache when something drops them
    at the end       before the file is closed (`give_back`): a mapping keeps the open file alive, with its locks
    for a new one    before the same file is opened anew, which begins with dropping its pages (`page_cache.py`). It may have some again when
                     the opening has failed, or when the new device is closed before it (`reopening_undone`)

A few at a time, because giving one back takes up to a tenth of a millisecond.
"""

import asyncio
import os
import threading
from typing import Final

from nbdtarget.common.clock import LoopClock, sleep
from nbdtarget.fast.compiled import FastFile, Windows

__all__ = ["WINDOWS_MAX", "FileWindows", "give_back", "windows_of_loop"]

# Bytes of the windows of one event loop (the server has one); and an eighth of the memory.
WINDOWS_MAX: Final = 1 << 30
SWEEP_S: Final = 5.0
SWEEP_STEP: Final = 8  # windows that are given back in one turn of the loop
SWEEP_STEP_S: Final = 0.05


def bytes_max() -> int:
    """Return how many bytes of files may be mapped for one event loop."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(WINDOWS_MAX, memory // 8)


class FileWindows:
    """The windows of the files of one event loop, and their sweeps."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.windows = Windows(bytes_max(), self._watch)
        self._clock = LoopClock()
        self._is_watched = False

    def _watch(self) -> None:
        if not self._is_watched:
            self._is_watched = True
            self._clock.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        self._is_watched = False
        if self.windows.sweep(SWEEP_STEP):
            self._is_watched = True
            self._clock.call_later(SWEEP_STEP_S, self._sweep)
        elif self.windows.nr_mapped:
            self._watch()


_of_thread: Final = threading.local()  # `it`: of the loop that runs in this thread


def windows_of_loop() -> Windows:
    """Return the windows of the running loop. The compiled modules are there."""
    loop = asyncio.get_running_loop()
    found: FileWindows | None = getattr(_of_thread, "it", None)
    if found is None or found.loop is not loop:
        found = _of_thread.it = FileWindows(loop)
    return found.windows


async def give_back(fast: FastFile) -> None:
    """Give all windows of a file back; it gets no new ones."""
    windows, fast.windows = fast.windows, None
    while windows is not None and windows.drop(fast.owner, SWEEP_STEP):
        await sleep(0)
