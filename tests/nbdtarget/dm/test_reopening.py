# SPDX-License-Identifier: Apache-2.0
"""A table that is loaded to cure a latched disk gets that disk opened again, not the latched device."""

import asyncio
import errno as errnos
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from nbdtarget.common.errors import (
    ConstructorError,
    DeviceError,
    ResolveError,
    TableError,
)
from nbdtarget.devices import resolve
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.devices.health import HealthState
from nbdtarget.devices.nbd import device as nbd_module
from nbdtarget.devices.nbd.device import NbdDevice
from nbdtarget.devices.resolve import open_device
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from tests.support.nbd_server import StrictServer
from tests.support.patience import until

MIB = 1 << 20
ROLES = {
    "linear": ("a",),
    "clone": ("m", "a"),
    "cache": ("m", "a", "b"),
}


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    for name in ("a", "b", "s"):
        (tmp_path / name).write_bytes(bytes(MIB))
    it = Registry(resolve)
    yield it
    await it.close()


def table_of(kind: str, directory: Path) -> str:
    a, b, m, s = (directory / name for name in "abms")
    return {
        "linear": f"0 2048 linear {a} 0",
        "clone": f"0 2048 clone {m} {a} {s} 8 1 no_hydration",
        "cache": f"0 2048 cache {m} {a} {b} 64 1 writeback default 0",
    }[kind]


def open_file_of(registry: Registry, name: str) -> FileDevice:
    """The device of that name that was opened last."""
    found = [
        device
        for minor in registry.devices()
        for device in registry.opens.lower_devices(minor)
        if device.name.endswith(name)
    ]
    assert isinstance(found[0], FileDevice)
    return found[0]


async def latch(
    registry: Registry, device: MappedDevice, name: str, monkeypatch: pytest.MonkeyPatch
) -> FileDevice:
    """Let the next sync of the file fail, as after a write to the disk that failed."""

    def fail() -> int:
        raise OSError(errnos.EIO, os.strerror(errnos.EIO))

    below = open_file_of(registry, name)
    monkeypatch.setattr(below._syncs, "_fdatasync", fail)
    monkeypatch.setattr(below._syncs, "_has_no_thread", True)
    await device.write(0, b"doomed")
    with suppress(
        DeviceError
    ):  # a cache that has nothing to commit does not flush its metadata
        await device.flush()
    with pytest.raises(DeviceError):
        await below.flush()
    assert below.health.state is HealthState.LATCHED
    return below


@pytest.mark.parametrize(
    ("kind", "role"), [(kind, role) for kind in ROLES for role in ROLES[kind]]
)
@pytest.mark.parametrize("cleared_first", [False, True])
async def test_same_line_loaded_and_resumed_cures_it(
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    role: str,
    cleared_first: bool,
) -> None:
    table = table_of(kind, tmp_path)
    device = await registry.create("d", table)
    await device.write(4096, b"before")
    await device.flush()
    old = await latch(registry, device, f"/{role}", monkeypatch)
    if cleared_first:
        await registry.load("d", table)
        await registry.clear("d")
        assert old in registry.opens.lower_devices(device)
    await registry.load("d", table)
    assert old in registry.opens.lower_devices(device)
    await registry.resume("d")
    assert old not in registry.opens.lower_devices(device)
    assert all(below.health.is_usable for below in registry.opens.lower_devices(device))
    await device.write(8192, b"after")
    await device.flush()
    assert bytes(await device.read(4096, 6)) == b"before"
    assert bytes(await device.read(8192, 5)) == b"after"
    # The table is loaded once more, now that all is well: no disk is opened again.
    below = set(registry.opens.lower_devices(device))
    await registry.load("d", table)
    await registry.resume("d")
    assert set(registry.opens.lower_devices(device)) == below
    assert bytes(await device.read(8192, 5)) == b"after"


@pytest.fixture
def undone(monkeypatch: pytest.MonkeyPatch) -> list[FileDevice]:
    """The devices that were told that what was opened in their place is closed again."""
    told: list[FileDevice] = []
    monkeypatch.setattr(
        FileDevice, "reopening_undone", lambda device: told.append(device)
    )
    return told


async def test_disk_whose_second_opening_may_not_be_used_is_as_before(
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undone: list[FileDevice],
) -> None:
    device = await registry.create("d", table_of("linear", tmp_path))
    old = await latch(registry, device, "/a", monkeypatch)
    with pytest.raises(ConstructorError, match="in use by d"):
        await registry.create("e", table_of("clone", tmp_path))
    assert undone == [old]
    assert registry.opens.lower_devices(device) == [old]


@pytest.mark.parametrize("is_refused", [False, True])
async def test_disk_whose_second_opening_is_closed_again_is_as_before(
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undone: list[FileDevice],
    is_refused: bool,
) -> None:
    table = table_of("linear", tmp_path)
    device = await registry.create("d", table)
    old = await latch(registry, device, "/a", monkeypatch)
    if is_refused:
        with pytest.raises(ConstructorError, match="no such file"):
            await registry.load("d", f"{table}\n2048 8 linear {tmp_path}/no 0")
    else:
        await registry.load("d", table)
        assert undone == []
        await registry.clear("d")
    assert undone == [old]
    await registry.load("d", table)
    await registry.resume("d")
    assert undone == [old]


