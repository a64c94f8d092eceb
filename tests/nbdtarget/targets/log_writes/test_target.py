# SPDX-License-Identifier: Apache-2.0
"""log-writes: what is logged, in which order, and what becomes of a log that is full."""

import errno as errnos
import logging

import pytest

from nbdtarget.bio import (
    FUA,
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.common.errors import ConstructorError, TableError
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.targets.log_writes import log as log_module
from nbdtarget.targets.log_writes.format import (
    END_MARK,
    Entry,
    parse_entry,
    parse_super,
)
from tests.support.clock import settle
from tests.support.tables import Disks, content, submit

S = 512
TABLE = "0 64 log-writes /a /log"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("/a", "Invalid argument count"),
        ("/no /log", "Device lookup failed: /no: No such file"),
        ("/a /no", "Log device lookup failed: /no: No such file"),
        ("/a /a", "Log device lookup failed: /a: the same device stands twice"),
        ("/small /log", "/small too small for target: start=0, len=64, dev_size=8"),
    ],
)
async def test_constructor_refuses(words: str, reason: str) -> None:
    disks = Disks(a=64 * S, log=1 << 20, small=8 * S)
    with pytest.raises(ConstructorError) as caught:
        await disks.create(f"0 64 log-writes {words}")
    assert str(caught.value).startswith(f"log-writes: {reason}")
    await disks.create("0 64 linear /a 0\n64 64 linear /log 0\n128 8 linear /small 0")
    assert not any(await disks.image("/log"))


async def test_one_log_for_two_targets_is_refused() -> None:
    disks = Disks(a=64 * S, b=64 * S, log=1 << 20)
    with pytest.raises(ConstructorError, match="belongs to another target"):
        await disks.create(f"{TABLE}\n64 64 log-writes /b /log")


class Logged:
    """A 32 KiB disk whose writes are logged."""

    def __init__(self, log_size: int = 1 << 20) -> None:
        self.disks = Disks(a=64 * S, log=log_size)
        self.below = self.disks["/a"]

    async def start(self) -> "Logged":
        self.device: MappedDevice = await self.disks.create(TABLE)
        return self

    def write(
        self, sector: int, fill: bytes = b"w", nr: int = 1, flags: int = 0
    ) -> Bio:
        return submit(self.device, OP_WRITE, sector * S, fill * S * nr, flags=flags)

    async def status(self) -> str:
        await settle()
        return (await self.device.status())[0][3]

    async def entries(self) -> list[str]:
        """Return the entries that the superblock vouches for: "write 3 w", "flush", "mark x", …"""
        await settle()
        return read_log(await self.disks.image("/log"))


def read_log(image: bytes) -> list[str]:
    nr_entries, size = parse_super(image)
    at = size
    told = []
    for nr in range(nr_entries):
        entry = parse_entry(image[at : at + size], f"entry {nr}")
        at += size
        data = image[at : at + entry.nr_data_sectors * size]
        at += len(data)
        told.append(told_of(entry, data))
    return told


def told_of(entry: Entry, data: bytes) -> str:
    match entry:
        case Entry(flags=8, mark=mark):
            return f"mark {mark.decode()}"
        case Entry(0, 0, 1):
            return "flush"
        case Entry(flags=4):
            return f"discard {entry.sector}+{entry.nr_sectors}"
    name = {0: "write", 2: "fua"}[entry.flags]
    return f"{name} {entry.sector}+{entry.nr_sectors} {chr(data[0])}"


async def test_table_and_status() -> None:
    logged = await Logged().start()
    assert logged.device.table() == [(0, 64, "log-writes", "/a /log")]
    assert await logged.status() == "0 0"
    logged.write(1, nr=2, flags=FUA)
    assert await logged.status() == "1 3"


async def test_writes_are_logged_with_the_flush_that_covers_them() -> None:
    logged = await Logged().start()
    assert logged.write(3, b"a").status == 0
    logged.write(1, b"b")
    assert submit(logged.device, OP_READ, 0, S).status == 0
    assert submit(logged.device, OP_CACHE, 0, S).status == 0
    assert await logged.status() == "0 0"
    submit(logged.device, OP_FLUSH)
    assert await logged.entries() == ["write 3+1 a", "write 1+1 b", "flush"]
    assert content(submit(logged.device, OP_READ, 3 * S, 2)) == b"aa"


