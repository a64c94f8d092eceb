# SPDX-License-Identifier: Apache-2.0
"""A server with one cache, which is written back and removed."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from nbdtarget.common.clock import sleep
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control import messages as m
from nbdtarget.control.uncache import A, CacheLine, Draining
from nbdtarget.control.verbs import Verbs
from nbdtarget.devices import resolve
from nbdtarget.devices.base import Device
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from nbdtarget.porcelain.uncache import uncache as uncache_at_a_terminal
from nbdtarget.targets import metadata_io
from nbdtarget_metadata.cache.superblock import CACHE, CacheSuperblock
from nbdtarget_metadata.log.superblock import (
    choose_superblock,
    read_area,
)
from tests.support.devices import FaultDevice
from tests.support.patience import PATIENCE_S

__all__ = [
    "BLOCK",
    "KIB",
    "MIB",
    "NR_SECTORS",
    "SIZE",
    "WRITEBACK",
    "Recorder",
    "World",
]

KIB: Final = 1 << 10
MIB: Final = 1 << 20
BLOCK: Final = 64 * KIB
SIZE: Final = 2 * MIB
NR_SECTORS: Final = SIZE // 512
WRITEBACK: Final = "128 1 writeback smq 2 migration_threshold 0"


class Opener:
    """As `resolve`, but each file can be made to fail."""

    identity = staticmethod(resolve.identity)
    may_create = staticmethod(resolve.may_create)
    remove_created = staticmethod(resolve.remove_created)

    def __init__(self) -> None:
        self.faults: dict[str, FaultDevice] = {}

    async def create_device(self, name: str, size: int) -> Device:
        return self._faulty(name, await resolve.create_device(name, size))

    async def open_device(self, name: str, *, read_only: bool) -> Device:
        return self._faulty(name, await resolve.open_device(name, read_only=read_only))

    def _faulty(self, name: str, device: Device) -> Device:
        self.faults[Path(name).name] = fault = FaultDevice(device)
        return fault


class Recorder:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.drained: list[Draining] = []
        self.stucks: list[Draining] = []
        self.ends: list[tuple[str, object]] = []
        self.left: Draining | None = None
        self.on_draining: Callable[[Draining], None] = lambda _: None
        self.on_stuck: Callable[[], None] = lambda: None

    def draining(self, now: Draining) -> None:
        self.drained.append(now)
        self.on_draining(now)

    def stuck(self, now: Draining, for_s: float) -> None:
        self.stucks.append(now)
        self.on_stuck()

    def interrupted(self, now: Draining | None) -> None:
        self.ends.append(("interrupted", now))
        self.left = now

    def uncached(self, line: CacheLine) -> None:
        self.ends.append(("uncached", line.origin))


class World:
    """A server with one device called `disk`, and what its origin must hold in the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.opener = Opener()
        self.registry = Registry(self.opener)
        self.verbs = Verbs(self.registry)
        self.recorder = Recorder()
        self.content = bytearray(os.urandom(SIZE))
        self.before_verb: Callable[[str, m.Request], None] = lambda verb, request: None
        (directory / "origin").write_bytes(self.content)
        (directory / "fast").write_bytes(bytes(MIB))

    @property
    def disk(self) -> MappedDevice:
        return self.registry.get("disk")

    @property
    def line(self) -> str:
        """The live table's line, without its devices' directory."""
        (line,) = self.disk.table()
        return " ".join(map(str, line)).replace(f"{self.directory}/", "")

    def table(self, words: str = WRITEBACK, *, fast: str = "fast") -> str:
        return f"0 {NR_SECTORS} cache meta {fast} origin {words}"

    async def create(self, words: str = WRITEBACK, *, nr_dirty: int = 0) -> None:
        """Make the cache, with some blocks in it, of which `nr_dirty` are dirty."""
        await self.registry.create(
            "disk", self.table(words), directory=str(self.directory)
        )
        if nr_dirty:
            await self.disk.message(0, ("warm", f"0-{nr_dirty + 2}"))
            while self.fields["cache_blocks_used"] != nr_dirty + 2:
                await sleep(0.01)
        for block in range(nr_dirty):
            await self.write(block * BLOCK + 4096, os.urandom(4096))
        assert self.fields["dirty_blocks"] == nr_dirty

    @property
    def fields(self) -> dict[str, bool | int | float | str | None]:
        assert self.disk.active is not None
        return self.disk.active.targets[0].status_fields()

    async def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        await self.disk.write(offset, data)

    async def uncache(self, name: str = "disk") -> int:
        loop = asyncio.get_running_loop()

        def ask(verb: str, request: m.Request, answer_type: type[A]) -> A:
            self.before_verb(verb, request)
            answering = getattr(self.verbs, verb)(request)
            answer = asyncio.run_coroutine_threadsafe(answering, loop).result(
                PATIENCE_S
            )
            assert isinstance(answer, answer_type)
            return answer

        async with asyncio.timeout(PATIENCE_S):
            return await uncache_at_a_terminal(name, ask, self.recorder)

    async def refusal(self, name: str = "disk") -> str:
        with pytest.raises(NbdTargetError) as caught:
            await self.uncache(name)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    async def superblock(self) -> CacheSuperblock:
        """Read the superblock of the metadata, after the device was removed."""
        await self.registry.close()
        device = await resolve.open_device(str(self.directory / "meta"))
        area = await metadata_io.run(device, read_area(device.size))
        await device.close()
        return choose_superblock(CACHE, area, admit_needs_check=True).superblock

    def check_uncached(self) -> None:
        assert self.line == f"0 {NR_SECTORS} linear origin 0"
        assert self.recorder.ends == [("uncached", f"{self.directory}/origin")]
        assert (self.directory / "origin").read_bytes() == self.content
