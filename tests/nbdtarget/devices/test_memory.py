# SPDX-License-Identifier: Apache-2.0
"""MemoryDevice: a disk that costs what is written to it."""

import errno
import random

import pytest

from nbdtarget.bio import OP_FLUSH, Bio
from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import EXTENT_DATA, EXTENT_HOLE, EXTENT_ZERO, Extent
from nbdtarget.devices.memory import CHUNK_SIZE, MemoryDevice

HOLE = EXTENT_HOLE | EXTENT_ZERO


async def test_terabyte_costs_nothing() -> None:
    device = MemoryDevice(1 << 40)
    assert bytes(await device.read((1 << 40) - 512, 512)) == bytes(512)
    assert await device.extents(0, 1 << 40) == [Extent(1 << 40, HOLE)]
    assert device.nr_chunks == 0


async def test_write_zeroes_and_discard_of_a_terabyte_are_free() -> None:
    device = MemoryDevice(1 << 40)
    await device.write(1 << 39, b"x")
    await device.write_zeroes(0, 1 << 40)
    assert device.nr_chunks == 0
    await device.discard(0, 1 << 40)


async def test_extents_tell_data_from_holes() -> None:
    device = MemoryDevice(8 * CHUNK_SIZE)
    await device.write(2 * CHUNK_SIZE - 1, b"xx")
    assert await device.extents(100, 6 * CHUNK_SIZE) == [
        Extent(CHUNK_SIZE - 100, HOLE),
        Extent(2 * CHUNK_SIZE, EXTENT_DATA),
        Extent(3 * CHUNK_SIZE + 100, HOLE),
    ]


async def test_discard_frees_whole_chunks_at_the_odd_end_too() -> None:
    device = MemoryDevice(CHUNK_SIZE + 512)
    await device.write(0, b"x" * (CHUNK_SIZE + 512))
    await device.discard(0, CHUNK_SIZE + 512)
    assert device.nr_chunks == 0


async def test_no_unmap_keeps_the_chunks() -> None:
    device = MemoryDevice(2 * CHUNK_SIZE)
    await device.write(0, b"x" * 2 * CHUNK_SIZE)
    await device.write_zeroes(0, 2 * CHUNK_SIZE, no_unmap=True)
    assert device.nr_chunks == 2
    assert bytes(await device.read(0, 2 * CHUNK_SIZE)) == bytes(2 * CHUNK_SIZE)


async def test_flush_ends_inline() -> None:
    ended: list[Bio] = []
    MemoryDevice(512).submit(Bio(OP_FLUSH, 0, 0, None, 0, ended.append))
    assert [bio.status for bio in ended] == [0]


async def test_past_the_end_is_refused() -> None:
    with pytest.raises(DeviceError) as caught:
        await MemoryDevice(512).write(1, bytes(512))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("seed", range(5))
async def test_it_is_an_array_of_bytes(seed: int) -> None:
    rng = random.Random(seed)
    size = 3 * CHUNK_SIZE + 1000
    device, model = MemoryDevice(size), bytearray(size)
    for _ in range(60):
        offset = rng.randrange(size)
        length = rng.randrange(1, size - offset + 1)
        if rng.random() < 0.5:
            data = rng.randbytes(length)
            await device.write(offset, data)
            model[offset : offset + length] = data
        else:
            await device.write_zeroes(offset, length, no_unmap=rng.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        assert (
            bytes(await device.read(offset, length)) == model[offset : offset + length]
        )
    assert bytes(await device.read(0, size)) == model
