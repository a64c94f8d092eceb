# SPDX-License-Identifier: Apache-2.0
"""Devices, targets and a registry for the tests of the device-mapper core."""

import errno as errnos
from collections.abc import Sequence

from nbdtarget.bio import (
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.common.errors import ConstructorError, ResolveError, TableError
from nbdtarget.devices.base import (
    EXTENT_DATA,
    Device,
    Extent,
)
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from nbdtarget.targets.base import SUBMITTED, Target, TargetContext
from nbdtarget.targets.registry import TARGET_TYPES
from tests.support.clock import SimClock

__all__ = [
    "BuggyTarget",
    "ProbeTarget",
    "RamDevice",
    "RamOpener",
    "TellingTarget",
    "content",
    "make",
    "make_registry",
    "submit",
]


class RamDevice(Device):
    """Bytes in memory that records its bios, and keeps them while `hold` is set."""

    def __init__(self, name: str, size: int, *, read_only: bool = False) -> None:
        super().__init__(name, size, read_only=read_only)
        self.data = bytearray(size)
        self.hold = False
        self.held: list[Bio] = []
        self.log: list[tuple[int, int, int, int]] = []
        self.closed = False
        self.flush_errno = 0

    def submit(self, bio: Bio) -> None:
        assert not self.closed
        self.log.append((bio.op, bio.offset, bio.length, bio.flags))
        if self.hold:
            bio.own()
            self.held.append(bio)
        else:
            self.serve(bio)

    def serve(self, bio: Bio) -> None:
        status = self.check_bounds(bio)
        if not status:
            end = bio.offset + bio.length
            if bio.op == OP_READ:
                assert bio.payload is not None
                bio.payload[:] = self.data[bio.offset : end]
            elif bio.op == OP_WRITE:
                assert bio.payload is not None
                self.data[bio.offset : end] = bio.payload
            elif bio.op in (OP_WRITE_ZEROES, OP_DISCARD):
                self.data[bio.offset : end] = bytes(bio.length)
            elif bio.op == OP_FLUSH:
                status = self.flush_errno
        bio.end(status)

    def let_go(self) -> None:
        self.hold = False
        held, self.held = self.held, []
        for bio in held:
            self.serve(bio)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return [Extent(length, EXTENT_DATA)]

    async def close(self) -> None:
        assert not self.closed
        self.closed = True


class RamOpener:
    """Devices by name; opening one that is not there fails as a missing file does."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.open: dict[str, RamDevice] = {}
        self.created: list[str] = []
        self.opened: list[str] = []  # each time

    def identity(self, name: str) -> str:
        return name.replace("/alias-", "/")

    def may_create(self, name: str) -> bool:
        return name not in self.sizes

    async def open_device(self, name: str, *, read_only: bool) -> Device:
        if name not in self.sizes:
            raise ResolveError(name, "No such file or directory", errnos.ENOENT)
        device = RamDevice(name, self.sizes[name], read_only=read_only)
        self.open[name] = device
        self.opened.append(name)
        return device

    async def create_device(self, name: str, size: int) -> Device:
        self.sizes[name] = size
        self.created.append(name)
        return await self.open_device(name, read_only=False)

    async def remove_created(self, name: str) -> None:
        assert self.open[name].closed
        del self.sizes[name]

    @property
    def still_open(self) -> list[str]:
        return [name for name, device in self.open.items() if not device.closed]


class ProbeTarget(Target):
    """`probe <fast> <slow> [fail|refuse|create]`: records its life; ends bios itself."""

    type_name = "probe"
    version = (0, 1, 0)
    num_flush_bios = 2
    lives: list[str] = []  # noqa: RUF012 (tests clear it)

    def __init__(self, ctx: TargetContext, args: Sequence[str], device: Device) -> None:
        super().__init__(ctx)
        self.args = args
        self.device = device
        self.holds_flushes = False
        self.flushes: list[Bio] = []

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "ProbeTarget":
        created = await ctx.maybe_open_device(args[0])
        if created is None:
            created = await ctx.create_device(args[0], 4096)
        await ctx.open_device(args[1], read_only=True)
        if list(args[2:]) == ["fail"]:
            raise ConstructorError("Invalid probe")
        cls.lives.append("ctr")
        return cls(ctx, args, created)

    async def dtr(self) -> None:
        for device in list(self.iterate_devices()):
            await self.ctx.close_device(device)
        self.lives.append("dtr")

    def map(self, bio: Bio) -> int:
        if bio.op == OP_FLUSH and self.holds_flushes:
            self.flushes.append(bio)
        else:
            bio.end(0)
        return SUBMITTED

    def presuspend(self) -> None:
        self.lives.append("presuspend")

    async def postsuspend(self) -> None:
        self.lives.append("postsuspend")

    async def preresume(self) -> None:
        self.lives.append("preresume")
        if list(self.args[2:]) == ["refuse"]:
            raise TableError("will not", errnos.EBUSY)

    def resume(self) -> None:
        self.lives.append("resume")

    async def status(self, *, noflush: bool = False) -> str:
        return "noflush" if noflush else "flush"

    def table_words(self) -> str:
        return " ".join(self.args)

    async def message(self, words: Sequence[str]) -> str | None:
        if words[0] == "event":
            self.ctx.event()
            return None
        return " ".join(words)

    def iterate_devices(self) -> list[Device]:
        context = self.ctx
        held = getattr(context, "_held", [])
        return [use.device for use in held]


class BuggyTarget(Target):
    """Breaks an invariant of ours on every bio."""

    type_name = "buggy"
    version = (0, 0, 1)

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "BuggyTarget":
        return cls(ctx)

    def map(self, bio: Bio) -> int:
        raise AssertionError("a bug")

    async def postsuspend(self) -> None:
        raise AssertionError("another bug")

    async def dtr(self) -> None:
        raise AssertionError("a third one")


class TellingTarget(Target):
    """`told <flags>`: has a metadata context "tale", in which all of it has those flags."""

    type_name = "told"
    version = (0, 0, 1)
    flags = 0

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "TellingTarget":
        target = cls(ctx)
        target.flags = int(args[0])
        return target

    async def dtr(self) -> None:
        pass

    @property
    def contexts(self) -> tuple[str, ...]:
        return ("tale",)

    async def context_extents(
        self, context: str, offset: int, length: int
    ) -> list[Extent]:
        if context != "tale":
            return await super().context_extents(context, offset, length)
        return [Extent(length, self.flags)]


def make_registry(**sizes: int) -> tuple[Registry, RamOpener]:
    """A registry over RAM devices called `/NAME`, sizes in bytes."""
    opener = RamOpener()
    opener.sizes = {f"/{name}": size for name, size in sizes.items()}
    ProbeTarget.lives = []
    types: dict[str, type[Target]] = {
        **TARGET_TYPES,
        "probe": ProbeTarget,
        "buggy": BuggyTarget,
        "told": TellingTarget,
    }
    return Registry(opener, types=types, clock=SimClock()), opener


async def make(
    table: str, *, read_only: bool = False, **sizes: int
) -> tuple[MappedDevice, Registry, RamOpener]:
    registry, opener = make_registry(**sizes)
    device = await registry.create("x", table, read_only=read_only)
    return device, registry, opener


def submit(
    device: MappedDevice,
    op: int,
    offset: int = 0,
    payload: bytes | int = 0,
    *,
    flags: int = 0,
    borrowed: bool = False,
) -> Bio:
    length = payload if isinstance(payload, int) else len(payload)
    view = None
    if op == OP_READ:
        view = memoryview(bytearray(length))
    elif isinstance(payload, bytes):
        view = memoryview(bytearray(payload))
    bio = Bio(op, offset, length, view, flags, lambda _: None, None, borrowed)
    device.submit(bio)
    return bio


def content(bio: Bio) -> bytes:
    assert bio.payload is not None
    return bytes(bio.payload)
