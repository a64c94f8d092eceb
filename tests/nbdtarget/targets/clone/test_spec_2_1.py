# SPDX-License-Identifier: Apache-2.0
"""Checklist 2.1: what becomes of a request, by the state of its region and the mode.

The table is driven as one: each row in each mode. What stands below it in the checklist, the
details and the discards, follows.
"""

import errno as errnos
from dataclasses import dataclass

import pytest

from nbdtarget.bio import (
    FUA,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    PENDING,
    Bio,
)
from nbdtarget.common.errors import DeviceError
from nbdtarget_metadata.mode import Mode
from tests.support.clock import settle
from tests.support.clone import REGION, Rig

HYDRATED, CHANGED, UNHYDRATED, HYDRATING = range(4)  # also the regions in that state
COMMIT = ["d flush", "m write", "m flush", "m write", "m write"]


@dataclass(frozen=True)
class Row:
    """One row of the table: data operations asked for at once, then after what it waits for.

    `RO` and FAIL columns: what is asked for at once, or None for EIO with nothing asked for.
    """

    name: str
    op: int
    region: int
    flags: int = 0
    length: int = REGION
    uncommitted: bool = True  # some other region's bit is not committed
    rw: tuple[str, ...] = ()
    rw_later: tuple[str, ...] | None = None  # None: it ends at once
    ro: tuple[str, ...] | None = None


ROWS = [
    Row("read hydrated", OP_READ, HYDRATED, rw=("d read",), ro=("d read",)),
    Row("read unhydrated", OP_READ, UNHYDRATED, rw=("s read",), ro=("s read",)),
    Row("read hydrating", OP_READ, HYDRATING, rw=("s read",), ro=("s read",)),
    Row("write hydrated", OP_WRITE, HYDRATED, rw=("d write",), ro=("d write",)),
    Row(
        "write FUA hydrated, nothing uncommitted",
        OP_WRITE,
        HYDRATED,
        FUA,
        uncommitted=False,
        rw=("d write FUA",),
        ro=("d write FUA",),
    ),
    Row(
        "write FUA hydrated, uncommitted changes",
        OP_WRITE,
        HYDRATED,
        FUA,
        rw_later=("d flush", "d write FUA"),
    ),
    Row("overwrite", OP_WRITE, UNHYDRATED, rw=("d write",)),
    Row(
        "overwrite FUA",
        OP_WRITE,
        UNHYDRATED,
        FUA,
        rw=("d write",),
        rw_later=("d flush",),
    ),
    Row(
        "part of an idle region",
        OP_WRITE,
        UNHYDRATED,
        length=REGION - 512,
        rw=("s read", "d write"),
    ),
    Row(
        "whole region, hydration running",
        OP_WRITE,
        HYDRATING,
        rw_later=("d write", "d write"),
    ),
    Row(
        "part of a region, hydration running",
        OP_WRITE,
        HYDRATING,
        length=512,
        rw_later=("d write", "d write"),
    ),
    Row(
        "flush, nothing uncommitted",
        OP_FLUSH,
        0,
        length=0,
        uncommitted=False,
        rw=("d flush",),
        ro=("d flush",),
    ),
    Row("flush, uncommitted", OP_FLUSH, 0, length=0, rw_later=("d flush",)),
    Row("discard hydrated", OP_DISCARD, HYDRATED, rw=("d discard",), ro=("d discard",)),
    Row("discard unhydrated", OP_DISCARD, UNHYDRATED, rw=("d discard",), ro=()),
]

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


async def make_rig(*, uncommitted: bool) -> Rig:
    """Regions 0 to 3 in the four states; the copy of the last one is held at the source."""
    rig = await Rig().start()
    rig.bio(OP_WRITE, HYDRATED * REGION, REGION)
    await rig.disk.flush()
    rig.source.hold = True
    rig.bio(OP_WRITE, HYDRATING * REGION + 512, REGION - 512)
    assert len(rig.source.held) == 1
    rig.source.hold = False
    if uncommitted:
        rig.bio(OP_WRITE, CHANGED * REGION, REGION)
    rig.log.clear()
    return rig


