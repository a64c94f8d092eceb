# SPDX-License-Identifier: Apache-2.0
"""The devices that tables stand on: which tables have which device open, and which others may open it.

Theory of operation. There is one entry for each open device. Its key is what the device *is* (the device and inode
number of a file, for example, and not its path), so a second name for the same file leads to the same entry. The rules:

- All tables that have a device open have the same `Device` object: a FLUSH covers the writes of all of them, and
  after a failed FLUSH the device is latched for all. With the object comes the dictionary `shared`, in which the
  live and the inactive table of a mapped device find the same metadata object.
- A target that only passes bios on (linear, striped, and so on) opens a device *shared*: any number of mapped
  devices may stand on it and write to it, as slices of one disk do. A device that a target opens for itself to
  write to (metadata, or a clone's destination) is refused to every other mapped device. A device that a target
  opens for itself to read (a clone's source) is refused to every other mapped device that would write to it. The
  error is EBUSY, and names the mapped device that has it open.
- These rules hold between mapped devices. The live and the inactive table of one mapped device may have the same
  devices open, because only one of the two runs.
- A device that is latched or lost counts as not open. A table that is loaded then gets the same disk opened once
  more, with a new `Device` and a new `shared`; the live table keeps the old one until it is swapped away. The rules
  hold for both objects together, and the lock on the file does not stand in the way (see
  `nbdtarget.devices.file.open`). A device that can mend itself (a connection to a server) is asked to do so first,
  and is shared if it does. A source whose server cannot be reached stays the one that is open: it reconnects by itself.
- A device that is open read-only stays so. A table that would write to it is refused until it is closed, because a
  second descriptor would meet the lock of the first.
- One target never gets the same device twice if it would write to it: a clone whose source is its destination would
  overwrite what it is going to read.
- A mapped device is a device like any other. Its open count tells how many mapped devices and exports hold it. A table that would
  stand on itself, directly or by way of others, is refused.

Other processes are kept out by the lock that a device takes when it is opened.

Renamed files. A file may be renamed while it is served, and its name given to another file. A table that replaces
a part of the live one by itself (`request_replacement`), or that is loaded with `keep_open`, is given the open devices:
a name that was used to open one of them means that device. If the name means another disk by now, the table is
refused, because its words would not lead back to what is served. A table that a person loads means what its names
mean now.

Disks that grow. A table is judged by the present sizes of its devices, so an open device is measured again when a
table is loaded. If the device has grown, its `size` is the new one from then on; the live table goes on using what it
had. If it has shrunk, the error of a table that does not fit says so. A device that cannot change its size while it
is open (`Device.can_resize`: a connection to an NBD server) is opened once more for the new table, as a latched one is.

A `TableContext` is the part of this that one target sees. It remembers what its target has opened and created, and
`undo` gives everything back if the constructor of this target, or a later one of the same table, refuses: nothing
stays open, and a file that was created for the table is removed.
"""

import asyncio
import errno as errnos
import logging
from collections.abc import Container, Hashable, Iterable, Sequence
from typing import Final, Protocol
from weakref import WeakValueDictionary

from nbdtarget.bio import Bio
from nbdtarget.common.clock import Clock, timeout
from nbdtarget.common.errors import ResolveError
from nbdtarget.common.permissions import Permission
from nbdtarget.devices.base import Device
from nbdtarget.devices.resolve import absolute_name
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.table import TargetSpec

__all__ = ["MAPPER", "DeviceOpener", "OpenDevices", "TableContext"]

log = logging.getLogger(__name__)

MAPPER = "/dev/mapper/"
MEASURE_S_MAX: Final = 2.0  # a server that hangs keeps no table from being loaded


class DeviceOpener(Protocol):
    """How names become devices. `nbdtarget.devices.resolve` does it, and tests have others."""

    async def open_device(self, name: str, *, read_only: bool) -> Device: ...

    async def create_device(self, name: str, size: int) -> Device: ...

    async def remove_created(self, name: str) -> None: ...

    def may_create(self, name: str) -> bool: ...

    def identity(self, name: str) -> Hashable: ...


