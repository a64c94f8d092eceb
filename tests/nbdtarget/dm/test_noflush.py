# SPDX-License-Identifier: Apache-2.0
"""Suspend with noflush: what a target only holds back goes to the queue, and to the next table."""

import asyncio
import random
from time import thread_time_ns
from typing import Any

import pytest

from nbdtarget.bio import (
    FUA,
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    PENDING,
    Bio,
)
from nbdtarget.devices.base import Device
from nbdtarget.dm.mapped_device import MappedDevice, State
from nbdtarget_metadata.clone.metadata import CloneMetadata
from tests.support.clock import settle
from tests.support.model import SECTOR
from tests.support.patience import PATIENCE_S
from tests.support.tables import Disks, content, submit

SLOW = "delay /a 1 60000"
REGION = 4096


async def noflush(device: MappedDevice) -> None:
    """Suspend, and fail rather than wait for a target's timer."""
    async with asyncio.timeout(PATIENCE_S):
        await device.suspend(noflush=True)
    assert device.state is State.SUSPENDED


async def test_held_bios_go_to_the_next_table_in_their_order() -> None:
    disks = Disks(a=65536, b=65536)
    await disks.fill("/b", b"B" * 65536)
    device = await disks.create(f"0 8 zero\n8 8 {SLOW}")
    order: list[int] = []
    held = [
        Bio(OP_WRITE, 4096, 4, memoryview(bytes([65 + nr] * 4)), 0, lambda _: None, nr)
        for nr in range(4)
    ]
    held.append(submit(device, OP_READ, 5000, 3))
    for bio in held[:4]:
        bio.endio = lambda bio: order.append(bio.private)  # type: ignore[arg-type]
        device.submit(bio)
    await noflush(device)
    later = submit(device, OP_WRITE, 4096, b"late")
    assert {bio.status for bio in (*held, later)} == {PENDING}
    assert disks.log == []
    assert (await device.status())[1][3] == "0 0 0"
    await disks.registry.load("d", "0 8 zero\n8 8 linear /b 0")
    await device.resume()
    assert {bio.status for bio in (*held, later)} == {0}
    assert order == [0, 1, 2, 3]
    assert disks.log == [("/b", "read", 904, 3), *[("/b", "write", 0, 4)] * 5]
    assert (await disks.image("/b"))[:5] == b"lateB"
    assert (await disks.image("/a")) == bytes(65536)
    await disks.registry.close()


async def test_held_bios_go_on_if_the_same_table_is_resumed() -> None:
    disks = Disks(a=65536)
    device = await disks.create(f"0 8 {SLOW}")
    write = submit(device, OP_WRITE, 512, b"data")
    await noflush(device)
    await device.resume()
    assert (await device.status())[0][3] == "0 1 0"
    disks.clock.advance(60)
    assert write.status == 0
    assert (await disks.image("/a"))[1024:1028] == b"data"
    await disks.registry.close()


async def test_flush_is_not_pushed_back_for_it_asks_about_this_table() -> None:
    disks = Disks(a=65536, b=65536)
    device = await disks.create(f"0 8 {SLOW}")
    flush, write = submit(device, OP_FLUSH), submit(device, OP_WRITE, 0, b"data")
    await noflush(device)
    assert (flush.status, write.status) == (0, PENDING)
    assert disks.log == [("/a", "flush", 0, 0)]
    await device.resume()
    await device.suspend()
    await disks.registry.close()
    assert write.status == 0


async def test_suspend_without_noflush_sends_held_bios_on() -> None:
    disks = Disks(a=65536)
    device = await disks.create(f"0 8 {SLOW}")
    write = submit(device, OP_WRITE, 0, b"data")
    await device.suspend()
    assert write.status == 0
    assert disks.log == [("/a", "write", 512, 4), ("/a", "flush", 0, 0)]
    await disks.registry.close()


async def test_bio_that_has_begun_below_is_waited_for() -> None:
    disks = Disks(a=65536)
    device = await disks.create(f"0 8 linear /a 0\n8 8 {SLOW}")
    disks["/a"].hold = True
    begun, held = (submit(device, OP_WRITE, at, b"data") for at in (0, 4096))
    suspend = asyncio.create_task(device.suspend(noflush=True))
    await settle()
    assert device.state is State.SUSPENDING
    assert (begun.status, held.status) == (PENDING, PENDING)
    disks["/a"].let_go()
    await suspend
    assert (begun.status, held.status) == (0, PENDING)
    await disks.registry.close()