def submit(rig: Rig, row: Row) -> Bio:
    return rig.bio(row.op, row.region * REGION, row.length, row.flags)


def asked(rig: Rig, flags: dict[int, int]) -> tuple[str, ...]:
    """Return the operations that the data devices were sent, with FUA."""
    ops = []
    for nr, (device, op, _, _) in enumerate(rig.log):
        if device != "m":
            ops.append(f"{device} {op}{' FUA' if flags.get(nr, 0) & FUA else ''}")
    return tuple(ops)


def note_flags(rig: Rig) -> dict[int, int]:
    """Note the flags of each bio by its place in the log."""
    flags: dict[int, int] = {}
    for spy in (rig.source, rig.destination):

        def fails(bio: Bio) -> int:
            flags[len(rig.log) - 1] = bio.flags
            return 0

        spy.fails = fails
    return flags


async def end(rig: Rig) -> None:
    rig.source.let_go()
    rig.metadata.fails = lambda _: 0
    await settle()
    await rig.stop()


@each_row
async def test_2_1_table_rw(row: Row) -> None:
    rig = await make_rig(uncommitted=row.uncommitted)
    flags = note_flags(rig)
    bio = submit(rig, row)
    assert asked(rig, flags) == row.rw
    assert bio.status == (0 if row.rw_later is None else PENDING)
    if row.rw_later is not None:
        if row.region == HYDRATING:
            assert bio.status == PENDING, "queued behind the copy"
            rig.source.let_go()
        await settle()
        assert asked(rig, flags) == row.rw + row.rw_later
        assert bio.status == 0
    await end(rig)


async def make_read_only(rig: Rig, *, uncommitted: bool) -> None:
    if uncommitted:
        rig.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
        with pytest.raises(DeviceError):
            await rig.disk.flush()
    else:
        rig.target._metadata.mode = Mode.RO
    rig.log.clear()


@each_row
async def test_2_1_table_ro(row: Row) -> None:
    # Where the kernel queues a write behind a copy, only to fail it then, we fail it at once.
    rig = await make_rig(uncommitted=row.uncommitted)
    await make_read_only(rig, uncommitted=row.uncommitted)
    flags = note_flags(rig)
    bio = submit(rig, row)
    await settle()
    assert asked(rig, flags) == (row.ro or ())
    assert bio.status == (errnos.EIO if row.ro is None else 0)
    await end(rig)


@each_row
async def test_2_1_table_fail(row: Row) -> None:
    rig = await make_rig(uncommitted=True)
    rig.metadata.fails = lambda _: errnos.EIO
    assert await rig.target.status() == "Error"
    rig.log.clear()
    bio = submit(rig, row)
    assert (bio.status, rig.log) == (errnos.EIO, [])
    await end(rig)


async def test_2_1_read_never_hydrates() -> None:
    rig = await Rig().start()
    await rig.disk.read(0, rig.size)
    assert await rig.hydrated() == "0/8"
    assert not rig.target._metadata.changed
    await rig.stop()


# Details


@pytest.mark.parametrize("how", ["background", "part write"])
async def test_2_1_copy_of_a_short_last_region_is_shortened(how: str) -> None:
    rig = await Rig(size=2 * REGION + 1024).start()
    if how == "background":
        await rig.target.message(["enable_hydration"])
        await settle()
    else:
        rig.bio(OP_WRITE, 2 * REGION, 512)
    tail = [(op, at + n) for d, op, at, n in rig.log if d != "m" and at >= 2 * REGION]
    assert max(at for _, at in tail) == rig.size
    assert {op for op, _ in tail} == {"read", "write"}
    await rig.stop()