async def test_completion_order_of_the_kernels_documentation() -> None:
    """W1,W2,W3,C3,C2,Wflush,C1,Cflush gives W3,W2,flush,W1 (log-writes.rst)."""
    logged = await Logged().start()
    logged.below.hold = True
    for nr in (1, 2, 3):
        logged.write(nr, b"%d" % nr)
    held = logged.below.held
    for nr in (3, 2):
        end_held(logged, held, nr)
    submit(logged.device, OP_FLUSH)
    flush = held.pop()
    end_held(logged, held, 1)
    logged.below._serve(flush)
    assert await logged.entries() == ["write 3+1 3", "write 2+1 2", "flush"]
    logged.below.hold = False
    submit(logged.device, OP_FLUSH)
    assert (await logged.entries())[3:] == ["write 1+1 1", "flush"]


def end_held(logged: Logged, held: list[Bio], nr: int) -> None:
    (bio,) = [bio for bio in held if bio.offset == nr * S]
    held.remove(bio)
    logged.below._serve(bio)


async def test_completion_order_of_the_kernels_source() -> None:
    """Wa,Wb,Wc,Cc,Ca,FLUSH,FUAd,Cb,CFLUSH,CFUAd gives c,a,flush,d; b waits.

    The comment at the head of dm-log-writes.c has b before the flush; its code, and
    log-writes.rst, do not.
    """
    logged = await Logged().start()
    logged.below.hold = True
    for nr in (1, 2, 3):
        logged.write(nr, b" abc"[nr : nr + 1])
    held = logged.below.held
    for nr in (3, 1):
        end_held(logged, held, nr)
    submit(logged.device, OP_FLUSH)
    flush = held.pop()
    logged.write(4, b"d", flags=FUA)
    end_held(logged, held, 2)
    logged.below._serve(flush)
    end_held(logged, held, 4)
    assert await logged.entries() == [
        "write 3+1 c",
        "write 1+1 a",
        "flush",
        "fua 4+1 d",
    ]


async def test_discard_keeps_its_place_among_the_writes() -> None:
    """WRITE block 1, DISCARD block 1, FLUSH (log-writes.rst)."""
    logged = await Logged().start()
    for can_discard in (True, False):
        logged.below.can_discard = can_discard
        logged.write(1)
        assert submit(logged.device, OP_DISCARD, S, 2 * S).status == 0
        assert submit(logged.device, OP_DISCARD, S + 1, S).status == 0
        submit(logged.device, OP_FLUSH)
    assert await logged.entries() == ["write 1+1 w", "discard 1+2", "flush"] * 2


async def test_zeroing_is_logged_as_a_write() -> None:
    logged = await Logged().start()
    submit(logged.device, OP_WRITE_ZEROES, S, 2 * S, flags=FUA)
    assert await logged.entries() == ["fua 1+2 \0"]


async def test_parts_of_sectors_are_logged_as_whole_ones() -> None:
    logged = await Logged().start()
    logged.write(0, b"o", nr=4)
    first = submit(logged.device, OP_WRITE, 100, b"x" * 100)
    second = submit(logged.device, OP_WRITE, 300, b"y" * 1000)
    await settle()
    assert (first.status, second.status) == (0, 0)
    submit(logged.device, OP_FLUSH)
    assert await logged.entries() == [
        "write 0+4 o",
        "write 0+1 o",
        "write 0+3 o",
        "flush",
    ]
    image = await logged.disks.image("/log")
    last = image[(1 + 5 + 2 + 1) * S :][: 3 * S]
    assert last == (await logged.disks.image("/a"))[: 3 * S]
    assert last[100:200] == b"x" * 100


