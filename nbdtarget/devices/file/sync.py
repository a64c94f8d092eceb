# SPDX-License-Identifier: Apache-2.0
"""`Syncs`: what makes the writes to a file durable, and what becomes of all when that fails.

*FLUSH* covers the writes that have ended. *FUA* is a write and then a FLUSH: the page cache takes the data, once, and the
write ends with the next sync. So an error of the write itself and one of the disk are never confused.

*One at a time.* FLUSHes and writes with FUA that come while a sync runs ride together on the next one; never on
the running one, for the kernel may have passed their pages already. Several at a time are not faster, because each of them
waits for all pages of the file that are on their way.

*Overlaps.* Other threads may write pages back meanwhile (`begin_writeback`, `run_beside`), and the kernel may tell the error of the one to the
other. So **a sync ends with 0 only after all others that overlapped it have succeeded**: it waits for those that are under way
when its own system call returns. If one of them fails, all of them fail.

*Latch.* The kernel reports a lost page once, to whichever sync of this open file asks first, and then forgets it. So
after any failed sync, and after a write that failed for more than want of space, each later FLUSH and FUA ends with
EIO until the device is opened again (which first drops what the page cache shows and the disk does not have: see
`open.py`). A DISCARD promises nothing: one that fails has lost nothing, and latches nothing. Want of space itself is
harmless only where the file system refuses a write before it takes any of it. NFS does not: there ENOSPC may be the
news of an *earlier* write, told once. So it latches, too, on every file system that is not known to refuse first. There
a write by a worker overlaps the syncs as well, until the loop has heard of its end (`count_write`).

*Thread.* A sync of a fast disk takes less time than two Python threads need to hand it over. So it is made by a thread in C
(`nbdtarget/fast/nbdtarget_sync.pyx`), and where that was not built, by a worker.

*Lent.* For a client that is alone and asks for one thing at a time, Python itself takes long, too. So while nothing else runs here, and syncs are quick (`sync_pace.py`), the
compiled path has the thread: `FastFile.syncer`. It uses it only while the loop stands still, so no other sync can begin meanwhile. It gives back what it does not wait for to
the end, and what has failed (`left_over`): that sync counts like any other one, and the request that it was made for waits for one more.
"""

import asyncio
import errno as errnos
import logging
import os
from collections.abc import Callable
from typing import Final

from nbdtarget.bio import OP_DISCARD, OP_NAMES, Bio
from nbdtarget.devices.file.sync_pace import QUICK_NS, SyncPace
from nbdtarget.devices.health import Health
from nbdtarget.devices.workers import WorkerPool
from nbdtarget.fast.compiled import IS_COMPILED, FastFile, Syncer

__all__ = ["Sync", "Syncs"]

log = logging.getLogger(__name__)

# Failures of a write that do not latch: it was refused before anything was lost, because the file
# system does not know the call, or for want of space: then the page cache took nothing, if
# the file system is one of those that look for space first.
_NOTHING_LOST: Final = frozenset({errnos.EOPNOTSUPP})
_NO_WRITEBACK: Final = frozenset(
    {errnos.EINVAL, errnos.ENOSYS, errnos.ESPIPE}
)  # it is not known here
_NO_SPACE: Final = frozenset({errnos.ENOSPC, errnos.EDQUOT, errnos.EFBIG})


class Sync:
    """One system call under way that makes something durable, or may be told an error; see *Overlaps* above.

    Attributes:
        bios: those that end with it; none, if it only waits for pages.
        what: its name in messages.
        left: so many overlapping syncs must succeed before this one ends.
        held: the syncs that wait for this one.
    """

    __slots__ = ("bios", "held", "left", "what")

    def __init__(self, bios: list[Bio], what: str) -> None:
        self.bios = bios
        self.what = what
        self.left = 0
        self.held: list[Sync] = []


