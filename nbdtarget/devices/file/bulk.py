# SPDX-License-Identifier: Apache-2.0
"""Files in bulk copies: `FileStream` reads and `FileWriter` writes for threads, `Behind` keeps what was written out of the page cache.

*Streams.* A file that is only read may be read by compiled threads: they need no lock of the interpreter, and give way to those who serve clients. Python's
threads are no help there: then it is read by bios. So is a block device, because a copy by bios looks for zeroes. The device counts the streams that it has lent, and is not closed before they are back.

*Writer.* Any number of threads may write; a lock lets one of them at a time do so (compiled threads have one of their own). The file system holds
the inode's lock for each buffered write in any case, and threads that wait there spin.

*Page cache.* A background copy writes as many gigabytes as the disk has, and no client has asked for them. Left alone, they
would push out of the page cache what clients, and all other programs, have there. All of it would be dirty, too, until the
kernel slows down everybody who writes, and until the next flush, which then takes seconds. And memory that was not
in use before costs more to fill than memory that has just been given back. So what has been copied is written
back early, a window at a time, while the copy goes on; when later windows are on their way, this one is waited for,
and dropped. What clients read of it later comes from the disk, as with the kernel's clone, which keeps no cache.

A disk that ends a window within `QUICK_S` gets up to `BEGUN_MAX` of them at a time: it would be idle now and then with two, because the
ends of writes come late on a busy machine. A slow disk has two, so that what a client wants of it does not wait behind many.

*Durability.* The thread that waits for pages may be told their error, as any sync is; the kernel then does not tell
the next fdatasync. So this wait counts as a sync among the others (`sync.py`): a FLUSH that overlaps it waits for it,
and its error latches the device.
"""

import asyncio
import errno as errnos
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from nbdtarget.common.clock import loop_time_s
from nbdtarget.devices.background_threads import NICE_STEP
from nbdtarget.devices.bulk_streams import Chunk
from nbdtarget.devices.file.sync import Sync, Syncs
from nbdtarget.devices.file.syscalls import wait_for_writeback, write_back_range
from nbdtarget.devices.workers import WorkerPool
from nbdtarget.fast.compiled import IS_COMPILED, CopyStream, Syncer

__all__ = ["STREAMS", "Behind", "FileStream", "FileWriter"]

BEGUN_MAX: Final = 5  # windows that are being written back at once
QUICK_S: Final = 0.05
STREAMS: Final = 4  # of a file that is read: so many reads wait for the disk at once

log = logging.getLogger(__name__)

_NOT_SUPPORTED: Final = frozenset({errnos.EINVAL, errnos.ENOSYS, errnos.ESPIPE})


class FileStream:
    """A `BulkStream` of one open file. Made by `FileDevice.lend_streams`.

    Args:
        failed: is told the errno of a read that has failed.
        came_back: the thread has ended.
    """

    is_broken = False
    is_near = True

    def __init__(
        self, fd: int, failed: Callable[[int], None], came_back: Callable[[], None]
    ) -> None:
        self._fd = fd
        self._failed = failed
        self._came_back = came_back
        self._asked: deque[Chunk] = deque()

    def can_read(self, offset: int, length: int) -> bool:
        return True

    def start(self, chunks: list[Chunk]) -> None:
        self._asked.extend(chunks)

    def wait(self) -> list[Chunk]:
        chunk = self._asked.popleft()
        got = 0
        try:
            while got < chunk.length:
                more = os.preadv(self._fd, (chunk.buffer[got:],), chunk.offset + got)
                if not more:
                    chunk.status = errnos.EIO  # the file has been truncated
                    break
                got += more
        except OSError as error:
            chunk.status = error.errno or errnos.EIO
        return [chunk]

    def maybe_compiled(self) -> CopyStream | None:
        return CopyStream.of_file(self._fd) if IS_COMPILED else None

    def lost_reason(self, sentence: str, error: int) -> str:
        raise AssertionError("a file is never lost")

    def read_failed(self, status: int) -> int:
        self._failed(status)
        return status

    def give_back(self, reason: str) -> None:
        self._came_back()