async def test_part_of_a_sector_that_cannot_be_read_is_not_written() -> None:
    logged = await Logged().start()
    logged.below.fails = lambda bio: errnos.EIO if bio.op == OP_READ else 0
    bio = submit(logged.device, OP_WRITE, 100, b"x")
    await settle()
    assert bio.status == errnos.EIO
    assert not any(await logged.disks.image("/a"))


async def test_failed_bios_are_not_logged() -> None:
    logged = await Logged().start()
    logged.write(1, b"a")
    logged.below.fails = lambda _: errnos.EIO
    assert logged.write(2, b"b").status == errnos.EIO
    assert logged.write(3, b"c", flags=FUA).status == errnos.EIO
    assert submit(logged.device, OP_FLUSH).status == errnos.EIO
    logged.below.fails = lambda _: 0
    logged.write(4, b"d")
    submit(logged.device, OP_FLUSH)
    assert await logged.entries() == ["write 1+1 a", "write 4+1 d", "flush"]


async def test_marks_go_before_what_waits_for_a_flush() -> None:
    logged = await Logged().start()
    logged.write(1)
    assert await logged.device.message(0, ("Mark", "mkfs")) is None
    submit(logged.device, OP_FLUSH)
    assert await logged.entries() == ["mark mkfs", "write 1+1 w", "flush"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("mark",), "Invalid log-writes message arguments, expect 2 arguments, got 1"),
        (("a", "b", "c"), "Invalid log-writes message arguments, expect 2 arguments,"),
        (
            ("nonsense", "x"),
            "Unrecognised log writes target message received: nonsense",
        ),
        (("mark", "x" * 480), "Invalid argument: a mark has 479 bytes at most"),
    ],
)
async def test_message_refused(words: tuple[str, ...], reason: str) -> None:
    logged = await Logged().start()
    with pytest.raises(TableError) as caught:
        await logged.device.message(0, words)
    assert caught.value.reason.startswith(reason)


async def test_removal_logs_what_waits_and_the_last_mark() -> None:
    logged = await Logged().start()
    logged.write(1)
    await logged.device.suspend(noflush=True)
    await logged.disks.registry.close()
    assert await logged.entries() == ["write 1+1 w", f"mark {END_MARK}"]
    assert logged.disks.log[-1] == ("/log", "flush", 0, 0)


async def test_suspend_and_removal_log_nothing_that_was_not_asked_for() -> None:
    """As recorded from the kernel: write, suspend, resume, mark, remove."""
    logged = await Logged().start()
    logged.write(0)
    logged.write(8)
    await logged.device.suspend()
    assert logged.disks.log[-1] == ("/a", "flush", 0, 0)  # what was written is safe
    assert await logged.status() == "0 0"
    await logged.device.resume()
    await logged.device.message(0, ("mark", "x"))
    assert await logged.status() == "1 1"
    await logged.disks.registry.close()
    assert await logged.entries() == [
        "mark x",
        "write 0+1 w",
        "write 8+1 w",
        f"mark {END_MARK}",
    ]


async def test_suspend_of_a_device_above_logs_nothing() -> None:
    logged = await Logged().start()
    registry = logged.disks.registry
    line = "0 32 linear /dev/mapper/d 0\n32 32 striped 1 32 /dev/mapper/d 32"
    await registry.create("upper", line)
    await registry.suspend("upper")
    assert await logged.status() == "0 0"


async def test_table_that_was_never_live_leaves_the_log_alone() -> None:
    logged = Logged()
    await logged.disks.registry.create("d", None)
    await logged.disks.fill("/log", b"an older log")
    await logged.disks.registry.load("d", TABLE)
    await logged.disks.registry.clear("d")
    assert (await logged.disks.image("/log")).startswith(b"an older log")


async def test_reload_goes_on_with_the_log() -> None:
    logged = await Logged().start()
    logged.write(1, b"a")
    await logged.disks.registry.load("d", TABLE)
    await logged.device.suspend(noflush=True)
    await logged.disks.registry.resume("d")
    logged.write(2, b"b")
    submit(logged.device, OP_FLUSH)
    assert await logged.entries() == ["write 1+1 a", "write 2+1 b", "flush"]
    await logged.device.suspend(noflush=True)
    await logged.disks.registry.close()
    assert (await logged.entries())[3:] == [f"mark {END_MARK}"]


