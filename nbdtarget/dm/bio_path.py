# SPDX-License-Identifier: Apache-2.0
"""`BioPath`: the way of a bio through a mapped device, to the live table or into the queue.

Theory of operation. What `nbdtarget.dm.fast_path` does not take at once comes here: a FLUSH, a DISCARD, zeroing, a
bio to a table of several targets, one to a device that is suspended, read-only, failed or removed, and one that is
counted in `nbdtarget.dm.statistics`. A bio that touches several targets is cut at their borders; its parts are
counted in flight, and not the bio itself, for each part goes its own way.

Queued bios. While a device is suspended, its bios wait in a queue, and own their payloads. The queue has no bound of
its own: what may be in it is what the submitters may have in flight, and every submitter is bounded.

FLUSH goes to every target, `num_flush_bios` times, and ends when all have ended, with the first error. A
WRITE_ZEROES to a target that has no such operation is carried out as writes of zeroes (`ZeroFill`); a DISCARD to a
target that has none ends with 0 at once.

Pushing back. A suspend with `noflush` does not wait for bios that a target only holds back and has not begun below
(`Target.push_back`): each goes to the front of the queue as it came, and is mapped anew by whatever table is
resumed. Meanwhile it is not in flight, as if it had been queued at once. A part of a bio that was cut is queued by
itself; its siblings go on. Of a WRITE_ZEROES that is being written out, no part is queued: when the parts under way
have ended, it is queued whole, and zeroed from its beginning again. A bio that waits in a **lower** mapped device is
not held back here but begun below: the suspend waits for it, as in the kernel. A FLUSH is never pushed back, because
it asks about writes that this table has answered.

Failure. An exception out of `map` is a bug of ours. It is logged with its traceback, the table is marked failed, and
from then on every bio ends with EIO; other mapped devices live on.
"""

import asyncio
import errno as errnos
import logging
import os
from collections.abc import Callable
from enum import Enum
from typing import Final

from nbdtarget.bio import (
    FAST_ZERO,
    OP_DISCARD,
    OP_FLUSH,
    OP_WRITE_ZEROES,
    UNASKED,
    Bio,
    split_bio,
)
from nbdtarget.common.clock import Clock
from nbdtarget.common.turns import Turns
from nbdtarget.devices.base import Device
from nbdtarget.dm.access_trace import AccessTrace
from nbdtarget.dm.fast_path import FastPath
from nbdtarget.dm.in_flight import InFlight
from nbdtarget.dm.statistics import Statistics
from nbdtarget.dm.table import Table
from nbdtarget.dm.zero_fill import ZeroFill
from nbdtarget.targets.base import KILL, REMAPPED, SUBMITTED, Target

__all__ = ["BioPath", "State"]

log = logging.getLogger(__name__)


# Stands in for a device that has been removed.
_GONE: Final = Device("a removed device", 0, read_only=True)


class State(Enum):
    """See the head of `nbdtarget.dm.mapped_device`."""

    ACTIVE = "ACTIVE"
    SUSPENDING = "SUSPENDING"
    SUSPENDED = "SUSPENDED"
    REMOVED = "REMOVED"


