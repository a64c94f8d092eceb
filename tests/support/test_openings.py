# SPDX-License-Identifier: Apache-2.0
"""Crash devices that are opened again: what one opening suffers is its own, what a disk forgets is all's."""

import asyncio
import random

import pytest

from nbdtarget.common.errors import DeviceError, ResolveError
from nbdtarget.devices.health import HealthState
from nbdtarget.targets.powercut.volatile_cache import Fate
from tests.support.devices import CrashDevice, FailFlush
from tests.support.openings import Openings

SIZE = 8 * 512
A = b"A" * 512
ZERO = bytes(512)


@pytest.fixture
def disk() -> CrashDevice:
    return CrashDevice(SIZE, name="/disk")


@pytest.fixture
def openings(disk: CrashDevice) -> Openings:
    return Openings([disk])


async def test_failed_flush_latches_its_opening_alone(
    disk: CrashDevice, openings: Openings
) -> None:
    first = await openings.open_device("/disk", read_only=False)
    await first.write(0, A)
    disk.lie = FailFlush()
    for _ in range(2):
        with pytest.raises(DeviceError):
            await first.flush()
    assert first.health.state is HealthState.LATCHED
    assert first.health.errors == {"flush": 1}
    second = await openings.open_device("/disk", read_only=False)
    await second.flush()
    assert disk.stable_image()[:512] == A


async def test_disk_that_goes_ends_what_is_in_flight_and_comes_back(
    openings: Openings, disk: CrashDevice
) -> None:
    first = await openings.open_device("/disk", read_only=False)
    await first.write(0, A)
    openings.hang(disk)
    hanging = asyncio.ensure_future(first.write(512, A))
    await asyncio.sleep(0)
    assert not hanging.done()
    openings.go(disk)
    with pytest.raises(DeviceError):
        await hanging
    assert first.health.state is HealthState.LOST
    with pytest.raises(ResolveError, match="refused"):
        await openings.open_device("/disk", read_only=False)
    openings.come_back(disk, 0, Fate.DROP)
    second = await openings.open_device("/disk", read_only=False)
    assert bytes(await second.read(0, 1024)) == ZERO + ZERO
    with pytest.raises(DeviceError):
        await first.read(0, 512)


async def test_disk_that_hangs_goes_on(openings: Openings, disk: CrashDevice) -> None:
    first = await openings.open_device("/disk", read_only=False)
    openings.hang(disk)
    writes = [asyncio.ensure_future(first.write(at, A)) for at in (0, 512)]
    second = await openings.open_device("/disk", read_only=False)
    reading = asyncio.ensure_future(second.read(0, 512))
    await asyncio.sleep(0)
    assert not any(each.done() for each in (*writes, reading))
    openings.go_on(disk, random.Random(0))
    await asyncio.gather(*writes, reading)
    assert disk.image()[:1024] == A + A


async def test_in_flight_on_a_slow_disk_has_happened_or_not_when_it_goes() -> None:
    seen = set()
    for seed in range(20):
        disk = CrashDevice(SIZE, seed, name="/disk", inline_chance=0.0)
        openings = Openings([disk])
        device = await openings.open_device("/disk", read_only=False)
        writing = asyncio.ensure_future(device.write(0, A))
        await asyncio.sleep(0)
        openings.go(disk)
        with pytest.raises(DeviceError):
            await writing
        await asyncio.sleep(0)
        seen.add(disk.image()[:512])
    assert seen == {A, ZERO}


async def test_another_disk_comes_back_under_the_name(
    openings: Openings, disk: CrashDevice
) -> None:
    first = await openings.open_device("/disk", read_only=False)
    openings.exchange(disk, CrashDevice(SIZE, content=A * 8, name="/disk"))
    second = await openings.open_device("/disk", read_only=False)
    assert bytes(await second.read(0, 512)) == A
    with pytest.raises(DeviceError):
        await first.read(0, 512)
