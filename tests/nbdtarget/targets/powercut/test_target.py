# SPDX-License-Identifier: Apache-2.0
"""powercut: what is safe, what is at risk, and what a cut leaves of it."""

import asyncio
import errno as errnos
import random

import pytest

from nbdtarget.bio import (
    FUA,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.common.errors import ConstructorError, DeviceError, TableError
from nbdtarget.devices.base import EXTENT_DATA, Extent
from nbdtarget.devices.losses import FlushObserver
from nbdtarget.dm.mapped_device import MappedDevice
from tests.support.clock import settle
from tests.support.tables import Disks, content, submit

S = 512


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("/a", "Invalid argument count"),
        ("/a x", "Invalid device sector"),
        ("/a 0 x", "Invalid number of feature arguments"),
        ("/a 0 1 tear_size", "Invalid number of feature arguments"),
        ("/a 0 2 tear_size", "Invalid number of feature arguments"),
        ("/a 0 6 a b c d e f", "Invalid number of feature arguments"),
        ("/a 0 2 nonsense 1", "Invalid feature argument"),
        ("/a 0 2 tear_size 1024", "Invalid tear_size (512 or 4096)"),
        ("/a 0 2 volatile_cache_max 0", "Invalid volatile_cache_max"),
        ("/no 0", "Device lookup failed: /no: No such file"),
        ("/a 65", "/a too small for target: start=65"),
    ],
)
async def test_constructor_refuses(words: str, reason: str) -> None:
    disks = Disks(a=128 * S)
    with pytest.raises(ConstructorError) as caught:
        await disks.create(f"0 64 powercut {words}")
    assert str(caught.value).startswith(f"powercut: {reason}")
    assert disks["/a"].nr_closed == ("small" in reason)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("", "0"),
        (" 0", "0"),
        (
            " 4 tear_size 4096 volatile_cache_max 9",
            "4 volatile_cache_max 9 tear_size 4096",
        ),
    ],
)
async def test_table(given: str, shown: str) -> None:
    disks = Disks(a=128 * S)
    device = await disks.create(f"0 64 powercut /a 1{given}")
    assert device.table() == [(0, 64, "powercut", f"/a 1 {shown}")]
    assert await device.status() == [(0, 64, "powercut", "on 0 0 0")]


class Cut:
    """A powercut disk of 64 sectors, from sector 8 of `/a` on, in the middle of a table."""

    def __init__(self, features: str = "") -> None:
        self.disks = Disks(a=128 * S)
        self.medium = self.disks["/a"]
        self.table = f"0 4 zero\n4 64 powercut /a 8 {features}"

    async def start(self) -> "Cut":
        await self.disks.fill("/a", b"0" * 128 * S)
        self.device: MappedDevice = await self.disks.create(self.table)
        return self

    def write(self, sector: int, fill: bytes, nr: int = 1, flags: int = 0) -> Bio:
        at = (4 + sector) * S
        return submit(self.device, OP_WRITE, at, fill * nr * S, flags=flags)

    def flush(self) -> Bio:
        return submit(self.device, OP_FLUSH)

    async def __call__(self, *words: str) -> str | None:
        return await self.device.message(4, words)

    async def status(self) -> str:
        return (await self.device.status())[1][3]

    async def reads(self, nr: int = 8) -> str:
        """The first character of each of the first sectors, as a client reads them."""
        bio = submit(self.device, OP_READ, 4 * S, nr * S)
        await settle()
        data = content(bio)
        assert all(len(set(data[at : at + S])) == 1 for at in range(0, len(data), S))
        return data[::S].decode()

    async def holds(self, nr: int = 8) -> str:
        """The same of what is on the medium."""
        return (await self.disks.image("/a"))[8 * S :: S][:nr].decode()


async def test_write_is_read_but_not_on_the_medium_until_flushed() -> None:
    cut = await Cut().start()
    assert cut.write(1, b"a").status == 0
    assert (await cut.reads(), await cut.holds()) == ("0a000000", "00000000")
    assert await cut.status() == "on 1 512 0"
    assert await cut.device.extents(4 * S, 8 * S) == [Extent(8 * S, EXTENT_DATA)]
    flush = cut.flush()
    await settle()
    assert flush.status == 0
    assert (await cut.reads(), await cut.holds()) == ("0a000000", "0a000000")
    assert await cut.status() == "on 0 0 0"
    assert cut.disks.log[-2][1] == "flush"