async def test_new_log_hides_an_older_one_before_its_first_entry() -> None:
    logged = await Logged().start()
    for nr in range(3):
        logged.write(nr, flags=FUA)
    await logged.disks.registry.remove_all()
    logged.disks.log.clear()
    again = await logged.disks.create(TABLE, "again")
    submit(again, OP_WRITE, 0, b"z" * S, flags=FUA)
    await settle()
    assert [entry[1:] for entry in logged.disks.log if entry[0] == "/log"] == [
        ("write", 0, S),
        ("write", S, 2 * S),
        ("write", 0, S),
    ]
    assert await logged.entries() == ["fua 0+1 z"]


async def test_full_log_ends_logging_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logged = await Logged(log_size=6 * S).start()
    logged.write(0, b"a")
    logged.write(1, b"b")
    logged.write(2, b"c")
    submit(logged.device, OP_FLUSH)
    assert await logged.status() == "2 4 logging_disabled"
    assert await logged.entries() == ["write 0+1 a", "write 1+1 b"]
    assert "Ran out of space on the logdev" in caplog.text
    assert logged.write(3, b"d", flags=FUA).status == 0
    assert submit(logged.device, OP_DISCARD, 0, S).status == 0
    assert submit(logged.device, OP_FLUSH).status == 0
    assert (await logged.disks.image("/a"))[3 * S] == ord("d")
    with pytest.raises(TableError, match="logging_disabled"):
        await logged.device.message(0, ("mark", "x"))
    await logged.disks.registry.close()
    assert await logged.entries() == ["write 0+1 a", "write 1+1 b"]


async def test_log_that_fails_ends_logging_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    logged = await Logged().start()
    logged.disks["/log"].fails = lambda _: errnos.EIO
    assert logged.write(0, flags=FUA).status == 0
    assert await logged.status() == "0 0 logging_disabled"
    assert "Error writing log" in caplog.text
    assert logged.write(1).status == 0
    await logged.disks.registry.close()


async def test_memory_is_bounded_by_flushing_and_by_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log_module, "BYTES_HELD_MAX", 8 * 1024)
    monkeypatch.setattr(log_module, "UNFLUSHED_BYTES_MAX", 4 * 1024)
    logged = await Logged().start()
    logged.disks["/log"].hold = True  # a log device that does not get on
    bios = [logged.write(nr, b"%c" % (65 + nr)) for nr in range(20)]
    await settle()
    assert [bio.status for bio in bios] == [0] * 8 + [-1] * 12
    logged.disks["/log"].let_go()
    await settle()
    assert [bio.status for bio in bios] == [0] * 20
    submit(logged.device, OP_FLUSH)
    written = [entry for entry in await logged.entries() if entry != "flush"]
    assert written == [f"write {nr}+1 {65 + nr:c}" for nr in range(20)]
    await logged.disks.registry.close()


async def test_waiting_writes_go_on_when_logging_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log_module, "BYTES_HELD_MAX", 2 * 1024)
    logged = await Logged().start()
    logged.below.fails = lambda bio: errnos.EIO if bio.op == OP_FLUSH else 0
    bios = [logged.write(nr) for nr in range(20)]
    await settle()
    assert [bio.status for bio in bios] == [0] * 20
    assert (await logged.status()).endswith("logging_disabled")


async def test_log_whose_writer_meets_a_bug_ends_and_has_no_gap(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logged = await Logged().start()
    logged.write(1, b"a", flags=FUA)
    assert await logged.entries() == ["fua 1+1 a"]

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as broken:
        broken.setattr(log_module, "pack_entry", fail)
        logged.write(2, b"b", flags=FUA)
        await settle()
    assert "/log: Error writing log: RuntimeError('a bug'): logging" in caplog.text
    assert logged.write(3, b"c", flags=FUA).status == 0
    assert await logged.entries() == ["fua 1+1 a"]
    await logged.disks.registry.close()
