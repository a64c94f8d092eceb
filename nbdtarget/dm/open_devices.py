# SPDX-License-Identifier: Apache-2.0
"""The devices that tables stand on: who holds which, and who may.

Theory of operation. One entry per open device, keyed by what the device *is* (device and
inode of a file, not its path), so that a second name for the same file is seen through. The
rules:

- The live and the inactive table of one mapped device share one `Device` object, and with it
  the `shared` dictionary in which they find one metadata object.
- Two mapped devices share a device only if both read. What one has open for writing is
  refused to every other with EBUSY, and the error names the holder.
- One target never gets the same device twice if it would write: source and destination, or
  metadata and destination, are then one, and the clone would eat itself.
- A mapped device is a device like any other; being held counts its open count up, and
  a table that would stand on itself, by however many steps, is refused.

Other processes are kept out by the lock that the device takes when it is opened.

A `TableContext` is what one target knows of all this. It remembers what its target opened
and created, and `undo` gives everything back if the constructor, or a later one of the same
table, refuses: nothing stays open, and a file that was created for the table is removed.
"""

import asyncio
import errno as errnos
import logging
import os
from collections.abc import Hashable, Sequence
from typing import Protocol
from weakref import WeakValueDictionary

from nbdtarget.clock import Clock
from nbdtarget.devices.base import Device
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.table import TargetSpec
from nbdtarget.errors import ResolveError

__all__ = ["MAPPER", "DeviceOpener", "OpenDevices", "TableContext", "absolute_name"]

_log = logging.getLogger(__name__)

MAPPER = "/dev/mapper/"


class DeviceOpener(Protocol):
    """How names become devices; `nbdtarget.devices.resolve` is the one that matters."""

    async def open_device(self, name: str, *, read_only: bool) -> Device: ...

    async def create_device(self, name: str, size: int) -> Device: ...

    async def remove_created(self, name: str) -> None: ...

    def may_create(self, name: str) -> bool: ...

    def identity(self, name: str) -> Hashable: ...


def absolute_name(name: str, directory: str) -> str:
    """Read a relative path as meant from `directory`; a URI says where it is by itself."""
    scheme, colon, _ = name.partition(":")
    if colon and "/" not in scheme and scheme[:1].isalpha():
        return name
    return os.path.normpath(os.path.join(directory, name))


class _Open:
    """One open device.

    Attributes:
        identity: what the device is.
        holders: how many references each mapped device has.
        shared: see `TargetContext.shared`.
    """

    __slots__ = ("device", "holders", "identity", "read_only", "shared")

    def __init__(self, identity: Hashable, device: Device, *, read_only: bool) -> None:
        self.identity = identity
        self.device = device
        self.read_only = read_only
        self.holders: dict[MappedDevice, int] = {}
        self.shared: dict[str, object] = {}

    def hold(self, holder: MappedDevice) -> None:
        self.holders[holder] = self.holders.get(holder, 0) + 1

    def others(self, holder: MappedDevice) -> list[str]:
        return sorted(other.dm_name for other in self.holders if other is not holder)


class OpenDevices:
    """All devices that the tables of one registry have open."""

    def __init__(self, opener: DeviceOpener) -> None:
        self.opener = opener
        self._opens: dict[Hashable, _Open] = {}
        # Opening takes its time (a server may be far away), and must not happen twice.
        self._locks: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()

    def _lock(self, identity: Hashable) -> asyncio.Lock:
        lock = self._locks.get(identity)
        if lock is None:
            lock = self._locks[identity] = asyncio.Lock()
        return lock

    async def open_path(
        self, name: str, holder: MappedDevice, *, read_only: bool
    ) -> _Open:
        """Open or share a device that is not a mapped one. Raises: ResolveError."""
        identity = self.opener.identity(name)
        async with self._lock(identity):
            held = self._maybe_share(identity, name, holder, read_only=read_only)
            if held is not None:
                return held
            device = await self.opener.open_device(name, read_only=read_only)
            return self._add(identity, device, holder, read_only=read_only)

    async def create_path(self, name: str, size: int, holder: MappedDevice) -> _Open:
        """Create and open. Raises: ResolveError."""
        device = await self.opener.create_device(name, size)
        identity = self.opener.identity(name)
        return self._add(identity, device, holder, read_only=False)

    def open_mapped(
        self, lower: MappedDevice, name: str, holder: MappedDevice, *, read_only: bool
    ) -> _Open:
        """Open or share another mapped device. Raises: ResolveError."""
        if lower is holder or self.stands_on(lower, holder):
            raise ResolveError(
                name, f"{holder.dm_name} would stand on itself", errnos.ELOOP
            )
        if lower.active is None:
            raise ResolveError(name, "has no table", errnos.ENXIO)
        if lower.read_only and not read_only:
            raise ResolveError(name, "Read-only device", errnos.EACCES)
        identity = f"mapper:{lower.minor}"
        held = self._maybe_share(identity, name, holder, read_only=read_only)
        if held is not None:
            return held
        lower.open_count += 1
        return self._add(identity, lower, holder, read_only=read_only)

    def _maybe_share(
        self, identity: Hashable, name: str, holder: MappedDevice, *, read_only: bool
    ) -> _Open | None:
        held = self._opens.get(identity)
        if held is None:
            return None
        others = held.others(holder)
        if others and not (read_only and held.read_only):
            raise ResolveError(name, f"in use by {', '.join(others)}", errnos.EBUSY)
        if held.read_only and not read_only:
            raise ResolveError(
                name, f"open read-only by {holder.dm_name}", errnos.EBUSY
            )
        held.hold(holder)
        return held

    def _add(
        self,
        identity: Hashable,
        device: Device,
        holder: MappedDevice,
        *,
        read_only: bool,
    ) -> _Open:
        assert identity not in self._opens
        opened = self._opens[identity] = _Open(identity, device, read_only=read_only)
        opened.hold(holder)
        return opened

    async def release(self, opened: _Open, holder: MappedDevice) -> None:
        """Drop one reference; the last one closes the device."""
        async with self._lock(opened.identity):
            opened.holders[holder] -= 1
            if opened.holders[holder] == 0:
                del opened.holders[holder]
            if opened.holders:
                return
            assert self._opens[opened.identity] is opened
            try:
                if isinstance(opened.device, MappedDevice):
                    opened.device.put()
                else:
                    await opened.device.close()
            finally:
                del self._opens[opened.identity]

    def lower_devices(self, holder: MappedDevice) -> list[Device]:
        """What `holder`'s tables have open, live and inactive."""
        return [
            opened.device for opened in self._opens.values() if holder in opened.holders
        ]

    def stands_on(self, upper: MappedDevice, lower: MappedDevice) -> bool:
        """Whether `upper` stands on `lower`, by any number of steps."""
        return any(
            device is lower or self.stands_on(device, lower)
            for device in self.lower_devices(upper)
            if isinstance(device, MappedDevice)
        )


