# SPDX-License-Identifier: Apache-2.0
"""A target that asks for another in its place: clients notice nothing, people have precedence."""

import asyncio
import errno as errnos
import logging
from collections.abc import Sequence

import pytest

from nbdtarget.bio import OP_CACHE, OP_FLUSH, OP_READ, OP_WRITE, PENDING, Bio
from nbdtarget.common.errors import TableError
from nbdtarget.dm.mapped_device import MappedDevice, State
from nbdtarget.dm.registry import Registry
from nbdtarget.targets.base import SUBMITTED, Target, TargetContext
from tests.support.clock import settle
from tests.support.dm import RamOpener, make_registry

SIZE = 64 << 10
CLONE = "clone /m /d /s 8 1 then_linear"
TABLE = f"0 {SIZE // 512} {CLONE}"
LINEAR = (0, SIZE // 512, "linear", "/d 0")


class AskingTarget(Target):
    """`asking [dead]`: the message `ask …` asks for what follows; keeps bios until told."""

    type_name = "asking"
    version = (0, 0, 1)
    is_dead = False

    def __init__(self, ctx: TargetContext) -> None:
        super().__init__(ctx)
        self.bios: list[Bio] = []
        self.deaths = 0

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "AskingTarget":
        target = cls(ctx)
        target.is_dead = list(args) == ["dead"]
        return target

    async def dtr(self) -> None:
        self.deaths += 1

    def map(self, bio: Bio) -> int:
        self.bios.append(bio)
        if bio.op == OP_FLUSH:
            bio.end(0)
        return SUBMITTED

    async def preresume(self) -> None:
        if self.is_dead:
            raise TableError("never", errnos.EPERM)

    def has_lost_writes(self) -> bool:
        return self.is_dead

    async def message(self, words: Sequence[str]) -> str | None:
        if words[0] == "ask":
            self.ctx.request_replacement(words[1], words[2:])
        elif words[0] == "die":
            self.is_dead = True
        return None


def make() -> tuple[Registry, RamOpener]:
    registry, opener = make_registry(m=1 << 20, d=SIZE, s=SIZE, x=SIZE)
    registry.types = {**registry.types, "asking": AskingTarget}
    return registry, opener


async def asking(registry: Registry, lines: str = "0 8 asking") -> MappedDevice:
    return await registry.create("d", lines)


def only(device: MappedDevice) -> AskingTarget:
    assert device.active is not None
    (target,) = device.active.targets
    assert isinstance(target, AskingTarget)
    return target


def submit(device: MappedDevice, op: int, offset: int = 0, length: int = 0) -> Bio:
    payload = memoryview(bytearray(b"w" * length)) if op <= OP_WRITE else None
    bio = Bio(op, offset, length, payload, 0, lambda _: None)
    device.submit(bio)
    return bio


# A replacement


async def test_bios_in_flight_end_and_later_ones_go_to_the_new_target() -> None:
    registry, opener = make()
    device = await asking(registry)
    old = only(device)
    before = submit(device, OP_WRITE, 0, 512)
    await device.message(0, ["ask", "linear", "/x", "8"])
    await settle()
    waiting = submit(device, OP_WRITE, 512, 512)
    assert (before.status, waiting.status) == (PENDING, PENDING)
    assert old.deaths == 0
    old.bios[0].end(0)
    await settle()
    assert (before.status, waiting.status) == (0, 0)
    assert opener.open["/x"].data[8 * 512 + 512 :].startswith(b"w" * 512)
    assert device.table() == [(0, 8, "linear", "/x 8")]
    assert old.deaths == 1
    assert device.event_nr == 1
    await registry.close()
    assert opener.still_open == []


async def test_other_targets_of_the_table_stay_what_they_are() -> None:
    registry, _ = make()
    device = await asking(registry, "0 8 asking\n8 8 asking\n16 8 asking")
    assert device.active is not None
    first, _, last = before = device.active.targets
    await device.message(8, ["ask", "linear", "/x", "0"])
    await settle()
    assert [line[2] for line in device.table()] == ["asking", "linear", "asking"]
    assert (device.active.targets[0], device.active.targets[2]) == (first, last)
    assert [t.deaths for t in before if isinstance(t, AskingTarget)] == [0, 1, 0]
    assert device.state is State.ACTIVE
    read = submit(device, OP_READ, 8 * 512, 512)
    assert read.status == 0
    await registry.close()


async def test_read_only_table_stays_read_only() -> None:
    registry, opener = make()
    device = await registry.create("d", "0 8 asking", read_only=True)
    await device.message(0, ["ask", "linear", "/x", "0"])
    await settle()
    assert device.read_only
    assert opener.open["/x"].read_only
    assert submit(device, OP_WRITE, 0, 512).status == errnos.EPERM
    await registry.close()


async def test_two_targets_may_ask_at_once() -> None:
    registry, _ = make()
    device = await asking(registry, "0 8 asking\n8 8 asking")
    for sector in (0, 8, 8, 0):
        await device.message(sector, ["ask", "linear", "/x", str(sector)])
    await settle()
    assert [line[2] for line in device.table()] == ["linear", "linear"]
    assert device.event_nr == 2
    await registry.close()


async def test_status_that_is_under_way_keeps_the_old_target_alive() -> None:
    registry, _ = make()
    device = await asking(registry)
    old, table = only(device), device.active
    assert table is not None
    with table.use():
        await device.message(0, ["ask", "linear", "/x", "0"])
        await settle()
        assert old.deaths == 0
    await settle()
    assert old.deaths == 1
    await registry.close()


# A replacement is refused


async def refused(registry: Registry, device: MappedDevice, words: list[str]) -> None:
    """Ask for a replacement, and check that only an event comes of it."""
    table, event_nr = device.active, device.event_nr
    await device.message(0, ["ask", *words])
    await settle()
    assert device.active is table
    assert device.event_nr == event_nr + 1
    assert only(device).deaths == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["linear", "/nowhere", "0"], "No such file"),
        (["linear", "/x", "999"], "too small"),
        (["asking", "dead"], "asking: never"),
    ],
)
async def test_new_target_that_refuses_leaves_the_old_one_running(
    words: list[str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    registry, opener = make()
    device = await asking(registry)
    await refused(registry, device, words)
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert reason in line
    assert device.state is State.ACTIVE
    bio = submit(device, OP_WRITE, 0, 512)
    only(device).bios[-1].end(0)
    assert bio.status == 0
    assert opener.still_open == []
    await registry.close()


async def test_target_that_lost_writes_is_not_replaced() -> None:
    # Unflushed writes are lost. Only a person may go on from there, by loading a table.
    registry, _ = make()
    device = await asking(registry)
    await device.message(0, ["die"])
    table = device.active
    await device.message(0, ["ask", "linear", "/x", "0"])
    await settle()
    assert device.active is table
    await registry.close()


async def test_inactive_table_is_kept_and_stays_inactive() -> None:
    registry, opener = make()
    device = await asking(registry)
    await registry.load("d", "0 8 zero")
    await refused(registry, device, ["linear", "/x", "0"])
    assert device.table(inactive=True) == [(0, 8, "zero", "")]
    await registry.clear("d")
    await device.message(0, ["ask", "linear", "/x", "0"])
    await settle()
    assert device.table() == [(0, 8, "linear", "/x 0")]
    await registry.close()
    assert opener.still_open == []


async def test_suspended_device_stays_suspended() -> None:
    registry, _ = make()
    device = await asking(registry)
    await registry.suspend("d")
    await refused(registry, device, ["linear", "/x", "0"])
    assert device.state is State.SUSPENDED
    await registry.close()


async def test_table_that_was_loaded_meanwhile_is_kept() -> None:
    registry, opener = make()
    device = await asking(registry)
    old = only(device)
    bio = submit(device, OP_WRITE, 0, 512)
    await registry.load("d", "0 8 zero")
    resuming = asyncio.create_task(registry.resume("d"))
    await settle()
    old.ctx.request_replacement("linear", ("/x", "0"))
    await settle()
    bio.end(0)
    await resuming
    await settle()
    assert device.table() == [(0, 8, "zero", "")]
    assert opener.still_open == []
    await registry.close()


async def test_verbs_that_come_during_a_replacement_wait_for_it() -> None:
    registry, _ = make()
    device = await asking(registry)
    bio = submit(device, OP_WRITE, 0, 512)
    await device.message(0, ["ask", "linear", "/x", "0"])
    await settle()
    loading = asyncio.create_task(registry.load("d", "0 8 zero"))
    suspending = asyncio.create_task(registry.suspend("d"))
    await settle()
    assert not any(verb.done() for verb in (loading, suspending))
    bio.end(0)
    await asyncio.gather(loading, suspending)
    assert device.table() == [(0, 8, "linear", "/x 0")]
    assert device.table(inactive=True) == [(0, 8, "zero", "")]
    assert device.state is State.SUSPENDED
    await registry.resume("d")
    assert device.table() == [(0, 8, "zero", "")]
    await registry.close()


@pytest.mark.parametrize("turns", range(12))
async def test_removal_at_any_moment_leaves_nothing_open(turns: int) -> None:
    registry, opener = make()
    device = await asking(registry)
    await device.message(0, ["ask", "linear", "/x", "0"])
    await settle(turns)
    await registry.remove("d")
    assert opener.still_open == []
    assert registry.devices() == []
    await settle()
    assert opener.still_open == []


@pytest.mark.parametrize("turns", range(0, 12, 3))
async def test_close_at_any_moment_leaves_nothing_open(turns: int) -> None:
    registry, opener = make()
    device = await asking(registry)
    await device.message(0, ["ask", "linear", "/x", "0"])
    await settle(turns)
    await registry.close()
    only_after = device.event_nr
    assert opener.still_open == []
    await settle()
    assert device.event_nr == only_after


# The clone that asks


async def make_clone(table: str = TABLE) -> tuple[Registry, RamOpener, MappedDevice]:
    registry, opener = make()
    device = await registry.create("c", table)
    opener.open["/s"].data[:] = bytes(range(256)) * (SIZE // 256)
    return registry, opener, device


async def test_clone_becomes_linear_when_it_is_hydrated() -> None:
    registry, opener, device = await make_clone()
    await settle(2000)
    assert device.table() == [LINEAR]
    assert device.event_nr == 2  # hydrated, and swapped
    assert opener.still_open == ["/d"]
    assert opener.open["/d"].data == bytes(range(256)) * (SIZE // 256)
    assert submit(device, OP_CACHE, 0, SIZE).status == 0
    await registry.remove("c")
    again = await registry.create("c", TABLE)
    await settle(200)
    assert again.table() == [LINEAR]
    await registry.close()


async def test_message_asks_now_or_for_later() -> None:
    registry, _, device = await make_clone(f"0 {SIZE // 512} clone /m /d /s 8")
    await settle(2000)
    assert device.table()[0][2] == "clone"
    await device.message(0, ["Then_Linear"])
    await settle(100)
    assert device.table() == [LINEAR]
    await registry.close()


async def test_message_takes_it_back() -> None:
    registry, _, device = await make_clone()
    await device.message(0, ["disable_then_linear"])
    await settle(2000)
    assert (await device.status())[0][3].split()[3] == "16/16"
    assert device.table()[0][2] == "clone"
    await registry.close()


async def test_clone_that_was_suspended_in_between_asks_again_at_resume() -> None:
    registry, opener, device = await make_clone()
    opener.open["/m"].hold = True  # the last commit has not ended
    await settle(1000)
    suspending = asyncio.create_task(registry.suspend("c"))
    await settle()
    opener.open["/m"].let_go()
    await suspending
    await settle()
    assert device.table()[0][2] == "clone"
    await registry.resume("c")
    await settle(100)
    assert device.table() == [LINEAR]
    await registry.close()


async def test_clone_does_not_ask_before_its_bits_are_durable() -> None:
    registry, opener, device = await make_clone()
    opener.open["/m"].hold = True
    await settle(2000)
    assert (await device.status(noflush=True))[0][3].split()[3] == "16/16"
    assert device.table()[0][2] == "clone"
    opener.open["/m"].let_go()
    await settle(200)
    assert device.table() == [LINEAR]
    await registry.close()


async def test_load_through_the_swap_sees_no_error_and_the_right_data() -> None:
    registry, opener, device = await make_clone()
    image = bytearray(opener.open["/s"].data)
    nr_bios = 0
    while device.table()[0][2] == "clone" or nr_bios % 40:
        at = nr_bios * 1536 % SIZE
        data = bytes([nr_bios % 251]) * 512
        write = Bio(OP_WRITE, at, 512, memoryview(data), 0, lambda _: None)
        device.submit(write)
        other = nr_bios * 3584 % SIZE
        read = submit(device, OP_READ, other, 512)
        flush = submit(device, OP_FLUSH)
        image[at : at + 512] = data
        want = bytes(image[other : other + 512])
        for _ in range(300):
            await asyncio.sleep(0)
            registry.clock.advance(0.0001)  # type: ignore[attr-defined]
            if PENDING not in (write.status, read.status, flush.status):
                break
        assert (write.status, read.status, flush.status) == (0, 0, 0)
        assert read.payload is not None
        assert bytes(read.payload) == want
        nr_bios += 1
        assert nr_bios < 5000
    assert device.table() == [LINEAR]
    await registry.close()
    assert opener.open["/d"].data == image
