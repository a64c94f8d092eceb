# SPDX-License-Identifier: Apache-2.0
"""A real registry over real files, each file behind a `Spy`; only time is simulated."""

import asyncio
import errno as errnos
import random
from collections.abc import Callable, Hashable
from pathlib import Path

from nbdtarget.bio import Bio
from nbdtarget.common.errors import ConstructorError
from nbdtarget.devices import resolve
from nbdtarget.devices.base import Device
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from nbdtarget.targets import metadata_io
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget_metadata.clone.superblock import CLONE
from nbdtarget_metadata.log.superblock import read_superblock
from tests.support.clock import SimClock
from tests.support.patience import PATIENCE_S
from tests.support.spy import Spy

__all__ = ["MIB", "SECTOR", "Lab"]

MIB = 1 << 20
SECTOR = 512


class Lab:
    """Files `meta`, `dest` and `source` in a directory, and clones on them.

    Attributes:
        log: (path, operation, offset, length) of all I/O, in order.
        spies: by file name; a file is behind one as long as it is open.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.clock = SimClock()
        self.log: list[tuple[str, str, int, int]] = []
        self.spies: dict[str, Spy] = {}
        self.registry = Registry(self, clock=self.clock)

    # The methods of an opener, for the registry: the real one, behind a spy

    def identity(self, name: str) -> Hashable:
        return resolve.identity(name)

    def may_create(self, name: str) -> bool:
        return resolve.may_create(name)

    async def open_device(self, name: str, *, read_only: bool) -> Device:
        return self._spied(await resolve.open_device(name, read_only=read_only))

    async def create_device(self, name: str, size: int) -> Device:
        return self._spied(await resolve.create_device(name, size))

    async def remove_created(self, name: str) -> None:
        await resolve.remove_created(name)

    def _spied(self, device: Device) -> Spy:
        spy = Spy(device, self.log)
        self.spies[Path(device.name).name] = spy
        return spy

    # Making

    def make_files(self, size: int, *, content: bool = True) -> bytes:
        """Make source and destination of `size` bytes; return what the source holds."""
        data = random.Random(size).randbytes(size) if content else b""
        (self.work / "source").write_bytes(data)
        for name in ("source", "dest"):
            with (self.work / name).open("ab") as file:
                file.truncate(size)
        return data

    def line(self, size: int, words: str) -> str:
        devices = " ".join(str(self.work / name) for name in ("meta", "dest", "source"))
        return f"0 {size // SECTOR} clone {devices} {words}"

    async def create(self, size: int, words: str) -> MappedDevice:
        device = await self.registry.create("c", self.line(size, words))
        self.log.clear()
        return device

    async def refused(self, size: int, words: str) -> str:
        """Create, which must fail and leave nothing open; return why."""
        try:
            await self.create(size, words)
        except ConstructorError as error:
            assert self.registry.devices() == []
            return error.reason
        raise AssertionError(f"{words} was accepted")

    def target(self) -> CloneTarget:
        table = self.registry.get("c").active
        assert table is not None
        (target,) = table.targets
        assert isinstance(target, CloneTarget)
        return target

    # Looking

    def generation(self) -> int:
        """Of the superblock that is on disk now."""
        path = self.work / "meta"
        steps = read_superblock(CLONE, path.stat().st_size)
        return metadata_io.run_file(path, steps, read_only=True).superblock.generation

    async def status(self, *, noflush: bool = True) -> list[str]:
        (line,) = await self.registry.get("c").status(noflush=noflush)
        return line[3].split()

    def asked(self, name: str, op: str) -> list[tuple[int, int]]:
        """Where this file was asked for `op`: (offset, length)."""
        return [
            (at, length)
            for path, name_of_op, at, length in self.log
            if (Path(path).name, name_of_op) == (name, op)
        ]

    def fail(self, name: str, *ops: int, errno: int = errnos.EIO) -> None:
        """Let these operations on a file fail; none: let all work again."""
        self.spies[name].fails = lambda bio: errno if bio.op in ops else 0

    def submit(self, op: int, offset: int = 0, length: int = 0, flags: int = 0) -> Bio:
        payload = memoryview(bytearray(b"w" * length))
        bio = Bio(op, offset, length, payload, flags, lambda _: None)
        self.registry.get("c").submit(bio)
        return bio

    # Waiting: for what workers do, never for time.

    async def until(self, holds: Callable[[], bool]) -> None:
        """Let the loop and the workers run until something holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not holds():  # noqa: ASYNC110 (nothing tells us)
                await asyncio.sleep(0)

    async def commit_under_way(self) -> None:
        """Wait for the commit that runs, if one does."""
        committer = self.target()._committer
        await self.until(lambda: not committer._is_running)

    async def hydrate(self) -> None:
        """Enable hydration and wait until all of it is durable."""
        device = self.registry.get("c")
        await device.message(0, ["hydration_threshold", "256"])
        await device.message(0, ["hydration_batch_size", "64"])
        await device.message(0, ["enable_hydration"])
        target = self.target()

        def done() -> bool:
            self.clock.advance(0.001)
            return target._is_hydrated

        await self.until(done)
