# SPDX-License-Identifier: Apache-2.0
"""The registry: every mapped device by name, and device-mapper's verbs on them.

Theory of operation. A name is taken from `create` to the beginning of `remove`. A verb that
fails leaves everything as it was. For example, after a `create` whose table is refused there is no
device, nothing is open, and no file was made.

The registry is also the directory of exports that the NBD server asks: every mapped device
with a live table is an export under its name. The empty name means the only export, if there is
only one. A connection holds its device open (`acquire`, `release`), so that it cannot be removed.

What may be a name, a UUID and a minor number: `nbdtarget.dm.names`.
"""

import asyncio
import errno as errnos
import logging
from collections.abc import Iterable, Mapping
from typing import Final

from nbdtarget.common.clock import Clock, LoopClock, wait_within
from nbdtarget.common.errors import ConstructorError, TableError
from nbdtarget.common.permissions import Permission
from nbdtarget.common.turns import Tasks, to_the_end
from nbdtarget.common.units import SECTOR
from nbdtarget.devices.base import Device
from nbdtarget.dm.mapped_device import MappedDevice, State
from nbdtarget.dm.names import NAME_LENGTH_MAX, check_name, check_uuid, free_minor
from nbdtarget.dm.open_devices import DeviceOpener, OpenDevices, TableContext
from nbdtarget.dm.reopenings import Reopenings
from nbdtarget.dm.replacements import Replacements
from nbdtarget.dm.table import Table, TargetSpec, construct_table, parse_table
from nbdtarget.targets.base import Target
from nbdtarget.targets.registry import TARGET_TYPES

__all__ = ["MAJOR", "SUSPEND_S_MAX", "Registry"]

log = logging.getLogger(__name__)

MAJOR: Final = 253  # what Linux most often gives device-mapper
DEVICES_MAX: Final = 4096
# Characters of a table; a longer one is parsed in a thread.
PARSED_AT_ONCE_MAX: Final = 64 << 10
# How long a verb waits for devices that do not answer, if it does not say anything else.
SUSPEND_S_MAX: Final = 60.0


def _report_deferred(error: BaseException) -> None:
    log.critical("a deferred removal failed", exc_info=error)