class FileWriter:
    """A `BulkWriter` for one open file."""

    def __init__(self, fd: int, syncs: Syncs) -> None:
        self._fd = fd
        self._syncs = syncs
        self._lock = threading.Lock()

    def write(self, data: memoryview, offset: int) -> int:
        # In one piece, unlike what clients write (`pieces.py`): the large folios that this makes are dropped soon.
        put = 0
        with self._lock:
            while put < len(data):
                more = os.pwrite(self._fd, data[put:], offset + put)
                if more == 0:
                    return errnos.EIO
                put += more
        return 0

    def maybe_fd(self) -> int | None:
        return self._fd

    def write_failed(self, status: int) -> None:
        self._syncs.note_write_error("WRITE", status)


class Behind:
    """Writes back, and drops, what was written some time ago. See the module head. Context: the loop."""

    def __init__(self, name: str, fd: int, syncs: Syncs) -> None:
        self._name = name
        self._fd = fd
        self._syncs = syncs
        # One thread: what waits for the disk must not take those that reads need. It is a compiled one, which never has
        # Python's lock; where there is none, a worker.
        self._thread: Syncer | None = None
        self._has_no_thread = not IS_COMPILED
        self._ended: asyncio.Future[int] | None = None  # of what the thread does
        self._pool = WorkerPool(f"{name}-behind", threads_max=1)
        self._begun: deque[list[tuple[int, int]]] = deque()
        self._nr_left = 1  # windows that need not have been written when `write` ends
        self._is_supported = True

    async def write(self, ranges: list[tuple[int, int]]) -> None:
        """Begin to write `ranges` back; end with those of an earlier call. Without ranges, end with all."""
        if ranges:
            self._begun.append(ranges)
        before: list[tuple[int, int]] = []
        while len(self._begun) > (self._nr_left if ranges else 0):
            before += self._begun.popleft()
        if not self._is_supported or not (before or ranges):
            return
        begun_s = loop_time_s()
        await self._until_idle()
        sync = self._syncs.begin_writeback()
        ended = self._maybe_begin(ranges, before)
        if ended is None:
            ended = self._pool.start(partial(self._write_and_drop, ranges, before))
        # Also if the caller is cancelled: until then, FLUSHes wait for it.
        ended.add_done_callback(partial(self._has_ended, sync))
        await asyncio.shield(ended)
        if before:
            is_quick = loop_time_s() - begun_s < QUICK_S
            self._nr_left = min(self._nr_left + 1, BEGUN_MAX - 1) if is_quick else 1

    def _has_ended(self, sync: Sync, ended: "asyncio.Future[int]") -> None:
        status = ended.result()
        if status in _NOT_SUPPORTED:
            self._is_supported = False
            status = 0
        self._syncs.done(sync, status)

    async def close(self) -> None:
        """Wait for what is under way, and end the thread."""
        await self._until_idle()
        if self._thread is not None:
            asyncio.get_running_loop().remove_reader(self._thread.event_fd)
            self._thread.close()
            self._thread = None
        await self._pool.close()

    def _maybe_begin(
        self, ranges: list[tuple[int, int]], before: list[tuple[int, int]]
    ) -> "asyncio.Future[int] | None":
        """Have the thread begin, which is idle; return the future of its status. None: there can be no thread."""
        if self._has_no_thread:
            return None
        try:
            if self._thread is None:
                self._thread = Syncer(self._fd, NICE_STEP)
                loop = asyncio.get_running_loop()
                loop.add_reader(self._thread.event_fd, self._reap)
            self._thread.begin_behind(ranges, before)
        except (OSError, MemoryError) as error:
            log.warning("%s: a worker writes back: %s", self._name, error)
            self._has_no_thread = True
            return None
        self._ended = asyncio.get_running_loop().create_future()
        return self._ended

    async def _until_idle(self) -> None:
        while self._ended is not None:
            await asyncio.wait((self._ended,))

    def _reap(self) -> None:
        assert self._thread is not None
        status = self._thread.take()
        if status >= 0:
            ended, self._ended = self._ended, None
            assert ended is not None
            ended.set_result(status)

    def _write_and_drop(
        self, ranges: list[tuple[int, int]], before: list[tuple[int, int]]
    ) -> int:
        for begin, end in ranges:
            write_back_range(self._fd, begin, end)
        for begin, end in before:
            wait_for_writeback(self._fd, begin, end)
            os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_DONTNEED)
        return 0