class _Use:
    """One reference to an open device, by one target of `holder`.

    Attributes:
        shared: other mapped devices may use the device, too, for reading and writing.
    """

    __slots__ = ("holder", "opened", "read_only", "shared")

    def __init__(
        self, opened: "_Open", holder: MappedDevice, *, read_only: bool, shared: bool
    ) -> None:
        self.opened = opened
        self.holder = holder
        self.read_only = read_only
        self.shared = shared

    @property
    def device(self) -> Device:
        return self.opened.device

    def is_like(self, other: "_Use") -> bool:
        """Whether both uses are compatible with the same other uses."""
        return (self.holder, self.read_only, self.shared) == (
            other.holder,
            other.read_only,
            other.shared,
        )

    def tolerates(self, other: "_Use") -> bool:
        """Whether another mapped device may use the device in the way of `other`."""
        return self.shared or (self.read_only and other.read_only)


class _Open:
    """One open device.

    Attributes:
        identity: what the device is.
        size_max: the largest that it has been, bytes.
        uses: at least one, as soon as the entry is in `OpenDevices`.
        shared: see `TargetContext.shared`.
        before: the latched or lost device that this one was opened to replace; it may still be in use.
    """

    __slots__ = (
        "before",
        "device",
        "identity",
        "read_only",
        "shared",
        "size_max",
        "uses",
    )

    def __init__(
        self,
        identity: Hashable,
        device: Device,
        *,
        read_only: bool,
        before: "_Open | None" = None,
    ) -> None:
        self.identity = identity
        self.device = device
        self.read_only = read_only
        self.before = before
        self.size_max = device.size
        self.uses: list[_Use] = []
        self.shared: dict[str, object] = {}

    @property
    def uses_of_disk(self) -> list[_Use]:
        """Return the uses of every opening of the same disk."""
        return self.uses + ([] if self.before is None else self.before.uses_of_disk)

    async def has_left_its_size(self) -> bool:
        """Whether the disk must be opened once more, because its size has changed and this object cannot follow.

        Not while it holds metadata: the two tables of a mapped device share one metadata object, on one device.
        """
        device = self.device
        if device.can_resize or self.shared:
            return False
        return await self._measured_size() != device.size

    async def _measured_size(self) -> int:
        device = self.device
        try:
            async with timeout(MEASURE_S_MAX):
                return await device.measure()
        except (OSError, ResolveError) as error:
            log.warning(
                "%s: its size cannot be read and is taken to be the same as before: %s",
                device.name,
                str(error) or "no answer",
            )
            return device.size

    async def measure(self) -> None:
        """Set `size` of the device to what it is now."""
        device = self.device
        if not device.can_resize:
            return
        size = await self._measured_size()
        if size == device.size:
            return
        is_larger = size > device.size
        log.log(
            logging.INFO if is_larger else logging.WARNING,
            "%s: has %s from %d to %d bytes",
            device.name,
            "grown" if is_larger else "shrunk",
            device.size,
            size,
        )
        device.set_size(size)
        self.size_max = max(self.size_max, size)

    def is_held_by(self, holder: MappedDevice) -> bool:
        return any(use.holder is holder for use in self.uses)

    def add(self, use: _Use) -> None:
        """Raises: ResolveError, without a name: the uses that there are do not allow this one."""
        if self.uses and self.uses[-1].is_like(use):
            self.uses.append(use)  # one more target of a long table on one device
            return
        # The two tables of one mapped device never run at the same time: only other holders count.
        others = [each for each in self.uses_of_disk if each.holder is not use.holder]
        # A source tolerates no writer, but a shared writer tolerates everything: both must agree.
        clashing = [
            each for each in others if not (each.tolerates(use) and use.tolerates(each))
        ]
        if clashing:
            raise ResolveError("", f"in use by {_names(clashing)}", errnos.EBUSY)
        if self.read_only and not use.read_only:
            raise ResolveError(
                "", f"open read-only by {_names(self.uses)}", errnos.EBUSY
            )
        if isinstance(self.device, MappedDevice) and not self.is_held_by(use.holder):
            self.device.open_count += 1
        self.uses.append(use)

    def drop(self, use: _Use) -> None:
        self.uses.remove(use)
        if isinstance(self.device, MappedDevice) and not self.is_held_by(use.holder):
            self.device.put()


def _names(uses: Iterable[_Use]) -> str:
    return ", ".join(sorted({use.holder.dm_name for use in uses}))