class Syncs:
    """The durability of one open file.

    Attributes:
        is_latched: each FLUSH and FUA fails. What `health` says, too.
        refuses_before_it_takes: want of space has lost nothing: see *Latch* above.
    """

    def __init__(self, name: str, fd: int, pool: WorkerPool, health: Health) -> None:
        self._name = name
        self._fd = fd
        self._pool = pool
        self._health = health
        self._running: set[Sync] = set()
        self._flush: Sync | None = None  # the one of them that ends bios
        self._waiting: list[Bio] = []
        self._pace = SyncPace()
        self._syncer: Syncer | None = None
        self._fast: FastFile | None = None
        self._nr_worth = 0  # what `_fast` had synced when it last waited in vain
        self._has_no_thread = False  # it was refused
        self._is_over: asyncio.Future[None] | None = None  # `close` waits for it
        self.is_latched = False
        self.refuses_before_it_takes = False

    def latch(self, what: str, status: int) -> None:
        """From now on each FLUSH and FUA fails: `what` has failed."""
        self.is_latched = True
        self._lend()
        if self._health.latch(status):
            log.error(
                "%s: %s failed: %s: no flush will succeed until it is opened again",
                self._name,
                what,
                os.strerror(status),
            )

    def write_failed(self, bio: Bio, status: int) -> None:
        """A write without FUA has failed; ends it."""
        if bio.op == OP_DISCARD:
            self._health.note_error(OP_NAMES[bio.op], status)
        else:
            self.note_write_error(OP_NAMES[bio.op], status)
        bio.end(status)

    def note_write_error(self, what: str, status: int) -> None:
        """A write has failed, of which there is no bio here."""
        self._health.note_error(what, status)
        if not self._has_lost_nothing(status):
            self.latch(what, status)

    def begin_writeback(self) -> Sync:
        """A thread is going to write pages back, and may be told an error. The caller calls `done`."""
        return self._begin("writeback")

    def run_beside(self, what: str, job: Callable[[], int]) -> "asyncio.Future[int]":
        """Run `job` in a worker; it may be told an error that no later sync is told. Returns the future of its status.

        A sync that overlaps the job waits for it, and fails with it, also if the future is cancelled.
        """
        sync = self._begin(what)
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def done(status: int) -> None:
            self.done(sync, 0 if status in _NO_WRITEBACK else status)
            if not ended.done():
                ended.set_result(status)

        self._pool.submit(job, done)
        return ended

    def count_write(self, done: Callable[[int], None]) -> Callable[[int], None]:
        """A worker is going to write. Returns what is called with its status, instead of `done`; see *Latch* above."""
        if self.refuses_before_it_takes:
            return done
        sync = self._begin("write")

        def ended(status: int) -> None:
            try:
                done(status)  # before the syncs that wait for it end: it may latch
            finally:
                self.done(sync, 0)

        return ended

    def _begin(self, what: str) -> Sync:
        sync = Sync([], what)
        self._running.add(sync)
        self._lend()
        return sync

    def flush(self, bio: Bio) -> None:
        """Take a FLUSH, or a write that the page cache has taken, and end it after a sync.

        Durable: when it ends with 0, all writes that had ended when this was called, and this one.
        """
        self._waiting.append(bio)
        if self._flush is None:
            self._start()

    def lend_to(self, fast: FastFile) -> None:
        """Let the compiled path sync by itself when it may; see *Lent* above."""
        self._fast = fast
        fast.sync_wait_ns = QUICK_NS
        self._lend()

    def _lend(self) -> None:
        """Lend the thread, or take it back: what that depends on may have changed."""
        if self._fast is not None:
            is_free = not (self._running or self.is_latched) and self._pace.is_quick
            self._fast.syncer = self._syncer if is_free else None

    def left_over(self) -> None:
        """The compiled path has begun a sync, and does not wait for its end, or it has failed."""
        assert self._fast is not None
        nr_worth, self._nr_worth = self._nr_worth, self._fast.nr_synced
        self._pace.waited_in_vain(self._nr_worth - nr_worth)
        self._flush = Sync([], "flush")
        self._running.add(self._flush)
        self._pace.begin()
        self._lend()
        self._reap()

    def writeback_failed(self, status: int) -> None:
        """The kernel could not begin to write pages back; perhaps no sync tells that again."""
        if status not in _NO_WRITEBACK:
            self._health.note_error("writeback", status)
            self.latch("writeback", status)

    def _start(self) -> None:
        """Sync for all that wait; no sync runs."""
        bios, self._waiting = self._waiting, []
        if self.is_latched:
            _end([(bio, errnos.EIO) for bio in bios])
        elif bios:
            self._flush = Sync(bios, "flush")
            self._running.add(self._flush)
            self._pace.begin()
            self._lend()
            if not self._has_begun():
                self._pool.submit(self._fdatasync, self._flush_done)

    def _has_begun(self) -> bool:
        """Begin a sync in the thread of its own, if there can be one."""
        if not IS_COMPILED or self._has_no_thread:
            return False
        try:
            if self._syncer is None:
                self._syncer = Syncer(self._fd)
                loop = asyncio.get_running_loop()
                loop.add_reader(self._syncer.event_fd, self._reap)
            self._syncer.begin()
        except (OSError, MemoryError) as error:
            log.warning("%s: workers sync: %s", self._name, error)
            self._has_no_thread = True
            return False
        return True

    def _reap(self) -> None:
        assert self._syncer is not None
        status = self._syncer.take()
        if status >= 0:
            self._flush_done(status)

    def _fdatasync(self) -> int:
        os.fdatasync(self._fd)
        return 0

    def _flush_done(self, status: int) -> None:
        """The sync has returned 0 or an errno."""
        sync, self._flush = self._flush, None
        assert sync is not None
        self._pace.ended()
        ended = self._settle(sync, status)
        # The next one begins before these bios end, so that the disk works while they are answered. It does not
        # cover what their ends submit: that waits for the one after it.
        self._start()
        if self._flush is None and self._is_over is not None:
            self._is_over.set_result(None)
        _end(ended)

    def done(self, sync: Sync, status: int) -> None:
        """The system call of `sync` has returned, which `begin_writeback` has begun."""
        _end(self._settle(sync, status))

    def _settle(self, sync: Sync, status: int) -> list[tuple[Bio, int]]:
        """The system call of `sync` has returned. Returns the bios that end by that, each with its status."""
        self._running.remove(sync)
        self._lend()
        if status:
            self._health.note_error(sync.what, status)
            self.latch(sync.what, status)
        ready = []
        for held in sync.held:
            held.left -= 1
            if held.left == 0:
                ready.append(held)
        ended = []
        if status:
            ended += [(bio, status) for bio in sync.bios]
        else:
            # Those that still run may be told of an error of ours.
            sync.left = len(self._running)
            for other in self._running:
                other.held.append(sync)
            if sync.left == 0:
                ready.append(sync)
        verdict = errnos.EIO if self.is_latched else 0
        return ended + [(bio, verdict) for held in ready for bio in held.bios]

    @property
    def nr_running(self) -> int:
        """How many requests wait for a sync that no worker makes."""
        if self._syncer is None:
            return 0
        return len(self._waiting) + (len(self._flush.bios) if self._flush else 0)

    async def close(self) -> None:
        """Wait for the sync that runs, and end the thread."""
        if self._fast is not None:
            self._fast.syncer = None
            self._fast = None
        if self._syncer is None:
            return
        if self._flush is not None:
            self._is_over = asyncio.get_running_loop().create_future()
            await self._is_over
        asyncio.get_running_loop().remove_reader(self._syncer.event_fd)
        self._syncer.close()
        self._syncer = None

    def _has_lost_nothing(self, status: int | None) -> bool:
        """Whether a write that failed in this way was refused before anything was taken."""
        return status in _NOTHING_LOST or (
            self.refuses_before_it_takes and status in _NO_SPACE
        )


def _end(ended: list[tuple[Bio, int]]) -> None:
    for bio, status in ended:
        bio.end(status)
