# SPDX-License-Identifier: Apache-2.0
"""Linear on linear on linear: one step, and each device can still be suspended and reloaded."""

import asyncio
import errno as errnos

import pytest

from nbdtarget.bio import OP_FLUSH, OP_READ, OP_WRITE, PENDING
from nbdtarget.dm.mapped_device import MappedDevice, State
from nbdtarget.dm.registry import Registry
from tests.support.clock import settle
from tests.support.dm import RamDevice, RamOpener, make_registry, submit

DATA = bytes(512)
NAMES = ("low", "middle", "high")


async def make() -> tuple[Registry, RamOpener, list[MappedDevice]]:
    """`high` on `middle` on `low` on /a, each 8 sectors further in."""
    registry, opener = make_registry(a=64 << 10, b=64 << 10)
    devices, below = [], "/a"
    for nr, name in enumerate(NAMES):
        table = f"0 {100 - 8 * nr} linear {below} 8"
        devices.append(await registry.create(name, table))
        below = f"/dev/mapper/{name}"
    return registry, opener, devices


def disk(opener: RamOpener) -> RamDevice:
    return opener.open["/a"]


async def test_offsets_add_up_and_nothing_between_sees_the_bio() -> None:
    registry, opener, (low, middle, high) = await make()
    submits = [passed.submit for passed in (low, middle)]
    for passed in (low, middle):
        passed.submit = None  # type: ignore[assignment]
    assert submit(high, OP_WRITE, 512, DATA).status == 0
    assert submit(high, OP_READ, 1024, 512).status == 0
    assert disk(opener).log == [
        (OP_WRITE, 25 * 512, 512, 0),
        (OP_READ, 26 * 512, 512, 0),
    ]
    low.submit, middle.submit = submits
    await registry.close()


@pytest.mark.parametrize("name", NAMES)
async def test_suspend_waits_for_what_is_in_flight_above(name: str) -> None:
    registry, opener, devices = await make()
    disk(opener).hold = True
    bio = submit(devices[-1], OP_WRITE, 0, DATA)
    suspending = asyncio.ensure_future(registry.suspend(name, noflush=True))
    await settle()
    assert not suspending.done()
    disk(opener).let_go()
    await suspending
    assert bio.status == 0
    await registry.close()


@pytest.mark.parametrize("name", NAMES)
async def test_bios_wait_where_it_is_suspended_and_go_on_at_resume(name: str) -> None:
    registry, opener, devices = await make()
    await registry.suspend(name)
    disk(opener).log.clear()
    bio = submit(devices[-1], OP_WRITE, 0, DATA)
    assert (bio.status, disk(opener).log) == (PENDING, [])
    await registry.resume(name)
    assert bio.status == 0
    assert submit(devices[-1], OP_WRITE, 0, DATA).status == 0
    assert disk(opener).log == [(OP_WRITE, 24 * 512, 512, 0)] * 2
    await registry.close()


async def test_lower_table_that_is_loaded_is_the_one_that_is_gone_through() -> None:
    registry, opener, devices = await make()
    await registry.load("low", "0 100 linear /b 0")
    await registry.resume("low")
    assert submit(devices[-1], OP_WRITE, 0, DATA).status == 0
    assert opener.open["/b"].log[-1] == (OP_WRITE, 16 * 512, 512, 0)
    await registry.close()


async def test_lower_table_that_is_smaller_ends_what_lies_beyond_it() -> None:
    registry, opener, devices = await make()
    await registry.load("middle", "0 16 linear /dev/mapper/low 8")
    await registry.resume("middle")
    disk(opener).log.clear()
    assert submit(devices[-1], OP_WRITE, 8 * 512, DATA).status == errnos.EIO
    assert disk(opener).log == []
    assert submit(devices[-1], OP_WRITE, 0, DATA).status == 0
    assert disk(opener).log == [(OP_WRITE, 24 * 512, 512, 0)]
    await registry.close()


async def test_lowest_device_that_has_shrunk_knows_that_the_bio_is_from_above() -> None:
    registry, _, devices = await make()
    await registry.load("low", "0 28 zero\n28 1 linear /a 0")
    await registry.resume("low")
    assert submit(devices[-1], OP_READ, 12 * 512, 512).status == 0
    assert submit(devices[-1], OP_READ, 13 * 512, 512).status == errnos.EIO
    await registry.close()


async def test_lower_table_of_two_targets_cuts_what_comes() -> None:
    registry, opener, devices = await make()
    await registry.load("low", "0 20 linear /a 8\n20 80 linear /b 0")
    await registry.resume("low")
    disk(opener).log.clear()
    assert submit(devices[-1], OP_WRITE, 3 * 512, 2 * DATA).status == 0
    assert disk(opener).log == [(OP_WRITE, 27 * 512, 512, 0)]
    assert opener.open["/b"].log[-1] == (OP_WRITE, 0, 512, 0)
    await registry.close()


async def test_wiped_lower_table_fails_everything_above() -> None:
    registry, opener, devices = await make()
    await registry.wipe_table("low")
    disk_log = len(disk(opener).log)
    assert submit(devices[-1], OP_READ, 0, 512).status == errnos.EIO
    assert len(disk(opener).log) == disk_log
    await registry.close()


async def test_upper_device_that_is_gone_is_not_told_of_the_lower_one() -> None:
    registry, _, (low, middle, high) = await make()
    assert low.fast_path._uppers == {middle.fast_path}
    assert middle.fast_path._uppers == {high.fast_path}
    await registry.remove("high")
    assert middle.fast_path._uppers == set()
    await registry.load("middle", "0 16 zero")
    await registry.resume("middle")
    assert low.fast_path._uppers == set()
    assert low.state is State.ACTIVE
    await registry.close()


async def test_flush_goes_the_usual_way() -> None:
    registry, opener, devices = await make()
    assert submit(devices[-1], OP_FLUSH).status == 0
    assert disk(opener).log == [(OP_FLUSH, 0, 0, 0)]
    await registry.close()
