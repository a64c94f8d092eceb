# SPDX-License-Identifier: Apache-2.0
"""Devices below that do not answer: verbs fail after a bound and change nothing, the end commits the rest."""

import asyncio
import errno as errnos
from collections.abc import AsyncIterator

import pytest

from nbdtarget.bio import OP_FLUSH
from nbdtarget.common.clock import sleep, timeout
from nbdtarget.common.errors import DeviceError, TableError
from nbdtarget.dm.mapped_device import MappedDevice, State
from nbdtarget.dm.registry import Registry
from nbdtarget.targets import metadata_io
from nbdtarget.targets.registry import TARGET_TYPES
from nbdtarget_metadata.clone.metadata import CloneMetadata
from tests.support.clock import settle
from tests.support.dm import RamDevice, RamOpener
from tests.support.patience import PATIENCE_S, until

SIZE = 1 << 20
SECTORS = SIZE // 512
SHORT_S = 0.05
CLONE = f"0 {SECTORS} clone /meta /dest /source 128"


class HangingDevice(RamDevice):
    """Hangs while `hold` is set, and takes reads back when it is told to."""

    @property
    def nr_in_flight(self) -> int:
        return len(self.held)

    def give_up_reads(self) -> None:
        if self.read_only:
            held, self.held = self.held, []
            for bio in held:
                bio.end(errnos.EIO)


class Opener(RamOpener):
    async def open_device(self, name: str, *, read_only: bool) -> HangingDevice:
        device = HangingDevice(name, self.sizes[name], read_only=read_only)
        if name in self.open:
            device.data = self.open[name].data
        self.open[name] = device
        return device


class World:
    def __init__(self) -> None:
        self.opener = Opener()
        self.registry = Registry(self.opener, types=TARGET_TYPES)
        for name in ("/a", "/b", "/dest", "/source"):
            self.opener.sizes[name] = SIZE

    def __getitem__(self, name: str) -> RamDevice:
        return self.opener.open[name]

    async def linear(self, name: str) -> MappedDevice:
        return await self.registry.create(name, f"0 {SECTORS} linear /{name} 0")

    def let_go(self) -> None:
        for device in self.opener.open.values():
            device.let_go()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    world.let_go()
    await world.registry.close()
    assert world.opener.still_open == []


def read(device: MappedDevice) -> "asyncio.Task[memoryview]":
    return asyncio.create_task(device.read(0, 4096))


async def test_a_suspend_over_a_device_that_hangs_fails_and_the_device_goes_on(
    world: World,
) -> None:
    a = await world.linear("a")
    world["/a"].hold = True
    hanging = read(a)
    await sleep(0)
    with pytest.raises(TableError, match=r"no answer from /a \(1 requests\)") as caught:
        await world.registry.suspend("a", within_s=SHORT_S)
    assert caught.value.errno == errnos.ETIMEDOUT
    world["/a"].let_go()
    assert await hanging == bytes(4096)
    async with timeout(PATIENCE_S):
        await a.write(0, b"x" * 512)
        await a.flush()
    await world.registry.suspend("a")
    assert a.state is State.SUSPENDED


async def test_what_was_queued_by_a_suspend_that_fails_is_carried_out(
    world: World,
) -> None:
    a = await world.linear("a")
    world["/a"].hold = True
    hanging = read(a)
    await sleep(0)
    suspending = asyncio.create_task(a.suspend(within_s=SHORT_S))
    await sleep(0)
    queued = asyncio.create_task(a.write(0, b"q" * 512))
    with pytest.raises(TableError):
        await suspending
    world["/a"].let_go()
    async with timeout(PATIENCE_S):
        await queued
    await hanging
    assert world["/a"].data[:512] == b"q" * 512


