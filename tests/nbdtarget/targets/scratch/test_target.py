# SPDX-License-Identifier: Apache-2.0
"""scratch: what was written is read, the image stays as it is, and a reset forgets everything."""

import asyncio
import errno as errnos
import random

import pytest

from nbdtarget.bio import FUA, OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, Bio
from nbdtarget.common.errors import ConstructorError, TableError
from nbdtarget.devices.base import EXTENT_DATA, EXTENT_HOLE, EXTENT_ZERO, Extent
from nbdtarget.dm.mapped_device import MappedDevice
from tests.support.clock import settle
from tests.support.tables import Disks, content, submit

S = 512
SECTORS = 64
GOLDEN = bytes(range(1, SECTORS + 1))  # the byte of each sector


def image() -> bytes:
    return b"".join(bytes([each]) * S for each in GOLDEN)


class Copy:
    """A scratch device of 64 sectors, from sector 4 of a table on; the image begins at sector 8 of `/g`."""

    def __init__(self, features: str = "") -> None:
        self.disks = Disks(g=128 * S, s=64 * S)
        self.golden, self.store = self.disks["/g"], self.disks["/s"]
        self.table = f"0 4 zero\n4 64 scratch /g 8 /s {features}"

    async def start(self) -> "Copy":
        await self.disks.fill("/g", bytes(8 * S) + image())
        self.device: MappedDevice = await self.disks.create(self.table)
        self.disks.log.clear()
        return self

    def submit(self, op: int, at: int, payload: bytes | int, flags: int = 0) -> Bio:
        return submit(self.device, op, 4 * S + at, payload, flags=flags)

    def write(self, sector: int, fill: bytes, nr: int = 1, flags: int = 0) -> Bio:
        return self.submit(OP_WRITE, sector * S, fill * nr * S, flags)

    async def read(self, at: int = 0, length: int = SECTORS * S) -> bytes:
        bio = self.submit(OP_READ, at, length)
        await settle()
        return content(bio)

    async def reset(self) -> str | None:
        return await self.device.message(4, ["reset"])

    async def status(self) -> str:
        return (await self.device.status())[1][3]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("/g 0", "Invalid argument count"),
        ("/g x /s", "Invalid device sector"),
        ("/g 0 /s 1 max_sectors", "Invalid number of feature arguments"),
        ("/g 0 /s 2 max_sectors", "Invalid number of feature arguments"),
        ("/g 0 /s 2 nonsense 1", "Invalid feature argument"),
        ("/g 0 /s 2 max_sectors 0", "Invalid max_sectors"),
        ("/no 0 /s", "Device lookup failed: /no: No such file"),
        ("/g 0 /no", "Store lookup failed: /no: No such file"),
        ("/g 65 /s", "/g too small for target: start=65"),
        ("/g 0 /t", "store /t is too small: it has 16384 bytes, not 32768"),
        ("/g 0 /g", "Store lookup failed"),
    ],
)
async def test_constructor_refuses_and_closes(words: str, reason: str) -> None:
    disks = Disks(g=128 * S, s=64 * S, t=32 * S)
    with pytest.raises(ConstructorError) as caught:
        await disks.create(f"0 64 scratch {words}")
    assert str(caught.value).startswith(f"scratch: {reason}")
    assert disks.registry.devices() == []


async def test_store_that_holds_data_is_refused_unless_it_may_be_lost() -> None:
    disks = Disks(g=64 * S, s=64 * S)
    await disks.fill("/s", b"valuable" * 64)
    with pytest.raises(ConstructorError, match="store /s holds data"):
        await disks.create("0 64 scratch /g 0 /s")
    assert (await disks.image("/s"))[:8] == b"valuable"
    device = await disks.registry.create(
        "d", "0 64 scratch /g 0 /s", permissions=frozenset({"overwrite"})
    )
    bio = submit(device, OP_READ, 0, S)
    assert content(bio) == bytes(S)


@pytest.mark.parametrize(
    ("given", "shown", "most"),
    [("", "", 64), (" 0", "", 64), (" 2 max_sectors 9", " 2 max_sectors 9", 9)],
)
async def test_table_and_status(given: str, shown: str, most: int) -> None:
    disks = Disks(g=128 * S, s=64 * S)
    device = await disks.create(f"0 64 scratch /g 1 /s{given}")
    assert device.table() == [(0, 64, "scratch", f"/g 1 /s{shown}")]
    assert await device.status() == [(0, 64, "scratch", f"0/{most} 0")]


