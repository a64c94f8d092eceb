# SPDX-License-Identifier: Apache-2.0
"""Whether a disk holds data: looked at where something would be, and never for long."""

import asyncio
import errno as errnos
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices import content
from nbdtarget.devices.base import EXTENT_DATA, Device, Extent
from nbdtarget.devices.content import maybe_content
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.devices.resolve import open_device
from tests.support.patience import PATIENCE_S

TERABYTE = 1 << 40


class Opaque(Device):
    """A sparse disk that calls everything data, as a block device does.

    Attributes:
        nr_read: bytes.
        delay_s: how long each read takes.
    """

    def __init__(self, size: int) -> None:
        super().__init__("opaque", size)
        self.inner = MemoryDevice(size, name="opaque")
        self.nr_read = 0
        self.delay_s = 0.0
        self.errno = 0

    async def readinto(self, offset: int, buffer: memoryview) -> None:
        self.nr_read += len(buffer)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.errno:
            raise DeviceError(self.errno, self.name, "read", offset, len(buffer))
        await self.inner.readinto(offset, buffer)


@pytest.mark.parametrize("size", [512, 4 << 20, 300 << 20, TERABYTE, TERABYTE + 512])
async def test_blank_disk_of_any_size_is_blank(size: int) -> None:
    disk = Opaque(size)
    assert await maybe_content(disk) is None
    assert disk.nr_read <= (256 << 20) + (5 << 20)


@pytest.mark.parametrize(
    ("offset", "magic", "what"),
    [
        (1080, b"\x53\xef", "holds an ext2, ext3 or ext4 file system"),
        (0, b"XFSB", "holds an XFS file system"),
        (512, b"EFI PART", "holds a GPT partition table"),
        (510, b"\x55\xaa", "holds an MBR partition table or a boot sector"),
        (512, b"LABELONE", "holds an LVM volume"),
        (4096, b"\xfc\x4e\x2b\xa9", "holds a RAID member (md)"),
        (0, b"LUKS\xba\xbe", "holds a LUKS volume"),
        (4086, b"SWAPSPACE2", "holds swap space"),
        (65600, b"_BHRfS_M", "holds a btrfs file system"),
        (0, b"nbdt-sb\0", "holds metadata of nbdtarget"),
        (TERABYTE - 512, b"EFI PART", "holds the end of a GPT partition table"),
        (TERABYTE - 8192, b"\xfc\x4e\x2b\xa9", "holds a RAID member (md)"),
        (TERABYTE - 65536, b"\xfc\x4e\x2b\xa9", "holds a RAID member (md)"),
        (5000, b"x", "holds data (byte 5000 is not zero)"),
        (TERABYTE - 1, b"x", f"holds data (byte {TERABYTE - 1} is not zero)"),
        (128 << 20, b"x", f"holds data (byte {128 << 20} is not zero)"),
        (TERABYTE // 2, b"XFSB", f"holds data (byte {TERABYTE // 2} is not zero)"),
    ],
)
async def test_what_is_found_is_named(offset: int, magic: bytes, what: str) -> None:
    disk = Opaque(TERABYTE)
    await disk.inner.write(offset, magic)
    assert await maybe_content(disk) == what


@pytest.mark.parametrize("at", [0.1, 0.37, 0.62, 0.9])
async def test_data_in_one_percent_of_a_large_disk_are_found(at: float) -> None:
    disk = Opaque(1 << 30)
    run = bytes([7]) * (10 << 20)
    await disk.inner.write(int(at * disk.size), run)
    found = await maybe_content(disk)
    assert found is not None
    assert found.startswith("holds data (byte ")


async def test_one_byte_in_what_may_be_data_of_a_sparse_file_is_found(
    tmp_path: Path,
) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(TERABYTE)
        os.pwrite(file.fileno(), b"x", 345 << 30)
    disk = await open_device(str(path))
    try:
        async with asyncio.timeout(PATIENCE_S):  # reading all of it takes longer
            found = await maybe_content(disk)
        assert found == f"holds data (byte {345 << 30} is not zero)"
    finally:
        await disk.close()


async def test_what_a_disk_calls_zeroes_is_not_read() -> None:
    class Holes(Opaque):
        async def extents(self, offset: int, length: int) -> list[Extent]:
            return await self.inner.extents(offset, length)

    disk = Holes(TERABYTE)
    assert await maybe_content(disk) is None
    assert disk.nr_read <= 5 << 20


async def test_disk_that_cannot_be_read_may_hold_data() -> None:
    disk = Opaque(TERABYTE)
    disk.errno = errnos.EIO
    found = await maybe_content(disk)
    assert found == (
        "may hold data: opaque: read of 4194304 bytes at 0: Input/output error"
    )


async def test_disk_that_is_too_slow_to_tell_may_hold_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(content, "LOOK_S_MAX", 0.1)
    disk = Opaque(TERABYTE)
    disk.delay_s = 0.03
    found = await maybe_content(disk)
    assert found is not None
    assert found.startswith("may hold data: in 0 s only ")


async def test_fragmented_disk_is_not_read_for_hours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A badly fragmented disk: the rest of it counts as one run of data."""
    monkeypatch.setattr(content, "RANGES_MAX", 8)

    class Fragments(Opaque):
        async def extents(self, offset: int, length: int) -> list[Extent]:
            size = 1 << 20
            flags = EXTENT_DATA if offset // size % 2 else 1
            return [Extent(min(size, length), flags)]

    disk = Fragments(TERABYTE)
    assert await maybe_content(disk) is None
    assert disk.nr_read <= 32 << 20


@pytest.fixture
def blank_block_device(tmp_path: Path) -> Iterator[str]:
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("loop devices need root and losetup")
    image = tmp_path / "blank"
    with image.open("wb") as file:
        file.truncate(2 << 30)
    made = subprocess.run(
        ["losetup", "-f", "--show", str(image)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    path = made.stdout.strip()
    try:
        yield path
    finally:
        subprocess.run(["losetup", "-d", path], check=True)


async def test_large_blank_block_device_holds_no_data(blank_block_device: str) -> None:
    disk = await open_device(blank_block_device)
    try:
        assert await maybe_content(disk) is None
        await disk.write(1 << 30, bytes([9]) * (20 << 20))
        found = await maybe_content(disk)
        assert found is not None
        assert found.startswith("holds data (byte ")
    finally:
        await disk.close()
