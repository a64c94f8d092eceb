# SPDX-License-Identifier: Apache-2.0
"""`FileDevice`: a regular file or a block device.

Theory of operation. Most bios find their bytes in the page cache and end inside `submit`; the
rest goes to the device's own worker threads and never holds up the loop. Reads that wait for the disk go
through io_uring instead, where it is allowed: `ring.py`.

    READ          inline by RWF_NOWAIT, which answers from the page cache or not at all. What is
                  missing is read through io_uring or by a worker. On tmpfs, which does not know RWF_NOWAIT and
                  has no disk to wait for, inline by a plain read; elsewhere without
                  RWF_NOWAIT, by workers only.
    WRITE         inline if small and while the device is quick (below); else by a worker
    WRITE + FUA   as a WRITE, which ends with the next FLUSH
    FLUSH         a thread of its own, fdatasync; one at a time (`sync.py`)
    DISCARD       worker, fallocate or BLKDISCARD
    WRITE_ZEROES  worker, fallocate; by writing where that is not supported
    CACHE         worker, posix_fadvise

*Quick.* No flag makes a buffered write fail instead of wait (ext4 refuses RWF_NOWAIT there), so
each inline write is timed. A slow one may have met a slow disk, or the kernel may have throttled it
because too many pages are dirty; or the scheduler just ran another process. So it puts the device on watch:

    state         writes go                            it ends
    quick         inline, timed                        with a slow write: watched
    watched       inline, timed, with voluntary        with a write that was slow and slept: backing off;
                  context switches counted             after WATCHED_WRITES others: quick
    backing off   to workers, for 1 s, then twice as   after that time: watched
                  long, up to 30 s, until quick again

A bio that was submitted in the background always goes to a worker.

So a slow disk holds the loop up twice, and then once for each time of backing off. A worker that
frees or zeroes space holds the lock of the inode, so no write goes inline meanwhile.

*One writer.* A file system holds the inode's lock while a buffered write copies, also where it
throttles. A second thread would only wait for that lock, and hold Python's lock while it tries. So writes to a
file have one thread of their own. On a block device, which has no such lock, they share the pool.

*Fast path.* The compiled fast path of the server reads and writes this file by itself, as `submit` does inline
(`maybe_fast_file`). It tells of a write that was slow, or that was not taken whole, and of its reads that wait for the disk:
they count here, and `close` waits for them. What it maps of this file: `windows.py`.

What a FLUSH and FUA cover, and what becomes of the device when one fails: `sync.py`. How DISCARD and WRITE_ZEROES are
carried out: `space.py`.

What a crash leaves: any part of each write that no later FLUSH covered, torn at sector borders.
"""

import asyncio
import errno as errnos
import logging
import os
import stat
from collections.abc import Awaitable, Callable
from functools import partial
from resource import RUSAGE_THREAD, getrusage
from typing import ClassVar, Final