async def test_what_was_written_is_read_and_the_image_stays() -> None:
    copy = await Copy().start()
    assert await copy.read() == image()
    assert copy.write(3, b"w", nr=2).status == 0
    wanted = bytearray(image())
    wanted[3 * S : 5 * S] = b"w" * 2 * S
    assert await copy.read() == wanted
    assert await copy.read(3 * S + 100, 700) == b"w" * 700
    assert await copy.read(2 * S + 100, 1000) == wanted[2 * S + 100 :][:1000]
    assert (await copy.disks.image("/g"))[8 * S : 72 * S] == image()
    assert await copy.status() == "2/64 0"


async def test_nothing_is_flushed() -> None:
    copy = await Copy().start()
    assert copy.write(1, b"f", flags=FUA).status == 0
    assert copy.submit(OP_FLUSH, -4 * S, 0).status == 0
    assert copy.submit(OP_DISCARD, S, S).status == 0
    assert [each[:2] for each in copy.disks.log] == [("/s", "write")]
    assert copy.store.held == []
    assert (await copy.read(S, S)) == b"f" * S


async def test_fua_does_not_reach_the_store() -> None:
    copy = await Copy().start()
    copy.store.hold = True
    bio = copy.write(1, b"f", flags=FUA)
    (held,) = copy.store.held
    assert held.flags == 0
    copy.store.let_go()
    assert (bio.status, bio.flags) == (0, FUA)


async def test_sector_under_way_is_read_from_the_image() -> None:
    copy = await Copy().start()
    copy.store.hold = True
    bio = copy.write(1, b"w")
    assert await copy.read(S, S) == image()[S : 2 * S]
    copy.store.let_go()
    assert bio.status == 0
    assert await copy.read(S, S) == b"w" * S


async def test_failed_write_leaves_the_image_and_its_room() -> None:
    copy = await Copy("2 max_sectors 1").start()
    copy.store.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
    assert copy.write(1, b"w").status == errnos.EIO
    assert await copy.read() == image()
    copy.store.fails = lambda _: 0
    assert copy.write(2, b"w").status == 0


async def test_more_than_the_bound_is_enospc() -> None:
    copy = await Copy("2 max_sectors 4").start()
    assert copy.write(0, b"a", nr=3).status == 0
    assert copy.write(10, b"b", nr=2).status == errnos.ENOSPC
    copy.store.hold = True
    under_way = copy.write(10, b"b")
    assert copy.write(11, b"c").status == errnos.ENOSPC
    assert copy.submit(OP_WRITE, 11 * S + 1, b"c").status < 0
    copy.store.let_go()
    await settle()
    assert under_way.status == 0
    assert copy.write(0, b"d", nr=3).status == 0  # nothing new
    assert await copy.status() == "4/4 0"
    await copy.reset()
    assert copy.write(20, b"e", nr=4).status == 0


@pytest.mark.parametrize(("at", "length"), [(1, 10), (500, 100), (512, 1), (100, 2000)])
async def test_parts_of_sectors(at: int, length: int) -> None:
    copy = await Copy().start()
    copy.write(1, b"o")
    bio = copy.submit(OP_WRITE, at, b"p" * length)
    await settle()
    assert bio.status == 0
    wanted = bytearray(image())
    wanted[S : 2 * S] = b"o" * S
    wanted[at : at + length] = b"p" * length
    assert await copy.read() == wanted


async def test_part_of_a_sector_beyond_the_bound_or_on_a_bad_store_fails() -> None:
    copy = await Copy("2 max_sectors 1").start()
    copy.write(0, b"a")
    bios = [copy.submit(OP_WRITE, 2 * S + 1, b"p")]
    await settle()
    copy.store.fails = lambda bio: errnos.EIO
    bios.append(copy.submit(OP_WRITE, 1, b"p"))
    await settle()
    assert [bio.status for bio in bios] == [errnos.ENOSPC, errnos.EIO]


async def test_reset_forgets_everything_and_gives_the_space_back() -> None:
    copy = await Copy().start()
    copy.write(3, b"w", nr=5)
    assert await copy.reset() == "5 sectors dropped"
    assert await copy.read() == image()
    assert ("/s", "discard", 0, 64 * S) in copy.disks.log
    assert await copy.disks.image("/s") == bytes(64 * S)
    assert await copy.status() == "0/64 1"
    copy.disks.log.clear()
    assert await copy.reset() == "0 sectors dropped"
    assert copy.disks.log == []