@pytest.mark.parametrize("op", [OP_READ, OP_WRITE])
async def test_part_of_a_bio_across_a_border_is_pushed_back_alone(op: int) -> None:
    disks = Disks(a=65536, b=65536)
    await disks.fill("/b", b"B" * 65536)
    device = await disks.create(f"0 8 linear /a 0\n8 8 {SLOW}\n16 8 linear /a 16")
    data = random.Random(1).randbytes(3 * 4096)
    bio = submit(device, op, 0, data if op == OP_WRITE else len(data))
    assert bio.status == PENDING
    nr_begun = len(disks.log)
    assert nr_begun == 2
    await noflush(device)
    assert bio.status == PENDING
    await disks.registry.load("d", "0 24 linear /b 0")
    await device.resume()
    assert bio.status == 0
    assert [entry[0] for entry in disks.log].count("/b") == 1
    if op == OP_WRITE:
        assert (await disks.image("/b"))[4096:8192] == data[4096:8192]
        assert (await disks.image("/a"))[:4096] == data[:4096]
    else:
        assert content(bio) == bytes(4096) + b"B" * 4096 + bytes(4096)
    await disks.registry.close()


async def test_part_beyond_the_end_of_the_next_table_fails_the_bio() -> None:
    disks = Disks(a=65536)
    device = await disks.create(f"0 8 linear /a 0\n8 8 {SLOW}")
    bio = submit(device, OP_WRITE, 0, bytes(8192))
    await noflush(device)
    await disks.registry.load("d", "0 8 linear /a 0")
    await device.resume()
    assert bio.status == 28  # ENOSPC
    await disks.registry.close()


async def test_zeroes_that_are_being_written_out_are_pushed_back_whole() -> None:
    disks = Disks(a=16 << 20, b=16 << 20)
    for name in ("/a", "/b"):
        disks[name].can_write_zeroes = False
        await disks.fill(name, b"x" * (16 << 20))
    device = await disks.create(f"0 16384 linear /a 0\n16384 16384 {SLOW}")
    zero = submit(device, OP_WRITE_ZEROES, 4 << 20, 8 << 20, flags=FUA)
    assert zero.status == PENDING
    await settle()
    await noflush(device)
    assert zero.status == PENDING
    disks["/b"].can_write_zeroes = True
    await disks.registry.load("d", "0 32768 linear /b 0")
    disks.log.clear()
    await device.resume()
    assert zero.status == 0
    assert disks.log == [("/b", "write_zeroes", 8 << 20, 4 << 20)]
    assert (await disks.image("/a"))[4 << 20 : 8 << 20] == bytes(4 << 20)
    await disks.registry.close()


async def test_zeroes_are_pushed_back_when_the_writes_under_way_have_ended() -> None:
    disks = Disks(a=16 << 20, b=16 << 20)
    disks["/a"].can_write_zeroes = False
    disks["/b"].can_write_zeroes = False
    # Reads are slow here, writes are not; the middle one holds what it gets.
    device = await disks.create("0 16384 delay /a 0 0 /a 0 60000")
    zero = submit(device, OP_WRITE_ZEROES, 0, 6 << 20)
    disks["/a"].hold = True
    disks.clock.advance(59)
    other = submit(device, OP_WRITE, 7 << 20, b"data")
    disks.clock.advance(1)  # the first four writes have begun below
    await settle()
    assert len(disks["/a"].held) == 4
    suspend = asyncio.create_task(device.suspend(noflush=True))
    await settle()
    disks["/a"].let_go()
    await settle()
    await suspend
    assert other.status == PENDING
    await device.resume()
    disks.clock.advance(60)
    await settle()
    disks.clock.advance(60)
    await settle()
    assert (zero.status, other.status) == (0, 0)
    await disks.registry.close()


async def test_upper_bio_in_the_queue_of_a_suspended_lower_device_is_waited_for() -> (
    None
):
    disks = Disks(a=65536)
    lower = await disks.create("0 8 linear /a 0", "lower")
    upper = await disks.create("0 8 linear /dev/mapper/lower 0", "upper")
    await lower.suspend()
    write = submit(upper, OP_WRITE, 0, b"data")
    suspend = asyncio.create_task(upper.suspend(noflush=True))
    await settle()
    assert upper.state is State.SUSPENDING
    await lower.resume()
    await suspend
    assert write.status == 0
    await disks.registry.close()


async def test_bio_of_an_upper_device_is_pushed_back_by_the_lower_one() -> None:
    disks = Disks(a=65536, b=65536)
    lower = await disks.create(f"0 16 {SLOW}", "lower")
    upper = await disks.create("0 8 linear /dev/mapper/lower 8", "upper")
    write = submit(upper, OP_WRITE, 0, b"data")
    await noflush(lower)
    await disks.registry.load("lower", "0 16 linear /b 0")
    await lower.resume()
    assert write.status == 0
    assert (await disks.image("/b"))[4096:4100] == b"data"
    await upper.suspend()  # the upper one has counted it too
    await disks.registry.close()


