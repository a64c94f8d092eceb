# SPDX-License-Identifier: Apache-2.0
"""Devices that are parked in one process, and made again in another, or in the same one."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from nbdtarget.bio import Bio
from nbdtarget.common.errors import DeviceError, TableError
from nbdtarget.devices import resolve
from nbdtarget.devices.health import Bequest
from nbdtarget.dm import handover
from nbdtarget.dm.geometry import Geometry
from nbdtarget.dm.handover import DeviceState, Parking, let_go, refusals, unpark
from nbdtarget.dm.mapped_device import State
from nbdtarget.dm.registry import Registry
from nbdtarget.targets.base import SUBMITTED, Target, TargetContext
from nbdtarget.targets.registry import TARGET_TYPES
from tests.support.dm import RamOpener, make_registry
from tests.support.patience import until

SIZES = {"a": 8192, "b": 8192}


class LateTarget(Target):
    """Its last commit ends when `may_end` is set."""

    type_name = "late"
    version = (0, 0, 1)
    may_end: asyncio.Event

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "LateTarget":
        return cls(ctx)

    def map(self, bio: Bio) -> int:
        bio.end(0)
        return SUBMITTED

    async def postsuspend(self) -> None:
        await self.may_end.wait()


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
    assert failure.startswith("other does not go on yet, and is tried again: ")
    assert "No such file or directory" in failure
    assert registry.get("high").state is State.ACTIVE
    await registry.close()


async def test_what_could_not_be_opened_again_fails_its_requests_and_is_tried_again() -> (
    None
):
    """A client that is attached gets errors meanwhile, and does not hang."""
    registry, opener = make_registry(**SIZES)
    await registry.create("low", "0 16 linear /a 0")
    await registry.create("high", "0 16 linear /dev/mapper/low 0")
    high = registry.acquire("high")
    parking = Parking(registry)
    await parking.park()
    waiting = asyncio.create_task(high.read(0, 512))
    await asyncio.sleep(0)
    del opener.sizes["/a"]
    failures = await parking.undo()
    assert [each.partition(" ")[0] for each in failures] == ["low", "high"]
    with pytest.raises(DeviceError):
        await waiting
    with pytest.raises(DeviceError):
        await high.flush()
    assert "No such file or directory" in registry.get("low").failure
    assert registry.why_missing("high").startswith("export 'high' cannot be served now")
    for name in ("low", "high"):
        found = [each for each in refusals(registry) if each.startswith(f"{name}: it")]
        assert len(found) == 1
    opener.sizes["/a"] = 8192
    registry.reopenings.try_now()
    await until(lambda: high.active is not None and high.state is State.ACTIVE)
    assert await high.read(0, 512) == bytes(512)
    await until(lambda: refusals(registry) == [])
    assert registry.get("low").failure == ""
    registry.release(high)
    await registry.close()
    assert opener.still_open == []


async def test_a_table_that_was_loaded_by_command_is_not_replaced() -> None:
    registry, opener = await stack()
    parking = Parking(registry)
    await parking.park()
    del opener.sizes["/b"]
    assert len(await parking.undo()) == 1
    other = registry.get("other")
    await registry.load("other", "0 8 linear /a 0", read_only=True)
    await registry.resume("other")
    opener.sizes["/b"] = 8192
    registry.reopenings.try_now()
    await until(lambda: other not in registry.reopenings)
    assert other.table() == [(0, 8, "linear", "/a 0")]
    await registry.close()
    assert opener.still_open == []


async def test_a_name_that_leads_to_another_disk_by_now_is_not_opened_again(
    tmp_path: Path,
) -> None:
    path, moved = tmp_path / "d", tmp_path / "moved"
    path.write_bytes(bytes(4096))
    registry = Registry(resolve)
    await registry.create("d", f"0 8 linear {path} 0")
    parking = Parking(registry)
    await parking.check()
    await parking.park()
    path.rename(moved)
    path.write_bytes(b"x" * 4096)
    (failure,) = await parking.undo()
    assert "the disk that was open is not found under this name any more" in failure
    moved.rename(path)
    registry.reopenings.try_now()
    device = registry.get("d")
    await until(lambda: device.state is State.ACTIVE and device.active is not None)
    assert await device.read(0, 512) == bytes(512)
    await registry.close()


async def test_what_cannot_be_opened_again_is_refused_while_it_is_in_use(
    tmp_path: Path,
) -> None:
    path, moved = tmp_path / "d", tmp_path / "moved"
    path.write_bytes(bytes(4096))
    registry = Registry(resolve)
    await registry.create("d", f"0 8 linear {path} 0")
    await Parking(registry).check()
    path.rename(moved)
    with pytest.raises(TableError, match=r"d: .*No such file.* was renamed"):
        await Parking(registry).check()
    path.write_bytes(bytes(4096))
    with pytest.raises(TableError, match=r"d: .*/d: is another file now"):
        await Parking(registry).check()
    assert await registry.get("d").read(0, 512) == bytes(512)
    await registry.close()


async def test_a_disk_that_does_not_answer_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    registry, opener = await stack()
    monkeypatch.setattr(opener.open["/b"], "check_again", hang)
    with pytest.raises(TableError, match=r"other: /b: does not answer for 0\.01 s"):
        await Parking(registry).check(0.01)
    await registry.close()


async def test_a_name_that_has_just_become_another_disk_stops_the_parking(
    tmp_path: Path,
) -> None:
    path, moved = tmp_path / "d", tmp_path / "moved"
    path.write_bytes(bytes(4096))
    registry = Registry(resolve)
    await registry.create("d", f"0 8 linear {path} 0")
    parking = Parking(registry)
    await parking.check()
    path.rename(moved)
    path.write_bytes(bytes(4096))
    with pytest.raises(TableError, match="has just become another disk"):
        await parking.park()
    assert await parking.undo() == []
    assert registry.get("d").state is State.ACTIVE
    await registry.close()


async def test_a_commit_that_is_still_under_way_is_waited_for_on_the_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its device is suspended when that ends. No person has asked for that, so it goes on by itself."""
    monkeypatch.setattr(handover, "UNDO_S_MAX", 0.01)
    opener = RamOpener()
    registry = Registry(opener, types={**TARGET_TYPES, "late": LateTarget})
    LateTarget.may_end = asyncio.Event()
    await registry.create("x", "0 16 late")
    device = registry.get("x")
    parking = Parking(registry)
    with pytest.raises(TableError, match="while the device commits"):
        await parking.park(0.01)
    (failure,) = await parking.undo()
    assert failure.startswith("x does not go on yet, and is tried again: ")
    assert device.active is not None
    LateTarget.may_end.set()
    registry.reopenings.try_now()
    await until(lambda: device.state is State.ACTIVE)
    await registry.close()


async def test_an_inactive_table_that_is_lost_keeps_no_device_from_going_on() -> None:
    registry, opener = await stack()
    await registry.load("other", "0 16 linear /a 0", read_only=True)
    high = registry.get("high")
    await registry.load("high", "0 8 linear /b 0", read_only=True)
    parking = Parking(registry)
    await parking.park()
    del opener.sizes["/b"]
    failures = await parking.undo()
    assert len(failures) == 2
    assert failures[1].startswith("high: goes on, without its inactive table: ")
    assert high.state is State.ACTIVE
    assert high not in registry.reopenings
    await high.write(0, bytes(512))
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