class OpenDevices:
    """All devices that the tables of one registry have open."""

    def __init__(self, opener: DeviceOpener) -> None:
        self.opener = opener
        self._opens: dict[Hashable, _Open] = {}
        self._unusable: list[
            _Open
        ] = []  # still in use, but opened again for newer tables
        # Opening takes time (a server may be far away). Meanwhile nothing else may open the same disk.
        self._locks: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()

    def _lock(self, identity: Hashable) -> asyncio.Lock:
        lock = self._locks.get(identity)
        if lock is None:
            lock = self._locks[identity] = asyncio.Lock()
        return lock

    def holders(self, device: Device) -> list[str]:
        """The names of the mapped devices whose tables, live or inactive, hold `device` open."""
        opened = (*self._opens.values(), *self._unusable)
        uses = [use for each in opened if each.device is device for use in each.uses]
        return sorted({use.holder.dm_name for use in uses})

    async def open_path(
        self,
        name: str,
        holder: MappedDevice,
        *,
        read_only: bool,
        shared: bool,
        measured: Container[Device] = (),
    ) -> _Use:
        """Open or share a device that is not a mapped one. Raises: ResolveError.

        Args:
            measured: devices whose size is known to be right.
        """
        identity = self.opener.identity(name)
        async with self._lock(identity):
            opened = self._opens.get(identity)
            if opened is None:
                device = await self.opener.open_device(name, read_only=read_only)
                opened = _Open(identity, device, read_only=read_only)
            elif not opened.device.health.is_usable or (
                opened.device not in measured and await opened.has_left_its_size()
            ):
                return await self._use_anew(
                    name, opened, holder, read_only=read_only, shared=shared
                )
            return self._use(name, opened, holder, read_only=read_only, shared=shared)

    async def _use_anew(
        self,
        name: str,
        old: _Open,
        holder: MappedDevice,
        *,
        read_only: bool,
        shared: bool,
    ) -> _Use:
        """Open a disk once more whose open device is latched, lost, or of another size by now.

        Raises: ResolveError.
        """
        try:
            device = await old.device.reopened(name, read_only=read_only)
            if device is None:
                device = await self.opener.open_device(name, read_only=read_only)
        except ResolveError:
            if not (read_only and old.read_only):
                raise
            # Nothing was written to it, so nothing can be lost; and a source reconnects by itself.
            return self._use(name, old, holder, read_only=True, shared=shared)
        if device is old.device:
            return self._use(name, old, holder, read_only=read_only, shared=shared)
        new = _Open(old.identity, device, read_only=read_only, before=old)
        new.size_max = max(old.size_max, device.size)
        self._unusable.append(old)
        try:
            use = self._use(name, new, holder, read_only=read_only, shared=shared)
        except ResolveError:
            self._unusable.remove(old)
            try:
                await device.close()
            finally:
                old.device.reopening_undone()
            raise
        log.info("%s: %s: opened again", holder.name, name)
        return use

    async def keep_open(
        self,
        device: Device,
        name: str,
        holder: MappedDevice,
        *,
        read_only: bool,
        shared: bool,
    ) -> _Use:
        """Share what `holder` has open as `name`. Raises: ResolveError: it is another disk now."""
        opened = next(each for each in self._all if each.device is device)
        means = self.opener.identity(name)
        # The identity of a disk in memory is another one at each call, because each opening makes a new
        # disk. Then the name can only mean the open one.
        is_always_another = means != self.opener.identity(name)
        if means != opened.identity and not is_always_another:
            raise ResolveError(
                name,
                f"{holder.dm_name} has another disk open under this name: that one was"
                " renamed or replaced. Load a table with its present name",
                errnos.ESTALE,
            )
        if not device.health.is_usable:
            return await self.open_path(
                name, holder, read_only=read_only, shared=shared
            )
        return self._use(name, opened, holder, read_only=read_only, shared=shared)

    async def create_path(self, name: str, size: int, holder: MappedDevice) -> _Use:
        """Create and open. Raises: ResolveError."""
        device = await self.opener.create_device(name, size)
        opened = _Open(self.opener.identity(name), device, read_only=False)
        assert opened.identity not in self._opens
        return self._use(name, opened, holder, read_only=False, shared=False)

    def open_mapped(
        self,
        lower: MappedDevice,
        name: str,
        holder: MappedDevice,
        *,
        read_only: bool,
        shared: bool,
    ) -> _Use:
        """Open or share another mapped device. Raises: ResolveError."""
        if lower is holder or self.stands_on(lower, holder):
            raise ResolveError(
                name, f"{holder.dm_name} would stand on itself", errnos.ELOOP
            )
        if lower.active is None:
            reason = lower.failure or "has no table"
            raise ResolveError(name, reason, errnos.ENXIO)
        if lower.read_only and not read_only:
            raise ResolveError(name, "Read-only device", errnos.EACCES)
        identity = f"mapper:{lower.minor}"
        opened = self._opens.get(identity)
        if opened is None:
            # No descriptor is opened here that could be read-only.
            opened = _Open(identity, lower, read_only=False)
        return self._use(name, opened, holder, read_only=read_only, shared=shared)

    def _use(
        self,
        name: str,
        opened: _Open,
        holder: MappedDevice,
        *,
        read_only: bool,
        shared: bool,
    ) -> _Use:
        use = _Use(opened, holder, read_only=read_only, shared=shared)
        try:
            opened.add(use)
        except ResolveError as error:
            raise ResolveError(name, error.reason, error.errno) from None
        self._opens[opened.identity] = opened
        return use

    async def release(self, use: _Use) -> None:
        """Drop one reference; the last one closes the device."""
        opened = use.opened
        async with self._lock(opened.identity):
            try:
                opened.drop(use)
                if not opened.uses and not isinstance(opened.device, MappedDevice):
                    await opened.device.close()
            finally:
                if not opened.uses:
                    self._forget(opened)

    def _forget(self, opened: _Open) -> None:
        """Forget an entry whose last use is gone."""
        if opened in self._unusable:
            self._unusable.remove(opened)
            return
        assert self._opens[opened.identity] is opened
        before = opened.before
        while before is not None and not before.uses:
            before = before.before
        if before is None:
            del self._opens[opened.identity]
        else:
            # The new table is gone again, and the live one still has the old device: that is the entry again.
            self._unusable.remove(before)
            self._opens[opened.identity] = before
            before.device.reopening_undone()

    def has_unusable(self, opened: _Open, holder: MappedDevice) -> bool:
        """Whether `opened` replaces a latched or lost device that `holder` still has open."""
        before = opened.before
        while before is not None:
            is_useless = not (before.read_only or before.device.health.is_usable)
            if is_useless and before.is_held_by(holder):
                return True
            before = before.before
        return False

    @property
    def _all(self) -> list[_Open]:
        return [*self._opens.values(), *self._unusable]

    def devices(self) -> list[Device]:
        """All open devices that are not mapped devices."""
        return [
            opened.device
            for opened in self._all
            if not isinstance(opened.device, MappedDevice)
        ]

    def is_held_only_by(self, device: Device, holder: MappedDevice) -> bool:
        """Whether no other mapped device's table has `device` open."""
        return all(
            use.holder is holder
            for opened in self._all
            if opened.device is device
            for use in opened.uses
        )

    def lower_devices(self, holder: MappedDevice) -> list[Device]:
        """Return the devices that the tables of `holder` have open, live and inactive."""
        return [opened.device for opened in self._all if opened.is_held_by(holder)]

    def stands_on(self, upper: MappedDevice, lower: MappedDevice) -> bool:
        """Whether `upper` stands on `lower`, by any number of steps."""
        return any(
            device is lower or self.stands_on(device, lower)
            for device in self.lower_devices(upper)
            if isinstance(device, MappedDevice)
        )


