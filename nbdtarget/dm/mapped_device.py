# SPDX-License-Identifier: Apache-2.0
"""A mapped device: a name, a live table, perhaps an inactive one, and the swap of the two.

Theory of operation. A mapped device is itself a `Device`, so tables stack: a target of one
may stand on another, one call deeper.

    state        bios                         how it is left
    ACTIVE       are mapped at once           suspend
    SUSPENDING   are queued; those in flight  the last one in flight ends, then every
                 go on                        target's postsuspend is done: SUSPENDED
    SUSPENDED    are queued                   resume
    REMOVED      end with EIO                 never

A new device is ACTIVE without a table, has size 0 and fails all I/O. `load` fills the
inactive slot beside the running table. `resume` puts it into use, in the kernel's order: it suspends
the running table, swaps the tables, calls preresume of every new target, then resume of every new target,
submits the queued bios, and destroys the old table. If a preresume refuses, everything is **as it was before** the verb: the
old table is put back, and resumed if it ran; the refused one is in the inactive slot again. (The
kernel leaves the device suspended with the refused table, and all its clients hang.) If the old table
cannot be resumed any more either, the device is left suspended, with the old table.

What becomes of a bio: `nbdtarget.dm.fast_path` and `nbdtarget.dm.bio_path`. What is known of the devices below:
`nbdtarget.dm.below`.

A target may ask for another one in its place (`replace_target`): suspend, swap of this one, resume.
It is refused while the device is suspended or a table is in the inactive slot, because a person is at work then.

Failure. A table that has failed (`bio_path`) is still suspended, so that what it does in the background
ends before its devices are closed; but the wait has a bound, because it may have lost a bio.
Loading and resuming a new table recovers the device.

Patience. A device below that hangs would make a suspend wait for ever. With `within_s` it does not: if bios,
background work or the flush have not ended by then, the suspend is undone (`presuspend_undo`), queued bios go on, and the
verb fails with ETIMEDOUT and the names of the devices that do not answer. So does `resume`, which then
leaves the inactive table where it is, and `remove`. Once the last commit has begun there is no
way back: it goes on by itself, the verb fails, and the next one waits for it first.

A verb whose caller is cancelled (the server stops while it starts or reloads) leaves nothing half done: a suspend is undone
or completed, a table that was getting ready is stopped and put back, what is being destroyed is destroyed.

Nothing here is stored: what a crash leaves behind is up to the targets.

Verbs on one device run one after another (`_verbs`); status, table, message and wait do not
queue behind them, so that a suspend that waits for a slow disk can be looked at: `nbdtarget.dm.questions`.
"""

import asyncio
import errno as errnos
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from nbdtarget.bio import Bio
from nbdtarget.common.clock import Clock, timeout, wait_within
from nbdtarget.common.errors import TableError
from nbdtarget.common.turns import log_failure, to_the_end
from nbdtarget.devices.base import (
    Device,
    QueueLimits,
)
from nbdtarget.devices.identity import MAPPED
from nbdtarget.dm.below import Below
from nbdtarget.dm.bio_path import BioPath, State
from nbdtarget.dm.events import EventCounter
from nbdtarget.dm.fast_path import end_with_eio
from nbdtarget.dm.geometry import Geometry
from nbdtarget.dm.questions import AnswersQuestions
from nbdtarget.dm.table import Table
from nbdtarget.targets.base import Target, TargetContext
from nbdtarget_metadata.disks import Evidence

__all__ = ["MappedDevice", "State"]

log = logging.getLogger(__name__)


