# SPDX-License-Identifier: Apache-2.0
"""The parts of a device that are read to see whether it is an image."""

import struct

import pytest

from nbdtarget.devices.image_look import maybe_image_on
from nbdtarget.devices.memory import MemoryDevice

MIB = 1 << 20


def footer() -> bytes:
    """The 512 bytes at the end of a VHD of a fixed size, as far as they are looked at."""
    data = bytearray(512)
    data[:8] = b"conectix"
    struct.pack_into(">I", data, 60, 2)
    struct.pack_into(">I", data, 64, ~sum(data) & 0xFFFFFFFF)
    return bytes(data)


@pytest.mark.parametrize("size", [1024, MIB + 512, MIB + 4096, 3 * MIB + 1024])
async def test_fixed_vhd_is_known_by_its_footer(size: int) -> None:
    disk = MemoryDevice(size)
    await disk.write(size - 512, footer())
    found = await maybe_image_on(disk)
    assert found is not None
    assert (found.name, found.verb) == ("vpc", "ends")


async def test_disk_of_a_usual_size_is_not_read_at_its_end() -> None:
    disk = MemoryDevice(2 * MIB)
    await disk.write(2 * MIB - 512, footer())
    assert await maybe_image_on(disk) is None


async def test_what_is_read_in_order_only_is_not_read_to_its_end() -> None:
    disk = MemoryDevice(MIB + 512)
    await disk.write(MIB, footer())
    disk.is_forward_only = True
    assert await maybe_image_on(disk) is None


async def test_raw_disk_of_an_unusual_size_is_a_raw_disk() -> None:
    disk = MemoryDevice(MIB + 512)
    await disk.write(MIB, b"conectix is what this disk ends with")
    assert await maybe_image_on(disk) is None