async def test_pushed_back_bio_of_a_removed_device_ends_with_an_error() -> None:
    disks = Disks(a=65536)
    device = await disks.create(f"0 8 {SLOW}")
    write = submit(device, OP_WRITE, 0, b"data")
    await noflush(device)
    await disks.registry.close()
    assert write.status == 5  # EIO


# A clone


async def make_clone(size: int = 16 * REGION) -> tuple[Disks, MappedDevice]:
    disks = Disks(m=CloneMetadata.device_size_for(64), d=size, s=size, e=size)
    await disks.fill("/s", b"S" * size)
    clone = "clone /m /d /s 8 1 no_hydration"
    table = f"0 8 zero\n8 {size // SECTOR - 8} {clone}"
    return disks, await disks.create(table)


async def test_clone_pushes_back_writes_that_wait_for_a_region() -> None:
    disks, device = await make_clone()
    disks["/s"].hold = True
    copied = submit(device, OP_WRITE, REGION, b"first")
    waiting = submit(device, OP_WRITE, REGION + 5, b"second")
    discard = submit(device, OP_DISCARD, REGION, 2 * REGION)
    last = submit(device, OP_WRITE, 3 * REGION - 3, b"third")
    everything = [copied, waiting, discard, last]
    assert {bio.status for bio in everything} == {PENDING}
    suspend = asyncio.create_task(device.suspend(noflush=True))
    await settle()
    disks["/s"].let_go()
    await suspend
    assert [bio.status for bio in everything] == [0, PENDING, PENDING, PENDING]
    await disks.registry.load("d", "0 128 linear /e 0")
    await device.resume()
    assert {bio.status for bio in everything} == {0}
    assert [entry[:3] for entry in disks.log if entry[0] == "/e"] == [
        ("/e", "write", REGION + 5),
        ("/e", "discard", REGION),
        ("/e", "write", 3 * REGION - 3),
    ]
    assert (await disks.image("/d"))[:5] == b"first"
    await disks.registry.close()


async def test_clone_takes_pushed_back_writes_again() -> None:
    disks, device = await make_clone()
    disks["/s"].hold = True
    bios = [submit(device, OP_WRITE, REGION + nr, b"x" * 9) for nr in range(300)]
    suspend = asyncio.create_task(device.suspend(noflush=True))
    await settle()
    disks["/s"].let_go()
    await suspend
    assert [bio.status for bio in bios] == [0] + [PENDING] * 299
    await device.resume()
    await settle()
    assert {bio.status for bio in bios} == {0}
    read = submit(device, OP_READ, REGION, 310)
    assert content(read) == b"x" * 308 + b"SS"
    await disks.registry.close()


async def test_thousands_of_waiting_discards_do_not_stop_the_loop() -> None:
    """A server admits this many discards. They once took minutes, in which no export was served."""
    disks, device = await make_clone()
    disks["/s"].hold = True
    copied = submit(device, OP_WRITE, REGION, b"first")
    discards = [submit(device, OP_DISCARD, REGION, 8 * REGION) for _ in range(4096)]
    suspend = asyncio.create_task(device.suspend(noflush=True))
    began_ns = thread_time_ns()
    await settle()
    took_ns = thread_time_ns() - began_ns
    disks["/s"].let_go()
    await suspend
    assert took_ns < 1e9
    assert copied.status == 0
    assert {bio.status for bio in discards} == {PENDING}
    await device.resume()
    await settle()
    assert {bio.status for bio in discards} == {0}
    await disks.registry.close()


async def test_clone_pushes_back_cache_requests_that_wait_for_a_turn() -> None:
    disks, device = await make_clone()
    disks["/s"].hold = True
    bios = [submit(device, OP_CACHE, nr * REGION, REGION) for nr in range(1, 9)]
    await settle()
    suspend = asyncio.create_task(device.suspend(noflush=True))
    await settle()
    disks["/s"].let_go()
    await suspend
    assert [bio.status for bio in bios] == [0] * 4 + [PENDING] * 4
    await device.resume()
    await settle(200)
    assert {bio.status for bio in bios} == {0}
    await disks.registry.close()


# Random walks by seed: in any order of events, each byte is one that was written there.


