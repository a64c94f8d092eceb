# SPDX-License-Identifier: Apache-2.0
"""Counters of regions: messages and numbers as a 6.12 kernel answers them."""

import asyncio
import errno

import pytest

from nbdtarget.bio import (
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.common.errors import TableError
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from nbdtarget.dm.statistics import AREAS_MAX
from tests.support.clock import SimClock
from tests.support.dm import RamDevice, make_registry

S = 512
ZEROES = "0 0 0 0 0 0 0 0 0 0 0 0 0"


class Lab:
    """`lin`, of 2048 sectors on /a."""

    def __init__(
        self, registry: Registry, device: MappedDevice, disk: RamDevice
    ) -> None:
        self.registry = registry
        self.device = device
        self.disk = disk

    @property
    def clock(self) -> SimClock:
        assert isinstance(self.registry.clock, SimClock)
        return self.registry.clock

    async def ask(self, words: str) -> str | None:
        return await self.device.message(0, words.split())

    def send(self, op: int, sector: int, nr: int) -> Bio:
        has_payload = op in (OP_READ, OP_WRITE)
        payload = memoryview(bytearray(nr * S)) if has_payload else None
        bio = Bio(op, sector * S, nr * S, payload, 0, lambda _: None)
        self.device.submit(bio)
        return bio


@pytest.fixture
async def lab() -> Lab:
    registry, opener = make_registry(a=1 << 20, b=1 << 20)
    device = await registry.create("lin", "0 2048 linear /a 0")
    return Lab(registry, device, opener.open["/a"])


async def test_regions_are_listed_as_recorded(lab: Lab) -> None:
    assert await lab.ask("@stats_list") is None
    assert await lab.ask("@stats_create - 1024") == "0"
    assert await lab.ask("@stats_create - /4 myprog") == "1"
    step = "@stats_create 100+100 30 1 precise_timestamps prog"
    assert await lab.ask(step) == "2"
    assert await lab.ask("@stats_create - /1 1 histogram:1,2,4,8") == "3"
    assert await lab.ask("@STATS_LIST") == (
        "0: 0+2048 1024 - -\n"
        "1: 0+2048 512 myprog -\n"
        "2: 100+100 30 prog - precise_timestamps\n"
        "3: 0+2048 2048 - - histogram:1,2,4,8"
    )
    assert await lab.ask("@stats_list prog") == (
        "2: 100+100 30 prog - precise_timestamps"
    )
    assert await lab.ask("@stats_list nosuch") is None
    assert await lab.ask("@stats_set_aux 0 hello") is None
    assert await lab.ask("@stats_delete 1") is None
    assert await lab.ask("@stats_create - /3000") == "1"
    assert await lab.ask("@stats_create 2000+100 100 - -") == "4"
    both = "@stats_create 0+64 8 2 histogram:1000,2000 precise_timestamps prog aux"
    assert await lab.ask(both) == "5"
    lines = (await lab.ask("@stats_list") or "").splitlines()
    assert lines[0] == "0: 0+2048 1024 - hello"
    assert lines[1] == "1: 0+2048 1 - -"
    assert lines[4] == "4: 2000+100 100 - -"
    assert lines[5] == "5: 0+64 8 prog aux precise_timestamps histogram:1000,2000"


async def test_counters_are_printed_as_recorded(lab: Lab) -> None:
    for words in ("- 1024", "100+100 30", "- /1 1 histogram:1,2,4,8"):
        await lab.ask(f"@stats_create {words}")
    for nr in range(8):
        lab.send(OP_WRITE, nr * 8, 8)
    for nr in range(4):
        lab.send(OP_READ, nr * 128, 128)
    assert await lab.ask("@stats_print 0") == (
        f"0+1024 4 3 512 0 8 7 64 0 0 0 0 0 0\n1024+1024 {ZEROES}"
    )
    assert await lab.ask("@stats_print 1") == (
        "100+30 2 1 30 0 0 0 0 0 0 0 0 0 0\n"
        "130+30 1 1 30 0 0 0 0 0 0 0 0 0 0\n"
        "160+30 1 1 30 0 0 0 0 0 0 0 0 0 0\n"
        "190+30 1 1 10 0 0 0 0 0 0 0 0 0 0"
    )
    assert await lab.ask("@stats_print 2") == (
        "0+2048 4 3 512 0 8 7 64 0 0 0 0 0 0 12:0:0:0:0"
    )
    assert await lab.ask("@stats_print 1 3 9") == "190+30 1 1 10 0 0 0 0 0 0 0 0 0 0"
    assert await lab.ask("@stats_print 1 9 9") is None
    assert await lab.ask("@stats_print 1 0 0") is None


async def test_a_write_over_several_areas_counts_in_each(lab: Lab) -> None:
    await lab.ask("@stats_create 0+64 8")
    lab.send(OP_WRITE, 0, 32)
    lab.send(OP_WRITE, 6, 2)
    printed = (await lab.ask("@stats_print 0") or "").splitlines()
    assert printed[0] == "0+8 0 0 0 0 2 0 10 0 0 0 0 0 0"
    assert printed[1:4] == [f"{at}+8 0 0 0 0 1 0 8 0 0 0 0 0 0" for at in (8, 16, 24)]
    assert printed[4:] == [f"{at}+8 {ZEROES}" for at in (32, 40, 48, 56)]


async def test_discards_and_zeroing_are_writes_and_flushes_are_nothing(
    lab: Lab,
) -> None:
    await lab.ask("@stats_create - /1")
    lab.send(OP_DISCARD, 0, 8)
    lab.send(OP_WRITE_ZEROES, 100, 8)
    lab.send(OP_FLUSH, 0, 0)
    lab.send(OP_CACHE, 0, 8)
    assert await lab.ask("@stats_print 0") == "0+2048 0 0 0 0 2 0 16 0 0 0 0 0 0"


async def test_times_and_histogram_of_requests_that_take_a_while(lab: Lab) -> None:
    await lab.ask("@stats_create - /1 1 histogram:1,2,4,8")
    await lab.ask("@stats_create - /1 2 precise_timestamps histogram:2500000")
    lab.disk.hold = True
    lab.send(OP_READ, 0, 8)
    lab.clock.advance(0.002)
    lab.send(OP_WRITE, 8, 8)
    assert await lab.ask("@stats_print 0") == (
        "0+2048 0 0 0 0 0 0 0 0 2 2 2 2 0 0:0:0:0:0"
    )
    lab.clock.advance(0.001)
    lab.disk.let_go()
    assert await lab.ask("@stats_print 0") == (
        "0+2048 1 0 8 3 1 0 8 1 0 3 4 3 1 0:1:1:0:0"
    )
    assert await lab.ask("@stats_print 1") == (
        "0+2048 1 0 8 3000000 1 0 8 1000000 0 3000000 4000000 3000000 1000000 1:1"
    )


async def test_clearing_keeps_what_is_in_flight(lab: Lab) -> None:
    await lab.ask("@stats_create - /2")
    lab.send(OP_WRITE, 0, 8)
    lab.disk.hold = True
    lab.send(OP_WRITE, 1024, 8)
    lab.clock.advance(0.005)
    printed = "0+1024 0 0 0 0 1 0 8 0 0 0 0 0 0"
    assert await lab.ask("@stats_print_clear 0 0 1") == printed
    assert await lab.ask("@stats_print 0") == (
        f"0+1024 {ZEROES}\n1024+1024 0 0 0 0 0 0 0 0 1 5 5 0 5"
    )
    assert await lab.ask("@stats_clear 0") is None
    assert await lab.ask("@stats_print 0 1 1") == "1024+1024 0 0 0 0 0 0 0 0 1 0 0 0 0"
    lab.disk.let_go()
    assert await lab.ask("@stats_print 0 1 1") == "1024+1024 0 0 0 0 1 0 8 5 0 0 0 0 0"


async def test_counting_changes_nothing_for_the_bios(lab: Lab) -> None:
    """Bios in flight while regions are created and deleted end well, and their data goes to the same place."""
    lab.disk.hold = True
    first = lab.send(OP_WRITE, 0, 8)
    await lab.ask("@stats_create - /1")
    second = lab.send(OP_WRITE, 8, 8)
    await lab.ask("@stats_delete 0")
    third = lab.send(OP_WRITE, 16, 8)
    await lab.ask("@stats_create - /1")
    lab.disk.let_go()
    assert [bio.status for bio in (first, second, third)] == [0, 0, 0]
    assert await lab.ask("@stats_print 0") == f"0+2048 {ZEROES}"
    await lab.registry.suspend("lin")
    assert lab.send(OP_READ, 0, 8).status == -1
    assert await lab.ask("@stats_print 0") == f"0+2048 {ZEROES}"
    await lab.registry.resume("lin")
    assert await lab.ask("@stats_print 0") == "0+2048 1 0 8 0 0 0 0 0 0 0 0 0 0"
    assert lab.send(OP_READ, 2048, 8).status == errno.EINVAL


async def test_without_regions_the_way_of_a_bio_is_the_fast_one(lab: Lab) -> None:
    fast = (lab.device.fast_path.op_max, lab.device.fast_path._map)
    await lab.ask("@stats_create - /1")
    assert lab.device.fast_path.op_max == -1
    await lab.ask("@stats_create - /1")
    await lab.ask("@stats_delete 0")
    assert lab.device.fast_path.op_max == -1
    await lab.ask("@stats_delete 1")
    assert (lab.device.fast_path.op_max, lab.device.fast_path._map) == fast


async def test_a_device_in_a_stack_is_counted_too(lab: Lab) -> None:
    upper = await lab.registry.create("upper", "0 64 linear /dev/mapper/lin 64")
    await lab.ask("@stats_create - /1")
    bio = Bio(OP_WRITE, 0, S, memoryview(bytes(S)), 0, lambda _: None)
    upper.submit(bio)
    assert bio.status == 0
    assert await lab.ask("@stats_print 0") == "0+2048 0 0 0 0 1 0 1 0 0 0 0 0 0"


async def test_what_a_suspend_gives_back_is_counted_once(lab: Lab) -> None:
    lines = "0 1024 delay /b 0 1000\n1024 1024 delay /b 1024 1000"
    lab.device = await lab.registry.create("slow", lines)
    await lab.ask("@stats_create - /1")
    whole, cut = lab.send(OP_WRITE, 0, 8), lab.send(OP_WRITE, 1020, 8)
    for _ in range(2):
        await lab.registry.suspend("slow", noflush=True)
        await lab.registry.resume("slow")
    assert (await lab.ask("@stats_print 0") or "").split()[9] == "2"
    await lab.registry.suspend("slow")
    assert (whole.status, cut.status) == (0, 0)
    assert await lab.ask("@stats_print 0") == "0+2048 0 0 0 0 2 0 16 0 0 0 0 0 0"


async def test_regions_outlive_tables_and_names(lab: Lab) -> None:
    await lab.ask("@stats_create - 1024")
    await lab.registry.load("lin", "0 1024 linear /a 0")
    await lab.registry.resume("lin")
    lab.registry.rename("lin", "other")
    assert await lab.ask("@stats_list") == "0: 0+2048 1024 - -"
    assert await lab.ask("@stats_create - 1024") == "1"
    assert await lab.ask("@stats_list") == "0: 0+2048 1024 - -\n1: 0+1024 1024 - -"


async def test_a_device_without_a_table_takes_the_messages(lab: Lab) -> None:
    lab.device = await lab.registry.create("bare", None)
    assert await lab.ask("@stats_list") is None
    assert await lab.ask("@stats_create - /1") == "0"
    assert await lab.ask("@stats_create 0+10 /1") == "1"
    assert await lab.device.message(99999, ["@stats_list"]) == (
        "0: 0+1 1 - -\n1: 0+10 10 - -"
    )


@pytest.mark.parametrize(
    "words",
    [
        "@stats_list prog x",
        "@stats_print 0 1",
        "@stats_print x",
        "@stats_print",
        "@stats_set_aux 0",
        "@stats_delete",
        "@stats_create",
        "@stats_create -",
        "@stats_create - 0",
        "@stats_create - /0",
        "@stats_create - x",
        "@stats_create 0+0 1",
        "@stats_create 5 1",
        "@stats_create 1+99999999999999999999 1",
        "@stats_create - /1 1 nosuch",
        "@stats_create - /1 1 histogram:2,1",
        "@stats_create - /1 1 histogram:1,1",
        "@stats_create - /1 1 histogram:",
        "@stats_create - /1 1 histogram:1,a",
        "@stats_create - /1 3 precise_timestamps",
        "@stats_create - /1 0 p a extra",
        "@stats_create - /1 p a extra",
        "@stats_nosuch",
        "@nosuch",
    ],
)
async def test_a_wrong_message_is_refused(lab: Lab, words: str) -> None:
    await lab.ask("@stats_create - /1")
    with pytest.raises(TableError) as caught:
        await lab.ask(words)
    assert caught.value.errno == errno.EINVAL
    assert await lab.ask("@stats_list") == "0: 0+2048 2048 - -"


@pytest.mark.parametrize("verb", ["print", "clear", "delete", "print_clear"])
async def test_a_region_that_is_not_there(lab: Lab, verb: str) -> None:
    with pytest.raises(TableError) as caught:
        await lab.ask(f"@stats_{verb} 7")
    assert caught.value.errno == errno.ENOENT


async def test_areas_are_bounded(lab: Lab) -> None:
    with pytest.raises(TableError) as caught:
        await lab.ask(f"@stats_create 0+{AREAS_MAX + 1} 1")
    assert caught.value.errno == errno.ENOMEM
    assert await lab.ask(f"@stats_create 0+{AREAS_MAX} 1") == "0"
    with pytest.raises(TableError):
        await lab.ask("@stats_create - /1")


async def test_disks_have_their_turns_while_many_areas_are_printed(lab: Lab) -> None:
    await lab.ask(f"@stats_create 0+{AREAS_MAX} 1")
    printing = asyncio.create_task(lab.ask("@stats_print 0"))
    nr_turns = 0
    while not printing.done():
        await asyncio.sleep(0)
        nr_turns += 1
    assert nr_turns >= AREAS_MAX // 1024
    assert len((await printing or "").splitlines()) == AREAS_MAX