async def test_a_flush_that_hangs_fails_the_suspend_too(world: World) -> None:
    a = await world.linear("a")
    world["/a"].hold = True
    with pytest.raises(TableError, match="no answer from /a"):
        await a.suspend(within_s=SHORT_S)
    # It is under way all the same: nothing is taken away from below it.
    suspending = asyncio.create_task(a.suspend(noflush=True))
    await sleep(SHORT_S)
    assert not suspending.done()
    world["/a"].let_go()
    await suspending


async def test_a_device_that_cannot_be_removed_is_there_as_before(world: World) -> None:
    a = await world.linear("a")
    world["/a"].hold = True
    hanging = read(a)
    await sleep(0)
    with pytest.raises(TableError, match="no answer from /a"):
        await world.registry.remove("a", within_s=SHORT_S)
    assert world.registry.get("a") is a
    world["/a"].let_go()
    await hanging
    await world.registry.remove("a", within_s=PATIENCE_S)
    assert world.registry.maybe_device("a") is None


async def test_a_registry_whose_last_device_cannot_be_removed_is_not_empty(
    world: World,
) -> None:
    a = await world.linear("a")
    world["/a"].hold = True
    hanging = read(a)
    removing = asyncio.create_task(world.registry.remove("a", within_s=SHORT_S))
    while world.registry.devices():
        await sleep(0)
    empty = asyncio.create_task(world.registry.until_empty())
    with pytest.raises(TableError, match="no answer from /a"):
        await removing
    await sleep(0)
    assert not empty.done()
    world["/a"].let_go()
    await hanging
    await world.registry.remove("a", within_s=PATIENCE_S)
    async with timeout(PATIENCE_S):
        await empty


async def test_a_table_over_a_device_that_hangs_is_not_swapped(world: World) -> None:
    a = await world.linear("a")
    live = a.active
    world["/a"].hold = True
    hanging = read(a)
    await sleep(0)
    await world.registry.load("a", f"0 {SECTORS} linear /b 0")
    with pytest.raises(TableError, match="no answer from /a"):
        await world.registry.resume("a", within_s=SHORT_S)
    assert a.active is live
    assert a.state is State.ACTIVE
    world["/a"].let_go()
    await hanging
    await world.registry.resume("a", within_s=PATIENCE_S)
    assert a.active is not live


async def test_a_clone_goes_on_copying_after_a_suspend_that_failed(
    world: World,
) -> None:
    clone = await world.registry.create("c", CLONE)
    world["/source"].hold = True
    await until(lambda: bool(world["/source"].held))  # a copy is under way
    with pytest.raises(TableError, match="no answer from /source"):
        await clone.suspend(within_s=SHORT_S)
    world["/source"].let_go()
    async with timeout(PATIENCE_S):
        while "16/16" not in (await clone.status())[0][3]:
            await sleep(0.01)


