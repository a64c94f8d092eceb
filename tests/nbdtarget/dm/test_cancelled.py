# SPDX-License-Identifier: Apache-2.0
"""Verbs whose caller is cancelled: a server that stops while it starts, or reloads its file.

A device that is closed here refuses every bio (`RamDevice.submit`), so a commit that outlives its table fails the test.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from nbdtarget.bio import FUA, OP_WRITE
from nbdtarget.devices.base import Device
from nbdtarget.dm.mapped_device import State
from nbdtarget.dm.registry import Registry
from nbdtarget.targets.registry import TARGET_TYPES
from tests.support.clock import SimClock
from tests.support.dm import ProbeTarget, RamDevice, RamOpener, submit
from tests.support.patience import PATIENCE_S

SIZE = 1 << 20
SECTORS = SIZE // 512
CLONE = f"0 {SECTORS} clone /meta /dest /source 128 1 no_hydration"
CACHE = f"0 {SECTORS} cache /meta /fast /origin 128 1 writeback default 0"
ORIGIN = f"0 {SECTORS} linear /origin 0"
LINEAR = f"0 {SECTORS} linear /dest 0"


class Opener(RamOpener):
    """Disks keep what was written to them when they are closed and opened again."""

    async def open_device(self, name: str, *, read_only: bool) -> Device:
        before = self.open.get(name)
        device = await super().open_device(name, read_only=read_only)
        if before is not None:
            self.open[name].data = before.data
        return device


class World:
    """A registry, and its disks."""

    def __init__(self) -> None:
        self.opener = Opener()
        for name in ("/dest", "/source", "/fast", "/origin", "/meta"):
            self.opener.sizes[name] = SIZE
        self.registry = Registry(self.opener, types=TARGET_TYPES, clock=SimClock())

    def disk(self, name: str) -> RamDevice:
        return self.opener.open[name]

    async def cancelled_at(
        self,
        nr_steps: int,
        verb: Coroutine[Any, Any, Any],
        *,
        is_removed: bool = False,
    ) -> bool:
        """Cancel `verb` when the metadata device has carried out so many bios, one after another, and go on.

        Args: is_removed: the device is removed before the metadata device carries out another one.
        Returns False if the verb had ended before.
        """
        disk = self.disk("/meta")
        disk.hold = True
        task = asyncio.create_task(verb)
        await settle()
        for _ in range(nr_steps):
            if disk.held:
                disk.serve(disk.held.pop(0))
            await settle()
        was_done = task.done()
        task.cancel()
        tasks = [task]
        if is_removed:
            tasks.append(asyncio.create_task(self.registry.remove("x")))
        await settle()
        disk.let_go()
        await asyncio.wait(tasks)
        assert was_done or task.cancelled()
        return not was_done


@pytest.fixture
async def world(caplog: pytest.LogCaptureFixture) -> AsyncIterator[World]:
    world = World()
    yield world
    await asyncio.wait_for(world.registry.close(), PATIENCE_S)
    await settle()
    assert world.opener.still_open == []
    assert [each for each in caplog.get_records("call") if each.exc_info] == []


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


@pytest.mark.parametrize("table", [CLONE, CACHE], ids=["clone", "cache"])
async def test_a_start_that_is_cancelled_leaves_no_commit_to_a_closed_device(
    world: World, table: str
) -> None:
    registry = world.registry
    await registry.create("x", table)
    await registry.remove("x")
    nr_steps, was_cancelled = 0, True
    while was_cancelled:
        device = await registry.create("x", None)
        await registry.load("x", table)
        await device.activate()  # as a job does before it listens
        write = submit(device, OP_WRITE, 0, b"waits")
        was_cancelled = await world.cancelled_at(
            nr_steps, device.resume(), is_removed=True
        )
        await settle()
        is_served = write.status == 0
        assert is_served != was_cancelled, "what is given up acknowledges nothing"
        assert world.opener.still_open == []
        nr_steps += 1
    assert nr_steps > 2


class SlowStart(ProbeTarget):
    """Its preresume waits until `may_go` is set."""

    may_go = asyncio.Event()

    async def preresume(self) -> None:
        await self.may_go.wait()
        self.lives.append("ready")


async def test_a_preresume_is_carried_to_its_end_and_the_target_is_stopped(
    world: World,
) -> None:
    world.registry.types = {"probe": SlowStart}
    SlowStart.may_go, SlowStart.lives = asyncio.Event(), []
    await world.registry.create("x", None)
    await world.registry.load("x", "0 8 probe /dest /source")
    task = asyncio.create_task(world.registry.resume("x"))
    await settle()
    task.cancel()
    await settle()
    assert not task.done()
    SlowStart.may_go.set()
    await asyncio.wait([task])
    assert task.cancelled()
    assert SlowStart.lives == ["ctr", "ready", "postsuspend"]


async def test_a_reload_that_is_cancelled_puts_the_old_table_back(world: World) -> None:
    registry = world.registry
    await registry.create("x", CACHE)
    await registry.remove("x")
    device = await registry.create("x", ORIGIN)
    old = device.active
    nr_steps, was_cancelled = 0, True
    while was_cancelled:
        await registry.load("x", CACHE)
        was_cancelled = await world.cancelled_at(nr_steps, device.resume())
        if was_cancelled:
            assert device.active is old
        assert device.state is State.ACTIVE
        assert submit(device, OP_WRITE, 0, b"served").status == 0
        nr_steps += 1
    assert nr_steps > 2


async def test_a_removal_that_is_cancelled_is_undone_or_completed(world: World) -> None:
    registry = world.registry
    nr_steps, was_cancelled = 0, True
    while was_cancelled:
        device = await registry.create("x", CLONE)
        assert submit(device, OP_WRITE, 0, b"data", flags=FUA).status <= 0
        was_cancelled = await world.cancelled_at(nr_steps, registry.remove("x"))
        await settle()
        if registry.maybe_device("x") is device:
            await registry.remove("x")
        assert device.state is State.REMOVED
        assert not device.is_uncommitted
        assert world.opener.still_open == []
        nr_steps += 1
    assert nr_steps > 1


async def test_what_is_being_removed_when_the_caller_is_cancelled_is_there_for_the_stop(
    world: World,
) -> None:
    """A reload forgets a device whose disk is slow, and the server stops: the device must not be forgotten with it."""
    registry = world.registry
    device = await registry.create("x", LINEAR)
    world.disk("/dest").hold = True  # the flush of the suspend
    task = asyncio.create_task(registry.remove("x"))
    await settle()
    task.cancel()
    await settle()
    assert task.cancelled()
    assert registry.maybe_device("x") is device
    assert device.state is State.ACTIVE
    world.disk("/dest").let_go()


async def test_a_table_that_did_not_stop_is_not_closed_under_what_it_does(
    world: World,
) -> None:
    registry = world.registry
    device = await registry.create("x", CLONE)
    submit(device, OP_WRITE, 0, b"data")
    assert device.active is not None
    device.active.failed = True
    world.disk("/meta").hold = True
    removing = asyncio.create_task(registry.remove("x"))
    await settle()
    assert isinstance(registry.clock, SimClock)
    registry.clock.advance(60)
    await removing
    assert not world.disk("/meta").closed
    world.disk("/meta").let_go()
    await settle()
    for name in ("/meta", "/dest", "/source"):
        await world.disk(name).close()
