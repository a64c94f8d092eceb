# SPDX-License-Identifier: Apache-2.0
"""RoundedDevice: the part of the last sector that a file does not have reads as zeroes."""

import errno
import os
from pathlib import Path

import pytest

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import EXTENT_DATA, EXTENT_ZERO, Extent
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.devices.resolve import open_device
from nbdtarget.devices.rounded import RoundedDevice

DATA = os.urandom(1000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "odd"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1024), (0, 1000), (0, 512), (512, 512), (990, 20), (1000, 24), (1023, 1)],
)
async def test_what_lies_behind_the_end_reads_as_zeroes(
    path: Path, offset: int, length: int
) -> None:
    device = await open_device(str(path), read_only=True)
    assert device.size == 1024
    whole = DATA + bytes(24)
    assert bytes(await device.read(offset, length)) == whole[offset : offset + length]
    await device.close()


async def test_reads_and_hints_past_the_rounded_end_are_bounded(path: Path) -> None:
    device = await open_device(str(path), read_only=True)
    with pytest.raises(DeviceError) as caught:
        await device.read(1000, 25)
    assert caught.value.errno == errno.EINVAL
    await device.prefetch(0, 1024)
    await device.prefetch(1000, 24)
    with pytest.raises(DeviceError) as caught:
        await device.prefetch(1000, 25)
    assert caught.value.op == "cache"
    with pytest.raises(DeviceError) as caught:
        await device.write(0, b"x")
    assert caught.value.errno == errno.EPERM
    await device.close()


async def test_extents_cover_the_rounded_size(path: Path) -> None:
    device = await open_device(str(path), read_only=True)
    found = await device.extents(0, 1024)
    assert found == [Extent(1000, EXTENT_DATA), Extent(24, EXTENT_ZERO)]
    assert await device.extents(1010, 14) == [Extent(14, EXTENT_ZERO)]
    assert await device.extents(0, 100) == [Extent(100, EXTENT_DATA)]
    await device.close()


async def test_it_tells_of_itself_what_the_file_tells(path: Path) -> None:
    device = await open_device(str(path), read_only=True)
    assert isinstance(device, RoundedDevice)
    assert (
        device.note
        == "its size, 1000 bytes, is no multiple of 512: 24 zero bytes are added"
    )
    evidence = await device.identify("source")
    assert (evidence.name, evidence.size) == (str(path), 1000)
    assert await device.measure() == 1024
    os.truncate(path, 2000)
    assert await device.measure() == 2048
    await device.close()


async def test_file_that_is_written_to_keeps_its_size(path: Path) -> None:
    device = await open_device(str(path), read_only=False)
    assert device.size == 1000
    await device.close()


async def test_whole_sectors_are_not_wrapped(tmp_path: Path) -> None:
    (tmp_path / "even").write_bytes(bytes(1024))
    device = await open_device(str(tmp_path / "even"), read_only=True)
    assert not isinstance(device, RoundedDevice)
    await device.close()


async def test_device_that_is_rounded_hears_that_it_is_alone_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[FileDevice] = []
    monkeypatch.setattr(
        FileDevice, "reopening_undone", lambda device: told.append(device)
    )
    device = await open_device(str(path), read_only=True)
    assert isinstance(device, RoundedDevice)
    device.reopening_undone()
    assert told == [device._inner]
    await device.close()
