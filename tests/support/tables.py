# SPDX-License-Identifier: Apache-2.0
"""Tables over disks in memory that can be watched, held back and made to fail."""

import errno as errnos
from collections.abc import Callable

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.base import Device
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from tests.support.clock import SimClock
from tests.support.spy import Spy

__all__ = ["Disk", "Disks", "content", "submit"]


class Disk(Spy):
    """A spy that stays what it is when a table closes it.

    Attributes:
        nr_closed: how often that was.
    """

    nr_closed = 0

    async def close(self) -> None:
        self.nr_closed += 1


class Disks:
    """A registry over disks called `/NAME`, sizes in bytes. Also their `DeviceOpener`.

    Attributes:
        log: (device, operation, offset, length) of each bio that reached a disk.
    """

    def __init__(self, **sizes: int) -> None:
        self.log: list[tuple[str, str, int, int]] = []
        self.clock = SimClock()
        self.disks = {
            f"/{name}": Disk(MemoryDevice(size, name=f"/{name}"), self.log)
            for name, size in sizes.items()
        }
        self.registry = Registry(self, clock=self.clock)

    def __getitem__(self, name: str) -> Disk:
        return self.disks[name]

    async def create(self, table: str, name: str = "d") -> MappedDevice:
        return await self.registry.create(name, table)

    async def image(self, name: str) -> bytes:
        disk = self.disks[name].device
        return bytes(await disk.read(0, disk.size))

    async def fill(self, name: str, data: bytes) -> None:
        await self.disks[name].device.write(0, data)

    async def open_device(self, name: str, *, read_only: bool) -> Device:
        if name not in self.disks:
            raise ResolveError(name, "No such file or directory", errnos.ENOENT)
        return self.disks[name]

    async def create_device(self, name: str, size: int) -> Device:
        raise ResolveError(name, "cannot be created here", errnos.EPERM)

    async def remove_created(self, name: str) -> None:
        raise AssertionError("nothing is created here")

    def may_create(self, name: str) -> bool:
        return False

    def identity(self, name: str) -> str:
        return name.replace("/alias-", "/")


def submit(
    device: Device,
    op: int,
    offset: int = 0,
    payload: bytes | int = 0,
    *,
    flags: int = 0,
    endio: Callable[[Bio], None] = lambda _: None,
) -> Bio:
    """Submit a bio whose payload is borrowed, and is scribbled over as soon as that returns."""
    length = payload if isinstance(payload, int) else len(payload)
    view = None
    if op == OP_READ:
        view = memoryview(bytearray(length))
    elif isinstance(payload, bytes):
        view = memoryview(bytearray(payload))
    bio = Bio(op, offset, length, view, flags, endio, None, borrowed=True)
    device.submit(bio)
    if view is not None and op != OP_READ:
        view[:] = b"\xee" * length
    return bio


def content(bio: Bio) -> bytes:
    assert bio.status == 0
    assert bio.payload is not None
    return bytes(bio.payload)
