# SPDX-License-Identifier: Apache-2.0
"""Mapped devices on their way from one server process to another.

Theory of operation. The old process *parks* its devices: each is suspended, which flushes and commits, and its tables are
dropped, so that its disks are closed. Bios that come meanwhile wait in the suspended device. The new process makes the same
devices from what `Parking.states` says, with the same names, numbers and tables. If it cannot, the old process undoes the
parking: it loads the same tables into its devices, and the bios go on.

What is closed may not come open again: a file was renamed, or a server lets no new client in. So `Parking.check` looks
beforehand, while everything runs, and refuses what is known to fail. What fails all the same is tried again and again, and its
requests end with EIO meanwhile (`reopenings.py`). A name that leads to another disk by then is refused, in this process as in
`check`: clients must not find another disk in the place of theirs.

Upper devices are parked before those that they stand on, and made after them. Devices of the same height are parked and made
side by side, because most of the time is spent waiting for disks.

The new process makes its devices in two steps. `unpark` opens everything, and I/O waits; only devices that others stand
on are resumed at once, because the others read their metadata through them. `let_go` resumes the rest. Between
the two, the old process learns that the new one is ready, and ends. A device that a user had suspended stays so.

Not everything survives: `refusals` tells what would be lost, and then nothing is begun.

Durable: after `Parking.park`, everything that has ended.
"""

import asyncio
import errno as errnos
import logging
from collections.abc import Coroutine, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from nbdtarget.common.clock import wait_within
from nbdtarget.common.errors import NbdTargetError, ResolveError, TableError
from nbdtarget.devices.health import HealthState
from nbdtarget.dm.geometry import Geometry
from nbdtarget.dm.mapped_device import MappedDevice, State
from nbdtarget.dm.registry import Registry
from nbdtarget.dm.statistics import RegionState

__all__ = ["DeviceState", "Parking", "let_go", "refusals", "unpark"]

log = logging.getLogger(__name__)

PARK_S_MAX: Final = 20.0  # for each height of devices
CHECK_S_MAX: Final = 5.0
UNDO_S_MAX: Final = 5.0  # for a commit that is still under way


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """One device, as `unpark` makes it again.

    Attributes:
        table, inactive: text; "": there is none.
        height: 0: no other mapped device is below; else one more than the highest of those below.
        is_below: another device stands on it.
        is_suspended: a user had suspended it.
        event_nr: of its event counter.
    """

    name: str
    uuid: str
    minor: int
    table: str
    read_only: bool
    inactive: str
    inactive_read_only: bool
    height: int
    is_below: bool
    is_suspended: bool
    geometry: tuple[int, int, int, int] | None
    rotational: bool | None
    event_nr: int
    regions: tuple[RegionState, ...]


def refusals(registry: Registry) -> list[str]:
    """Return a sentence for each reason why devices cannot be handed over; none: they can."""
    found = [
        f"{device.dm_name}: {reason}"
        for device in registry.devices()
        if (reason := _refusal(registry, device))
    ]
    for below in registry.opens.devices():
        if below.volatile_state:
            found.append(f"{below.name}: {below.volatile_state} would be lost")
        elif below.health.state is not HealthState.OK:
            found.append(
                f"{below.name}: has failed, and has to be opened again first: load its table"
            )
    return found


def _refusal(registry: Registry, device: MappedDevice) -> str:
    if device in registry.reopenings:
        reason = device.failure or "it does not answer"
        return (
            f"it could not be opened again after another hand-over had failed: {reason}"
        )
    tables = [table for table in (device.active, device.inactive) if table is not None]
    for target in (target for table in tables for target in table.targets):
        if target.volatile_state:
            return f"{target.volatile_state} ({target.type_name}) would be lost"
    if any(table.has_lost_writes() for table in tables):
        return "its table has failed or has lost writes: load another one first"
    bequest = device.health.bequest
    if bequest is not None and bequest.losses != device.losses:
        return (
            "writes were lost, and no client has been told yet: attach one, and flush"
        )
    upper = registry.opens.holders(device)
    if device.state is State.SUSPENDED and upper:
        return f"it is suspended, and {', '.join(upper)} stands on it: resume it first"
    if device.deferred_remove:
        return "it is going to be removed when its last client has gone"
    return ""


