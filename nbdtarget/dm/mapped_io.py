# SPDX-License-Identifier: Apache-2.0
"""The way of a bio through a mapped device: to the live table, or into the queue.

Theory of operation. `submit` is the hottest function of the house after the wire. For a READ or
WRITE to a running single-target table it compares twice, calls the target's `map` and sends
the bio on. Everything else (FLUSH, DISCARD, zeroing, several targets, a suspended, read-only or
failed device, one whose I/O is counted in `nbdtarget.dm.statistics`) takes `_submit_slow`; `_fast_op_max` and `_fast_end` are what tells them
apart. Only a bio that has not ended when `submit` returns is counted in flight, by a hook; of one
that is cut at target borders its parts are counted, for each goes its own way.

Stacks. Where a table is one `linear` on another mapped device whose table is one `linear`, and so
on, a READ or WRITE goes from the uppermost to the lowest in one step (`_Chain`), while all of
them run. Whenever the fast path of one changes, because it is suspended, resumed or has failed,
those that stand on it look anew (`_uppers`). A bio that does not end at once is in flight in each
device of the chain, so that each can be suspended, and waits for it.

Queued bios. A queue entry owns its payload. The queue has no bound of its own: what may be
in it is what the submitters may have in flight, and every submitter is bounded.

FLUSH goes to every target, `num_flush_bios` times, and ends when all have ended, with the
first error. WRITE_ZEROES to a target that cannot is turned into writes of zeroes (`ZeroFill`);
DISCARD to a target that cannot ends with 0 at once.

Losses (see `nbdtarget.devices.health`). What a mapped device has lost is its own count, in its
`health`, plus what the devices below its live table have lost since that table became live
(`losses`). When a table is swapped away, what was lost below it is added to our own count, so the sum
neither shrinks nor jumps with a swap. Our own count goes up when a table is swapped away with
writes that had ended and were not flushed: the flush of the suspend failed, the target says
so (`has_lost_writes`), the table has failed, or `noflush` left the flush out and the next table does
not stand on the same devices, so that no later FLUSH reaches the writes. Whoever flushes a mapped
device learns of it from the number, on its way up through any number of tables, and not from the FLUSH.

Trouble below. Whenever a device below the live table is latched or lost, or loses something, that is an event of
this device, and of those that stand on it (`Health.watchers`).

Pushing back. A suspend with `noflush` does not wait for bios that a target only holds back and has
not begun below (`Target.push_back`): each goes to the front of the queue as it came, and is mapped
anew by whatever table is resumed. They leave the flight meanwhile, as if `submit` had queued them.
A part of a bio that was cut is queued by itself; its siblings go on. Of a WRITE_ZEROES that is being
written out, no part is queued: when the parts under way have ended, it is queued whole, and zeroed
from its beginning again. What waits in a **lower** mapped device is not held back by us but begun below: it
is waited for, as in the kernel. A FLUSH is never pushed back, because it asks about writes that this
table has answered.

Failure. An exception out of `map` is a bug of ours. It is logged with its traceback, the table
is marked failed, and from then on every bio ends with EIO; other mapped devices live on.
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
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    UNASKED,
    Bio,
    split_bio,
)
from nbdtarget.common.clock import Clock
from nbdtarget.common.turns import Turns
from nbdtarget.devices.base import Device, QueueLimits
from nbdtarget.dm.geometry import Geometry
from nbdtarget.dm.statistics import Statistics
from nbdtarget.dm.table import Table
from nbdtarget.dm.zero_fill import ZeroFill
from nbdtarget.targets.base import KILL, REMAPPED, SUBMITTED, Target

__all__ = ["FAILED_DRAIN_S_MAX", "MappedIo", "State"]

log = logging.getLogger(__name__)

FAILED_DRAIN_S_MAX: Final = 5.0  # a failed target may have lost bios: wait no longer


class State(Enum):
    """See the head of `nbdtarget.dm.mapped_device`."""

    ACTIVE = "ACTIVE"
    SUSPENDING = "SUSPENDING"
    SUSPENDED = "SUSPENDED"
    REMOVED = "REMOVED"


class _Chain:
    """The way through mapped devices that are one `linear` each. See *Stacks* above."""

    __slots__ = ("_delta", "_device", "_submit", "_through")

    def __init__(
        self, device: Device, delta: int, through: tuple["MappedIo", ...]
    ) -> None:
        """Args: device: the lowest. delta: to its offsets. through: what is left out."""
        self._device = device
        self._submit = device.submit
        self._delta = delta
        self._through = through

    def map(self, bio: Bio) -> int:
        bio.device = self
        return REMAPPED

    def submit(self, bio: Bio) -> None:
        # hot: 0.1 us, where each device that is left out takes 0.2 us.
        bio.offset += self._delta
        bio.device = self._device
        self._submit(bio)
        if bio.status < 0:
            for lower in self._through:
                lower._count_in_flight(bio)


class MappedIo(Device):
    """What of a mapped device meets bios; the verbs are `MappedDevice`'s.

    Attributes:
        state: see `nbdtarget.dm.mapped_device`.
        active: the live table, if there is one.
        geometry: what people said that it is; gone with a table of another size.
        statistics: the regions in which I/O is counted.
    """

    # hot: an object that has more than thirty attributes in its dictionary is slower to ask.
    __slots__ = (
        "_clock",
        "_data_devices",
        "_drained",
        "_fast_end",
        "_fast_map",
        "_fast_op_max",
        "_fast_remap",
        "_fast_through",
        "_in_flight",
        "_is_counting",
        "_is_flushed",
        "_limits",
        "_losses_before",
        "_lower",
        "_nr_pushed_back",
        "_queue",
        "_queueing",
        "_running",
        "_turns",
        "_uppers",
        "_watched",
        "active",
        "geometry",
        "state",
        "statistics",
    )

    fails_inline = True  # what `map` kills ends at once

    def __init__(self, name: str, clock: Clock) -> None:
        super().__init__(name, 0)
        self.state = State.ACTIVE
        self.active: Table | None = None
        self._clock = clock
        self._queue: list[Bio] = []
        self._nr_pushed_back = 0  # so many at the front of the queue
        self._queueing = True
        self._turns = Turns()
        self._in_flight = 0
        self._drained: asyncio.Future[None] | None = None
        self._data_devices: tuple[Device, ...] = ()  # below the live table
        self._losses_before = 0  # theirs, when the table became live
        self._watched: tuple[Device, ...] = ()  # all below the live table
        self.health.watchers.append(self.event)
        self._limits = QueueLimits()
        self._is_flushed = False  # suspended, and all that has ended is durable
        self._running = asyncio.Event()
        self._running.set()
        # The fast path: READ is 0, WRITE is 1, and -1 sends everything the slow way.
        self._fast_op_max = -1
        self._fast_end = 0
        self._fast_map: Callable[[Bio], int] = _no_target
        # Where the fast path leads in the end, if to one device; and what it leaves out.
        self._fast_remap: tuple[Device, int] | None = None
        self._fast_through: tuple[MappedIo, ...] = ()
        self._lower: MappedIo | None = None
        self.geometry: Geometry | None = None
        self.statistics = Statistics(clock, self._count_or_not)
        self._is_counting = False
        self._uppers: set[MappedIo] = set()  # whose fast path depends on ours

    @property
    def limits(self) -> QueueLimits:
        """Those of the live table."""
        return self._limits

    @property
    def losses(self) -> int:
        """See *Losses* in the module head."""
        return self.health.losses + self._losses_below()

    def _losses_below(self) -> int:
        return sum(each.losses for each in self._data_devices) - self._losses_before

    def event(self) -> None:
        """Count one event and wake who waits for it."""
        raise NotImplementedError

    # ---- the way of a bio ----

    def submit(self, bio: Bio) -> None:
        # hot: 0.4 us with linear, on top of a device that ends the bio inline (0.4 us).
        if bio.op > self._fast_op_max or bio.offset + bio.length > self._fast_end:
            self._submit_slow(bio)
            return
        try:
            answer = self._fast_map(bio)
        except Exception:
            self._fail_table(bio)
            return
        if answer == REMAPPED:
            bio.device.submit(bio)
        elif answer == KILL:
            bio.end(errnos.EIO)
        if bio.status < 0:
            self._in_flight += 1
            bio.on_end(self._bio_ended)

    def _submit_slow(self, bio: Bio) -> None:
        if not self._running.is_set() and self._queueing:
            bio.own()
            self._queue.append(bio)
            return
        table = self.active
        if self.state is not State.ACTIVE or table is None or table.failed:
            is_flushed = self._is_flushed and self.state is State.SUSPENDED
            bio.end(0 if is_flushed and bio.op == OP_FLUSH else errnos.EIO)
            return
        refused = self.check_bounds(bio)
        if refused:
            # From a target above, which fitted when it was constructed: this one has shrunk.
            is_above = getattr(bio, "device", None) is self and refused != errnos.EPERM
            bio.end(errnos.EIO if is_above else refused)
        elif bio.op == OP_FLUSH:
            self._submit_flush(table, bio)
        elif bio.length == 0:
            bio.end(0)
        else:
            if self._is_counting:
                self.statistics.begin(bio)
            runs = table.runs(bio.offset, bio.length)
            if len(runs) == 1:
                self._submit_to(runs[0][0], bio)
            else:
                children = split_bio(bio, [length for _, length in runs])
                for (target, _), child in zip(runs, children, strict=True):
                    self._submit_to(target, child)
                    self._count_in_flight(child)
                return
        self._count_in_flight(bio)

    def _count_in_flight(self, bio: Bio) -> None:
        if bio.status < 0:
            self._in_flight += 1
            bio.on_end(self._bio_ended)

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
        if self.active is None or self.active.failed:
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

    def _bio_ended(self, _: Bio) -> None:
        self._in_flight -= 1
        if self._in_flight == 0 and self._drained is not None:
            if not self._drained.done():
                self._drained.set_result(None)
            self._drained = None

    def _push_back(self, table: Table) -> None:
        """Queue what the targets hold back; see the module head."""
        for target in table.targets:
            for bio in target.push_back():
                assert bio.op != OP_FLUSH
                if bio.hooks and self._bio_ended in bio.hooks:
                    self._requeue(bio)
                else:
                    # Not from `submit`: a part of what is being zeroed by writing.
                    assert isinstance(bio.private, ZeroFill)
                    bio.private.pushed_back()

    def _requeue(self, bio: Bio) -> None:
        """Put a bio that is in flight into the queue, before all that came while we suspend."""
        assert not self._running.is_set()
        assert bio.hooks is not None
        bio.hooks.remove(self._bio_ended)
        if self._is_counting:
            self.statistics.pass_over(bio)
        self._queue.insert(self._nr_pushed_back, bio)
        self._nr_pushed_back += 1
        self._bio_ended(bio)

    def _fail_table(self, bio: Bio) -> None:
        """Called in an except clause: the target, not the bio, is what went wrong."""
        log.exception("%s: target failed on %r: device fails", self.name, bio)
        assert self.active is not None
        self.active.failed = True
        self._set_fast_path()
        self.event()
        if bio.status < 0:
            bio.end(errnos.EIO)

    def _set_fast_path(self) -> None:
        table = self.active
        if (
            self.state is State.ACTIVE
            and table is not None
            and not table.failed
            and len(table.targets) == 1
            and not self._is_counting
        ):
            self._fast_map = table.targets[0].map
            self._fast_op_max = OP_READ if self.read_only else OP_WRITE
            self._fast_end = table.size
            self._fast_remap = table.targets[0].maybe_remap()
        else:
            self._fast_op_max = -1
            self._fast_end = 0
            self._fast_map = _no_target
            self._fast_remap = None
        self._shorten_fast_path()
        for upper in tuple(self._uppers):
            upper._set_fast_path()

    def _drop_references(self) -> None:
        """The device is removed: let go of all that refers to it, so that its memory is freed at once.

        Otherwise it would wait for the garbage collector, with its targets and all that they hold.
        """
        self._set_fast_path()
        self.health.watchers.remove(self.event)
        self.statistics = Statistics(self._clock, _nothing)

    def _count_or_not(self) -> None:
        """There is a region by now, or none any more."""
        self._is_counting = bool(self.statistics)
        self._set_fast_path()

    def _shorten_fast_path(self) -> None:
        """Leave out the mapped devices below that only pass bios on, too."""
        self._fast_through = ()
        if self._lower is not None:
            self._lower._uppers.discard(self)
            self._lower = None
        if self._fast_remap is None:
            return
        lower, delta = self._fast_remap
        if not isinstance(lower, MappedIo):
            return
        self._lower = lower
        lower._uppers.add(self)
        if (
            lower._fast_remap is None
            or lower._fast_op_max < self._fast_op_max
            or lower._fast_end < self._fast_end + delta
        ):
            return
        device, more = lower._fast_remap
        self._fast_remap = device, delta + more
        self._fast_through = (lower, *lower._fast_through)
        self._fast_map = _Chain(device, delta + more, self._fast_through).map

    @property
    def is_flushed(self) -> bool:
        """Whether a suspend, or the end, has made durable all that had ended."""
        return self._is_flushed

    async def _flush(self, table: Table) -> None:
        """Make durable what has ended, whatever becomes of the table after this.

        If that fails it is a loss, which the clients' next FLUSH tells.
        """
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def ended(bio: Bio) -> None:
            if not done.done():  # cancelled: who waited has gone away
                done.set_result(bio.status)

        flush = Bio(OP_FLUSH, 0, 0, None, UNASKED, ended)
        self._submit_flush(table, flush)
        # If nobody waits for it to the end, it is in flight all the same.
        self._count_in_flight(flush)
        errno = await done
        if errno:
            self.health.note_loss()
            log.error("%s: flush: %s", self.name, os.strerror(errno))
        self._is_flushed = not errno

    async def _drain(self, table: Table | None) -> None:
        """Wait until no bio is in flight; after a failure only for a bounded time."""
        if self._in_flight == 0:
            return
        drained = self._drained = asyncio.get_running_loop().create_future()
        if table is None or not table.failed:
            try:
                await drained
            finally:
                self._drained = None
            return

        def give_up() -> None:
            if not drained.done():
                drained.set_result(None)

        timer = self._clock.call_later(FAILED_DRAIN_S_MAX, give_up)
        await drained
        timer.cancel()

    def _adopt(self, table: Table | None) -> None:
        """Make `table` live: what a device can do is what its live table can do."""
        self.health.losses += self._losses_below()
        self._data_devices = () if table is None else table.data_devices()
        self._losses_before = sum(each.losses for each in self._data_devices)
        self._watch(() if table is None else tuple(dict.fromkeys(table.devices())))
        self.active = table
        targets = () if table is None else table.targets
        size = 0 if table is None else table.size
        if size != self.size:
            self.geometry = None
        self.size = size
        self.read_only = table is not None and table.read_only
        self._limits = QueueLimits() if table is None else table.limits
        self.logical_block_size = self._limits.logical_block_size
        # A DISCARD is worth sending if any part of the device takes it.
        self.can_discard = any(target.can_discard for target in targets)
        self.can_write_zeroes = all(target.can_write_zeroes for target in targets)
        self.can_fast_zero = all(target.can_fast_zero for target in targets)

    def _watch(self, devices: tuple[Device, ...]) -> None:
        """Hear of the trouble of these devices, and of no others."""
        for device in self._watched:
            device.health.watchers.remove(self.health.notify)
        for device in devices:
            device.health.watchers.append(self.health.notify)
        self._watched = devices

    def devices_below(self) -> list[Device]:
        """What the live table stands on in the end, each once: no mapped devices."""
        found: dict[Device, None] = {}
        for device in self._watched:
            if isinstance(device, MappedIo):
                found.update(dict.fromkeys(device.devices_below()))
            else:
                found[device] = None
        return list(found)

    def stop_queueing(self) -> None:
        """End what waits here, and what still comes, with EIO: nobody will resume the device."""
        self._queueing = False
        self._running.set()  # for who asks for extents
        for bio in self._take_queue():
            bio.end(errnos.EIO)

    def _take_queue(self) -> list[Bio]:
        queue, self._queue, self._nr_pushed_back = self._queue, [], 0
        return queue


def _nothing() -> None:
    """The device is removed: nothing is counted any more."""


def _no_target(bio: Bio) -> int:
    raise AssertionError(f"no fast path for {bio!r}")