async def test_below_a_stacked_device_too(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of("linear", tmp_path)
    low = await registry.create("low", table)
    top = await registry.create("top", "0 1024 linear /dev/mapper/low 1024")
    await latch(registry, low, "/a", monkeypatch)
    await registry.load("low", table)
    await registry.resume("low")
    await top.write(0, b"through")
    await top.flush()
    assert (tmp_path / "a").read_bytes()[512 << 10 :][:7] == b"through"


async def test_others_are_kept_out_as_by_the_old_one(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = await registry.create("d", table_of("clone", tmp_path))
    await latch(registry, device, "/a", monkeypatch)
    with pytest.raises(ConstructorError, match="in use by d"):
        await registry.create("e", table_of("linear", tmp_path))
    assert len(registry.opens.lower_devices(device)) == 3


async def test_slices_of_one_disk_are_cured_one_by_one(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"0 1024 linear {tmp_path}/a {begin}" for begin in (0, 1024)]
    first, second = [await registry.create(f"d{i}", lines[i]) for i in (0, 1)]
    old = await latch(registry, first, "/a", monkeypatch)
    for nr, device in enumerate((first, second)):
        assert old in registry.opens.lower_devices(device)
        await registry.load(f"d{nr}", lines[nr])
        await registry.resume(f"d{nr}")
    assert registry.opens.lower_devices(first) == registry.opens.lower_devices(second)
    assert old._fd < 0


def lock_is_free(path: Path) -> bool:
    """Whether another process could lock the file for writing now."""
    with path.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


async def test_lock_is_held_without_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(4096))
    first = await open_device(str(path))
    second = await first.reopened(str(path), read_only=False)
    assert second is not None
    third = await second.reopened(str(path), read_only=False)
    assert third is not None
    for device in (second, first):
        await device.close()
        with pytest.raises(ResolveError, match="in use"):
            await open_device(str(path))
        # Of this process, whose POSIX locks are another matter than those of its open files.
        assert not lock_is_free(path)
    await third.write(0, b"x")
    await third.flush()
    await third.close()
    assert lock_is_free(path)


async def test_another_file_under_the_name_is_not_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(4096))
    device = await open_device(str(path))
    nr_open = len(os.listdir("/proc/self/fd"))
    path.rename(tmp_path / "old")
    path.write_bytes(bytes(4096))
    with pytest.raises(ResolveError, match="was replaced while it was opened"):
        await device.reopened(str(path), read_only=False)
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) == nr_open
    await device.close()


async def test_block_device_is_opened_beside_its_own_claim(loop: Path) -> None:
    first = await open_device(str(loop))
    second = await first.reopened(str(loop), read_only=False)
    assert second is not None
    await first.close()
    with pytest.raises(ResolveError, match="in use"):
        await open_device(str(loop))
    await second.write(0, b"x", fua=True)
    await second.close()
    await (await open_device(str(loop))).close()


@pytest.mark.parametrize("kind", ["clone", "cache"])
@pytest.mark.parametrize("cleared_first", [False, True])
async def test_table_is_refused_if_the_old_one_committed_after_the_load(
    registry: Registry, tmp_path: Path, kind: str, cleared_first: bool
) -> None:
    table = table_of(kind, tmp_path)
    device = await registry.create("d", table)
    old = open_file_of(registry, "/a")
    assert old.health.latch(errnos.EIO)
    await registry.load("d", table)
    if cleared_first:
        await registry.clear("d")
        await registry.load("d", table)
    old.health.recover()  # as a lost server does that is back
    await device.write(4096, b"after the load")
    await device.flush()
    with pytest.raises(TableError, match="load it again"):
        await registry.resume("d")
    await registry.load("d", table)
    await registry.resume("d")
    assert bytes(await device.read(4096, 14)) == b"after the load"
    await device.write(8192, b"more")
    await device.flush()


async def test_lost_server_is_connected_at_once_by_a_load(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_module, "RECONNECT_S_MIN", 1000.0)
    (tmp_path / "back").mkdir()
    async with StrictServer(tmp_path / "back") as server:
        table = f"0 2048 clone {tmp_path}/m {server.uri} {tmp_path}/s 8 1 no_hydration"
        device = await registry.create("d", table)
        await device.write(4096, b"before")
        await device.flush()
        server.hang_up_all()
        below = next(
            each
            for each in registry.opens.lower_devices(device)
            if isinstance(each, NbdDevice)
        )
        await until(lambda: not below.health.is_usable)
        away = server.path.rename(tmp_path / "away")
        with pytest.raises(ConstructorError, match="cannot connect"):
            await registry.load("d", table)
        away.rename(server.path)
        await registry.load("d", table)
        assert below.health.is_usable
        await registry.resume("d")
        assert below in registry.opens.lower_devices(device)
        assert bytes(await device.read(4096, 6)) == b"before"
        await device.write(4096, b"after")
        await device.flush()
        await registry.remove("d")
