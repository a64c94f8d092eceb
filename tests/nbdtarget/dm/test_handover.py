# SPDX-License-Identifier: Apache-2.0
"""Devices that are parked in one process, and made again in another, or in the same one."""

import msgspec
import pytest

from nbdtarget.common.errors import TableError
from nbdtarget.devices.health import Bequest
from nbdtarget.dm.geometry import Geometry
from nbdtarget.dm.handover import DeviceState, Parking, let_go, refusals, unpark
from nbdtarget.dm.mapped_device import State
from nbdtarget.dm.registry import Registry
from tests.support.dm import RamOpener, make_registry

SIZES = {"a": 8192, "b": 8192}


async def stack() -> tuple[Registry, RamOpener]:
    """`low`, `high` on it, `other` beside them, and `none` without a table."""
    registry, opener = make_registry(**SIZES)
    assert isinstance(opener, RamOpener)
    await registry.create("low", "0 16 linear /a 0")
    await registry.create(
        "high", "0 4 linear /dev/mapper/low 0\n4 4 linear /dev/mapper/low 8", uuid="U"
    )
    await registry.create("other", "0 16 linear /b 0", minor=9, read_only=True)
    await registry.create("none", None)
    return registry, opener


def sent(states: list[DeviceState]) -> list[DeviceState]:
    """As they come out at the other end."""
    raw = msgspec.msgpack.encode(states)
    return msgspec.msgpack.decode(raw, type=list[DeviceState])


def picture(registry: Registry) -> list[object]:
    return [
        (
            *(device.dm_name, device.uuid, device.minor, device.read_only),
            *(device.state, device.size, device.event_nr, device.geometry),
            *(device.table(), device.table(inactive=True), device.said_rotational),
        )
        for device in registry.devices()
    ]


async def test_another_process_makes_the_same_devices() -> None:
    registry, opener = await stack()
    low = registry.get("low")
    low.geometry = Geometry(1, 2, 3, 0)
    low.said_rotational = True
    low.event()
    await registry.load("other", "0 8 linear /b 0", read_only=True)
    await registry.suspend("other")
    await low.message(0, ["@stats_create", "-", "/2", "1", "histogram:1,2", "me", "x"])
    await registry.get("high").read(0, 4096)
    before = picture(registry)
    counted = await low.message(0, ["@stats_print", "0"])
    assert counted is not None
    assert counted.split()[1] == "1"

    parking = Parking(registry)
    await parking.park()
    assert opener.still_open == []
    assert not any(device.has_table for device in registry.devices())

    other, opener = make_registry(**SIZES)
    states = sent(parking.states)
    await unpark(other, states)
    assert other.get("high").state is State.SUSPENDED
    await let_go(other, states)
    assert picture(other) == before
    assert await other.get("low").message(0, ["@stats_print", "0"]) == counted
    assert await other.get("low").message(0, ["@stats_list"]) == (
        "0: 0+16 8 me x histogram:1,2"
    )
    await other.close()
    await registry.close()
    assert isinstance(opener, RamOpener)
    assert opener.still_open == []


async def test_undo_makes_them_what_they_were() -> None:
    registry, opener = await stack()
    await registry.suspend("other")
    before = picture(registry)
    parking = Parking(registry)
    await parking.park()
    assert await parking.undo() == []
    assert picture(registry) == before
    await registry.get("high").write(0, bytes(512))
    await registry.close()
    assert opener.still_open == []


async def test_a_device_that_does_not_answer_stops_it_and_all_goes_on() -> None:
    registry, opener = await stack()
    before = picture(registry)
    opener.open["/b"].hold = True
    await registry.create("stuck", "0 8 linear /a 0")
    disk = opener.open["/a"]
    disk.flush_errno = 0
    disk.hold = True
    parking = Parking(registry)
    with pytest.raises(
        TableError, match=r"has not ended for 0\.01 s; the device goes on"
    ):
        await parking.park(0.01)
    disk.let_go()
    assert await parking.undo() == []
    await registry.remove("stuck")
    assert picture(registry) == before
    opener.open["/b"].let_go()
    await registry.close()


async def test_undo_says_what_could_not_be_opened_again() -> None:
    registry, opener = await stack()
    parking = Parking(registry)
    await parking.park()
    del opener.sizes["/b"]
    (failure,) = await parking.undo()
    assert failure.startswith("other: ")
    assert "No such file or directory" in failure
    assert registry.get("high").state is State.ACTIVE
    await registry.close()


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("0 8 dust /a 0 512", "x: the list of bad blocks (dust) would be lost"),
        ("0 8 powercut /a 0", "x: what the volatile cache holds (powercut) would be"),
    ],
)
async def test_targets_with_a_state_of_their_own_are_refused(
    table: str, reason: str
) -> None:
    registry, _ = make_registry(**SIZES)
    await registry.create("x", table)
    (found,) = refusals(registry)
    assert found.startswith(reason)
    await registry.close()


async def test_what_would_be_forgotten_is_refused() -> None:
    registry, opener = await stack()
    assert refusals(registry) == []
    registry.get("low").health.bequest = Bequest(-1)
    opener.open["/b"].health.latch(5)
    registry.get("high").deferred_remove = True
    await registry.suspend("low")
    assert [each[:40] for each in refusals(registry)] == [
        "low: writes were lost, and no client has",
        "high: it is going to be removed when its",
        "/b: has failed, and has to be opened aga",
    ]
    registry.get("low").health.bequest = None
    assert refusals(registry)[0] == (
        "low: it is suspended, and high stands on it: resume it first"
    )
    await registry.close()