class Registry:
    """See the module head. One per process; everything runs on the event loop's thread."""

    def __init__(
        self,
        opener: DeviceOpener,
        *,
        types: Mapping[str, type[Target]] = TARGET_TYPES,
        clock: Clock | None = None,
    ) -> None:
        self.types = types
        self.clock: Clock = LoopClock() if clock is None else clock
        self.opens = OpenDevices(opener)
        self._devices: dict[str, MappedDevice] = {}
        self._removing: set[MappedDevice] = set()
        self._load_locks: dict[MappedDevice, asyncio.Lock] = {}
        self.replacements = Replacements(self)
        self.reopenings = Reopenings()
        self._deferred = Tasks(failed=_report_deferred)
        self._is_closing = False
        self._uncommitted: list[str] = []  # names of removed devices

    # ---- looking up ----

    def devices(self) -> list[MappedDevice]:
        """All mapped devices, by minor number."""
        return sorted(self._devices.values(), key=lambda device: device.minor)

    def get(self, name: str) -> MappedDevice:
        """Return the device called `name`, or `/dev/mapper/name`. Raises: TableError, ENXIO."""
        device = self._devices.get(name.removeprefix("/dev/mapper/"))
        if device is None:
            raise TableError("Device does not exist", errnos.ENXIO)
        return device

    async def until_empty(self) -> None:
        """Return when no device is left, nor one whose removal is under way and may fail."""
        while left := [
            device
            for device in (*self.devices(), *self._removing)
            if not device.events.is_closed
        ]:
            await left[0].events.wait()

    def maybe_device(self, name: str) -> MappedDevice | None:
        """Return the device called `name`, with or without a table."""
        return self._devices.get(name)

    def deps(self, device: MappedDevice) -> list[str]:
        """The names of the devices that the live table stands on, each once."""
        if device.active is None:
            return []
        return list(dict.fromkeys([below.name for below in device.active.devices()]))

    # ---- the directory of exports ----

    def names(self) -> Iterable[tuple[str, str]]:
        """(name, description) of each export."""
        for device in self.devices():
            if device.active is not None:
                yield self.listed(device)

    def listed(self, device: Device) -> tuple[str, str]:
        """(name, description) of one export."""
        assert isinstance(device, MappedDevice)
        # Empty, as other servers have it: clients on a network need not know how the disk is made.
        return device.dm_name, ""

    def open_disks(self) -> list[str]:
        """The names of the disks that all devices stand on, without `raw:`."""
        return [each.bare_name for each in self.opens.devices()]

    def claimed_names(self) -> Iterable[str]:
        """The names of all exports, of those that could not be opened, too."""
        for device in self.devices():
            if device.has_table or device.failure:
                yield device.dm_name

    def maybe_get(self, name: str) -> MappedDevice | None:
        """Return the export called `name`."""
        device = self._devices.get(name)
        return device if device is not None and device.active is not None else None

    def why_missing(self, name: str) -> str:
        """Why there is no export `name` although a file configures one; "" if there is no such reason."""
        device = self._devices.get(name)
        if device is None or device.has_table or not device.failure:
            return ""
        return f"export {name!r} cannot be served now: {device.failure}"

    def acquire(self, name: str) -> MappedDevice:
        """Hold the export called `name` open. Raises: KeyError: there is none."""
        device = self.maybe_get(name)
        if device is None:
            raise KeyError(name)
        device.open_count += 1
        return device

    def release(self, device: Device) -> None:
        """Give back what `acquire` returned."""
        assert isinstance(device, MappedDevice)
        if self._is_closing and not device.open_count:
            return  # `close` did not wait for this connection: its last bio ends only now
        device.put()

    # ---- verbs ----

    async def create(
        self,
        name: str,
        table: str | None,
        *,
        uuid: str = "",
        minor: int | None = None,
        directory: str = "/",
        read_only: bool = False,
        permissions: frozenset[Permission] = frozenset(),
        failure: str = "",
        rotational: bool | None = None,
    ) -> MappedDevice:
        """Create a device; with a table, load and resume it in one go.

        Args:
            table: text, or None for a device without one.
            minor: its minor number; None: the lowest that is free.
            directory: absolute; where relative paths in the table are meant.
            permissions: what the caller allows, see `nbdtarget.common.permissions`.
            rotational: what clients are told; None: what the table's devices say.
            failure: shown as long as it has no table, see `MappedDevice.failure`.
        Raises: TableError, ConstructorError; nothing is left of the device then, nor of the
            files that were created for it.
        """
        check_name(name)
        if name in self._devices:
            raise TableError("Device or resource busy: name exists", errnos.EBUSY)
        if uuid:
            self._check_uuid(uuid)
        if len(self._devices) >= DEVICES_MAX:
            raise TableError(f"More than {DEVICES_MAX} devices", errnos.ENOMEM)
        device = MappedDevice(
            name,
            self._take_minor(minor),
            self.clock,
            uuid=uuid,
            unused=self._remove_unused,
        )
        device.failure = failure
        device.said_rotational = rotational
        self._devices[name] = device
        self._load_locks[device] = asyncio.Lock()
        if table is None:
            return device
        try:
            await self._fill(
                device,
                table,
                directory=directory,
                read_only=read_only,
                permissions=permissions,
            )
        except BaseException:
            await self._remove(device)
            raise
        return device

    async def fill(
        self, name: str, table: str, *, directory: str = "/", read_only: bool = False
    ) -> None:
        """Load the first table of a device that has none, and resume it.

        Raises: TableError, ConstructorError; then the device is as it was, without a table, and
            nothing is left of the files that were created for it.
        """
        device = self.get(name)
        await self._fill(device, table, directory=directory, read_only=read_only)

    async def _fill(
        self,
        device: MappedDevice,
        text: str,
        *,
        directory: str,
        read_only: bool,
        permissions: frozenset[Permission] = frozenset(),
    ) -> None:
        created = await self._load(
            device,
            text,
            directory=directory,
            read_only=read_only,
            permissions=permissions,
        )
        table = device.inactive
        try:
            await device.resume()
        except BaseException:
            if device.inactive is table:  # else another one was loaded meanwhile
                await device.clear()
            # It was never resumed, so there is nothing in the files that were made for it.
            for path in created:
                await self.opens.opener.remove_created(path)
            raise

    def _check_uuid(self, uuid: str) -> None:
        check_uuid(uuid)
        if any(device.uuid == uuid for device in self._devices.values()):
            raise TableError("Device or resource busy: UUID exists", errnos.EBUSY)

    def _take_minor(self, wanted: int | None) -> int:
        return free_minor(
            {device.minor for device in (*self._devices.values(), *self._removing)},
            wanted,
        )

    async def load(
        self,
        name: str,
        table: str,
        *,
        directory: str = "/",
        read_only: bool = False,
        permissions: frozenset[Permission] = frozenset(),
        keep_open: bool = False,
    ) -> list[str]:
        """Construct a table into the inactive slot. Raises: TableError, ConstructorError.

        Args:
            keep_open: a name under which the live table has a disk open means that open disk; if
                it is the name of another disk by now, the table is refused.

        Returns the names of the files that were created for it.
        """
        return await self._load(
            self.get(name),
            table,
            directory=directory,
            read_only=read_only,
            permissions=permissions,
            keep_open=keep_open,
        )

    async def _load(
        self,
        device: MappedDevice,
        text: str,
        *,
        directory: str,
        read_only: bool,
        permissions: frozenset[Permission],
        keep_open: bool = False,
    ) -> list[str]:
        lock = self._load_locks[device]
        if len(text) <= PARSED_AT_ONCE_MAX:
            specs = parse_table(text, self.types)
        else:
            specs = await asyncio.to_thread(parse_table, text, self.types)
        async with lock:
            if self._is_closing:
                raise TableError("the server is stopping", errnos.ESHUTDOWN)
            contexts: list[TableContext] = []
            live = device.active if keep_open else None
            kept = () if live is None else tuple(dict.fromkeys(live.devices()))
            measured: set[Device] = set()

            def make_context(spec: TargetSpec) -> TableContext:
                context = TableContext(
                    self,
                    device,
                    spec,
                    directory=directory,
                    read_only=read_only,
                    permissions=permissions,
                    kept=kept,
                    measured=measured,
                )
                contexts.append(context)
                return context

            try:
                table: Table = await construct_table(
                    specs, self.types, make_context, read_only=read_only
                )
                await device.load(table)
            except BaseException as error:
                if isinstance(error, ConstructorError):
                    # Perhaps that is why: the kernel's text says only that it does not fit.
                    shrunken = [
                        each for context in contexts for each in context.shrunken
                    ]
                    error.reason = "; ".join(dict.fromkeys([error.reason, *shrunken]))
                for context in reversed(contexts):
                    await context.undo()
                raise
            return [path for context in contexts for path in context.created]

    def request_replacement(
        self,
        device: MappedDevice,
        context: TableContext,
        type_name: str,
        args: tuple[str, ...],
        devices: tuple[Device, ...],
    ) -> None:
        """Replace the live target that was constructed with `context`, in a task of its own.

        See `TargetContext.request_replacement`. One that is under way is not begun again.
        """
        if not self._is_closing:
            self.replacements.request(device, context, type_name, args, devices)

    def maybe_load_lock(self, device: MappedDevice) -> asyncio.Lock | None:
        """Return the lock that keeps loads for `device` apart; None: the device is gone."""
        return self._load_locks.get(device)

    async def clear(self, name: str) -> None:
        """Drop the inactive table."""
        await self.get(name).clear()

    async def suspend(
        self,
        name: str,
        *,
        noflush: bool = False,
        within_s: float | None = SUSPEND_S_MAX,
    ) -> None:
        """Suspend; commits. Raises: TableError; ETIMEDOUT: something below does not answer."""
        if self._is_closing:
            raise TableError("the server is stopping", errnos.ESHUTDOWN)
        await self.get(name).suspend(noflush=noflush, within_s=within_s)

    async def resume(
        self, name: str, *, within_s: float | None = SUSPEND_S_MAX
    ) -> None:
        """Resume, with the inactive table if there is one. Raises: TableError."""
        await self.get(name).resume(within_s=within_s)

    async def remove(
        self,
        name: str,
        *,
        force: bool = False,
        deferred: bool = False,
        within_s: float | None = SUSPEND_S_MAX,
    ) -> None:
        """Remove. With `force`, first replace the table by one that fails all I/O.

        Args:
            within_s: as of `MappedDevice.suspend`.
            deferred: a device that is held open is removed when its open count falls to 0.
        Raises: TableError, EBUSY: a connection or another table holds the device open.
        """
        device = self.get(name)
        if force:
            await self.wipe_table(name, within_s=within_s)
        if device.open_count and deferred:
            device.deferred_remove = True
            return
        if device.open_count:
            users = self._describe_users(device)
            raise TableError("Device or resource busy", errnos.EBUSY, hint=users)
        if self._devices.get(device.dm_name) is not device:
            raise TableError("Device does not exist", errnos.ENXIO)
        await self._remove(device, within_s)

    def _describe_users(self, device: MappedDevice) -> str:
        tables = self.opens.holders(device)
        nr_clients = device.open_count - len(tables)
        users = [f"the table of {name}" for name in tables]
        if nr_clients:
            plural = "" if nr_clients == 1 else "s"
            users.append(f"{nr_clients} NBD connection{plural}")
        return f"in use by {' and '.join(users)}"

    async def _remove(
        self, device: MappedDevice, within_s: float | None = None
    ) -> None:
        """Raises: TableError, ETIMEDOUT: it is there as before; so it is if the caller is cancelled in time."""
        if self._devices.get(device.dm_name) is not device:
            # Another task removes it: the name is free, or names another device by now.
            await device.remove(within_s=within_s)
            return
        del self._devices[device.dm_name]
        self._removing.add(device)
        try:
            await device.remove(within_s=within_s)
        except (TableError, asyncio.CancelledError):
            if device.state is not State.REMOVED:
                self._removing.discard(device)
                self._put_back(device)
            else:
                await to_the_end(self._removed(device))
            raise
        except BaseException:
            self._removing.discard(device)
            del self._load_locks[device]
            raise
        await to_the_end(self._removed(device))

    async def _removed(self, device: MappedDevice) -> None:
        if device.is_uncommitted:
            self._uncommitted.append(device.name)
        try:
            await self.replacements.ended(device)
        finally:
            self._removing.discard(device)
            del self._load_locks[device]

    def _put_back(self, device: MappedDevice) -> None:
        """A device that could not be removed has its name again, or one like it."""
        name = device.dm_name
        if name in self._devices:
            name = f"{name[: NAME_LENGTH_MAX // 2]}.{device.minor}"
            log.error("%s: could not be removed, and is %s now", device.name, name)
            device.dm_name, device.name = name, f"/dev/mapper/{name}"
        self._devices[name] = device

    def _remove_unused(self, device: MappedDevice) -> None:
        """Remove a device whose open count is 0, in a task of its own."""
        if self._is_closing:
            return  # `close` removes everything

        async def remove() -> None:
            # By now it may have been opened again, or the removal cancelled.
            if device.deferred_remove and not device.open_count:
                await self._remove(device)

        self._deferred.start(remove())

    async def remove_all(
        self, *, force: bool = False, within_s: float | None = SUSPEND_S_MAX
    ) -> list[str]:
        """Remove every device whose open count is 0, upper ones first.

        Returns the names of those that are still there.
        """
        if force:
            for device in self.devices():
                await self.wipe_table(device.dm_name, within_s=within_s)
        progress = True
        while progress:
            progress = False
            for device in self.devices():
                if not device.open_count and device.dm_name in self._devices:
                    await self._remove(device, within_s)
                    progress = True
        return [device.dm_name for device in self.devices()]

    async def wipe_table(
        self, name: str, *, within_s: float | None = SUSPEND_S_MAX
    ) -> None:
        """Replace the table by an `error` target of the same size.

        Nothing is flushed: what stands below may not answer any more. Reads of a source that does not
        answer are given up.
        """
        device = self.get(name)
        if not device.size:
            return
        await self.load(
            name,
            f"0 {device.size // SECTOR} error",
            read_only=device.read_only,
        )
        try:
            try:
                await device.suspend(noflush=True, within_s=within_s)
            except TableError as error:
                if error.errno != errnos.ETIMEDOUT or not self._give_up_reads(device):
                    raise
                await device.suspend(noflush=True, within_s=within_s)
        except TableError:
            await device.clear()
            raise
        await device.resume(within_s=within_s)

    def _give_up_reads(self, holder: MappedDevice) -> bool:
        """Give up what hangs of devices that `holder` alone reads; False: there are none."""
        hanging = [
            device
            for device in self.opens.lower_devices(holder)
            if device.read_only
            and device.nr_in_flight
            and self.opens.is_held_only_by(device, holder)
        ]
        for device in hanging:
            device.give_up_reads()
        return bool(hanging)

    def set_uuid(self, name: str, uuid: str) -> None:
        """Give a device that has none a UUID. Raises: TableError."""
        device = self.get(name)
        if not uuid:
            raise TableError("Invalid argument: empty UUID")
        if device.uuid:
            raise TableError("Invalid argument: the device has a UUID")
        self._check_uuid(uuid)
        device.uuid = uuid
        device.event()

    def rename(self, old: str, new: str) -> None:
        """Rename. Raises: TableError: no such device, or the new name is taken."""
        device = self.get(old)
        check_name(new)
        if new in self._devices:
            raise TableError("Device or resource busy: name exists", errnos.EBUSY)
        del self._devices[device.dm_name]
        self._devices[new] = device
        device.dm_name = new
        device.name = f"/dev/mapper/{new}"
        device.event()

    async def close(self) -> list[str]:
        """Suspend and remove everything, upper devices first: the process ends.

        Returns the names of devices of which what had ended could not be flushed.

        Bios that wait in a suspended device end with EIO: it will not be resumed, and what
        stands on it could not be suspended while they wait.
        Durable: everything, as after a suspend; but of a device that stands on a suspended one,
            only what its last FLUSH made durable.
        """
        self._is_closing = True
        await self.reopenings.close()
        stops = [
            asyncio.create_task(device.stop_if_suspended())
            # One that is being suspended now: what it waits for is let go here.
            for device in self.devices()
        ]
        for device in self.devices():
            if device.state is State.SUSPENDED:
                device.stop_queueing()
        await self._close_devices()
        for task in stops:
            await task
        await self._deferred.wait()
        for device in list(self._removing):
            await device.remove()
        return self._uncommitted

    async def _close_devices(self) -> None:
        """Remove all side by side, so that one that hangs holds up only what it stands on."""
        loads = asyncio.create_task(self._loads_ended())
        running: dict[asyncio.Task[None], MappedDevice] = {}
        errors: list[BaseException] = []
        while True:
            # A load that is under way for a device that is gone lets go of what it has opened.
            for device in self._removable(may_force=loads.done()):
                running[asyncio.create_task(self._remove(device))] = device
                # The name is free at once: no second task for the same device.
                await asyncio.sleep(0)
            waiting = {*running, *(() if loads.done() else (loads,))}
            if not waiting:
                break
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done & running.keys():
                del running[task]
                if error := task.exception():
                    errors.append(error)
        await loads
        if errors:
            raise errors[0]
        assert not self._devices

    async def _loads_ended(self) -> None:
        for lock in list(self._load_locks.values()):
            async with lock:
                pass

    def _removable(self, *, may_force: bool) -> list[MappedDevice]:
        """Devices whose open count is 0; with `may_force`, also those that only connections hold."""
        found = [device for device in self.devices() if not device.open_count]
        if found or not may_force:
            return found
        held = [
            below
            for device in (*self.devices(), *self._removing)
            for below in self.opens.lower_devices(device)
        ]
        for device in self.devices():
            if device not in held:
                log.warning("%s: still open %d times", device.name, device.open_count)
                device.open_count = 0
                found.append(device)
        return found

    def give_up_reads(self) -> None:
        """End what hangs of the devices that are only read: nothing can be lost by it."""
        for device in self.opens.devices():
            if device.read_only and (nr_reads := device.nr_in_flight):
                log.warning(
                    "%s: does not answer: %d requests are given up",
                    device.name,
                    nr_reads,
                )
                device.give_up_reads()

    def hanging(self) -> list[str]:
        """Return the things that `close` still waits for, a line each."""
        lines = []
        for device in (*self.devices(), *self._removing):
            below = [
                f"{each.name} ({each.nr_in_flight} requests)"
                for each in self.opens.lower_devices(device)
                if each.nr_in_flight
            ]
            what = f"no answer from {', '.join(below)}" if below else "does not end"
            lines.append(f"{device.name}: {what}")
        return lines

    async def commit_what_answers(self, within_s: float) -> list[str]:
        """While `close` hangs: flush and commit what has ended, of each device by itself.

        Returns the names of the devices of which that failed, or did not end in time.
        """
        tasks = {
            asyncio.create_task(device.commit_ended()): device
            for device in (*self.devices(), *self._removing)
        }
        if not tasks:
            return []
        done = await wait_within(tasks, within_s)
        return [
            device.name
            for task, device in tasks.items()
            if task not in done or task.exception() is not None or not task.result()
        ]
