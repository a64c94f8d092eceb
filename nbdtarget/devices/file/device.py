# SPDX-License-Identifier: Apache-2.0
"""`FileDevice`: a regular file or a block device.

Theory of operation. Most bios find their bytes in the page cache and end inside `submit`; the
rest goes to the device's own worker threads and never holds up the loop.

    READ          inline by RWF_NOWAIT, which answers from the page cache or not at all. What is
                  missing is read by a worker. On tmpfs, which does not know RWF_NOWAIT and
                  has no disk to wait for, inline by a plain read; elsewhere without
                  RWF_NOWAIT, by workers only.
    WRITE         inline if small and while the device is quick (below); else by a worker
    WRITE + FUA   worker, to the page cache and then with RWF_DSYNC
    FLUSH         worker, fdatasync; one at a time
    DISCARD       worker, fallocate or BLKDISCARD
    WRITE_ZEROES  worker, fallocate; by writing where that is not supported
    CACHE         worker, posix_fadvise

*Quick.* No flag makes a buffered write fail instead of wait (ext4 refuses RWF_NOWAIT there), so
each inline write is timed. One that took long may have met a slow disk, or the kernel throttling
whoever dirties pages; or the scheduler just ran somebody else. So it puts the device on watch:

    quick       inline, timed                      a slow one: watched
    watched     inline, timed, and voluntary       one that was slow and slept: backing off
                context switches counted           WATCHED_WRITES good ones: quick
    backing     by workers, for 1 s, doubling      then watched
     off        to 30 s, until quick again

What is submitted in the background goes to a worker in any case.

A slow disk thus holds the loop up twice, and after that once a back-off. A worker that frees
or zeroes space holds the inode's lock: no write goes inline meanwhile.

*One writer.* A file system holds the inode's lock while a buffered write copies, also where it
throttles. A second thread would only spin for that lock, and for Python's: so writes to a file
have one thread of their own. On a block device, which has no such lock, they share the pool.

*FLUSH* covers the writes that have ended. FLUSHes that come while one runs ride together on the
next one; never on the running one, for the kernel may have passed their pages already.

*Latch.* The kernel reports a lost page once, to whichever sync of this open file asks first,
and then forgets it. So after any failed sync, and after a write that failed for more than want
of space, each later FLUSH and FUA ends with EIO until the device is opened again (which first
drops what the page cache shows and the disk does not have: see `open.py`). A DISCARD
promises nothing: one that fails has lost nothing, and latches nothing. Want of space itself
is harmless only where the file system refuses a write before it takes any of it. NFS does
not: there ENOSPC may be the news of an *earlier* write, told once. So it latches, too,
on every file system that is not known to refuse first. And because
two syncs may overlap and the error of the one be told to the other, **a sync ends with 0 only
after all others that overlapped it have succeeded**: each waits for those in flight when its
own system call returned. One failed: all of them fail.

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
from typing import Final

from nbdtarget.bio import (
    FAST_ZERO,
    FUA,
    NO_UNMAP,
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
from nbdtarget.devices.base import (
    EXTENT_DATA,
    EXTENT_HOLE,
    EXTENT_ZERO,
    Device,
    Extent,
)
from nbdtarget.devices.file.identity import RecognisedFile
from nbdtarget.devices.file.syscalls import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    allocate,
    block_device_limit,
    block_device_sector,
    can_punch_holes,
    discard_blocks,
    fd_size,
    is_memory_file_system,
    refuses_before_it_takes,
    start_writeback,
)
from nbdtarget.devices.workers import WorkerPool

__all__ = ["FileDevice"]

log = logging.getLogger(__name__)

INLINE_READ_MAX: Final = 1 << 20  # bytes; copying more would hold the loop up by itself
INLINE_WRITE_MAX: Final = 256 << 10
# Large writes go to the page cache in such pieces. ext4 (6.16 and later) makes folios as large as the
# write that fills them, and each later small write to a folio pays for its size: 4 KiB rewrites of a
# file that was written in 1 MiB pieces took 4.6 us and more, of one in 64 KiB pieces 3.8, in 4 KiB
# pieces 2.0; filling it is not slower at 64 KiB. A clone is first hydrated, then written at random.
WRITE_PIECE: Final = 64 << 10
WRITE_SLOW_NS: Final = 2_000_000
WATCHED_WRITES: Final = 256
BACKOFF_NS_MIN: Final = 1_000_000_000
BACKOFF_NS_MAX: Final = 30_000_000_000
EXTENTS_MAX: Final = 1024  # one call finds at most so many; each costs a system call
ZEROES: Final = bytes(1 << 20)  # what zeroes are written from, piece by piece

# Failures of a write that do not latch: it was refused before anything was lost, because the file
# system does not know the call, or for want of space: then the page cache took nothing, if
# the file system is one of those that look for space first.
_NOTHING_LOST: Final = frozenset({errnos.EOPNOTSUPP})
_NO_SPACE: Final = frozenset({errnos.ENOSPC, errnos.EDQUOT, errnos.EFBIG})

_preadv = os.preadv
_pwrite = os.pwrite
_now_ns = monotonic_ns
_getrusage = getrusage


class _Sync:
    """One system call under way that makes something durable; see *Latch* above."""

    __slots__ = ("bios", "held", "is_refused", "left")

    def __init__(self, bios: list[Bio]) -> None:
        self.bios = bios
        self.is_refused = (
            False  # by the page cache, or it is a DISCARD: nothing is lost
        )
        self.left = 0  # overlapping syncs that must succeed before this one ends
        self.held: list[_Sync] = []  # those that wait for this one


class FileDevice(RecognisedFile):
    """An open regular file or block device. Made in `open.py`.

    Attributes:
        open_beside: opens it once more, with the lock of this one.
    """

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
        self._writers = pool  # of writes without FUA
        self._alignment = 1  # of fallocate and discards, in bytes
        self._can_zero_range = False
        self._is_block_device = False
        self._read_flags = os.RWF_NOWAIT
        self._read_inline_max = INLINE_READ_MAX
        self._is_latched = False  # what `health` says, for `submit`: set in `_latch`
        self._nothing_lost = _NOTHING_LOST
        self._syncs: set[_Sync] = set()
        self._flush_runs = False
        self._flush_waiting: list[Bio] = []
        self._is_quick = True  # and no space job runs: what `submit` looks at
        self._watch_left = 0
        self._backoff_end_ns = 0
        self._backoff_ns = BACKOFF_NS_MIN
        self._nr_space_jobs = 0
        self._writeback: asyncio.Task[None] | None = None
        self._probe()

    # hot: 4 KiB: read 1.7 us, write 2.0 us, half of it the kernel (scripts/bench_devices.py)
    def submit(self, bio: Bio) -> None:
        op = bio.op
        if op == OP_READ:
            length = bio.length
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
                    self._read_later(bio, got)
                return
        elif (
            op == OP_WRITE
            and self._is_quick
            and not bio.flags
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
                self._write_failed(bio, error.errno or errnos.EIO)
                return
            if _now_ns() - start_ns > WRITE_SLOW_NS:
                self._watch()
            if put == bio.length:
                bio.end(0)
            else:
                self._write_later(bio, put)
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
        if self._writeback is None:
            self._writeback = asyncio.get_running_loop().create_task(self._write_back())

    async def _write_back(self) -> None:
        status = await self._pool.run(partial(self._call, start_writeback))
        self._writeback = None
        if status not in (0, errnos.EINVAL, errnos.ENOSYS, errnos.ESPIPE):
            self.health.note_error("writeback", status)
            self._latch("writeback", status)

    def _call(self, call: Callable[[int], None]) -> int:
        call(self._fd)
        return 0

    async def measure(self) -> int:
        return await self._pool.number(partial(fd_size, self._fd))

    async def close(self) -> None:
        if self._writeback is not None:
            await self._writeback
        await self._writers.close()
        await self._pool.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    async def reopened(self, name: str, *, read_only: bool) -> Device | None:
        if self.read_only and not read_only:
            return None  # our lock is not enough
        return await self.open_beside(self, name, read_only)

    def share_lock(self) -> int:
        """Return a descriptor that keeps our lock for as long as it is open."""
        return os.dup(self._fd if self._lock_fd < 0 else self._lock_fd)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        if self._is_block_device or length == 0:
            return [Extent(length, EXTENT_DATA)]
        found: list[Extent] = []
        status = await self._pool.run(
            partial(self._find_extents, offset, length, found)
        )
        if status:
            raise DeviceError(status, self.name, "extents", offset, length)
        return found

    def _submit_slow(self, bio: Bio) -> None:
        """What does not go inline. Latched devices still read and write."""
        status = self.check_bounds(bio)
        op = bio.op
        durable = op == OP_FLUSH or (op != OP_READ and bool(bio.flags & FUA))
        if not status and durable and self._is_latched:
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
            self._flush_waiting.append(bio)
            self._start_flush()
        elif op == OP_DISCARD:
            self._space_job(bio, partial(self._discard, bio.offset, bio.length))
        elif op == OP_WRITE_ZEROES:
            job = partial(self._zero, bio.offset, bio.length, bio.flags)
            self._space_job(bio, job)
        else:
            assert op == OP_CACHE
            job = partial(self._advise, bio.offset, bio.length)
            self._pool.submit(job, partial(self._read_done, bio))

    # -- reads ----------------------------------------------------------------------------

    def _inline_read_failed(self, error: OSError) -> None:
        # EAGAIN: not in the page cache. Anything but "not supported" is left to the worker's
        # read to meet again.
        if error.errno in (errnos.EOPNOTSUPP, errnos.ENOSYS):
            self._read_inline_max = -1
            log.info("%s: no RWF_NOWAIT: reads go to workers", self.name)

    def _read_later(self, bio: Bio, got: int) -> None:
        here = bio.payload
        bio.own()
        payload = bio.payload
        assert payload is not None
        assert here is not None
        if got and payload is not here:
            payload[:got] = here[:got]
        job = partial(self._read_rest, payload, bio.offset, got)
        self._pool.submit(job, partial(self._read_done, bio))

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

    # -- writes ---------------------------------------------------------------------------

    def _write_slow(self, bio: Bio) -> None:
        """A write that `submit` did not take: by a worker, or inline and watched."""
        if (
            self._watch_left
            and not self._nr_space_jobs
            and not bio.flags
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
            self._write_failed(bio, error.errno or errnos.EIO)
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
            bio.end(0)
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
        self._is_quick = not self._watch_left and not self._nr_space_jobs

    def _write_later(self, bio: Bio, put: int) -> None:
        bio.own()
        payload = bio.payload
        assert payload is not None
        if bio.flags & FUA:
            # Twice: a failure of the second alone leaves open whether the page cache or the
            # disk had no room. Next to the disk, the first costs nothing (2 us for 4 KiB). Between
            # the two, a later write to the same bytes could be undone: who submits bios that
            # overlap in flight leaves their order open (`base.py`), and the server does not.
            write = partial(self._write_rest, payload, bio.offset, put)
            self._start_sync(
                _Sync([bio]), partial(write, 0), partial(write, os.RWF_DSYNC)
            )
            return
        job = partial(self._write_rest, payload, bio.offset, put, 0)
        self._writers.submit(job, partial(self._write_done, bio))

    def _write_rest(
        self, payload: memoryview, offset: int, put: int, flags: int
    ) -> int:
        # What is durable by itself goes in one piece: each would wait for the disk.
        piece = len(payload) if flags else WRITE_PIECE
        while put < len(payload):
            part = payload[put : put + piece]
            more = os.pwritev(self._fd, (part,), offset + put, flags)
            if more == 0:
                return errnos.EIO
            put += more
        return 0

    def _write_done(self, bio: Bio, status: int) -> None:
        if status:
            self._write_failed(bio, status)
        else:
            bio.end(0)

    def _write_failed(self, bio: Bio, status: int) -> None:
        self.health.note_error(OP_NAMES[bio.op], status)
        if bio.op != OP_DISCARD and status not in self._nothing_lost:
            self._latch(OP_NAMES[bio.op], status)
        bio.end(status)

    # -- durability -----------------------------------------------------------------------

    def _latch(self, what: str, status: int) -> None:
        self._is_latched = True
        if self.health.latch(status):
            log.error(
                "%s: %s failed: %s: no flush will succeed until it is opened again",
                self.name,
                what,
                os.strerror(status),
            )

    def _start_flush(self) -> None:
        if self._flush_runs or not self._flush_waiting:
            return
        bios, self._flush_waiting = self._flush_waiting, []
        if self._is_latched:
            for bio in bios:
                bio.end(errnos.EIO)
            return
        self._flush_runs = True
        sync = _Sync(bios)
        self._syncs.add(sync)
        self._pool.submit(self._fdatasync, partial(self._flush_done, sync))

    def _fdatasync(self) -> int:
        os.fdatasync(self._fd)
        return 0

    def _flush_done(self, sync: _Sync, status: int) -> None:
        self._flush_runs = False
        self._sync_done(sync, status)
        self._start_flush()

    def _start_sync(
        self, sync: _Sync, write: Callable[[], int], make_durable: Callable[[], int]
    ) -> None:
        self._syncs.add(sync)
        job = partial(self._write_and_sync, sync, write, make_durable)
        self._pool.submit(job, partial(self._sync_done, sync))

    def _write_and_sync(
        self, sync: _Sync, write: Callable[[], int], make_durable: Callable[[], int]
    ) -> int:
        try:
            status = write()
        except OSError as error:
            is_discard = sync.bios[0].op == OP_DISCARD
            sync.is_refused = is_discard or error.errno in self._nothing_lost
            raise
        return status or make_durable()

    def _sync_done(self, sync: _Sync, status: int) -> None:
        self._syncs.remove(sync)
        if status:
            what = OP_NAMES[sync.bios[0].op]
            self.health.note_error(what, status)
            if status != errnos.EOPNOTSUPP and not sync.is_refused:
                self._latch(what, status)
        # Before anybody is told: an endio may submit more, which did not overlap this one.
        ready = []
        for held in sync.held:
            held.left -= 1
            if held.left == 0:
                ready.append(held)
        if not status:
            sync.left = len(self._syncs)
            for other in self._syncs:
                other.held.append(sync)
            if sync.left == 0:
                ready.append(sync)
        else:
            for bio in sync.bios:
                bio.end(status)
        for held in ready:
            for bio in held.bios:
                bio.end(errnos.EIO if self._is_latched else 0)

    # -- space ----------------------------------------------------------------------------

    def _space_job(self, bio: Bio, job: Callable[[], int]) -> None:
        """Run a job that holds the inode's lock; with FUA, sync in the same breath."""
        self._nr_space_jobs += 1
        self._set_quick()

        sync = _Sync([bio]) if bio.flags & FUA else None

        def done(status: int) -> None:
            self._nr_space_jobs -= 1
            self._set_quick()
            if sync is not None:
                self._sync_done(sync, status)
            else:
                self._write_done(bio, status)

        if sync is not None:
            self._syncs.add(sync)
            job = partial(self._write_and_sync, sync, job, self._fdatasync)
        self._pool.submit(job, done)

    def _zeroes_fast(self, bio: Bio) -> bool:
        if bio.flags & NO_UNMAP and not self._can_zero_range:
            return False
        if (bio.offset | bio.length) % self._alignment:
            return False
        return self.can_fast_zero

    def _discard(self, offset: int, length: int) -> int:
        begin, end = self._aligned(offset, length)
        if not self.can_discard or begin >= end:
            return 0
        try:
            if self._is_block_device:
                discard_blocks(self._fd, begin, end - begin)
            else:
                mode = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
                allocate(self._fd, mode, begin, end - begin)
        except OSError as error:
            if error.errno != errnos.EOPNOTSUPP:
                raise
            self.can_discard = False  # only advice: the bio ends well all the same
        return 0

    def _zero(self, offset: int, length: int, flags: int) -> int:
        begin, end = self._aligned(offset, length)
        if not self.can_write_zeroes or begin >= end:
            return self._zero_by_writing(offset, length)
        try:
            self._zero_aligned(begin, end - begin, flags)
        except OSError as error:
            if error.errno != errnos.EOPNOTSUPP or flags & FAST_ZERO:
                raise
            return self._zero_by_writing(offset, length)
        return self._zero_by_writing(offset, begin - offset) or self._zero_by_writing(
            end, offset + length - end
        )

    def _zero_aligned(self, offset: int, length: int, flags: int) -> None:
        if flags & NO_UNMAP and self._can_zero_range:
            mode = FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE
            try:
                allocate(self._fd, mode, offset, length)
                return
            except OSError as error:
                if error.errno != errnos.EOPNOTSUPP:
                    raise
                self._can_zero_range = False
                if flags & FAST_ZERO or self._is_block_device:
                    raise
        allocate(self._fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length)
        if flags & NO_UNMAP:
            allocate(self._fd, FALLOC_KEEP_SIZE, offset, length)

    def _zero_by_writing(self, offset: int, length: int) -> int:
        zeroes = memoryview(ZEROES)
        end = offset + length
        while offset < end:
            piece = zeroes[: min(len(zeroes), end - offset)]
            status = self._write_rest(piece, offset, 0, 0)
            if status:
                return status
            offset += len(piece)
        return 0

    def _aligned(self, offset: int, length: int) -> tuple[int, int]:
        """The begin and end of what lies in whole units inside the range."""
        unit = self._alignment
        return -(-offset // unit) * unit, (offset + length) // unit * unit

    def _advise(self, offset: int, length: int) -> int:
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)
        return 0

    def _find_extents(self, offset: int, length: int, found: list[Extent]) -> int:
        """Fill `found`. lseek moves the file's position, which nothing here uses."""
        at, end = offset, offset + length
        while at < end and len(found) < EXTENTS_MAX:
            try:
                data = min(os.lseek(self._fd, at, os.SEEK_DATA), end)
            except OSError as error:
                if error.errno == errnos.ENXIO:  # no data up to the end of the file
                    data = end
                elif error.errno == errnos.EINVAL and not found:
                    break  # a file system that cannot tell
                else:
                    raise
            if data > at:
                found.append(Extent(data - at, EXTENT_HOLE | EXTENT_ZERO))
            at = data
            if at < end:
                hole = min(os.lseek(self._fd, at, os.SEEK_HOLE), end)
                if hole <= at:
                    break  # punched between the two calls: call the rest data
                found.append(Extent(hole - at, EXTENT_DATA))
                at = hole
        if at < end and len(found) < EXTENTS_MAX:
            found.append(Extent(end - at, EXTENT_DATA))
        return 0

    # -- set-up ---------------------------------------------------------------------------

    def _probe(self) -> None:
        """Find out what this file can do, without changing it. Context: a worker."""
        status = os.fstat(self._fd)
        self._is_block_device = stat.S_ISBLK(status.st_mode)
        if self._is_block_device or refuses_before_it_takes(self._fd):
            self._nothing_lost = _NOTHING_LOST | _NO_SPACE
        if self._is_block_device:
            self.logical_block_size = block_device_sector(self._fd)
            self._alignment = self.logical_block_size
            limit = partial(block_device_limit, status.st_rdev)
            self.can_discard = limit("discard_max_bytes") > 0
            self.can_write_zeroes = limit("write_zeroes_max_bytes") > 0
            self._can_zero_range = self.can_write_zeroes
        else:
            self._writers = WorkerPool(f"{self.name}-writer", threads_max=1)
            self._pools = (self._pool, self._writers)
            if is_memory_file_system(self._fd):
                self._read_flags = 0
            if not self.read_only:
                self.can_discard = can_punch_holes(self._fd, self.size)
                self.can_write_zeroes = self.can_discard
                # Not probed, for past the end it would allocate: true until it fails once.
                self._can_zero_range = self.can_write_zeroes
        self.can_fast_zero = self.can_write_zeroes