class Parking:
    """The old process's side.

    Attributes:
        states: of all devices that have been, or are being, parked; lower ones first.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._parked: set[str] = set()
        self._begun: set[str] = set()
        self._disks: dict[str, Hashable] = {}  # what each name led to at `check`
        self._without_inactive: list[str] = []
        self._names: dict[str, list[str]] = {}  # of the disks of each device
        self.states: list[DeviceState] = []

    async def check(self, within_s: float = CHECK_S_MAX) -> None:
        """Look whether all disks could be opened again. Nothing is disturbed.

        Raises: TableError: one of them could not, or does not answer.
        """
        opens = self._registry.opens
        tasks = {
            asyncio.create_task(disk.check_again()): disk for disk in opens.devices()
        }
        if not tasks:
            return
        reasons = []
        try:
            done = await wait_within(tasks, within_s)
        finally:
            for task in tasks:
                task.cancel()  # which does nothing to those that have ended
        for task, disk in tasks.items():
            error = task.exception() if task in done else None
            if error is not None and not isinstance(error, NbdTargetError):
                raise error
            if task not in done:
                error = ResolveError(disk.name, f"does not answer for {within_s:g} s")
            if error is not None:
                reasons.append(f"{', '.join(opens.holders(disk))}: {error}")
            name = disk.loadable_name
            self._disks[name] = opens.opener.identity(name)
        if reasons:
            reason = "; ".join(reasons)
            raise TableError(f"cannot be opened again: {reason}", errnos.EBUSY)

    async def flush_ahead(self, within_s: float | None = PARK_S_MAX) -> None:
        """Flush all devices while they are in use, so that less is left to be flushed while clients wait.

        What fails, or takes longer, is left to `park`.
        """
        tasks = [
            asyncio.create_task(device.flush())
            for device in self._registry.devices()
            if device.state is State.ACTIVE and device.active is not None
        ]
        if not tasks:
            return
        done = await wait_within(tasks, within_s)
        for task in tasks:
            if task not in done:
                task.cancel()
            elif error := task.exception():
                log.info("before the hand-over: %s", error)

    async def park(self, within_s: float | None = PARK_S_MAX) -> None:
        """Suspend all devices, upper ones first, and close what is below them.

        Raises: TableError: one could not be suspended in time; `undo` makes all of it undone.
        Durable: everything that has ended.
        """
        levels = _levels(self._registry)
        opens = self._registry.opens
        for disk in opens.devices():
            name = disk.loadable_name
            identity = opens.opener.identity(name)
            if self._disks.setdefault(name, identity) != identity:
                holders = ", ".join(opens.holders(disk))
                reason = f"{holders}: {disk.name} has just become another disk"
                raise TableError(reason, errnos.ESTALE)
        self._names = {
            device.dm_name: [
                disk.loadable_name
                for disk in opens.lower_devices(device)
                if not isinstance(disk, MappedDevice)
            ]
            for level in levels
            for device in level
        }
        self.states = [
            _state_of(self._registry, device, height)
            for height, level in enumerate(levels)
            for device in level
        ]
        for level in reversed(levels):
            await _all(self._park(device, within_s) for device in level)

    async def _park(self, device: MappedDevice, within_s: float | None) -> None:
        self._begun.add(device.dm_name)
        if device.active is None:
            # No request can wait in it: it fails them all.
            await device.clear()
            self._parked.add(device.dm_name)
            return
        await device.suspend(within_s=within_s)
        self._parked.add(device.dm_name)
        await device.drop_tables()

    async def undo(self) -> list[str]:
        """Make all devices what they were. Returns a sentence for each that could not be; it is tried again."""
        failures: list[str] = []

        async def undo(state: DeviceState) -> None:
            try:
                await self._undo(state)
            except NbdTargetError as error:
                failures.append(
                    f"{state.name} does not go on yet, and is tried again: {error}"
                )

        for level in _by_height(self.states):
            await _all(undo(state) for state in level)
        return failures + self._without_inactive

    async def _undo(self, state: DeviceState) -> None:
        """Raises: NbdTargetError: the device is tried again."""
        device = self._registry.get(state.name)
        if state.name in self._parked:
            try:
                await self._open_again(device, state)
            except NbdTargetError:
                attempt = partial(self._attempt, device, state)
                self._registry.reopenings.start(device, attempt)
                raise
        elif state.name in self._begun and not state.is_suspended:
            # Its suspend has failed: it runs already, or commits, and is suspended when that ends.
            try:
                await device.resume(within_s=UNDO_S_MAX)
            except NbdTargetError:
                self._registry.reopenings.start(device, partial(_resumed, device))
                raise

    async def _attempt(self, device: MappedDevice, state: DeviceState) -> bool:
        if device.has_table:
            return False
        self._without_inactive.clear()
        await self._open_again(device, state)
        for sentence in self._without_inactive:
            log.error("%s", sentence)
        return True

    async def _open_again(self, device: MappedDevice, state: DeviceState) -> None:
        """Raises: NbdTargetError: it has no table then, and its requests end with EIO."""
        try:
            self._check_names(state)
            await _load(self._registry, device, state)
            is_left_suspended = state.is_suspended or device.active is None
            if device.state is State.SUSPENDED and not is_left_suspended:
                await device.resume()
        except NbdTargetError as error:
            await device.fail_without_table(str(error))
            raise
        device.failure = ""
        try:
            await _load_inactive(self._registry, device, state)
        except NbdTargetError as error:
            # A person can load it again. Clients need not wait for that.
            sentence = f"{device.dm_name}: goes on, without its inactive table: {error}"
            self._without_inactive.append(sentence)

    def _check_names(self, state: DeviceState) -> None:
        """Raises: ResolveError: a name leads to another disk than the one that was closed."""
        opener = self._registry.opens.opener
        for name in self._names[state.name]:
            if opener.identity(name) != self._disks[name]:
                reason = "the disk that was open is not found under this name any more"
                raise ResolveError(name, reason, errnos.ESTALE)


async def _resumed(device: MappedDevice) -> bool:
    await device.resume(within_s=UNDO_S_MAX)
    return True


async def unpark(registry: Registry, states: Sequence[DeviceState]) -> None:
    """Make the devices in a new process; I/O waits until `let_go`. Raises: NbdTargetError."""
    for level in _by_height(states):
        await _all(_make(registry, state) for state in level)


async def let_go(registry: Registry, states: Sequence[DeviceState]) -> None:
    """Resume what `unpark` has made. Raises: TableError."""
    for level in _by_height(states):
        await _all(
            registry.get(state.name).resume()
            for state in level
            if state.table and not (state.is_suspended or state.is_below)
        )


async def _make(registry: Registry, state: DeviceState) -> None:
    device = await registry.create(
        state.name,
        None,
        uuid=state.uuid,
        minor=state.minor,
        rotational=state.rotational,
    )
    await _load(registry, device, state)
    await _load_inactive(registry, device, state)
    if state.is_below and state.table and not state.is_suspended:
        await device.resume()


async def _load(registry: Registry, device: MappedDevice, state: DeviceState) -> None:
    """Give a device without tables those that it had; it stays suspended."""
    name = device.dm_name  # which a command may have changed
    if state.table:
        await registry.load(name, state.table, read_only=state.read_only)
        await device.activate()
    device.geometry = None if state.geometry is None else Geometry(*state.geometry)
    device.events.nr = state.event_nr
    device.statistics.restore(state.regions)


async def _load_inactive(
    registry: Registry, device: MappedDevice, state: DeviceState
) -> None:
    if state.inactive:
        await registry.load(
            device.dm_name, state.inactive, read_only=state.inactive_read_only
        )


def _state_of(registry: Registry, device: MappedDevice, height: int) -> DeviceState:
    active, inactive = device.active, device.inactive
    return DeviceState(
        name=device.dm_name,
        uuid=device.uuid,
        minor=device.minor,
        table=_text(device.table()),
        read_only=active is not None and active.read_only,
        inactive=_text(device.table(inactive=True)),
        inactive_read_only=inactive is not None and inactive.read_only,
        height=height,
        is_below=bool(registry.opens.holders(device)),
        is_suspended=device.state is State.SUSPENDED,
        geometry=device.geometry,
        rotational=device.said_rotational,
        event_nr=device.event_nr,
        regions=device.statistics.states(),
    )


def _text(lines: Iterable[tuple[int, int, str, str]]) -> str:
    return "\n".join(" ".join(map(str, line)).rstrip() for line in lines)


def _levels(registry: Registry) -> list[list[MappedDevice]]:
    """Return all devices that have a table, by height."""
    heights: dict[MappedDevice, int] = {}

    def height(device: MappedDevice) -> int:
        if device not in heights:
            below = registry.opens.lower_devices(device)
            heights[device] = 1 + max(
                (height(each) for each in below if isinstance(each, MappedDevice)),
                default=-1,
            )
        return heights[device]

    # Those that could not be opened yet are left to those who try to open them.
    devices = [
        each for each in registry.devices() if each.has_table or not each.failure
    ]
    levels: list[list[MappedDevice]] = [
        [] for _ in range(1 + max(map(height, devices), default=-1))
    ]
    for device in devices:
        levels[height(device)].append(device)
    return levels


def _by_height(states: Sequence[DeviceState]) -> list[list[DeviceState]]:
    top = max((state.height for state in states), default=-1)
    levels: list[list[DeviceState]] = [[] for _ in range(1 + top)]
    for state in states:
        levels[state.height].append(state)
    return levels


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it side by side; then raise the first of what went wrong."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
