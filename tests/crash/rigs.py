# SPDX-License-Identifier: Apache-2.0
"""The disks that the crash machine drives: each target in a real registry, on crash devices."""

import errno
import random
from typing import Final

from metadata.check import check
from metadata.clone import CloneMetadata
from nbdtarget.devices.base import Device
from nbdtarget.dm.registry import Registry
from nbdtarget.errors import ResolveError
from nbdtarget.metadata_io import run
from tests.support.clock import SimClock
from tests.support.devices import CrashDevice
from tests.support.model import SECTOR

__all__ = [
    "CONTENT",
    "DISK_SIZE",
    "REGION_SIZE",
    "CloneRig",
    "DeviceTable",
    "LinearRig",
]

REGION_SIZE: Final = 8 * SECTOR
# Seven whole regions, and a short one at the end.
DISK_SIZE: Final = 7 * REGION_SIZE + 3 * SECTOR


def _content() -> bytes:
    """What the source holds: noise, but region 2 and the end of region 5 are holes."""
    content = bytearray(random.Random(1).randbytes(DISK_SIZE))
    content[2 * REGION_SIZE : 3 * REGION_SIZE] = bytes(REGION_SIZE)
    content[5 * REGION_SIZE + 4 * SECTOR : 6 * REGION_SIZE] = bytes(4 * SECTOR)
    return bytes(content)


CONTENT: Final = _content()


class DeviceTable:
    """A `DeviceOpener` that knows devices by name, and closes none of them."""

    def __init__(self, devices: dict[str, Device]) -> None:
        self.devices = devices

    async def open_device(self, name: str, *, read_only: bool) -> Device:
        device = self.devices.get(name)
        if device is None:
            raise ResolveError(name, "No such file or directory", errno.ENOENT)
        return device

    async def create_device(self, name: str, size: int) -> Device:
        raise ResolveError(name, "cannot be created here", errno.EPERM)

    def may_create(self, name: str) -> bool:
        return False

    def identity(self, name: str) -> str:
        return name

    async def remove_created(self, name: str) -> None:
        raise AssertionError("nothing is created here")


class _RegistryRig:
    """One mapped device `d` in a registry of its own."""

    table: str
    devices: dict[str, Device]

    def __init__(self) -> None:
        self.clock = SimClock()

    async def start(self) -> None:
        self.registry = Registry(DeviceTable(self.devices), clock=self.clock)
        await self.registry.create("d", self.table)
        self.disk: Device = self.registry.get("d")

    async def suspend(self) -> None:
        await self.registry.suspend("d")

    async def resume(self) -> None:
        await self.registry.resume("d")

    async def reload(self) -> None:
        await self.registry.load("d", self.table)
        await self.registry.resume("d")

    async def message(self, *words: str) -> None:
        await self.registry.get("d").message(0, words)

    async def status(self) -> str:
        return (await self.registry.get("d").status())[0][3]

    async def stop(self) -> None:
        await self.registry.close()


class LinearRig(_RegistryRig):
    """The machine's own check: a table that adds nothing to a crash device."""

    table = f"0 {DISK_SIZE // SECTOR} linear /disk 0"

    def __init__(self, seed: int, inline: float, content: bytes = CONTENT) -> None:
        super().__init__()
        self.device = CrashDevice(
            DISK_SIZE, seed, content=content, inline_chance=inline
        )
        self.devices = {"/disk": self.device}

    async def message(self, *words: str) -> None:
        """linear takes no messages."""

    def crash(self, seed: int) -> "LinearRig":
        image = self.device.crash(seed)
        self.device.cut_power()
        return LinearRig(seed, self.device.inline_chance, image)

    async def check(self) -> None:
        """linear keeps nothing that could be wrong."""


class CloneRig(_RegistryRig):
    """A clone: the source never changes; destination and metadata lose power together."""

    table = (
        f"0 {DISK_SIZE // SECTOR} clone /metadata /destination /source"
        f" {REGION_SIZE // SECTOR} 0 4 hydration_threshold 2 hydration_batch_size 2"
    )
    nr_regions = -(-DISK_SIZE // REGION_SIZE)

    def __init__(
        self,
        seed: int,
        inline: float,
        destination: bytes | None = None,
        metadata: bytes | None = None,
    ) -> None:
        super().__init__()
        garbage = random.Random(seed).randbytes(DISK_SIZE)
        self.destination = CrashDevice(
            DISK_SIZE,
            seed,
            content=garbage if destination is None else destination,
            inline_chance=inline,
            name="/destination",
        )
        # The smallest that works: compactions come often.
        self.metadata = CrashDevice(
            CloneMetadata.device_size_min(self.nr_regions),
            seed + 1,
            content=metadata,
            inline_chance=inline,
            name="/metadata",
        )
        self.source = CrashDevice(
            DISK_SIZE, seed + 2, content=CONTENT, inline_chance=inline, name="/source"
        )
        self.devices = {
            "/destination": self.destination,
            "/metadata": self.metadata,
            "/source": self.source,
        }

    def crash(self, seed: int) -> "CloneRig":
        assert self.source.image() == CONTENT, "the source was written"
        destination = self.destination.crash(seed)
        metadata = self.metadata.crash(seed + 1)
        for device in (self.destination, self.metadata, self.source):
            device.cut_power()
        return CloneRig(seed, self.destination.inline_chance, destination, metadata)

    async def check(self) -> None:
        assert self.source.image() == CONTENT, "the source was written"
        if any(self.metadata.image()):
            await run(self.metadata, check(self.metadata.size))