async def test_forcing_a_device_away_gives_up_reads_of_its_source(world: World) -> None:
    clone = await world.registry.create("c", CLONE)
    world["/source"].hold = True
    hanging = asyncio.create_task(clone.read(SIZE // 2, 4096))
    await settle()
    await world.registry.remove("c", force=True, within_s=SHORT_S)
    with pytest.raises(DeviceError):
        await hanging
    assert world.registry.maybe_device("c") is None


async def test_forcing_a_device_away_that_still_hangs_leaves_its_table(
    world: World,
) -> None:
    a = await world.linear("a")
    live = a.active
    world["/a"].hold = True
    hanging = read(a)
    await sleep(0)
    with pytest.raises(TableError, match="no answer from /a"):
        await world.registry.remove("a", force=True, within_s=SHORT_S)
    assert (a.active, a.inactive) == (live, None)
    world["/a"].let_go()
    assert await hanging == bytes(4096)


async def test_suspend_fails_while_its_last_commit_hangs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await world.linear("a")
    assert a.active is not None
    go = asyncio.Event()
    monkeypatch.setattr(a.active.targets[0], "postsuspend", go.wait)
    with pytest.raises(TableError, match="while the device commits"):
        await a.suspend(within_s=SHORT_S)
    with pytest.raises(TableError, match="while the device commits"):
        await a.resume(within_s=SHORT_S)
    go.set()
    await a.suspend(within_s=PATIENCE_S)
    assert a.state is State.SUSPENDED
    await a.resume()
    assert await a.read(0, 512) == bytes(512)


async def test_a_status_whose_commit_hangs_fails_and_tells_how_to_go_without(
    world: World,
) -> None:
    clone = await world.registry.create("c", f"{CLONE} 1 no_hydration")
    await clone.write(0, b"w" * 65536)
    world["/dest"].hold = True
    with pytest.raises(
        TableError, match=r"no answer from /dest .* --noflush"
    ) as caught:
        await clone.status_by_name(within_s=SHORT_S)
    assert caught.value.errno == errnos.ETIMEDOUT
    ((line, _),) = await clone.status_by_name(noflush=True, within_s=PATIENCE_S)
    assert " 1/16 " in line[3]
    world["/dest"].let_go()
    assert await clone.status_by_name(within_s=PATIENCE_S)


async def test_the_end_commits_every_device_that_answers_whatever_hangs(
    world: World,
) -> None:
    a, b = await world.linear("a"), await world.linear("b")
    await b.write(0, b"b" * 512)
    world["/a"].hold = True
    hanging = read(a)
    await sleep(0)
    ending = asyncio.create_task(world.registry.close())
    await until(lambda: world["/b"].closed)
    await settle()
    assert not ending.done()
    assert world["/b"].log[-1][0] == OP_FLUSH
    assert world.registry.hanging() == ["/dev/mapper/a: no answer from /a (1 requests)"]
    assert await world.registry.commit_what_answers(SHORT_S) == ["/dev/mapper/a"]
    world["/a"].let_go()
    await hanging
    assert await ending == []


async def test_the_end_does_not_close_a_slow_disk_under_the_flush_of_its_bound(
    world: World,
) -> None:
    """The disk answers after the bound: the removal goes on, and the second flush is still under way."""
    await world.linear("a")
    disk = world["/a"]
    disk.hold = True
    ending = asyncio.create_task(world.registry.close())
    await until(lambda: len(disk.held) == 1)
    committing = asyncio.create_task(world.registry.commit_what_answers(PATIENCE_S))
    await until(lambda: len(disk.held) == 2)
    assert [bio.op for bio in disk.held] == [OP_FLUSH, OP_FLUSH]
    disk.serve(disk.held.pop(0))
    await settle()
    assert not disk.closed
    disk.let_go()
    assert await committing == []
    assert await ending == []


async def test_the_end_commits_a_clone_while_its_source_hangs(world: World) -> None:
    clone = await world.registry.create("c", f"{CLONE} 1 no_hydration")
    world["/source"].hold = True
    hanging = asyncio.create_task(clone.read(SIZE // 2, 4096))
    await sleep(0)
    await clone.write(0, b"w" * 65536)
    ending = asyncio.create_task(world.registry.close())
    await settle()
    assert not ending.done()
    assert await world.registry.commit_what_answers(PATIENCE_S) == []
    metadata = RamDevice("copy", len(world["/meta"].data))
    metadata.data[:] = world["/meta"].data
    kept = await metadata_io.run(
        metadata,
        CloneMetadata.open(
            device_size=metadata.size, region_size=65536, target_size=SIZE
        ),
    )
    assert kept.nr_hydrated == 1
    assert world["/dest"].data[:65536] == b"w" * 65536
    world.registry.give_up_reads()
    assert await ending == []
    with pytest.raises(DeviceError):
        await hanging


async def test_the_end_names_devices_whose_writes_could_not_be_flushed(
    world: World,
) -> None:
    await world.linear("b")
    a = await world.linear("a")
    await a.write(0, b"a" * 512)
    world["/a"].flush_errno = errnos.EIO
    assert await world.registry.close() == ["/dev/mapper/a"]
