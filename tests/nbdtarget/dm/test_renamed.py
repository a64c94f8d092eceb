# SPDX-License-Identifier: Apache-2.0
"""A disk that is served is the open one, whatever its name has become meanwhile."""

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.common.clock import sleep, timeout
from nbdtarget.common.errors import ConstructorError
from nbdtarget.devices import resolve
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from nbdtarget.targets.clone.target import CloneTarget
from tests.support.patience import PATIENCE_S

MIB = 1 << 20
NR_SECTORS = MIB // 512


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    registry = Registry(resolve)
    (tmp_path / "source").write_bytes(b"source" * (MIB // 6) + bytes(MIB % 6))
    for name in ("dest", "other"):
        (tmp_path / name).write_bytes(bytes(MIB))
    yield registry
    await registry.close()


async def clone_on(registry: Registry, directory: Path, dest: str) -> MappedDevice:
    """A clone that is hydrated, and on which a client has written."""
    device = await registry.create(
        "c", f"0 {NR_SECTORS} clone meta {dest} source 8", directory=str(directory)
    )
    await device.write(4096, b"client" * 100)
    await device.flush()
    assert device.active is not None
    target = device.active.targets[0]
    assert isinstance(target, CloneTarget)
    async with timeout(PATIENCE_S):
        while not target._is_hydrated:
            await sleep(0.01)
    return device


async def ask_for_linear(registry: Registry, device: MappedDevice) -> None:
    await device.message(0, ["then_linear"])
    await registry.replacements.ended(device)


async def test_clone_in_memory_keeps_its_content_when_it_becomes_linear(
    registry: Registry, tmp_path: Path
) -> None:
    device = await clone_on(registry, tmp_path, f"memory:{MIB}")
    before = bytes(await device.read(0, MIB))
    await ask_for_linear(registry, device)
    assert device.table() == [(0, NR_SECTORS, "linear", f"memory:{MIB} 0")]
    assert bytes(await device.read(0, MIB)) == before


async def test_clone_does_not_become_linear_on_a_file_of_the_same_name(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    device = await clone_on(registry, tmp_path, "dest")
    before = bytes(await device.read(0, MIB))
    (tmp_path / "dest").rename(tmp_path / "renamed")
    (tmp_path / "other").rename(tmp_path / "dest")
    await ask_for_linear(registry, device)
    assert device.table()[0][2] == "clone"
    assert "another disk open under this name" in caplog.text
    await device.write(0, b"later")
    assert bytes(await device.read(0, MIB)) == b"later" + before[5:]
    assert (tmp_path / "dest").read_bytes() == bytes(MIB)
    # The name is right again.
    (tmp_path / "dest").rename(tmp_path / "other")
    (tmp_path / "renamed").rename(tmp_path / "dest")
    await ask_for_linear(registry, device)
    assert device.table()[0][2] == "linear"
    assert bytes(await device.read(0, MIB)) == b"later" + before[5:]


async def test_load_with_keep_open_means_the_open_disks(
    registry: Registry, tmp_path: Path
) -> None:
    async def load(table: str, *, keep_open: bool) -> None:
        await registry.load("c", table, directory=str(tmp_path), keep_open=keep_open)
        await registry.resume("c")

    disk = f"memory:{MIB}"
    device = await clone_on(registry, tmp_path, disk)
    before = bytes(await device.read(0, MIB))
    await load(f"0 {NR_SECTORS} linear {disk} 0", keep_open=True)
    assert bytes(await device.read(0, MIB)) == before
    await load(f"0 {NR_SECTORS} linear {disk} 0", keep_open=False)
    assert bytes(await device.read(0, MIB)) == bytes(MIB)
    await load(f"0 {NR_SECTORS} linear dest 0", keep_open=True)
    (tmp_path / "dest").rename(tmp_path / "renamed")
    for _ in range(2):  # missing, then another one
        with pytest.raises(ConstructorError, match="another disk open under this name"):
            await load(f"0 {NR_SECTORS} linear dest 0", keep_open=True)
        (tmp_path / "dest").write_bytes(bytes(MIB))
    await load(f"0 {NR_SECTORS} linear dest 0", keep_open=False)


async def test_load_with_keep_open_does_not_guess_between_two_disks_of_one_name(
    registry: Registry, tmp_path: Path
) -> None:
    disk = f"memory:{MIB}"
    table = f"0 {NR_SECTORS} linear {disk} 0\n{NR_SECTORS} {NR_SECTORS} linear {disk} 0"
    await registry.create("c", table)
    with pytest.raises(ConstructorError, match="two open disks have this name"):
        await registry.load("c", f"0 {NR_SECTORS} linear {disk} 0", keep_open=True)
