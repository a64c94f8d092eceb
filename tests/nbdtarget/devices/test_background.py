# SPDX-License-Identifier: Apache-2.0
"""Background I/O, for which no client waits, stays off the loop, and is otherwise the same as other I/O."""

import asyncio
import errno as errnos
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.bio import FUA, OP_FLUSH, OP_READ, OP_WRITE, PENDING, Bio
from nbdtarget.devices.base import Device
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.devices.resolve import open_device

SIZE = 1 << 20


@pytest.fixture
async def device(tmp_path: Path) -> AsyncIterator[Device]:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    opened = await open_device(str(path), read_only=False)
    yield opened
    await opened.close()


async def status_of(device: Device, bio: Bio, *, ends_at_once: bool) -> int:
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    bio.endio = lambda _: ended.set_result(None)
    device.submit_background(bio)
    assert (bio.status != PENDING) == ends_at_once
    await ended
    return bio.status


def bio_of(op: int, offset: int, data: bytes | bytearray, flags: int = 0) -> Bio:
    return Bio(op, offset, len(data), memoryview(data), flags, lambda _: None)


async def test_small_cached_io_goes_to_workers(device: Device) -> None:
    data, found = b"x" * 4096, bytearray(4096)
    write, read = bio_of(OP_WRITE, 8192, data), bio_of(OP_READ, 8192, found)
    assert await status_of(device, write, ends_at_once=False) == 0
    assert await status_of(device, read, ends_at_once=False) == 0
    assert found == data


async def test_fua_and_flush_are_what_they_are_in_the_foreground(
    device: Device,
) -> None:
    write = bio_of(OP_WRITE, 0, b"y" * 512, FUA)
    assert await status_of(device, write, ends_at_once=False) == 0
    flush = Bio(OP_FLUSH, 0, 0, None, 0, lambda _: None)
    assert await status_of(device, flush, ends_at_once=False) == 0
    assert bytes(await device.read(0, 512)) == b"y" * 512


@pytest.mark.parametrize(
    ("op", "errno"), [(OP_READ, errnos.EINVAL), (OP_WRITE, errnos.ENOSPC)]
)
async def test_bounds_are_kept(device: Device, op: int, errno: int) -> None:
    bio = bio_of(op, SIZE - 512, bytearray(1024))
    assert await status_of(device, bio, ends_at_once=True) == errno


async def test_other_devices_take_it_as_any_other_bio() -> None:
    memory = MemoryDevice(SIZE)
    data, found = b"z" * 4096, bytearray(4096)
    write, read = bio_of(OP_WRITE, 4096, data), bio_of(OP_READ, 4096, found)
    assert await status_of(memory, write, ends_at_once=True) == 0
    assert await status_of(memory, read, ends_at_once=True) == 0
    assert found == data