class MappedDevice(AnswersQuestions):
    """One mapped device. The registry gives it its name, and opens the devices below.

    Attributes:
        dm_name: as `ls` shows it; `name` is the path that table lines use.
        uuid: "" if it has none.
        minor: stands in for the device number.
        fast_path: its `submit` is the device's.
        geometry: as `setgeometry` has set it; a table of another size clears it.
        inactive: the other table slot, beside `active`.
        events: of the targets, and of renaming; counted by `event_nr`.
        open_count: exports and tables that hold this device; see `put`.
        deferred_remove: it is removed when its open count falls to 0.
        said_rotational: what `--rotational` or a message has set `is_rotational` to; None: ask the live table.
        failure: why it has no table although the configuration file gives it one, or "". It means nothing
            once there is a table.
        is_uncommitted: it has been removed, and what had ended could not be flushed before.
        before_live: awaited in a swap, when the old table has committed and no request runs through the new one yet.
        has_lost_writes: it has been removed, and its table had lost writes (`Table.has_lost_writes`).
    """

    fails_inline = True  # what `map` kills ends at once
    submit: Callable[[Bio], None]  # type: ignore[assignment] # a method elsewhere

    def __init__(
        self,
        dm_name: str,
        minor: int,
        clock: Clock,
        *,
        uuid: str = "",
        unused: Callable[["MappedDevice"], None] = lambda _: None,
    ) -> None:
        """Args: unused: called when the last opener of one to be removed has gone."""
        super().__init__(f"/dev/mapper/{dm_name}", 0)
        self._clock = clock
        self._path = BioPath(self, clock, self.event)
        self.fast_path = self._path.fast_path
        self.access_trace = self._path.access_trace
        # Not a method that calls the other: the hottest function of the house would be two.
        self.submit = self.fast_path.submit
        self._below = Below(self.health)
        self.health.watchers.append(self.event)
        self._limits = QueueLimits()
        self.geometry: Geometry | None = None
        self.dm_name = dm_name
        self.uuid = uuid
        self.minor = minor
        self.inactive: Table | None = None
        self.events = EventCounter()
        self.open_count = 0
        self.deferred_remove = False
        self.said_rotational: bool | None = None
        self.failure = ""
        self.is_uncommitted = False
        self.before_live: Callable[[], Awaitable[None]] | None = None
        self.has_lost_writes = False
        self._unused = unused
        self._verbs = asyncio.Lock()
        self._last_commit: asyncio.Task[None] | None = None  # of a suspend with a bound

    @property
    def is_flushed(self) -> bool:
        """Whether a suspend, or the end, has made durable all that had ended."""
        return self._path.is_flushed

    @property
    def limits(self) -> QueueLimits:
        """The limits of the live table."""
        return self._limits

    @property
    def losses(self) -> int:
        """The number of losses of the device itself and of those below; see `nbdtarget.dm.below`."""
        return self.health.losses + self._below.losses

    def devices_below(self) -> list[Device]:
        """Return the devices at the bottom of the live table, each once; none of them is a mapped device."""
        found: dict[Device, None] = {}
        for device in self._below.devices:
            if isinstance(device, MappedDevice):
                found.update(dict.fromkeys(device.devices_below()))
            else:
                found[device] = None
        return list(found)

    @property
    def has_table(self) -> bool:
        """Whether a table is live, or is going to be."""
        return self.active is not None or self.inactive is not None

    @property
    def is_rotational(self) -> bool:
        """Whether any part of the live table has to seek, as in the kernel, unless this was set by command."""
        if self.said_rotational is not None:
            return self.said_rotational
        targets = () if self.active is None else self.active.targets
        return any(target.is_rotational for target in targets)

    def put(self) -> None:
        """Count one opener less."""
        assert self.open_count > 0
        self.open_count -= 1
        if self.deferred_remove and not self.open_count:
            self._unused(self)

    # ---- tables ----

    async def load(self, table: Table) -> None:
        """Put `table` into the inactive slot; what was there is destroyed."""
        async with self._verbs:
            if self.state is State.REMOVED:
                await self._destroy(table)
                raise TableError("Device does not exist", errnos.ENXIO)
            old, self.inactive = self.inactive, table
            if old is not None:
                await self._destroy(old)

    async def clear(self) -> None:
        """Destroy the inactive table, if there is one."""
        async with self._verbs:
            old, self.inactive = self.inactive, None
            if old is not None:
                await self._destroy(old)

    async def drop_tables(self) -> None:
        """Destroy both tables of a suspended device. It stays suspended, and its disks can be opened elsewhere."""
        async with self._verbs:
            assert self.state is State.SUSPENDED
            dropped, self.inactive = (self.active, self.inactive), None
            self._adopt(None)
            for table in dropped:
                if table is not None:
                    await self._destroy(table)

    async def fail_without_table(self, reason: str) -> None:
        """Be a device whose disks could not be opened: without tables, with `failure`, and every request ends with EIO.

        For one that is suspended, or has no table. What waits in it ends with EIO, too.
        """
        async with self._verbs:
            assert self.active is None or self.state is State.SUSPENDED
            tables, self.inactive = (self.active, self.inactive), None
            self._adopt(None)
            for table in tables:
                if table is not None:
                    await self._destroy(table)
            is_news, self.failure = reason != self.failure, reason
            self._path.let_go()
            if is_news:
                self.event()

    async def suspend(
        self, *, noflush: bool = False, within_s: float | None = None
    ) -> None:
        """Stop new I/O, wait for what is in flight, flush, let the targets commit.

        A suspended device stays as it is. The flush is what the kernel gets by freezing the
        filesystem: what stands under the table may be gone from the next one, and then no
        later FLUSH reaches it. `noflush` leaves it out, and does not wait for bios that a target
        only holds back: those are queued, for whatever table is resumed.

        Args: within_s: how long to wait for devices that do not answer; None: for ever.
        Raises: TableError, ETIMEDOUT; see *Patience* in the module head.
        Durable: what each target's postsuspend commits; unless `noflush`, every write that
            has ended. If that flush fails it is logged, and the next FLUSH fails.
        """
        async with self._verbs:
            if self.state is State.REMOVED:
                raise TableError("Device does not exist", errnos.ENXIO)
            await self._suspend(noflush=noflush, within_s=within_s)

    async def _suspend(
        self, *, noflush: bool = False, within_s: float | None = None
    ) -> None:
        if self._last_commit is not None:  # of a suspend before, which had a bound
            await self._await_last_commit(within_s)
        if self.state is State.SUSPENDED:
            return
        table = self.active
        if table is not None:
            if noflush:
                # Queue first: nothing more may come to a target that has given back what it held.
                self._path.stop()
                table.guarded(self.name, partial(self._path.push_back, table))
            for target in table.targets:
                table.guarded(self.name, target.presuspend)
        # Only now, without `noflush`: what a target lets go in presuspend goes down, and is waited for.
        self._path.stop()
        begun_ns = self._clock.now_ns()
        try:
            async with timeout(within_s):
                await self._settle(table, noflush=noflush)
        except TimeoutError:
            assert table is not None
            reason = f"{table.unanswered()} for {within_s:g} s"
            self._undo_suspend(table)
            raise TableError(
                f"{reason}; the device goes on as before", errnos.ETIMEDOUT
            ) from None
        except BaseException:
            if table is not None:
                self._undo_suspend(table)
            raise
        if table is None:
            self._suspended()
            return
        # A task of its own: it goes on if the time is over, or the caller is cancelled.
        self._last_commit = asyncio.create_task(self._commit_last(table))
        log_failure(self._last_commit, f"{self.name}: the last commit of a suspend")
        if within_s is not None:
            spent_s = (self._clock.now_ns() - begun_ns) / 1e9
            within_s = max(0.0, within_s - spent_s)
        await self._await_last_commit(within_s)

    async def _settle(self, table: Table | None, *, noflush: bool) -> None:
        """Wait until nothing is under way, and flush. May be cancelled."""
        await self._path.drain(table)
        if table is None or table.failed:
            return
        for target in table.targets:
            await target.quiesce()
        if not (noflush or table.read_only):
            await self._path.flush(table)

    async def _commit_last(self, table: Table) -> None:
        """Stop the targets, which commit. From here on the suspend cannot be undone."""
        await table.stop(table.targets, self.name, self._clock)
        self._suspended()

    async def _await_last_commit(self, within_s: float | None) -> None:
        """Raises: TableError, ETIMEDOUT: the device is suspended as soon as it ends."""
        commit = self._last_commit
        assert commit is not None
        done = await wait_within([commit], within_s)
        if not done:
            assert self.active is not None
            raise TableError(
                f"{self.active.unanswered()} for {within_s:g} s while the device commits;"
                " it is suspended when that ends",
                errnos.ETIMEDOUT,
            )
        self._last_commit = None
        commit.result()

    def _suspended(self) -> None:
        self._path.suspended()
        log.info("%s: suspended", self.name)

    def _undo_suspend(self, table: Table) -> None:
        for target in table.targets:
            table.guarded(self.name, target.presuspend_undo)
        self._path.let_go()

    async def commit_ended(self) -> bool:
        """Flush and commit what has ended, whatever hangs; False: that failed.

        For a device that cannot be suspended, at the end of the process.
        """
        table = self.active
        if table is None or table.read_only or self.state is State.SUSPENDED:
            return True
        with table.use():  # the end may come meanwhile after all
            await self._path.flush(table)
        return self.is_flushed

    async def activate(self) -> None:
        """Make the inactive table live, but stay suspended: bios queue until `resume`.

        So a server can listen before the first bio may go. Raises: TableError.
        """
        async with self._verbs:
            old = await self._swap()
            assert self.active is not None
            if old is not None:
                self._note_losses(old, self.active)
                await self._destroy(old)

    async def resume(self, *, within_s: float | None = None) -> None:
        """Make the inactive table live, if there is one, and let I/O go.

        A device that runs, without an inactive table, is left as it is.

        Args: within_s: as of `suspend`.
        Raises: TableError: suspended without any table, or a target's preresume refused, and then both tables are where they were before.
        """
        async with self._verbs:
            if self._last_commit is not None:
                await self._await_last_commit(within_s)
            if self.inactive is not None:
                await self._resume_inactive(within_s)
            elif self.state is not State.ACTIVE:
                if self.active is None:
                    raise TableError("Invalid argument: no table to resume")
                await self._resume(self.active)

    async def _resume_inactive(self, within_s: float | None) -> None:
        ran = self.state is State.ACTIVE
        old = await self._swap(within_s)
        new = self.active
        assert new is not None
        try:
            if self.before_live is not None:
                await self.before_live()
            await new.preresume(self.name, self._clock)
        except BaseException as error:
            await to_the_end(self._take_back(old, new, error, runs=ran))
            raise
        if old is not None:
            self._note_losses(old, new)
        self._run(new)
        if old is not None:
            await self._destroy(old)

    async def _take_back(
        self, old: Table | None, new: Table, error: BaseException, *, runs: bool
    ) -> None:
        """Put both tables where they were before `new` was refused, or its resume was given up.

        Raises: TableError: the refusal, with what has become of the device.
        """
        self.inactive = new
        self._adopt(old)
        if self.before_live is not None:  # it may have been told of the new one
            try:
                await self.before_live()
            except TableError as second:
                log.error("%s: %s", self.name, second)
        slot = "`clear' drops the refused table"
        if not runs:
            outcome = f"the device is still suspended, without it; {slot}"
        elif old is None or old.failed:
            self._run(old)
            outcome = f"the device is as it was before; {slot}"
        else:
            outcome = f"the device goes on with the table that it had; {slot}"
            try:
                await self._resume(old)
            except TableError as second:
                outcome = f"the table before it cannot be resumed either ({second}): the device is suspended; load a table that works, and resume it"
        if not isinstance(error, TableError):
            log.info("%s: resume given up: %s", self.name, outcome)
            return
        log.error("%s: resume refused: %s (%s)", self.name, error, outcome)
        raise TableError(error.reason, error.errno, outcome) from error

    async def _swap(self, within_s: float | None = None) -> Table | None:
        """Suspend, put the inactive table in the live slot; the caller destroys the old one."""
        if self.state is State.REMOVED:
            raise TableError("Device does not exist", errnos.ENXIO)
        if self.inactive is None:
            raise TableError("Invalid argument: no inactive table")
        await self._suspend(within_s=within_s)
        old, new, self.inactive = self.active, self.inactive, None
        self._adopt(new)
        return old

    def _adopt(self, table: Table | None) -> None:
        """Make `table` live: what a device can do is what its live table can do."""
        self._below.adopt(table)
        self._path.table = table
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

    def _note_losses(self, old: Table, new: Table) -> None:
        """`new` takes the place of `old`: say so if it takes writes with it."""
        if self._swap_loses(old, new):
            log.error(
                "%s: writes that were not flushed went with the table that was replaced:"
                " the next FLUSH of each client fails",
                self.name,
            )
            self.health.note_loss()

    def _swap_loses(self, old: Table, new: Table) -> bool:
        """Whether writes that have ended under `old` are reached by no FLUSH any more."""
        if old.has_lost_writes():
            return True
        if self.is_flushed or old.read_only:
            return False
        # The suspend did not flush (`noflush`), or its flush failed. A later FLUSH covers these writes only if the new table stands on the
        # same devices. A failed flush was counted as a loss before; clients are not told twice, because no FLUSH ends before the resume.
        written = [device for device in old.data_devices() if not device.read_only]
        return not set(written) <= set(new.data_devices())

    async def replace_target(self, old: Target, new: Target) -> None:
        """Put `new` in the place of `old` in the live table; destroy `old`, and nothing else.

        Raises: TableError: not now, or not at all. Then the table is live as it was, and `new` is still the caller's.
        """
        async with self._verbs:
            table = self._check_replaceable(old)
            await self._suspend()
            replaced = table.replaced(old, new)
            try:
                if table.failed or old.has_lost_writes():
                    raise TableError("writes were lost", errnos.EIO)
                self._adopt(replaced)
                if self.before_live is not None:
                    await self.before_live()
                await self._resume(replaced)
            except BaseException:
                self._adopt(table)
                await to_the_end(self._resume(table))
                raise
            await to_the_end(self._destroy_replaced(table, old))

    async def _destroy_replaced(self, table: Table, old: Target) -> None:
        await table.unused()
        await self._destroy_target(old)

    def maybe_live_target(self, context: TargetContext) -> Target | None:
        return None if self.active is None else self.active.maybe_target_of(context)

    def _check_replaceable(self, target: Target) -> Table:
        if self.state is State.REMOVED:
            raise TableError("Device does not exist", errnos.ENXIO)
        if self.active is None or target not in self.active.targets:
            raise TableError("another table is live")
        if self.state is not State.ACTIVE:
            raise TableError("the device is suspended", errnos.EBUSY)
        if self.inactive is not None:
            raise TableError("there is an inactive table", errnos.EBUSY)
        return self.active

    async def _resume(self, table: Table) -> None:
        await table.preresume(self.name, self._clock)
        self._run(table)

    def _run(self, table: Table | None) -> None:
        """Let I/O go, to `table`, which is the live one."""
        if table is not None and not table.failed:
            for target in table.targets:
                table.guarded(self.name, target.resume)
        self._path.let_go()
        log.info("%s: resumed", self.name)

    async def _destroy(self, table: Table) -> None:
        """Destroy a table; what goes wrong here must not keep the device from its end."""
        nr_lost = self._path.in_flight.count if table.failed else 0
        if nr_lost or not table.has_stopped:
            # Something may still be on its way below: a closed descriptor could be another file's
            # by then. The devices stay open, and locked, until the process ends.
            log.error("%s: did not stop: %d bios lost in failure", self.name, nr_lost)
            return
        await to_the_end(self._destroy_targets(table))

    async def _destroy_targets(self, table: Table) -> None:
        await table.unused()
        for target in table.targets:
            await self._destroy_target(target)

    async def _destroy_target(self, target: Target) -> None:
        try:
            await target.dtr()
        except Exception:
            log.exception("%s: destructor failed", self.name)

    async def remove(self, *, within_s: float | None = None) -> None:
        """Suspend (which commits), destroy both tables, wake those that wait for events.

        The caller has seen to it that the open count is 0.

        Args: within_s: as of `suspend`.
        Raises: TableError, ETIMEDOUT: it is not removed.
        """
        async with self._verbs:
            if self.state is State.REMOVED:
                return
            assert self.open_count == 0
            await self._suspend(within_s=within_s)
            await to_the_end(self._end())

    async def _end(self) -> None:
        self._path.removed()
        self._below.forget()
        self.is_uncommitted = self.active is not None and not (
            self.is_flushed or self.active.read_only or not self.active.data_devices()
        )
        active, self._path.table = self.active, None
        self.has_lost_writes = active is not None and active.has_lost_writes()
        inactive, self.inactive = self.inactive, None
        for table in (active, inactive):
            if table is not None:
                await self._destroy(table)
        self.events.close()
        self._drop_references()

    def _drop_references(self) -> None:
        """The device is removed: let go of what refers to it; see `BioPath.drop_references`."""
        self.submit = end_with_eio
        self.health.watchers.remove(self.event)
        self._path.drop_references()

    def give_back(self, bio: Bio) -> None:
        """Queue what a target gives back while it is suspended: see `TargetContext.give_back`."""
        self._path.give_back(bio)

    def stop_queueing(self) -> None:
        """End what waits here, and what still comes, with EIO: the device will not be resumed."""
        self._path.stop_queueing()

    async def stop_if_suspended(self) -> None:
        """`stop_queueing`, if the device is suspended once the verb under way has ended."""
        async with self._verbs:
            if self.state is State.SUSPENDED:
                self.stop_queueing()

    async def identify(self, role: str) -> Evidence:
        ids = (f"uuid={self.uuid}",) if self.uuid else ()
        pins = await self._below.pins(role)
        return Evidence(MAPPED, self.name, self.size, (*ids, *pins))

    async def close(self) -> None:
        await self.remove()

    @property
    def event_nr(self) -> int:
        return self.events.nr

    def event(self) -> None:
        """Count one event and wake those that wait for it."""
        self.events.count()