async def test_reset_waits_for_what_is_under_way_and_holds_back_what_comes() -> None:
    copy = await Copy().start()
    copy.write(1, b"o")
    copy.store.hold = True
    old_write = copy.write(2, b"o")
    old_read = copy.submit(OP_READ, S, S)
    reset = asyncio.create_task(copy.reset())
    await settle()
    new_write, new_read = copy.write(3, b"n"), copy.submit(OP_READ, S, S)
    part = copy.submit(OP_WRITE, 5 * S + 1, b"p")
    last = copy.write(3, b"l")
    await settle()
    assert not reset.done()
    assert [bio.status for bio in (new_write, new_read, part, last)] == [-1] * 4
    copy.store.let_go()
    await settle()
    assert await reset == "2 sectors dropped"
    assert old_write.status == 0
    assert content(old_read) == b"o" * S
    assert content(new_read) == image()[S : 2 * S]
    assert (new_write.status, part.status, last.status) == (0, 0, 0)
    wanted = bytearray(image())
    wanted[3 * S : 4 * S] = b"l" * S
    wanted[5 * S + 1] = ord("p")
    assert await copy.read() == wanted


async def test_reset_is_done_even_if_the_space_does_not_come_back() -> None:
    copy = await Copy().start()
    copy.write(1, b"w")
    copy.store.fails = lambda bio: errnos.EIO if bio.op == OP_DISCARD else 0
    with pytest.raises(TableError, match="is reset, but its space does not come back"):
        await copy.reset()
    assert await copy.read() == image()


async def test_suspend_waits_for_a_reset() -> None:
    copy = await Copy().start()
    copy.store.hold = True
    old = copy.write(2, b"o")
    reset = asyncio.create_task(copy.reset())
    await settle()
    new = copy.write(3, b"n")
    suspend = asyncio.create_task(copy.disks.registry.suspend("d"))
    await settle()
    assert not suspend.done()
    copy.store.let_go()
    await asyncio.gather(reset, suspend)
    assert (old.status, new.status) == (0, 0)
    await copy.disks.registry.resume("d")
    assert (await copy.read())[3 * S : 4 * S] == b"n" * S


async def test_table_that_takes_its_place_begins_with_the_image() -> None:
    copy = await Copy().start()
    copy.write(3, b"w")
    await copy.disks.registry.load("d", copy.table)
    await copy.disks.registry.resume("d")
    assert await copy.read() == image()
    assert await copy.disks.image("/s") == bytes(64 * S)
    copy.write(4, b"x")
    await copy.disks.registry.suspend("d")
    await copy.disks.registry.resume("d")
    assert (await copy.read(4 * S, S)) == b"x" * S


async def test_extents_are_those_of_the_image_but_for_what_was_written() -> None:
    disks = Disks(g=256 << 10, s=256 << 10)
    await disks.fill("/g", b"g" * (64 << 10))
    device = await disks.create("0 512 scratch /g 0 /s")
    submit(device, OP_WRITE, 128 << 10, b"w" * S)
    assert await device.extents(0, 256 << 10) == [
        Extent(64 << 10, EXTENT_DATA),
        Extent(64 << 10, EXTENT_HOLE | EXTENT_ZERO),
        Extent(S, EXTENT_DATA),
        Extent((128 << 10) - S, EXTENT_HOLE | EXTENT_ZERO),
    ]
    assert await device.extents(100, 1000) == [Extent(1000, EXTENT_DATA)]


@pytest.mark.parametrize("seed", range(6))
async def test_random_requests_against_a_model(seed: int) -> None:
    rng = random.Random(seed)
    copy = await Copy().start()
    model = bytearray(image())
    for _ in range(150):
        at = rng.randrange(SECTORS * S - 4096)
        length = rng.randrange(1, 4096)
        if rng.randrange(2):
            at, length = at // S * S, max(1, length // S) * S
        match rng.randrange(8):
            case 0:
                await copy.reset()
                model[:] = image()
            case 1 | 2 | 3:
                fill = bytes([rng.randrange(100, 250)]) * length
                bio = copy.submit(OP_WRITE, at, fill)
                await settle()
                assert bio.status == 0
                model[at : at + length] = fill
            case _:
                assert await copy.read(at, length) == model[at : at + length]
    assert await copy.read() == model


async def test_message_that_is_none_is_refused() -> None:
    copy = await Copy().start()
    with pytest.raises(TableError, match="reset"):
        await copy.device.message(4, ["rewind"])
