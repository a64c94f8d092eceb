# SPDX-License-Identifier: Apache-2.0
"""`Syncs`: what makes the writes to a file durable, and what becomes of all when one of these calls fails.

*FLUSH* covers the writes that have ended. FLUSHes that come while one runs ride together on the next one; never on
the running one, for the kernel may have passed their pages already.

*Latch.* The kernel reports a lost page once, to whichever sync of this open file asks first, and then forgets it. So
after any failed sync, and after a write that failed for more than want of space, each later FLUSH and FUA ends with
EIO until the device is opened again (which first drops what the page cache shows and the disk does not have: see
`open.py`). A DISCARD promises nothing: one that fails has lost nothing, and latches nothing. Want of space itself is
harmless only where the file system refuses a write before it takes any of it. NFS does not: there ENOSPC may be the
news of an *earlier* write, told once. So it latches, too, on every file system that is not known to refuse first.

*Overlaps.* Two syncs may be under way at once, for example a FLUSH and a write with FUA, and the kernel may tell the
error of the one to the other. So **a sync ends with 0 only after all others that overlapped it have succeeded**: it
waits for those that are under way when its own system call returns. If one of them fails, all of them fail.
"""

import errno as errnos
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Final

from nbdtarget.bio import OP_DISCARD, OP_NAMES, Bio
from nbdtarget.devices.health import Health
from nbdtarget.devices.workers import WorkerPool

__all__ = ["Sync", "Syncs"]

log = logging.getLogger(__name__)

# Failures of a write that do not latch: it was refused before anything was lost, because the file
# system does not know the call, or for want of space: then the page cache took nothing, if
# the file system is one of those that look for space first.
_NOTHING_LOST: Final = frozenset({errnos.EOPNOTSUPP})
_NO_SPACE: Final = frozenset({errnos.ENOSPC, errnos.EDQUOT, errnos.EFBIG})


class Sync:
    """One system call under way that makes something durable; see *Overlaps* above.

    Attributes:
        bios: those that end with it: several FLUSHes, or one write; none, if it only waits for pages.
        what: its name in messages.
        is_refused: the write before it was refused by the page cache, or it is a DISCARD: nothing is lost.
        left: so many overlapping syncs must succeed before this one ends.
        held: the syncs that wait for this one.
    """

    __slots__ = ("bios", "held", "is_refused", "left", "what")

    def __init__(self, bios: list[Bio], what: str = "") -> None:
        self.bios = bios
        self.what = what or OP_NAMES[bios[0].op]
        self.is_refused = False
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
        self._flush_runs = False
        self._flush_waiting: list[Bio] = []
        self.is_latched = False
        self.refuses_before_it_takes = False

    def latch(self, what: str, status: int) -> None:
        """From now on each FLUSH and FUA fails: `what` has failed."""
        self.is_latched = True
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
        """A write without FUA has failed, of which there is no bio here."""
        self._health.note_error(what, status)
        if not self._has_lost_nothing(status):
            self.latch(what, status)

    def begin_writeback(self) -> Sync:
        """A thread is going to wait for pages to be written, and may be told an error. The caller calls `done`."""
        sync = Sync([], "writeback")
        self._running.add(sync)
        return sync

    # ---- flushes ----

    def flush(self, bio: Bio) -> None:
        """Take a FLUSH. Durable: when it ends with 0, all writes that had ended when this was called."""
        self._flush_waiting.append(bio)
        self._start_flush()

    def _start_flush(self) -> None:
        if self._flush_runs or not self._flush_waiting:
            return
        bios, self._flush_waiting = self._flush_waiting, []
        if self.is_latched:
            for bio in bios:
                bio.end(errnos.EIO)
            return
        self._flush_runs = True
        sync = Sync(bios)
        self._running.add(sync)
        self._pool.submit(self._fdatasync, partial(self._flush_done, sync))

    def _fdatasync(self) -> int:
        os.fdatasync(self._fd)
        return 0

    def _flush_done(self, sync: Sync, status: int) -> None:
        self._flush_runs = False
        self.done(sync, status)
        self._start_flush()

    # ---- writes with FUA ----

    def start(
        self, bio: Bio, write: Callable[[], int], make_durable: Callable[[], int]
    ) -> None:
        """Have a worker call `write`, then `make_durable`; end `bio`."""
        sync, job = self.begin(bio, write, make_durable)
        self._pool.submit(job, partial(self.done, sync))

    def begin(
        self,
        bio: Bio,
        write: Callable[[], int],
        make_durable: Callable[[], int] | None = None,
    ) -> tuple[Sync, Callable[[], int]]:
        """As `start`, but the caller submits the job and calls `done`.

        Args: make_durable: None: sync the file.
        """
        sync = Sync([bio])
        self._running.add(sync)
        finish = make_durable or self._fdatasync
        return sync, partial(self._write_and_sync, sync, write, finish)

    def _write_and_sync(
        self, sync: Sync, write: Callable[[], int], make_durable: Callable[[], int]
    ) -> int:
        try:
            status = write()
        except OSError as error:
            is_discard = sync.bios[0].op == OP_DISCARD
            sync.is_refused = is_discard or self._has_lost_nothing(error.errno)
            raise
        return status or make_durable()

    def done(self, sync: Sync, status: int) -> None:
        """The system call of `sync` has returned: end its bios, now or after those that overlapped it."""
        self._running.remove(sync)
        if status:
            self._health.note_error(sync.what, status)
            if status != errnos.EOPNOTSUPP and not sync.is_refused:
                self.latch(sync.what, status)
        # Before any bio ends: an endio may submit more, which did not overlap this one.
        ready = []
        for held in sync.held:
            held.left -= 1
            if held.left == 0:
                ready.append(held)
        if not status:
            # Those that still run may be told of an error of ours.
            sync.left = len(self._running)
            for other in self._running:
                other.held.append(sync)
            if sync.left == 0:
                ready.append(sync)
        else:
            for bio in sync.bios:
                bio.end(status)
        for held in ready:
            for bio in held.bios:
                bio.end(errnos.EIO if self.is_latched else 0)

    def _has_lost_nothing(self, status: int | None) -> bool:
        """Whether a write that failed in this way was refused before anything was taken."""
        return status in _NOTHING_LOST or (
            self.refuses_before_it_takes and status in _NO_SPACE
        )