class MappedDevices(Protocol):
    """What a context asks of the registry."""

    opens: OpenDevices
    clock: Clock

    def maybe_device(self, name: str) -> MappedDevice | None: ...

    def request_replacement(
        self,
        device: MappedDevice,
        context: "TableContext",
        type_name: str,
        args: tuple[str, ...],
    ) -> None: ...


class TableContext:
    """The `TargetContext` of one target. See the module head.

    Attributes:
        mapped_device: that the table is for.
        created: names of the files that the target has created.
    """

    def __init__(
        self,
        registry: MappedDevices,
        mapped_device: MappedDevice,
        spec: TargetSpec,
        *,
        directory: str,
        read_only: bool,
    ) -> None:
        """Args: directory: absolute; where relative paths of the table line are meant."""
        self.begin = spec.begin
        self.length = spec.length
        self.name = mapped_device.dm_name
        self.read_only = read_only
        self.clock = registry.clock
        self._registry = registry
        self.mapped_device = mapped_device
        self._directory = directory
        self._held: list[tuple[_Open, bool]] = []
        self.created: list[str] = []

    async def open_device(self, name: str, *, read_only: bool = False) -> Device:
        opens = self._registry.opens
        path = absolute_name(name, self._directory)
        lower = self._maybe_mapped(path)
        if lower is not None:
            opened = opens.open_mapped(
                lower, path, self.mapped_device, read_only=read_only
            )
        else:
            opened = await opens.open_path(
                path, self.mapped_device, read_only=read_only
            )
        for other, other_read_only in self._held:
            if other is opened and not (read_only and other_read_only):
                await opens.release(opened, self.mapped_device)
                raise ResolveError(
                    path,
                    "the same device stands twice in this table line",
                    errnos.EBUSY,
                )
        self._held.append((opened, read_only))
        return opened.device

    async def maybe_open_device(self, name: str) -> Device | None:
        path = absolute_name(name, self._directory)
        if self._maybe_mapped(path) is None and (
            self._registry.opens.opener.may_create(path)
        ):
            return None
        return await self.open_device(name)

    async def create_device(self, name: str, size: int) -> Device:
        path = absolute_name(name, self._directory)
        opened = await self._registry.opens.create_path(path, size, self.mapped_device)
        self.created.append(path)
        self._held.append((opened, False))
        return opened.device

    async def close_device(self, device: Device) -> None:
        for index, (opened, _) in enumerate(self._held):
            if opened.device is device:
                del self._held[index]
                await self._registry.opens.release(opened, self.mapped_device)
                return
        raise AssertionError(f"{device.name} is not open here")

    def shared(self, device: Device) -> dict[str, object]:
        for opened, _ in self._held:
            if opened.device is device:
                return opened.shared
        raise AssertionError(f"{device.name} is not open here")

    def event(self) -> None:
        self.mapped_device.event()

    def request_replacement(self, type_name: str, args: Sequence[str]) -> None:
        self._registry.request_replacement(
            self.mapped_device, self, type_name, tuple(args)
        )

    async def undo(self) -> None:
        """After a refusal: close what is still open, remove what was created."""
        while self._held:
            opened, _ = self._held.pop()
            await self._registry.opens.release(opened, self.mapped_device)
        while self.created:
            path = self.created.pop()
            _log.info("%s: removing %s again", self.name, path)
            await self._registry.opens.opener.remove_created(path)

    def _maybe_mapped(self, path: str) -> MappedDevice | None:
        # A real /dev/mapper of the machine shows through: its volumes are fine sources.
        if not path.startswith(MAPPER):
            return None
        return self._registry.maybe_device(path.removeprefix(MAPPER))
