# SPDX-License-Identifier: Apache-2.0
"""FileDevice on a block device: a loop device, where we may make one."""

import os
import stat
from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.base import EXTENT_DATA, Extent
from nbdtarget.devices.resolve import create_device, identity, open_device

SIZE = 4 << 20


async def test_size_sector_and_abilities(loop: Path) -> None:
    device = await open_device(str(loop))
    assert device.size == SIZE
    assert device.logical_block_size in (512, 4096)
    assert device.can_discard
    assert device.can_write_zeroes
    assert await device.extents(0, SIZE) == [Extent(SIZE, EXTENT_DATA)]
    assert device.hides_zeroes
    await device.close()


async def test_read_write_zero_discard_at_any_alignment(loop: Path) -> None:
    device = await open_device(str(loop))
    model = bytearray(await device.read(0, SIZE))
    for offset, length in ((0, 4096), (5, 100), (4095, 70_000), (1 << 20, 1 << 20)):
        await device.write(offset, b"w" * length, fua=True)
        model[offset : offset + length] = b"w" * length
        await device.write_zeroes(offset + 3, length - 3, no_unmap=length == 100)
        model[offset + 3 : offset + length] = bytes(length - 3)
    await device.flush()
    await device.discard(3 << 20, 1 << 20)
    assert bytes(await device.read(0, 3 << 20)) == model[: 3 << 20]
    await device.close()


async def test_second_user_is_refused(loop: Path) -> None:
    device = await open_device(str(loop))
    for read_only in (False, True):
        with pytest.raises(ResolveError, match="in use by another"):
            await open_device(str(loop), read_only=read_only)
    await device.close()


async def test_it_is_not_created(loop: Path) -> None:
    with pytest.raises(ResolveError, match="file exists"):
        await create_device(str(loop), SIZE)
    assert stat.S_ISBLK(os.stat(loop).st_mode)


def test_identity_is_of_the_device_not_of_its_node(loop: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    os.mknod(node, 0o600 | stat.S_IFBLK, loop.stat().st_rdev)
    assert identity(str(node)) == identity(str(loop))