async def test_2_1_queued_writes_are_issued_in_order_and_fua_after_a_commit() -> None:
    rig = await Rig().start()
    rig.source.hold = True
    writes = [
        rig.bio(OP_WRITE, 0, 512),
        rig.bio(OP_WRITE, 512, 512, FUA),
        rig.bio(OP_WRITE, 1024, 512),
    ]
    rig.log.clear()
    rig.source.let_go()
    # The FUA write finds the bit that the first has set uncommitted: it waits for a commit.
    assert [write.status for write in writes] == [0, PENDING, 0]
    await settle()
    assert writes[1].status == 0
    data = [(op, at) for device, op, at, _ in rig.log if device == "d"]
    assert data == [("write", 0), ("write", 1024), ("flush", 0), ("write", 512)]
    await rig.stop()


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_2_1_failed_copy_fails_all_waiting_writes_and_is_tried_again(
    side: str,
) -> None:
    # We try once for each that waits, where the kernel fails all with the first.
    rig = await Rig().start()
    device = rig.source if side == "source" else rig.destination
    device.fails = lambda _: errnos.EIO
    rig.source.hold = True
    writes = [rig.bio(OP_WRITE, nr * 512, 512) for nr in range(3)]
    rig.source.let_go()
    assert [write.status for write in writes] == [errnos.EIO] * 3
    assert await rig.hydrated() == "0/8"
    device.fails = lambda _: 0
    assert rig.bio(OP_WRITE, 0, 512).status == 0
    assert await rig.hydrated() == "1/8"
    await rig.stop()


async def test_2_1_copy_that_ends_after_the_mode_fell_fails_its_write() -> None:
    rig = await make_rig(uncommitted=True)
    write = rig.bio(OP_WRITE, UNHYDRATED * REGION, 512)
    assert write.status == 0
    queued = rig.bio(OP_WRITE, HYDRATING * REGION, 512)
    await make_read_only(rig, uncommitted=True)
    rig.source.let_go()
    assert queued.status == errnos.EIO
    assert (await rig.target.status()).split()[3:5] == ["1/8", "0"]
    assert (
        await rig.disk.read(HYDRATING * REGION, REGION)
        == (rig.content[HYDRATING * REGION : (HYDRATING + 1) * REGION])
    )
    await end(rig)


async def test_2_1_source_is_never_written_flushed_or_discarded() -> None:
    rig = await Rig().start()
    for region_nr in range(6):
        rig.bio(OP_WRITE, region_nr * REGION + 512, REGION, FUA * (region_nr % 2))
        rig.bio(OP_READ, 0, rig.size)
        rig.bio(OP_DISCARD, region_nr * REGION, 2 * REGION)
        rig.flush()
    await rig.target.message(["enable_hydration"])
    for _ in range(100):
        await settle()
        rig.clock.advance(0.1)
    assert await rig.hydrated() == "8/8"
    await rig.disk.flush()
    assert {op for device, op, _, _ in rig.log if device == "s"} == {"read"}
    assert await rig.source.device.read(0, rig.size) == rig.content
    await rig.stop()


# The discards, by the number of their step


async def test_2_1_discard_2_hydrated_range_is_trimmed_and_passed_down() -> None:
    rig = await Rig().start()
    rig.bio(OP_WRITE, 0, 4 * REGION)
    await rig.disk.flush()
    rig.log.clear()
    assert rig.bio(OP_DISCARD, 512, 3 * REGION).status == 0
    assert rig.log == [("d", "discard", REGION, 2 * REGION)]
    assert not rig.target._metadata.changed
    await rig.stop()


async def test_2_1_discard_4_marks_at_once_and_the_commit_follows_by_time() -> None:
    rig = await Rig().start()
    await rig.destination.device.write(0, b"old bytes of the destination".ljust(REGION))
    assert rig.bio(OP_DISCARD, 0, 2 * REGION).status == 0
    assert rig.ops() == ["d discard"]
    assert await rig.hydrated() == "2/8"
    rig.clock.advance(1.1)
    await settle()
    assert sorted(rig.ops()) == sorted(COMMIT)
    await rig.stop()