from nbdtarget.bio import (
    FAST_ZERO,
    FUA,
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_NAMES,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.common.clock import monotonic_ns
from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import EXTENT_DATA, Device, Extent
from nbdtarget.devices.bulk_streams import BulkStream
from nbdtarget.devices.file.again import maybe_refusal
from nbdtarget.devices.file.bulk import STREAMS, Behind, FileStream, FileWriter
from nbdtarget.devices.file.closing import close_descriptors
from nbdtarget.devices.file.extents import find_extents
from nbdtarget.devices.file.pieces import WRITE_PIECE, write_rest
from nbdtarget.devices.file.ring import find_out, maybe_reader
from nbdtarget.devices.file.space import Space
from nbdtarget.devices.file.sync import Syncs
from nbdtarget.devices.file.syscalls import (
    block_device_limit,
    block_device_sector,
    can_punch_holes,
    fd_size,
    is_memory_file_system,
    maps_at_once,
    refuses_before_it_takes,
    start_writeback,
)
from nbdtarget.devices.file.windows import give_back, windows_of_loop
from nbdtarget.devices.identity import identify_fd, mark_fd, sync_attributes_fd
from nbdtarget.devices.workers import THREADS_MAX, WorkerPool
from nbdtarget.fast.compiled import IS_COMPILED, FastFile
from nbdtarget_metadata.disks import Evidence, Mark

__all__ = ["FileDevice"]

log = logging.getLogger(__name__)

INLINE_READ_MAX: Final = 1 << 20  # bytes; copying more would hold the loop up by itself
INLINE_WRITE_MAX: Final = 256 << 10
WRITE_SLOW_NS: Final = 2_000_000
WATCHED_WRITES: Final = 256
BACKOFF_NS_MIN: Final = 1_000_000_000
BACKOFF_NS_MAX: Final = 30_000_000_000

_preadv = os.preadv
_pwrite = os.pwrite
_now_ns = monotonic_ns
_getrusage = getrusage


class FileDevice(Device):
    """An open regular file or block device. Made in `open.py`.

    Attributes:
        path: by which it was opened.
        open_beside: opens it once more, with the lock of this one.
        open_flags: for open(2), besides the usual ones.
        threads_max: of its pool of workers.
    """

    may_be_container = True
    open_flags: ClassVar[int] = 0
    threads_max: ClassVar[int] = THREADS_MAX
    path: str
    open_beside: Callable[["FileDevice", str, bool], Awaitable["FileDevice"]]

    def __init__(
        self,
        name: str,
        fd: int,
        size: int,
        pool: WorkerPool,
        *,
        read_only: bool,
        lock_fd: int = -1,
    ) -> None:
        """Args: lock_fd: has the lock, if `fd` has not; -1. Both belong to the device now."""
        super().__init__(name, size, read_only=read_only)
        self._fd = fd
        self._lock_fd = lock_fd
        self._pool = pool
        self._pools = (pool,)
        self._writers = pool
        self._is_block_device = False
        self._read_flags = os.RWF_NOWAIT
        self._read_inline_max = INLINE_READ_MAX
        self._syncs = Syncs(name, fd, pool, self.health)
        self._nr_ring_reads = 0  # see `ring.py`
        self._nr_lent = 0  # streams, see `lend_streams`
        self._streams_ended: asyncio.Future[None] | None = None  # `close` waits for it
        self._ring_reads_ended: asyncio.Future[None] | None = (
            None  # `close` waits for it
        )
        # For the compiled fast path: see `maybe_fast_file`.
        self._fast: FastFile | None = None
        self._can_map = False
        self._may_map = True
        self._unfinished: tuple[int, int, int, int] | None = None
        self._nr_before_unfinished = 0
        self._is_quick = True  # and no space job runs: what `submit` looks at
        self._watch_left = 0
        self._backoff_end_ns = 0
        self._backoff_ns = BACKOFF_NS_MIN
        self._nr_space_jobs = 0
        self._writeback: asyncio.Future[int] | None = None
        self._behind: Behind | None = Behind(name, fd, self._syncs)
        self._space = self._probe()

    # hot: 4 KiB: read 1.7 us, write 2.0 us, half of it the kernel (scripts/bench_devices.py)
    def submit(self, bio: Bio) -> None:
        op = bio.op
        if op == OP_READ:
            length = bio.length
            # `_read_inline_max` is -1 where RWF_NOWAIT does not work: then no READ is inline.
            if length <= self._read_inline_max and bio.offset + length <= self.size:
                payload = bio.payload
                assert payload is not None
                try:
                    got = _preadv(self._fd, (payload,), bio.offset, self._read_flags)
                except OSError as error:
                    self._inline_read_failed(error)
                    got = 0
                if got == length:
                    bio.end(0)
                else:
                    # The page cache had only the first `got` bytes: a worker reads the others.
                    self._read_later(bio, got)
                return
        elif (
            op == OP_WRITE
            and self._is_quick
            and (not bio.flags or not self._syncs.is_latched)
            and bio.length <= INLINE_WRITE_MAX
            and bio.offset + bio.length <= self.size
            and not self.read_only
        ):
            payload = bio.payload
            assert payload is not None
            start_ns = _now_ns()
            try:
                if bio.length <= WRITE_PIECE:
                    put = _pwrite(self._fd, payload, bio.offset)
                else:
                    put = self._put_pieces(payload, bio.offset)
            except OSError as error:
                self._syncs.write_failed(bio, error.errno or errnos.EIO)
                return
            # See *Quick* in the module head: one slow write is a suspicion, and not yet a verdict.
            if _now_ns() - start_ns > WRITE_SLOW_NS:
                self._watch()
            if put < bio.length:
                self._write_later(bio, put)
            elif bio.flags:
                self._written(bio)
            else:
                bio.end(0)
            return
        self._submit_slow(bio)

    def submit_background(self, bio: Bio) -> None:
        if bio.flags or self.check_bounds(bio):
            self.submit(bio)
        elif bio.op == OP_READ:
            self._read_later(bio, 0)
        elif bio.op == OP_WRITE:
            self._write_later(bio, 0)
        else:
            self.submit(bio)

    def start_writeback(self) -> None:
        if self._writeback is None or self._writeback.done():
            job = partial(self._call, start_writeback)
            self._writeback = self._syncs.run_beside("writeback", job)

    def _call(self, call: Callable[[int], None]) -> int:
        call(self._fd)
        return 0

    def submit_behind(self, bio: Bio) -> None:
        if self._behind is None or bio.flags or self.check_bounds(bio):
            self.submit(bio)
        else:
            # In one piece: the large folios that this makes are dropped soon.
            self._write_later(bio, 0, piece=bio.length)

    async def write_behind(self, ranges: list[tuple[int, int]]) -> None:
        if self._behind is not None:
            await self._behind.write(ranges)

    def lend_streams(self) -> list[BulkStream]:
        # A copy by bios looks for the zeroes that a block device cannot tell of.
        if not (self.read_only and IS_COMPILED) or self.hides_zeroes:
            return []
        self._nr_lent += STREAMS
        failed = partial(self.health.note_error, OP_NAMES[OP_READ])
        return [
            FileStream(self._fd, failed, self._stream_came_back) for _ in range(STREAMS)
        ]

    def _stream_came_back(self) -> None:
        self._nr_lent -= 1
        ended = self._streams_ended
        if ended is not None and not self._nr_lent and not ended.done():
            ended.set_result(None)

    def maybe_bulk_writer(self) -> FileWriter | None:
        if self.read_only or not self._syncs.refuses_before_it_takes:
            # A worker's write counts as a sync where it may be told an error of another one: see `sync.py`.
            return None
        return FileWriter(self._fd, self._syncs)

    def maybe_fast_file(self) -> FastFile | None:
        if self._fast is None and IS_COMPILED:
            self._fast = FastFile(
                self._fd,
                WRITE_SLOW_NS,
                self._watch,
                self._note_unfinished,
                self._note_ring_reads,
                self._syncs.left_over,
                self._syncs.writeback_failed,
                partial(self.health.note_error, OP_NAMES[OP_READ]),
            )
            self._syncs.lend_to(self._fast)
            self._lend_windows(self._fast)
        if self._fast is not None:
            self._fast.size = self.size
            self._fast.read_max = max(self._read_inline_max, 0)
            self._fast.read_flags = self._read_flags
            reader = maybe_reader()
            if reader is not None:
                self._fast.ring = reader.ring
                self._fast.ring_max = INLINE_READ_MAX
            self._set_quick()
        return self._fast

    def _lend_windows(self, fast: FastFile) -> None:
        if not (self._can_map and self._may_map):
            return
        windows = windows_of_loop()
        if windows.takes(self._fd, self.size):
            fast.windows = windows

    def _note_unfinished(
        self, offset: int, length: int, put: int, error: int, nr_before: int
    ) -> None:
        """The compiled fast path has begun a WRITE, which `submit` gets after `nr_before` others: see `_write_slow`."""
        self._unfinished = offset, length, put, error
        self._nr_before_unfinished = nr_before
        self._is_quick = False

    def set_size(self, size: int) -> None:
        super().set_size(size)
        if self._fast is not None:
            self._fast.size = size

    async def measure(self) -> int:
        return await self._pool.number(partial(fd_size, self._fd))

    async def close(self) -> None:
        fast, self._fast = self._fast, None
        if fast is not None:
            await give_back(fast)
        if self._writeback is not None:
            await asyncio.wait((self._writeback,))
        if self._nr_ring_reads:
            self._ring_reads_ended = asyncio.get_running_loop().create_future()
            await self._ring_reads_ended
        if self._nr_lent:
            self._streams_ended = asyncio.get_running_loop().create_future()
            await self._streams_ended
        await self._syncs.close()
        await self._writers.close()
        if self._behind is not None:
            await self._behind.close()
        await self._pool.close()
        fds = [fd for fd in (self._fd, self._lock_fd) if fd >= 0]
        self._fd = self._lock_fd = -1
        if fds:
            await close_descriptors(self.name, fds)

    async def check_again(self) -> None:
        look = partial(maybe_refusal, self.name, self.path, self._fd)
        refusal = await self._pool.ask(partial(look, read_only=self.read_only), None)
        if refusal is not None:
            raise refusal

    async def reopened(self, name: str, *, read_only: bool) -> Device | None:
        if self.read_only and not read_only:
            return None  # our lock is not enough
        self._may_map = False
        try:
            if self._fast is not None:
                await give_back(self._fast)
            return await self.open_beside(self, name, read_only)
        except BaseException:
            self.reopening_undone()  # also when the caller was cancelled
            raise

    def reopening_undone(self) -> None:
        self._may_map = True
        if self._fast is not None:
            self._lend_windows(self._fast)

    def begin_sync_beside(self) -> Callable[[int], None]:
        """The file is going to be synced through another descriptor. Returns what is called with the status."""
        return partial(self._syncs.done, self._syncs.begin_writeback())

    def share_lock(self) -> int:
        """Return a descriptor that keeps our lock for as long as it is open."""
        return os.dup(self._fd if self._lock_fd < 0 else self._lock_fd)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        if self._is_block_device or length == 0:
            return [Extent(length, EXTENT_DATA)]
        found: list[Extent] = []
        status = await self._pool.run(
            partial(find_extents, self._fd, offset, length, found)
        )
        if status:
            raise DeviceError(status, self.name, "extents", offset, length)
        return found

    def _submit_slow(self, bio: Bio) -> None:
        """Carry out a bio that cannot be carried out inline. Latched devices still read and write."""
        status = self.check_bounds(bio)
        op = bio.op
        # A latched device promises nothing any more, but clients may still read, and save what they can.
        durable = op == OP_FLUSH or (op != OP_READ and bool(bio.flags & FUA))
        if not status and durable and self._syncs.is_latched:
            status = errnos.EIO
        if not status and bio.flags & FAST_ZERO and not self._zeroes_fast(bio):
            status = errnos.ENOTSUP
        if status:
            bio.end(status)
        elif op == OP_READ:
            self._read_later(bio, 0)
        elif op == OP_WRITE:
            self._write_slow(bio)
        elif op == OP_FLUSH:
            self._syncs.flush(bio)
        elif op == OP_DISCARD:
            self._space_job(bio, partial(self._discard, bio.offset, bio.length))
        elif op == OP_WRITE_ZEROES:
            self._space_job(bio, partial(self._zero, bio.offset, bio.length, bio.flags))
        else:
            assert op == OP_CACHE
            job = partial(self._advise, bio.offset, bio.length)
            self._pool.submit(job, partial(self._read_done, bio))

    # ---- reads ----

    def _inline_read_failed(self, error: OSError) -> None:
        # EAGAIN means that the data is not in the page cache. The worker's read will meet any other error
        # again, and report it; only "not supported" has to be remembered here.
        if error.errno in (errnos.EOPNOTSUPP, errnos.ENOSYS):
            self._read_inline_max = -1
            if self._fast is not None:
                self._fast.read_max = 0
            log.info("%s: no RWF_NOWAIT: reads go to workers", self.name)

    def _read_later(self, bio: Bio, got: int) -> None:
        here = bio.payload
        bio.own()
        payload = bio.payload
        assert payload is not None
        assert here is not None
        if got and payload is not here:
            payload[:got] = here[:got]
        reader = maybe_reader()
        if reader is not None:
            done = partial(self._ring_read_done, bio, payload, got)
            if reader.read(self._fd, payload[got:], bio.offset + got, done):
                self._note_ring_reads(1)
                return
        job = partial(self._read_rest, payload, bio.offset, got)
        self._pool.submit(job, partial(self._read_done, bio))

    def _ring_read_done(
        self, bio: Bio, payload: memoryview, got: int, result: int
    ) -> None:
        self._note_ring_reads(-1)
        if result == len(payload) - got:
            bio.end(0)
            return
        # It came short, or failed: a worker meets the reason again, and tells it.
        job = partial(self._read_rest, payload, bio.offset, got + max(result, 0))
        self._pool.submit(job, partial(self._read_done, bio))

    def _note_ring_reads(self, more: int) -> None:
        """So many reads more are in the ring; fewer, if it is negative."""
        self._nr_ring_reads += more
        ended = self._ring_reads_ended
        if ended is not None and not self._nr_ring_reads and not ended.done():
            ended.set_result(None)

    @property
    def nr_in_flight(self) -> int:
        return super().nr_in_flight + self._nr_ring_reads + self._syncs.nr_running

    def _read_done(self, bio: Bio, status: int) -> None:
        if status:
            self.health.note_error(OP_NAMES[bio.op], status)
        bio.end(status)

    def _read_rest(self, payload: memoryview, offset: int, got: int) -> int:
        while got < len(payload):
            more = os.preadv(self._fd, (payload[got:],), offset + got)
            if more == 0:
                return errnos.EIO  # the file has been truncated under us
            got += more
        return 0

    # ---- writes ----

    def _write_slow(self, bio: Bio) -> None:
        """A write that `submit` did not take: by a worker, or inline and watched."""
        if self._unfinished is not None and self._nr_before_unfinished:
            self._nr_before_unfinished -= 1  # an earlier piece of the same request
        elif self._unfinished is not None:
            unfinished, self._unfinished = self._unfinished, None
            self._set_quick()
            offset, length, put, status = unfinished
            if (offset, length) == (bio.offset, bio.length):
                # It is not simply tried again: the kernel may have told its error just once.
                if status:
                    self._syncs.write_failed(bio, status)
                else:
                    self._write_later(bio, put)
                return
            if status:
                # The client that asked for that WRITE does not ask again; its error must not be forgotten.
                self._syncs.note_write_error("write", status)
        if (
            self._watch_left
            and not self._nr_space_jobs
            and bio.length <= INLINE_WRITE_MAX
            and _now_ns() >= self._backoff_end_ns
        ):
            self._write_watched(bio)
        else:
            self._write_later(bio, 0)

    def _write_watched(self, bio: Bio) -> None:
        payload = bio.payload
        assert payload is not None
        slept = _getrusage(RUSAGE_THREAD).ru_nvcsw
        start_ns = _now_ns()
        try:
            put = self._put_pieces(payload, bio.offset)
        except OSError as error:
            self._syncs.write_failed(bio, error.errno or errnos.EIO)
            return
        took_ns = _now_ns() - start_ns
        if took_ns > WRITE_SLOW_NS and _getrusage(RUSAGE_THREAD).ru_nvcsw > slept:
            self._back_off(took_ns)
        else:
            self._watch_left -= 1
            if self._watch_left == 0:
                self._backoff_ns = BACKOFF_NS_MIN
                self._set_quick()
        if put == bio.length:
            self._written(bio)
        else:
            self._write_later(bio, put)

    def _put_pieces(self, payload: memoryview, offset: int) -> int:
        """Write in pieces of WRITE_PIECE, up to the first that is not taken whole."""
        put = 0
        for at in range(0, len(payload), WRITE_PIECE):
            piece = payload[at : at + WRITE_PIECE]
            taken = _pwrite(self._fd, piece, offset + at)
            put += taken
            if taken < len(piece):
                break
        return put

    def _watch(self) -> None:
        self._watch_left = WATCHED_WRITES
        self._set_quick()

    def _back_off(self, took_ns: int) -> None:
        log.debug(
            "%s: a write took %d us: by workers for %.0f s",
            self.name,
            took_ns // 1000,
            self._backoff_ns / 1e9,
        )
        self._backoff_end_ns = _now_ns() + self._backoff_ns
        self._backoff_ns = min(2 * self._backoff_ns, BACKOFF_NS_MAX)
        self._watch_left = WATCHED_WRITES

    def _set_quick(self) -> None:
        self._is_quick = (
            not self._watch_left
            and not self._nr_space_jobs
            and self._unfinished is None
        )
        if self._fast is not None:
            may_write = self._is_quick and not self.read_only
            self._fast.write_max = INLINE_WRITE_MAX if may_write else 0

    def _write_later(self, bio: Bio, put: int, *, piece: int = WRITE_PIECE) -> None:
        bio.own()
        payload = bio.payload
        assert payload is not None
        job = partial(write_rest, self._fd, payload, bio.offset, put, piece=piece)
        done = self._syncs.count_write(partial(self._write_done, bio))
        self._writers.submit(job, done)

    def _write_done(self, bio: Bio, status: int) -> None:
        if status:
            self._syncs.write_failed(bio, status)
        else:
            self._written(bio)

    def _written(self, bio: Bio) -> None:
        """The page cache has taken all of a write."""
        if bio.flags & FUA:
            bio.own()  # it ends later
            self._syncs.flush(bio)
        else:
            bio.end(0)

    # ---- space ----

    def _space_job(self, bio: Bio, job: Callable[[], int]) -> None:
        """Run a job that holds the inode's lock."""
        self._nr_space_jobs += 1
        self._set_quick()

        def done(status: int) -> None:
            self._nr_space_jobs -= 1
            self._set_quick()
            self._write_done(bio, status)

        self._pool.submit(job, self._syncs.count_write(done))

    def _zeroes_fast(self, bio: Bio) -> bool:
        is_fast = self._space.zeroes_fast(bio.offset, bio.length, bio.flags)
        return is_fast and self.can_fast_zero

    def _discard(self, offset: int, length: int) -> int:
        if not self.can_discard:
            return 0
        try:
            self._space.discard(offset, length)
        except OSError as error:
            if error.errno != errnos.EOPNOTSUPP:
                raise
            self.can_discard = False  # only advice: the bio ends well all the same
        return 0

    def _zero(self, offset: int, length: int, flags: int) -> int:
        by_writing = not self.can_write_zeroes
        return self._space.zero(offset, length, flags, by_writing=by_writing)

    def _advise(self, offset: int, length: int) -> int:
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)
        return 0

    # ---- what it is ----

    async def identify(self, role: str) -> Evidence:
        name = self.bare_name
        look = partial(identify_fd, name, self._fd, self.size, role)
        return await self._pool.ask(look, Evidence("", name, self.size))

    async def mark(self, role: str, mark: Mark) -> bool:
        write = partial(mark_fd, self._fd, role, mark)
        return not self.read_only and await self._sync_beside(write)

    async def sync_attributes(self) -> bool:
        return await self._sync_beside(partial(sync_attributes_fd, self._fd))

    async def _sync_beside(self, sync: Callable[[], bool]) -> bool:
        """Run a job that syncs through a descriptor of its own, and return what it returns; False if the sync fails."""
        if self.read_only:
            return await self._pool.ask(sync, False)  # nothing of ours can be lost
        answers: list[bool] = []

        def run() -> int:
            answers.append(sync())
            return 0

        await self._syncs.run_beside("fsync", run)
        return answers == [True]

    # ---- set-up ----

    def _probe(self) -> Space:
        """Find out what this file can do, without changing it. Context: a worker."""
        find_out()
        status = os.fstat(self._fd)
        self._is_block_device = stat.S_ISBLK(status.st_mode)
        self._syncs.refuses_before_it_takes = (
            self._is_block_device or refuses_before_it_takes(self._fd)
        )
        self._can_map = self._is_block_device or maps_at_once(self._fd)
        unit = 1
        if self._is_block_device:
            self.hides_zeroes = True
            self.logical_block_size = unit = block_device_sector(self._fd)
            limit = partial(block_device_limit, status.st_rdev)
            self.can_discard = limit("discard_max_bytes") > 0
            self.can_write_zeroes = limit("write_zeroes_max_bytes") > 0
        else:
            self._writers = WorkerPool(f"{self.name}-writer", threads_max=1)
            self._pools = (self._pool, self._writers)
            if is_memory_file_system(self._fd):
                self._read_flags = 0
                self._behind = None  # its page cache is the disk
            if not self.read_only:
                self.can_discard = can_punch_holes(self._fd, self.size)
                self.can_write_zeroes = self.can_discard
        self.can_fast_zero = self.can_write_zeroes
        return Space(
            self._fd,
            unit=unit,
            is_block_device=self._is_block_device,
            # Not probed, for past the end it would allocate: true until it fails once.
            can_zero_range=self.can_write_zeroes,
        )