async def test_flush_covers_what_was_written_before_it_only() -> None:
    cut = await Cut().start()
    cut.write(1, b"a")
    cut.write(2, b"b", nr=2)
    flush = cut.flush()
    cut.write(2, b"c")
    await settle()
    assert flush.status == 0
    assert (await cut.reads(), await cut.holds()) == ("0acb0000", "0abb0000")
    await cut("cycle", "drop")
    assert await cut.reads() == "0abb0000"


async def test_fua_makes_itself_safe_and_nothing_else() -> None:
    cut = await Cut().start()
    cut.write(1, b"a", nr=3)
    fua = cut.write(2, b"f", flags=FUA)
    await settle()
    assert fua.status == 0
    assert (await cut.reads(), await cut.holds()) == ("0afa0000", "00f00000")
    await cut("cycle", "keep")
    assert await cut.reads() == "0afa0000"


async def test_write_after_a_fua_that_is_under_way_is_newer() -> None:
    cut = await Cut().start()
    cut.medium.hold = True
    fua = cut.write(2, b"f", flags=FUA)
    await settle()
    cut.write(2, b"n")
    cut.medium.let_go()
    await settle()
    assert fua.status == 0
    assert (await cut.reads(), await cut.holds()) == ("00n00000", "00f00000")


async def test_parts_of_sectors_and_zeroing() -> None:
    cut = await Cut().start()
    bios = [
        submit(cut.device, OP_WRITE, 5 * S + 100, b"x" * 1000),
        submit(cut.device, OP_WRITE, 5 * S + 90, b"y" * 10),
        submit(cut.device, OP_WRITE, 5 * S + 1100, b"z", flags=FUA),
        submit(cut.device, OP_WRITE_ZEROES, 9 * S, S),
        submit(cut.device, OP_DISCARD, 4 * S, S),
        submit(cut.device, OP_WRITE, 4 * S, b""),
    ]
    await settle()
    assert [bio.status for bio in bios] == [0] * 6
    expected = b"0" * 90 + b"y" * 10 + b"x" * 1000 + b"z" + b"0" * (3 * S - 1101)
    assert content(submit(cut.device, OP_READ, 5 * S, 3 * S)) == expected
    assert content(submit(cut.device, OP_READ, 5 * S + 95, 20)) == expected[95:115]
    assert content(submit(cut.device, OP_READ, 9 * S, S)) == bytes(S)
    assert (await cut.disks.image("/a"))[11 * S : 12 * S] == expected[2 * S :]


async def test_read_under_way_sees_what_a_flush_forgets_meanwhile() -> None:
    cut = await Cut().start()
    cut.write(1, b"a")
    read_first = cut.medium._serve

    def late(bio: Bio) -> None:
        if bio.op == OP_READ:
            held.append(bio)
        else:
            read_first(bio)

    held: list[Bio] = []
    old = (await cut.disks.image("/a"))[9 * S : 10 * S]
    cut.medium._serve = late  # type: ignore[method-assign]
    read = submit(cut.device, OP_READ, 5 * S, S)
    flush = cut.flush()
    await settle()
    assert flush.status == 0
    (below,) = held
    assert below.payload is not None
    below.payload[:] = old  # carried out before the flush, ended after it
    below.end(0)
    assert content(read) == b"a" * S


async def test_every_bio_fails_between_cut_and_on() -> None:
    cut = await Cut().start()
    cut.write(1, b"a")
    assert await cut("cut", "drop", "7") == (
        "drop 7: 1 writes of 1 sectors at risk, 0 sectors survive"
    )
    assert await cut.status() == "off 0 0 1"
    assert cut.device.event_nr == 1
    for op in (OP_READ, OP_WRITE, OP_WRITE_ZEROES):
        payload: int | bytes = b"x" * S if op == OP_WRITE else S
        assert submit(cut.device, op, 4 * S, payload).status == errnos.EIO
    assert cut.flush().status == errnos.EIO
    with pytest.raises(DeviceError):
        await cut.device.extents(4 * S, S)
    with pytest.raises(TableError, match="the power is off"):
        await cut("cut", "keep")
    assert await cut("on") is None
    with pytest.raises(TableError, match="the power is on"):
        await cut("on")
    assert await cut.reads() == "00000000"
    cut.write(1, b"b")
    await cut("cycle", "KEEP")
    assert await cut.status() == "on 0 0 2"
    assert await cut.reads() == "0b000000"