class MappedDevices(Protocol):
    """The methods of the registry that a context calls."""

    opens: OpenDevices
    clock: Clock

    def maybe_device(self, name: str) -> MappedDevice | None: ...

    def request_replacement(
        self,
        device: MappedDevice,
        context: "TableContext",
        type_name: str,
        args: tuple[str, ...],
        devices: tuple[Device, ...],
    ) -> None: ...


class TableContext:
    """The `TargetContext` of one target. See the module head.

    Attributes:
        mapped_device: the one that the table is for.
        created: names of the files that the target has created.
        shrunken: a sentence for each device that is smaller than it was.
    """

    def __init__(
        self,
        registry: MappedDevices,
        mapped_device: MappedDevice,
        spec: TargetSpec,
        *,
        directory: str,
        read_only: bool,
        permissions: frozenset[Permission] = frozenset(),
        kept: Sequence[Device] = (),
        measured: set[Device] | None = None,
    ) -> None:
        """
        Args:
            directory: absolute; relative paths of the table line begin there.
            kept: open devices of `mapped_device`; a name that one of them was opened by means that one.
            measured: shared by the lines of one table: devices whose size is known to be right.
        """
        self.begin = spec.begin
        self.length = spec.length
        self.name = mapped_device.dm_name
        self.read_only = read_only
        self.permissions = permissions
        self.clock = registry.clock
        self._registry = registry
        self.mapped_device = mapped_device
        self._directory = directory
        self._kept = tuple(kept)
        self._measured = set() if measured is None else measured
        self._held: list[_Use] = []
        self.created: list[str] = []
        self.shrunken: list[str] = []

    async def open_device(
        self, name: str, *, read_only: bool = False, shared: bool = False
    ) -> Device:
        path = absolute_name(name, self._directory)
        use = await self._open(path, read_only=read_only, shared=shared)
        for other in self._held:
            is_same = other.opened.identity == use.opened.identity
            if is_same and not (read_only and other.read_only):
                await self._registry.opens.release(use)
                raise ResolveError(
                    path,
                    "the same device stands twice in this table line",
                    errnos.EBUSY,
                )
        self._held.append(use)
        if not isinstance(use.device, MappedDevice):
            await self._measure(use.opened)
        return use.device

    async def _measure(self, opened: _Open) -> None:
        """Measure a device, once for a whole table."""
        device = opened.device
        if device not in self._measured:
            self._measured.add(device)
            await opened.measure()
        if device.size < opened.size_max:
            self.shrunken.append(
                f"{device.name} has shrunk from {opened.size_max} to {device.size} bytes"
                " since it was opened"
            )

    async def _open(self, path: str, *, read_only: bool, shared: bool) -> _Use:
        opens, holder = self._registry.opens, self.mapped_device
        lower = self._maybe_mapped(path)
        if lower is not None:
            return opens.open_mapped(
                lower, path, holder, read_only=read_only, shared=shared
            )
        kept = self._kept_as(path)
        if kept is not None:
            return await opens.keep_open(
                kept, path, holder, read_only=read_only, shared=shared
            )
        use = await opens.open_path(
            path,
            holder,
            read_only=read_only,
            shared=shared,
            measured=self._measured,
        )
        if not use.device.can_resize:
            self._measured.add(use.device)  # `open_path` has just done so
        return use

    def _kept_as(self, path: str) -> Device | None:
        """Raises: ResolveError: more than one device is open under this name."""
        kept = [device for device in self._kept if device.name == path]
        if len(kept) > 1:
            raise ResolveError(path, "two open disks have this name", errnos.ENOTUNIQ)
        return kept[0] if kept else None

    def full_name(self, name: str) -> str:
        return absolute_name(name, self._directory)

    async def maybe_open_device(self, name: str) -> Device | None:
        path = absolute_name(name, self._directory)
        if (
            self._maybe_mapped(path) is None
            and self._kept_as(path) is None
            and self._registry.opens.opener.may_create(path)
        ):
            return None
        return await self.open_device(name)

    async def create_device(self, name: str, size: int) -> Device:
        path = absolute_name(name, self._directory)
        use = await self._registry.opens.create_path(path, size, self.mapped_device)
        self.created.append(path)
        self._held.append(use)
        return use.device

    async def close_device(self, device: Device) -> None:
        for index, use in enumerate(self._held):
            if use.device is device:
                del self._held[index]
                await self._registry.opens.release(use)
                return
        raise AssertionError(f"{device.name} is not open here")

    @property
    def replaces_unusable(self) -> bool:
        opens, holder = self._registry.opens, self.mapped_device
        return any(opens.has_unusable(use.opened, holder) for use in self._held)

    def shared(self, device: Device) -> dict[str, object]:
        for use in self._held:
            if use.device is device:
                return use.opened.shared
        raise AssertionError(f"{device.name} is not open here")

    def event(self) -> None:
        self.mapped_device.event()

    def give_back(self, bio: Bio) -> None:
        self.mapped_device.give_back(bio)

    def request_replacement(
        self, type_name: str, args: Sequence[str], devices: Sequence[Device] = ()
    ) -> None:
        self._registry.request_replacement(
            self.mapped_device, self, type_name, tuple(args), tuple(devices)
        )

    async def undo(self) -> None:
        """After a refusal: close what is still open, remove what was created."""
        while self._held:
            await self._registry.opens.release(self._held.pop())
        while self.created:
            path = self.created.pop()
            log.info("%s: removing %s again", self.name, path)
            await self._registry.opens.opener.remove_created(path)

    def _maybe_mapped(self, path: str) -> MappedDevice | None:
        # A real /dev/mapper of the machine shows through: its volumes are fine sources.
        path = path.removeprefix("raw:")
        if not path.startswith(MAPPER):
            return None
        return self._registry.maybe_device(path.removeprefix(MAPPER))
