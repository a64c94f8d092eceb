# SPDX-License-Identifier: Apache-2.0
"""Packed images as devices: in order, waiting, beginning again, and as the source of a clone."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdtarget.bio import OP_READ, PENDING, Bio
from nbdtarget.common.errors import DeviceError, NbdTargetError
from nbdtarget.devices import resolve
from nbdtarget.devices.packed import device as module
from nbdtarget.devices.packed import size as size_module
from nbdtarget.devices.packed.device import PackedDevice
from nbdtarget.devices.resolve import open_device
from nbdtarget.dm.registry import Registry
from nbdtarget.targets.clone.target import CloneTarget
from tests.support.image_server import ImageServer, image_of
from tests.support.packed import PACKERS
from tests.support.patience import attempts, until
from tests.support.porcelain_clone import Recorder, clone

MIB = 1 << 20
IMAGE = image_of(256 << 10) + bytes(5 * MIB) + image_of((768 << 10) + 700)
FORMATS = ("gzip", "xz", "zstd")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 256 << 10)
    monkeypatch.setattr(module, "WINDOW_BYTES", 1 << 20)
    monkeypatch.chdir(tmp_path)


def packed(path: Path, format_name: str = "gzip", data: bytes = IMAGE) -> str:
    """Write a packed file; return the name of the device."""
    (path / "packed").write_bytes(PACKERS[format_name](data))
    size = f"#size={len(data)}" if format_name == "gzip" else ""
    return f"{format_name}:{path}/packed{size}"


@asynccontextmanager
async def device_of(name: str) -> AsyncIterator[PackedDevice]:
    device = await open_device(name, read_only=True)
    assert isinstance(device, PackedDevice)
    try:
        yield device
    finally:
        await device.close()


def ahead(device: PackedDevice, offset: int, length: int) -> Bio:
    buffer = memoryview(bytearray(b"\xee" * length))
    bio = Bio(OP_READ, offset, length, buffer, 0, lambda _: None)
    device.submit_ahead(bio)
    return bio


@pytest.mark.parametrize("format_name", FORMATS)
async def test_copy_in_order_unpacks_once(tmp_path: Path, format_name: str) -> None:
    async with device_of(packed(tmp_path, format_name)) as device:
        assert device.size == len(IMAGE) + 324  # whole sectors
        found = bytearray()
        for at in range(0, device.size, 512 << 10):
            bio = ahead(device, at, min(512 << 10, device.size - at))
            await until(lambda bio=bio: bio.status != PENDING)  # type: ignore[misc]
            assert bio.status == 0
            found += bio.payload or b""
        assert found == IMAGE + bytes(324)
        assert device.nr_starts == 1
        await device.flush()


async def test_client_that_reads_far_ahead_waits_and_spoils_nothing(
    tmp_path: Path,
) -> None:
    """The kernel reads far ahead when it looks for the backup of a partition table at the end of a disk."""
    async with device_of(packed(tmp_path)) as device:
        first = ahead(device, 0, 64 << 10)
        end = Bio(OP_READ, 6 * MIB, 512, memoryview(bytearray(512)), 0, lambda _: None)
        device.submit(end)
        await until(lambda: first.status == 0)
        for at in range(64 << 10, 6 * MIB, 256 << 10):
            assert end.status == PENDING or at > 5 * MIB
            bio = ahead(device, at, min(256 << 10, device.size - at))
            await until(lambda bio=bio: bio.status == 0)  # type: ignore[misc]
        await until(lambda: end.status == 0)
        assert bytes(end.payload or b"") == IMAGE[6 * MIB : 6 * MIB + 512]
        assert device.nr_starts == 1


async def test_client_alone_drives_it_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALONE_S", 0.01)
    async with device_of(packed(tmp_path)) as device:
        assert (
            bytes(await device.read(5 * MIB, 4096)) == IMAGE[5 * MIB : 5 * MIB + 4096]
        )
        assert device.nr_starts == 1
        # A read of bytes that have left the window starts at the beginning of the file again.
        assert bytes(await device.read(4096, 4096)) == IMAGE[4096:8192]
        assert device.nr_starts == 2


@pytest.mark.parametrize("size", [len(IMAGE) - 512, len(IMAGE) + 512])
async def test_wrong_size_fails_before_the_last_byte_is_given_out(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALONE_S", 0.0)
    name = packed(tmp_path).partition("#")[0]
    async with device_of(f"{name}#size={size}") as device:
        assert bytes(await device.read(0, 4096)) == IMAGE[:4096]
        with pytest.raises(DeviceError):
            await device.read(device.size - 512, 512)
        assert "bytes" in device.health.last_error
        with pytest.raises(DeviceError):
            await device.read(0, 512)


async def test_file_that_was_away_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with device_of(packed(tmp_path)) as device:
        inner = device._inner
        read = inner.submit_ahead
        monkeypatch.setattr(inner, "submit_ahead", lambda bio: bio.end(errno.EIO))
        with pytest.raises(DeviceError):
            await device.read(0, 512)
        assert "cannot be read at 0 (EIO)" in device.health.last_error
        monkeypatch.setattr(inner, "submit_ahead", read)
        assert bytes(await device.read(0, 512)) == IMAGE[:512]
        assert device.nr_starts == 2


async def test_damaged_file_fails_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALONE_S", 0.0)
    name = packed(tmp_path)
    data = bytearray((tmp_path / "packed").read_bytes())
    data[100_000] ^= 0xFF
    (tmp_path / "packed").write_bytes(data)
    async with device_of(name) as device:
        with pytest.raises(DeviceError):
            await device.read(6 * MIB, 512)
        assert "is no intact gzip file" in device.health.last_error
        assert device.changed == device.health.last_error


async def test_clone_of_an_image_with_a_wrong_size_ends_and_says_so(
    tmp_path: Path,
) -> None:
    """Several frames: only the first one was looked at, as it is long."""
    name = packed(tmp_path, "zstd")
    path = tmp_path / "packed"
    path.write_bytes(PACKERS["zstd"](IMAGE * 2) + path.read_bytes())
    assert 2 * len(IMAGE) > size_module.ZSTD_BLOCKS_MAX << 17
    recorder = Recorder()
    assert await clone(recorder, source=name, dest="vm.img") == 1
    assert recorder.calls == ["serving", "source_changed", "stopping"]


async def test_close_ends_what_waits(tmp_path: Path) -> None:
    async with device_of(packed(tmp_path)) as device:
        ahead(device, 0, 512)
        bio = Bio(OP_READ, 6 * MIB, 512, memoryview(bytearray(512)), 0, lambda _: None)
        device.submit(bio)
        await asyncio.sleep(0)
    assert bio.status == errno.EIO


@pytest.mark.parametrize("format_name", FORMATS)
async def test_one_line_clones_a_packed_image(tmp_path: Path, format_name: str) -> None:
    recorder = Recorder()
    assert (
        await clone(recorder, source=packed(tmp_path, format_name), dest="vm.img") == 0
    )
    assert (tmp_path / "vm.img").read_bytes() == IMAGE + bytes(324)


async def test_url_of_a_packed_image_can_be_swapped(tmp_path: Path) -> None:
    """A URL whose signature has expired is replaced by a new one. Unpacking continues where it was."""
    data = PACKERS["gzip"](IMAGE)
    async with ImageServer(data) as server:
        size = f"#size={len(IMAGE)}"
        async with device_of(f"gzip:{server.url('/a?sig=old')}{size}") as device:
            await device.use_name(f"gzip:{server.url('/a?sig=new')}{size}")
            assert device.loadable_name == f"gzip:{server.url('/a?sig=new')}{size}"
            assert "sig=" not in device.name
            await device.use_name(server.url("/a?sig=newer"))
            assert device.loadable_name == f"gzip:{server.url('/a?sig=newer')}{size}"
            assert bytes(await device.read(0, 512)) == IMAGE[:512]
            assert server.noted[-1].target == "/a?sig=newer"
            server.etag = '"two"'
            with pytest.raises(NbdTargetError, match="is another image"):
                await device.use_name(server.url("/a?sig=newest"))
            assert device.loadable_name == f"gzip:{server.url('/a?sig=newer')}{size}"
    async with device_of(packed(tmp_path)) as device:
        with pytest.raises(NbdTargetError, match="is not reached by a URL"):
            await device.use_name("gzip:/other")


async def test_packed_image_on_a_web_server(tmp_path: Path) -> None:
    data = PACKERS["gzip"](IMAGE)
    async with ImageServer(data) as server:
        name = f"gzip:{server.url('/a.gz?sig=secret')}#size={len(IMAGE)}&connections=2"
        recorder = Recorder()
        assert await clone(recorder, source=name, dest="vm.img") == 0
        assert (tmp_path / "vm.img").read_bytes() == IMAGE + bytes(324)
        assert b"secret" not in (tmp_path / "vm.img.nbdtarget").read_bytes()


@pytest.mark.long
async def test_restart_begins_the_stream_again_and_skips(tmp_path: Path) -> None:
    name = packed(tmp_path)
    (tmp_path / "dest").write_bytes(bytes(6 * MIB))
    line = f"0 {6 * MIB // 512} clone {tmp_path}/meta {tmp_path}/dest {name} 128 1 no_hydration"
    registry = Registry(resolve)
    device = await registry.create("c", line)
    await device.prefetch(0, MIB)
    await device.write(3 * MIB, b"mine" * 16384)
    await registry.close()
    registry = Registry(resolve)
    device = await registry.create("c", line)
    assert bytes(await device.read(0, MIB)) == IMAGE[:MIB]
    await device.message(0, ["enable_hydration"])
    async for _ in attempts():
        (_, fields), *_ = await device.status_by_name()
        if fields["hydrated_durably"]:
            break
    await registry.close()
    wanted = bytearray(IMAGE[: 6 * MIB])
    wanted[3 * MIB : 3 * MIB + 65536] = b"mine" * 16384
    assert (tmp_path / "dest").read_bytes() == wanted


async def test_other_packed_file_is_refused_at_the_next_start(tmp_path: Path) -> None:
    name = packed(tmp_path)
    (tmp_path / "dest").write_bytes(bytes(6 * MIB))
    line = f"0 {6 * MIB // 512} clone {tmp_path}/meta {tmp_path}/dest {name} 128 1 no_hydration"
    registry = Registry(resolve)
    device = await registry.create("c", line)
    await device.write(0, b"mine" * 16384)
    await registry.close()
    packed(tmp_path, data=IMAGE[::-1])
    registry = Registry(resolve)
    with pytest.raises(NbdTargetError, match="is not the source that"):
        await registry.create("c", line)
    await registry.close()


async def test_nothing_goes_first_of_a_packed_image(tmp_path: Path) -> None:
    name = packed(tmp_path)
    (tmp_path / "dest").write_bytes(bytes(6 * MIB))
    registry = Registry(resolve)
    device = await registry.create(
        "c",
        f"0 {6 * MIB // 512} clone {tmp_path}/meta {tmp_path}/dest {name} 128 2 no_hydration hydrate_on_read"
        " 4 hydration_threshold 16 hydration_batch_size 4",
    )
    assert device.active is not None
    target = device.active.targets[0]
    assert isinstance(target, CloneTarget)
    target.hydrate_first([(4 * MIB, 5 * MIB), (MIB, 2 * MIB)])
    late = asyncio.create_task(device.read(5 * MIB, 4096))
    await device.message(0, ["enable_hydration"])
    await until(lambda: target.status_fields()["hydrated_durably"] is True)
    assert bytes(await late) == IMAGE[5 * MIB : 5 * MIB + 4096]
    (source,) = (
        each for each in device.devices_below() if isinstance(each, PackedDevice)
    )
    assert source.nr_starts == 1
    await registry.close()
    assert (tmp_path / "dest").read_bytes() == IMAGE[: 6 * MIB]
