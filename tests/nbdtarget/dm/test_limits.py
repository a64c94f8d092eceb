# SPDX-License-Identifier: Apache-2.0
"""Limits: stacked from the devices below through targets and tables, and told to NBD clients."""

import pytest

from nbdtarget.devices.base import Device, QueueLimits
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.server.export import (
    DirectoryExports,
    preferred_block_size,
    transmission_flags,
)
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_protocol.consts import FLAG_SEND_FAST_ZERO, FLAG_SEND_FUA, FLAG_SEND_TRIM
from tests.support.tables import Disks

K = 1024


def make() -> Disks:
    disks = Disks(
        m=CloneMetadata.device_size_for(16), d=1 << 20, s=1 << 20, a=1 << 20, b=1 << 20
    )
    for name in ("/d", "/s", "/a", "/b"):
        disks[name].can_discard = True
        disks[name].can_write_zeroes = True
        disks[name].can_fast_zero = True
    return disks


async def limits(table: str, disks: Disks | None = None) -> QueueLimits:
    return (await (disks or make()).create(table)).limits


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("0 8 zero", QueueLimits()),
        ("0 8 linear /a 0", QueueLimits()),
        ("0 384 striped 3 128 /a 0 /b 0 /d 0", QueueLimits(512, 64 * K, 192 * K)),
        (
            "0 256 striped 2 128 /a 0 /b 0\n256 96 striped 3 16 /a 512 /b 512 /d 512",
            QueueLimits(512, 64 * K, 384 * K),
        ),
        ("0 2048 clone /m /d /s 128", QueueLimits(512, 64 * K, 64 * K)),
        (
            "0 2048 clone /m /d /s 128 1 no_discard_passdown",
            QueueLimits(512, 64 * K, 64 * K, 64 * K),
        ),
    ],
)
async def test_limits_of_targets(table: str, expected: QueueLimits) -> None:
    assert await limits(table) == expected


async def test_limits_shine_through_a_stack_and_follow_the_live_table() -> None:
    disks = make()
    disks["/a"].logical_block_size = 4096
    disks["/d"].io_opt = 256 * K
    disks["/d"].io_min = 32 * K
    disks["/d"].discard_granularity = 1 << 20
    clone = await disks.create("0 2048 clone /m /d /s 128", "clone")
    expected = QueueLimits(512, 32 * K, 256 * K, 1 << 20)
    assert clone.limits == expected  # a multiple of the region size
    upper = await disks.create("0 8 linear /dev/mapper/clone 8\n8 8 linear /a 0", "u")
    assert upper.limits == expected._replace(logical_block_size=4096)
    await disks.registry.load("u", "0 8 zero")
    assert upper.logical_block_size == 4096
    await upper.resume()
    assert upper.limits == QueueLimits()


@pytest.mark.parametrize(
    ("table", "trim", "fast_zero"),
    [
        ("0 8 linear /a 0", True, True),
        ("0 8 linear /b 0", False, False),
        ("0 8 linear /a 0\n8 8 linear /b 0", True, False),
        ("0 16 striped 2 8 /a 0 /b 0", True, False),
    ],
)
async def test_what_a_device_can_do_is_stacked_too(
    table: str, trim: bool, fast_zero: bool
) -> None:
    disks = make()
    disks["/b"].can_discard = disks["/b"].can_fast_zero = False
    lower = await disks.create(table, "lower")
    size = lower.size // 512
    upper = await disks.create(f"0 {size} linear /dev/mapper/lower 0", "upper")
    for device in (lower, upper):
        flags = transmission_flags(device)
        assert flags & FLAG_SEND_FUA
        assert bool(flags & FLAG_SEND_TRIM) is trim
        assert bool(flags & FLAG_SEND_FAST_ZERO) is fast_zero


@pytest.mark.parametrize(
    ("io_opt", "block_size", "payload_max", "preferred"),
    [
        (0, 512, 32 << 20, 4096),
        (0, 8192, 32 << 20, 8192),
        (512, 512, 32 << 20, 4096),
        (64 * K, 512, 32 << 20, 64 * K),
        (192 * K, 512, 32 << 20, 64 * K),
        (1 << 30, 512, 64 << 20, 32 << 20),
        (1 << 30, 512, (3 << 20) + 5, 2 << 20),
    ],
)
def test_preferred_block_size(
    io_opt: int, block_size: int, payload_max: int, preferred: int
) -> None:
    device: Device = MemoryDevice(1 << 20)
    device.io_opt, device.logical_block_size = io_opt, block_size
    assert preferred_block_size(device, payload_max=payload_max) == preferred


async def test_clients_are_told_the_region_size_of_a_clone() -> None:
    disks = make()
    clone = await disks.create("0 2048 clone /m /d /s 128", "c")
    assert isinstance(clone, MappedDevice)
    export = DirectoryExports(disks.registry).lookup("c")
    assert export is not None
    assert (export.block_size_min, export.block_size_preferred) == (1, 64 * K)