class Walk:
    """Writes of one block each, none to a block that has one in flight; swaps in between."""

    BLOCK = 1024
    LOWER = (
        "0 128 linear /a 0",
        "0 40 delay /a 0 30\n40 88 linear /a 40",
        "0 128 delay /a 0 5 /a 0 50",
    )
    UPPER = "0 64 linear /dev/mapper/low 0\n64 64 delay /dev/mapper/low 64 20"

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.disks = Disks(a=65536)
        self.model = bytearray(65536)
        self.busy: set[int] = set()
        self.pending = 0
        self.device: Device
        self.upper: MappedDevice

    def write(self) -> None:
        rng = self.random
        first = rng.randrange(60)
        blocks = set(range(first, first + rng.randint(1, 4)))
        if blocks & self.busy:
            return
        self.busy |= blocks
        self.pending += 1
        at, length = first * self.BLOCK, len(blocks) * self.BLOCK
        op = rng.choice((OP_WRITE, OP_WRITE, OP_WRITE_ZEROES, OP_READ))
        data = rng.randbytes(length) if op == OP_WRITE else bytes(length)
        if op != OP_READ:
            self.model[at : at + length] = data
        expected = bytes(self.model[at : at + length])

        def ended(bio: Bio) -> None:
            self.busy.difference_update(blocks)
            self.pending -= 1
            assert bio.status == 0, bio
            if op == OP_READ:
                assert content(bio) == expected

        view = None if op == OP_WRITE_ZEROES else memoryview(bytearray(data))
        buffer = view
        bio = Bio(op, at, length, view, 0, ended, None, op != OP_WRITE_ZEROES)
        self.device.submit(bio)
        if buffer is not None and bio.status == PENDING:
            buffer[:] = b"?" * length  # borrowed: a kept bio was copied

    async def run(self, steps: int) -> None:
        disks, rng = self.disks, self.random
        disks["/a"].can_write_zeroes = rng.random() < 0.5
        lower = await disks.create(rng.choice(self.LOWER), "low")
        self.device = upper = await disks.create(self.UPPER, "d")
        for _ in range(steps):
            device = rng.choice((lower, upper))
            match rng.randrange(12):
                case 0:
                    await self.suspend(device)
                case 1:
                    await device.resume()
                case 2:
                    await disks.registry.load("low", rng.choice(self.LOWER))
                    await self.swap(lower)
                case 3 | 4:
                    disks.clock.advance(rng.random() * 0.04)
                case 5:
                    disks["/a"].hold = True
                case 6:
                    disks["/a"].let_go()
                case _:
                    self.write()
            await settle(3)
        await self.finish(lower, upper)
        assert await disks.image("/a") == self.model
        await self.wait(asyncio.create_task(disks.registry.close()))

    async def suspend(self, device: MappedDevice) -> None:
        """Start a suspend, and end everything that it may wait for."""
        noflush = self.random.random() < 0.8
        task = asyncio.create_task(device.suspend(noflush=noflush))
        await settle(3)
        await self.wait(task)

    async def swap(self, device: MappedDevice) -> None:
        await self.suspend(device)
        await self.wait(asyncio.create_task(device.resume()))

    async def wait(self, task: "asyncio.Task[Any]") -> None:
        while not task.done():
            self.disks["/a"].let_go()
            low = self.disks.registry.maybe_device("low")
            if low is not None and low.state is State.SUSPENDED:
                await low.resume()
            self.disks.clock.advance(0.05)
            await settle(3)
        task.result()

    async def finish(self, *devices: MappedDevice) -> None:
        for device in devices:
            await self.wait(asyncio.create_task(device.resume()))
        while self.pending:
            self.disks["/a"].let_go()
            self.disks.clock.advance(0.1)
            await settle(3)


@pytest.mark.parametrize("seed", range(40))
async def test_walk_of_swaps_with_and_without_noflush_loses_nothing(seed: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await Walk(seed).run(120)


async def test_a_suspend_that_flushes_gives_back_a_cache_command_that_is_not_done() -> (
    None
):
    """Its client sees a pause, and no error."""
    size = 4 << 20
    disks = Disks(meta=1 << 20, dest=size, source=size)
    table = f"0 {size // 512} clone /meta /dest /source 8 1 no_hydration"
    device = await disks.create(table)
    await disks.fill("/source", b"s" * size)
    source = disks["/source"]
    source.hold = True
    caches = [submit(device, OP_CACHE, 0, size) for _ in range(6)]
    await settle()
    suspending = asyncio.create_task(device.suspend())
    await settle()
    source.let_go()
    await suspending
    assert {bio.status for bio in caches} == {PENDING}
    assert device.state is State.SUSPENDED
    await device.resume()
    await settle(3000)
    assert {bio.status for bio in caches} == {0}
    await disks.registry.close()