class BioPath:
    """See the module head.

    Attributes:
        state: of the device, see `nbdtarget.dm.mapped_device`.
        table: the live table, if there is one.
        in_flight: the bios that were sent on and have not ended.
        fast_path: its `submit` is the device's.
        statistics: the regions in which I/O is counted.
        access_trace: what is read and written, while it is recorded.
        is_flushed: a suspend, or the end, has made durable all that had ended.
        running: set while bios are not queued.
    """

    def __init__(self, device: Device, clock: Clock, event: Callable[[], None]) -> None:
        """Args: event: called when the table has failed."""
        self.state = State.ACTIVE
        self.table: Table | None = None
        self.in_flight = InFlight(clock)
        self.fast_path = FastPath(
            self.in_flight,
            self._table_of_fast_path,
            self._submit_slow,
            self._fail_table,
            lambda: device.read_only,
        )
        self.statistics = Statistics(clock, self._count_or_not)
        self.access_trace = AccessTrace(self._count_or_not)
        self.is_flushed = False
        self.running = asyncio.Event()
        self.running.set()
        self._clock = clock
        self._device = device
        self._event = event
        self._queue: list[Bio] = []
        self._nr_pushed_back = 0  # so many at the front of the queue
        self._given_back: list[Bio] = []  # before bios are queued
        self._queueing = True
        self._turns = Turns()
        self._is_counting = False

    # ---- states ----

    def stop(self) -> None:
        """Queue bios from now on."""
        self.state = State.SUSPENDING
        self.is_flushed = False
        self.running.clear()
        self.fast_path.update()
        given_back, self._given_back = self._given_back, []
        for bio in given_back:
            self._requeue(bio)

    def suspended(self) -> None:
        """Nothing is in flight any more, and the targets have stopped."""
        self.state = State.SUSPENDED

    def let_go(self) -> None:
        """Map bios from now on, first those that were queued."""
        self.state = State.ACTIVE
        self.running.set()
        self.fast_path.update()
        for bio in self._take_queue():
            self._device.submit(bio)

    def removed(self) -> None:
        """The device is gone: end what waits, and what still comes, with EIO."""
        self.state = State.REMOVED
        self.stop_queueing()

    def drop_references(self) -> None:
        """The device is removed: let go of all that refers to it, so that its memory is freed at once.

        Otherwise it would wait for the garbage collector, with its targets and all that they hold.
        """
        self.fast_path.close()
        self.statistics = Statistics(self._clock, _nothing)
        self.access_trace = AccessTrace(_nothing)
        self._device = _GONE
        self._event = _nothing

    def stop_queueing(self) -> None:
        """End what waits here, and what still comes, with EIO: the device will not be resumed."""
        self._queueing = False
        self.running.set()  # for those that ask for extents
        for bio in self._take_queue():
            bio.end(errnos.EIO)

    def _take_queue(self) -> list[Bio]:
        queue, self._queue, self._nr_pushed_back = self._queue, [], 0
        return queue

    def _table_of_fast_path(self) -> Table | None:
        table = self.table
        if (
            self.state is State.ACTIVE
            and table is not None
            and not table.failed
            and not self._is_counting
        ):
            return table
        return None

    def _count_or_not(self) -> None:
        """Look again whether bios are counted: a region was made or deleted, or recording has begun or ended."""
        self._is_counting = bool(self.statistics) or self.access_trace.is_recording
        self.fast_path.update()

    # ---- the slow path ----

    def _submit_slow(self, bio: Bio) -> None:
        if not self.running.is_set() and self._queueing:
            # It outlives `submit`, and the memory of a borrowed payload does not.
            bio.own()
            self._queue.append(bio)
            return
        table = self.table
        if self.state is not State.ACTIVE or table is None or table.failed:
            # A FLUSH to a device that ends suspended asks only about what the suspend has flushed.
            is_flushed = self.is_flushed and self.state is State.SUSPENDED
            bio.end(0 if is_flushed and bio.op == OP_FLUSH else errnos.EIO)
            return
        refused = self._device.check_bounds(bio)
        if refused:
            # Only a target above sets `device`. Its bios fitted when it was constructed, so this device
            # has shrunk since then: an error of the disk (EIO), and not of the request (EINVAL).
            is_above = getattr(bio, "device", None) is self._device
            has_shrunk = is_above and refused != errnos.EPERM
            bio.end(errnos.EIO if has_shrunk else refused)
        elif bio.op == OP_FLUSH:
            self._submit_flush(table, bio)
        elif bio.length == 0:
            bio.end(0)
        else:
            if self._is_counting:
                self.access_trace.note(bio)
                self.statistics.begin(bio)
            runs = table.runs(bio.offset, bio.length)
            if len(runs) == 1:
                self._submit_to(runs[0][0], bio)
            else:
                # The parts are in flight one by one; the bio itself ends with the last of them.
                children = split_bio(bio, [length for _, length in runs])
                for (target, _), child in zip(runs, children, strict=True):
                    self._submit_to(target, child)
                    self.in_flight.enter(child)
                return
        self.in_flight.enter(bio)

    def _submit_flush(self, table: Table, bio: Bio) -> None:
        targets = [
            target for target in table.targets for _ in range(target.num_flush_bios)
        ]
        if not targets:
            bio.end(0)
        elif len(targets) == 1:
            self.map_to(targets[0], bio)
        else:
            left = len(targets)
            first_error = 0

            def child_ended(child: Bio) -> None:
                nonlocal left, first_error
                first_error = first_error or child.status
                left -= 1
                if left == 0:
                    bio.end(first_error)

            for target in targets:
                self.map_to(target, Bio(OP_FLUSH, 0, 0, None, bio.flags, child_ended))

    def _submit_to(self, target: Target, bio: Bio) -> None:
        """Send a bio that lies inside `target`; see to what the target cannot do."""
        if bio.op == OP_DISCARD and not target.can_discard:
            bio.end(0)
        elif bio.op == OP_WRITE_ZEROES and bio.flags & FAST_ZERO:
            if target.can_fast_zero:
                self.map_to(target, bio)
            else:
                bio.end(errnos.ENOTSUP)
        elif bio.op == OP_WRITE_ZEROES and not target.can_write_zeroes:
            ZeroFill(self.map_to, self._requeue, target, bio, self._turns).pump()
        else:
            self.map_to(target, bio)

    def map_to(self, target: Target, bio: Bio) -> None:
        """Let `target` map `bio`, whatever it is able to do, and send it where it says."""
        if self.table is None or self.table.failed:
            bio.end(errnos.EIO)  # a sibling of this bio broke the table a moment ago
            return
        try:
            answer = target.map(bio)
        except Exception:
            self._fail_table(bio)
            return
        if answer == REMAPPED:
            bio.device.submit(bio)
        elif answer == KILL:
            bio.end(errnos.EIO)
        else:
            assert answer == SUBMITTED

    def _fail_table(self, bio: Bio) -> None:
        """Called in an except clause: the target, not the bio, is what went wrong."""
        log.exception("%s: target failed on %r: device fails", self._device.name, bio)
        assert self.table is not None
        self.table.failed = True
        self.fast_path.update()
        self._event()
        if bio.status < 0:
            bio.end(errnos.EIO)

    # ---- suspending ----

    def push_back(self, table: Table) -> None:
        """Queue what the targets hold back; see the module head."""
        for target in table.targets:
            for bio in target.push_back():
                assert bio.op != OP_FLUSH
                if self.in_flight.holds(bio):
                    self._requeue(bio)
                else:
                    # Not from `submit`: a part of what is being zeroed by writing.
                    assert isinstance(bio.private, ZeroFill)
                    bio.private.pushed_back()

    def give_back(self, bio: Bio) -> None:
        """A target that is being suspended does not finish this bio: see `TargetContext.give_back`."""
        if self.running.is_set():
            self._given_back.append(
                bio
            )  # in presuspend: `stop` follows in the same step
        else:
            self._requeue(bio)

    def _requeue(self, bio: Bio) -> None:
        """Put a bio that is in flight into the queue, before all that came while we suspend."""
        assert not self.running.is_set()
        if self._is_counting:
            self.statistics.pass_over(bio)
        self._queue.insert(self._nr_pushed_back, bio)
        self._nr_pushed_back += 1
        self.in_flight.forget(bio)

    async def drain(self, table: Table | None) -> None:
        """Wait until no bio is in flight; after a failure only for a bounded time."""
        await self.in_flight.drain(is_failed=table is not None and table.failed)

    async def flush(self, table: Table) -> None:
        """Make durable what has ended, whatever becomes of the table after this: `is_flushed`.

        If that fails it is a loss, which the clients' next FLUSH tells.
        """
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def ended(bio: Bio) -> None:
            if not done.done():  # it is, if the caller was cancelled
                done.set_result(bio.status)

        flush = Bio(OP_FLUSH, 0, 0, None, UNASKED, ended)
        self._submit_flush(table, flush)
        # If the caller does not wait to the end, the flush is in flight all the same.
        self.in_flight.enter(flush)
        errno = await done
        if errno:
            self._device.health.note_loss()
            log.error("%s: flush: %s", self._device.name, os.strerror(errno))
        self.is_flushed = not errno


def _nothing() -> None:
    """Do nothing: the device is removed, so nothing is counted any more."""
