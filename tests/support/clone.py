# SPDX-License-Identifier: Apache-2.0
"""A clone on devices in memory, without the device-mapper core around it."""

import errno as errnos
import random
from collections.abc import Sequence

from nbdtarget.bio import OP_FLUSH, OP_READ, OP_WRITE, Bio
from nbdtarget.common.clock import Clock
from nbdtarget.common.errors import ResolveError
from nbdtarget.common.permissions import OVERWRITE, Permission
from nbdtarget.devices.base import Device
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.targets.base import KILL, REMAPPED
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget_metadata.clone.metadata import CloneMetadata
from tests.support.clock import SimClock
from tests.support.model import SECTOR
from tests.support.spy import Spy

__all__ = ["REGION", "Context", "Disk", "Rig"]

REGION = 8 * SECTOR


class Context:
    """A `TargetContext` over devices by name."""

    def __init__(
        self, devices: dict[str, Device], length: int, clock: Clock, begin: int = 0
    ) -> None:
        self.devices = devices
        self.begin = begin
        self.length = length
        self.name = "c"
        self.read_only = False
        self.replaces_unusable = False
        # Tests fill their disks before the metadata is made.
        self.permissions: frozenset[Permission] = frozenset((OVERWRITE,))
        self.clock = clock
        self.nr_events = 0
        self.replacements: list[tuple[str, ...]] = []
        self.given_back: list[Bio] = []
        self.nr_open = 0
        self.created: dict[str, int] = {}
        self._shared: dict[Device, dict[str, object]] = {}

    async def open_device(
        self, name: str, *, read_only: bool = False, shared: bool = False
    ) -> Device:
        device = self.devices.get(name)
        if device is None:
            raise ResolveError(name, "No such file or directory", errnos.ENOENT)
        self.nr_open += 1
        return device

    def full_name(self, name: str) -> str:
        return name

    async def maybe_open_device(self, name: str) -> Device | None:
        if name.startswith("new"):
            return None
        return await self.open_device(name)

    async def create_device(self, name: str, size: int) -> Device:
        self.created[name] = size
        self.devices[name] = MemoryDevice(size, name=name)
        return await self.open_device(name)

    async def close_device(self, device: Device) -> None:
        self.nr_open -= 1

    def shared(self, device: Device) -> dict[str, object]:
        return self._shared.setdefault(device, {})

    def event(self) -> None:
        self.nr_events += 1

    def give_back(self, bio: Bio) -> None:
        self.given_back.append(bio)

    def request_replacement(
        self, type_name: str, args: Sequence[str], devices: Sequence[Device] = ()
    ) -> None:
        self.replacements.append((type_name, *args))


class Disk(Device):
    """The target as a device: what the mapped device does with `map`'s answer."""

    def __init__(self, target: CloneTarget) -> None:
        super().__init__("c", target.begin + target.length)
        self.target = target

    def submit(self, bio: Bio) -> None:
        answer = self.target.map(bio)
        if answer == REMAPPED:
            bio.device.submit(bio)
        elif answer == KILL:
            bio.end(errnos.EIO)


class Rig:
    """Source, destination and metadata with a log, and a clone on them.

    Attributes:
        log: (device, operation, offset, length) of all I/O, in order.
    """

    def __init__(
        self,
        *,
        size: int = 8 * REGION,
        words: str = "8 1 no_hydration",
        begin: int = 0,
        content: bytes | None = None,
    ) -> None:
        self.size = size
        self.content = random.Random(7).randbytes(size) if content is None else content
        self.log: list[tuple[str, str, int, int]] = []
        self.words = ["m", "d", "s", *words.split()]
        region_size = int(self.words[3]) * SECTOR
        metadata_size = CloneMetadata.device_size_for(-(-size // region_size))
        self.source = Spy(MemoryDevice(size, name="s"), self.log)
        self.destination = Spy(MemoryDevice(size, name="d"), self.log)
        self.metadata = Spy(MemoryDevice(metadata_size, name="m"), self.log)
        self.clock = SimClock()
        self.ctx = Context(
            {"m": self.metadata, "d": self.destination, "s": self.source},
            size,
            self.clock,
            begin,
        )

    async def start(self) -> "Rig":
        for at in range(0, self.size, 1 << 16):
            piece = self.content[at : at + (1 << 16)]
            if piece.strip(b"\0"):  # `any` takes milliseconds
                await self.source.device.write(at, piece)
        await self.restart()
        return self

    async def restart(self) -> None:
        """Construct the target from what is on the devices."""
        self.target = await CloneTarget.ctr(self.ctx, self.words)
        await self.target.preresume()
        self.target.resume()
        self.disk = Disk(self.target)
        self.log.clear()

    async def suspend(self) -> None:
        self.target.presuspend()
        await self.target.postsuspend()

    async def stop(self) -> None:
        await self.suspend()
        await self.target.dtr()

    def bio(self, op: int, offset: int = 0, length: int = 0, flags: int = 0) -> Bio:
        """Submit one bio; it may or may not have ended when this returns."""
        payload: memoryview | None = None
        if op == OP_READ:
            payload = memoryview(bytearray(length))
        elif op == OP_WRITE:
            payload = memoryview(b"w" * length)
        bio = Bio(op, offset, length, payload, flags, lambda _: None)
        self.disk.submit(bio)
        return bio

    def flush(self) -> Bio:
        return self.bio(OP_FLUSH)

    def ops(self) -> list[str]:
        """The log as "device operation", and forget it."""
        ops = [f"{device} {op}" for device, op, _, _ in self.log]
        self.log.clear()
        return ops

    async def hydrated(self) -> str:
        """The hydrated/total word of the status line."""
        return (await self.target.status(noflush=True)).split()[3]