async def test_what_is_in_flight_at_a_cut_fails() -> None:
    cut = await Cut().start()
    cut.write(1, b"a")
    cut.medium.hold = True
    bios = [cut.flush(), cut.write(2, b"f", flags=FUA), cut.flush()]
    await settle()
    task = asyncio.ensure_future(cut("cycle", "drop"))
    await settle()
    assert [bio.status for bio in bios] == [-1] * 3
    cut.medium.let_go()
    await task
    assert [bio.status for bio in bios] == [errnos.EIO] * 3
    # The first write of the first flush was under way: it landed. Nothing was promised.
    assert await cut.reads() == "0a000000"


@pytest.mark.parametrize("border", [512, 4096])
async def test_torn_writes_are_torn_at_borders_and_by_seed(border: int) -> None:
    seen = set()
    for seed in range(40):
        left = []
        for _ in range(2):
            cut = await Cut(f"2 tear_size {border}").start()
            cut.write(0, b"a", nr=24)
            await cut("cycle", "tear", str(seed))
            left.append(await cut.reads(24))
        assert left[0] == left[1]
        seen.add(left[0])
    assert len(seen) > 3
    step = border // S
    for sectors in seen:
        for at in range(0, 24, step):
            assert len(set(sectors[at : at + step])) == 1
    assert (border == 512) == any(len(set(s[:8])) == 2 for s in seen)


async def test_survivors_are_old_or_new() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        cut = await Cut().start()
        may: list[set[str]] = [{"0"} for _ in range(8)]
        for nr in range(12):
            sector, fill = rng.randrange(8), chr(97 + nr)
            cut.write(sector, fill.encode())
            may[sector].add(fill)
            if rng.random() < 0.2:
                cut.flush()
                await settle()
                for at, value in enumerate(await cut.holds()):
                    may[at] = {value}
        await cut("cycle", "mixed", str(seed))
        for value, values in zip(await cut.reads(), may, strict=True):
            assert value in values


async def test_full_cache_writes_the_oldest_down() -> None:
    cut = await Cut("2 volatile_cache_max 4").start()
    bios = [cut.write(nr, b"abcdefgh"[nr : nr + 1]) for nr in range(5)]
    assert [bio.status for bio in bios] == [0, 0, 0, 0, -1]
    await settle()
    assert bios[4].status == 0
    assert (await cut.reads(), await cut.holds()) == ("abcde000", "ab000000")
    assert await cut.status() == "on 3 1536 0"


async def test_medium_that_fails_fails_the_flush_and_loses_nothing() -> None:
    cut = await Cut().start()
    cut.write(1, b"a")
    cut.medium.fails = lambda bio: errnos.ENOSPC if bio.op == OP_WRITE else 0
    flush = cut.flush()
    await settle()
    assert flush.status == errnos.ENOSPC
    assert await cut.reads() == "0a000000"
    cut.medium.fails = lambda _: 0
    flush = cut.flush()
    await settle()
    assert flush.status == 0
    assert await cut.holds() == "0a000000"


async def test_suspend_and_removal_bring_everything_to_the_medium() -> None:
    cut = await Cut().start()
    cut.write(1, b"a")
    await cut.disks.registry.load("d", cut.table)
    await cut.disks.registry.resume("d")
    assert (await cut.reads(), await cut.holds()) == ("0a000000", "0a000000")
    cut.write(2, b"b")
    await cut.disks.registry.close()
    assert await cut.holds() == "0ab00000"


async def test_writes_that_a_suspend_could_not_save_fail_the_next_flush(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cut = await Cut().start()
    cut.write(1, b"a")
    cut.medium.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
    client = FlushObserver(cut.device)
    await cut.disks.registry.load("d", cut.table)
    await cut.disks.registry.resume("d")
    assert "the cache cannot be written" in caplog.text
    cut.medium.fails = lambda _: 0
    with pytest.raises(DeviceError, match="flush"):
        await client.flush()
    await client.flush()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("cut", "Invalid argument"),
        ("cut drop 1 2", "Invalid argument"),
        ("nonsense", "Invalid argument"),
        ("on now", "Invalid argument"),
        ("cut half", "Invalid argument: half is not keep, drop, tear or mixed"),
        ("cut tear x", "Invalid argument: x is not a seed"),
    ],
)
async def test_message_refused(words: str, reason: str) -> None:
    cut = await Cut().start()
    with pytest.raises(TableError) as caught:
        await cut(*words.split())
    assert caught.value.reason.startswith(reason)
    assert await cut.status() == "on 0 0 0"
