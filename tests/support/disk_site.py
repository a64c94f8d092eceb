# SPDX-License-Identifier: Apache-2.0
"""A clone and a cache over real files, with what is said about the disks given with each table."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdtarget.common.errors import ConstructorError
from nbdtarget.common.permissions import OTHER_DISK, Permission
from nbdtarget.devices import resolve
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from nbdtarget.tools.writeback import WritebackJob, write_back
from nbdtarget_metadata.cache.superblock import CACHE
from nbdtarget_metadata.clone.superblock import CLONE
from nbdtarget_metadata.disks import Disk, decode_disks
from nbdtarget_metadata.log.superblock import (
    Superblock,
    choose_superblock,
)
from tests.support.patience import attempts, until

__all__ = ["BLOCK", "KIB", "MIB", "NOTHING", "NR_SECTORS", "SAY_OTHER", "SIZE", "Site"]

KIB, MIB = 1 << 10, 1 << 20
SIZE = 2 * MIB
BLOCK = 64 * KIB
NR_SECTORS = SIZE // 512
NOTHING: frozenset[Permission] = frozenset()
SAY_OTHER: frozenset[Permission] = frozenset({OTHER_DISK})


class Site:
    """Files of one machine, and tables over them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.write("source", os.urandom(SIZE))
        self.write("origin", os.urandom(SIZE))
        for name in ("dest", "cache"):
            self.blank(name)

    def path(self, name: str) -> Path:
        return self.directory / name

    def write(self, name: str, content: bytes) -> None:
        self.path(name).write_bytes(content)

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def change(self, name: str, offset: int, content: bytes) -> None:
        """Write to a file as somebody else does, who takes longer than a tick of its time."""
        before = self.path(name).stat().st_mtime_ns
        while self.path(name).stat().st_mtime_ns == before:
            with self.path(name).open("r+b") as file:
                file.seek(offset)
                file.write(content)

    def blank(self, name: str) -> None:
        """A new file of zeroes in the place of what was there."""
        self.path(name).unlink(missing_ok=True)
        with self.path(name).open("wb") as file:
            file.truncate(SIZE)

    def clone(self, *, dest: str = "dest", source: str = "source") -> str:
        names = [str(self.path(each)) for each in ("clone.meta", dest, source)]
        return f"0 {NR_SECTORS} clone {' '.join(names)} 128 1 no_hydration"

    def cache(
        self, *, cache: str = "cache", origin: str = "origin", mode: str = "writeback"
    ) -> str:
        names = [str(self.path(each)) for each in ("cache.meta", cache, origin)]
        # In a writeback cache nothing is written back by itself.
        threshold = 0 if mode == "writeback" else 1 << 20
        features = f"1 {mode} smq 2 migration_threshold {threshold}"
        return f"0 {NR_SECTORS} cache {' '.join(names)} 128 {features}"

    @asynccontextmanager
    async def served(
        self, table: str, permissions: frozenset[Permission] = NOTHING
    ) -> AsyncIterator[MappedDevice]:
        registry = Registry(resolve)
        device = await registry.create("d", table, permissions=permissions)
        try:
            yield device
        finally:
            await registry.remove("d")

    async def refused(
        self, table: str, permissions: frozenset[Permission] = NOTHING
    ) -> str:
        """The line with which a table is refused."""
        with pytest.raises(ConstructorError) as caught:
            async with self.served(table, permissions):
                pass
        line = str(caught.value)
        assert "\n" not in line
        return line

    async def started(
        self, table: str, permissions: frozenset[Permission] = NOTHING
    ) -> None:
        async with self.served(table, permissions):
            pass

    async def half_cloned(self) -> None:
        """Leave a clone of which the first half is copied."""
        async with self.served(self.clone()) as device:
            await device.write(0, b"c" * MIB)
            await device.flush()

    async def dirty_cache(self) -> bytes:
        """Leave a cache with a dirty block; return what a client reads."""
        async with self.served(self.cache()) as device:
            async for _ in attempts():
                await device.write(0, b"d" * BLOCK)
                if _nr_dirty(device):
                    break
            await device.flush()
            return bytes(await device.read(0, SIZE))

    async def clean_cache(self, mode: str = "writethrough") -> None:
        """Leave a cache in which the first blocks are mapped and clean."""
        async with self.served(self.cache(mode=mode)) as device:
            await device.message(0, ["pin", "0-4"])
            await _promoted(device, 4)

    async def write_back(
        self, cache: str, origin: str, permissions: frozenset[Permission] = NOTHING
    ) -> None:
        names = [str(self.path(each)) for each in ("cache.meta", cache, origin)]
        job = WritebackJob(
            metadata=names[0], cache=names[1], origin=names[2], permissions=permissions
        )
        await write_back(job, lambda done, of: None)

    def superblock(self, name: str) -> Superblock:
        area = memoryview(self.read(name)[: 16 * KIB])
        if name == "clone.meta":
            return choose_superblock(CLONE, area).superblock
        return choose_superblock(CACHE, area).superblock

    def recorded(self, name: str, role: str) -> Disk:
        disks = decode_disks(self.superblock(name).disks)
        return next(disk for disk in disks if disk.role == role)


def _fields(device: MappedDevice) -> dict[str, object]:
    assert device.active is not None
    return dict(device.active.targets[0].status_fields())


def _nr_dirty(device: MappedDevice) -> int:
    return int(str(_fields(device)["dirty_blocks"]))


async def _promoted(device: MappedDevice, nr_blocks: int) -> None:
    """Wait until so many blocks have been promoted."""
    await until(lambda: int(str(_fields(device)["promotions"])) >= nr_blocks)
