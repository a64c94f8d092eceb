# SPDX-License-Identifier: Apache-2.0
"""striped: where each byte lies, what goes to which stripe, and who is counted dead."""

import errno as errnos
import random

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
from nbdtarget.common.errors import ConstructorError
from nbdtarget.devices.base import EXTENT_DATA, EXTENT_HOLE, EXTENT_ZERO, Extent
from nbdtarget.devices.memory import CHUNK_SIZE
from tests.support.clock import settle
from tests.support.tables import Disks, content, submit

SECTOR = 512
HOLE = EXTENT_HOLE | EXTENT_ZERO


@pytest.mark.parametrize(
    ("length", "words", "reason"),
    [
        (24, "2", "Not enough arguments"),
        (24, "0 4 /a 0 /b 0", "Invalid stripe count"),
        (24, "x 4 /a 0 /b 0", "Invalid stripe count"),
        (24, "4294967296 4 /a 0 /b 0", "Invalid stripe count"),
        (24, "2 0 /a 0 /b 0", "Invalid chunk_size"),
        (24, "2 -4 /a 0 /b 0", "Invalid chunk_size"),
        (25, "2 4 /a 0 /b 0", "Target length not divisible by number of stripes"),
        (24, "2 5 /a 0 /b 0", "Target length not divisible by chunk size"),
        (24, "2 4 /a 0", "Not enough destinations specified"),
        (24, "2 4 /a 0 /b 0 /c 0", "Not enough destinations specified"),
        (24, "2 4 /a 0 /b x", "Couldn't parse stripe destination"),
        (24, "2 4 /a 0 /no 0", "Couldn't parse stripe destination: /no: No such"),
        (24, "2 4 /a 0 /b 29", "/b too small for target: start=29, len=12, dev_size"),
        (24, "2 4 /a 0 /alias-a 0", "Couldn't parse stripe destination: /alias-a: the"),
    ],
)
async def test_constructor_refuses(length: int, words: str, reason: str) -> None:
    disks = Disks(a=20480, b=20480, c=20480)
    disks.disks["/alias-a"] = disks["/a"]
    with pytest.raises(ConstructorError) as caught:
        await disks.create(f"0 {length} striped {words}")
    assert str(caught.value).startswith(f"striped: {reason}")
    assert disks["/a"].nr_closed == ("/a" in words and reason.startswith(("C", "/")))


async def test_table_and_status() -> None:
    disks = Disks(a=20480, b=20480)
    device = await disks.create("0 24 striped +2 3 /a 8 /b 1")
    assert device.table() == [(0, 24, "striped", "2 3 /a 8 /b 1")]
    assert await device.status() == [(0, 24, "striped", "2 /a /b 1 AA")]


@pytest.mark.parametrize(("nr_stripes", "chunk_sectors"), [(1, 3), (2, 8), (3, 5)])
@pytest.mark.parametrize("begin_sectors", [0, 7])
async def test_every_range_reads_what_was_written(
    nr_stripes: int, chunk_sectors: int, begin_sectors: int
) -> None:
    rng = random.Random(nr_stripes)
    size = nr_stripes * chunk_sectors * 6 * SECTOR
    disks = Disks(**{f"s{nr}": size for nr in range(nr_stripes)}, z=4096)
    runs = " ".join(f"/s{nr} {nr}" for nr in range(nr_stripes))
    lead = f"0 {begin_sectors} linear /z 0\n" if begin_sectors else ""
    device = await disks.create(
        f"{lead}{begin_sectors} {size // SECTOR} striped {nr_stripes} {chunk_sectors} {runs}"
    )
    begin = begin_sectors * SECTOR
    model = bytearray(size)
    for _ in range(60):
        at = rng.randrange(size)
        length = rng.randrange(1, size - at + 1)
        if rng.random() < 0.7:
            data = rng.randbytes(length)
            assert submit(device, OP_WRITE, begin + at, data).status == 0
            model[at : at + length] = data
        else:
            assert submit(device, OP_WRITE_ZEROES, begin + at, length).status == 0
            model[at : at + length] = bytes(length)
        at = rng.randrange(size)
        length = rng.randrange(1, size - at + 1)
        assert (
            content(submit(device, OP_READ, begin + at, length))
            == (model[at : at + length])
        )
    chunk = chunk_sectors * SECTOR
    for nr in range(nr_stripes):
        expected = b"".join(
            model[at : at + chunk] for at in range(nr * chunk, size, nr_stripes * chunk)
        )
        image = await disks.image(f"/s{nr}")
        assert image[nr * SECTOR : nr * SECTOR + len(expected)] == expected


async def test_discard_and_zeroing_go_once_to_each_stripe_that_has_a_part() -> None:
    disks = Disks(a=65536, b=65536, c=65536)
    device = await disks.create("0 72 striped 3 4 /a 0 /b 8 /c 0")
    disks.log.clear()
    # Sectors 6 to 30: the end of chunk 1, chunks 2 to 6, half of chunk 7.
    for op, name in ((OP_DISCARD, "discard"), (OP_WRITE_ZEROES, "write_zeroes")):
        assert submit(device, op, 6 * SECTOR, 24 * SECTOR).status == 0
        assert disks.log == [
            ("/a", name, 4 * SECTOR, 8 * SECTOR),
            ("/b", name, (8 + 2) * SECTOR, 8 * SECTOR),
            ("/c", name, 0, 8 * SECTOR),
        ]
        disks.log.clear()
    submit(device, OP_CACHE, 0, 4 * SECTOR)
    assert disks.log == [("/a", "cache", 0, 4 * SECTOR)]


async def test_flush_goes_to_each_device_once_and_waits_for_all() -> None:
    disks = Disks(a=65536, b=65536)
    device = await disks.create("0 24 striped 3 4 /a 0 /b 0 /a 64")
    disks["/b"].hold = True
    disks.log.clear()
    bio = submit(device, OP_FLUSH)
    assert disks.log == [("/a", "flush", 0, 0), ("/b", "flush", 0, 0)]
    assert bio.status < 0
    disks["/b"].let_go()
    assert bio.status == 0


async def test_fua_stays_on_the_pieces() -> None:
    disks = Disks(a=65536, b=65536)
    device = await disks.create("0 24 striped 2 4 /a 0 /b 0")
    flags = []

    def note(bio: Bio) -> int:
        flags.append(bio.flags)
        return 0

    disks["/a"].fails = disks["/b"].fails = note
    assert submit(device, OP_WRITE, 0, bytes(4096), flags=FUA).status == 0
    assert flags == [FUA, FUA]


async def test_very_many_pieces_do_not_hold_up_the_loop() -> None:
    disks = Disks(a=1 << 20, b=1 << 20)
    device = await disks.create("0 4096 striped 2 1 /a 0 /b 0")
    data = random.Random(1).randbytes(1 << 20)
    bio = submit(device, OP_WRITE, 0, data)
    assert bio.status < 0
    assert 0 < len(disks.log) <= 64
    await settle()
    assert bio.status == 0
    bio = submit(device, OP_READ, 0, 1 << 20)
    await settle()
    assert content(bio) == data


async def test_errors_make_a_stripe_dead_and_raise_so_many_events() -> None:
    disks = Disks(a=65536, b=65536)
    device = await disks.create("0 32 striped 4 4 /a 0 /b 0 /a 32 /b 32")
    disks["/b"].fails = lambda bio: errnos.ENOTSUP
    before = device.event_nr
    assert submit(device, OP_READ, 4 * SECTOR, 512).status == errnos.ENOTSUP
    assert (await device.status())[0][3] == "4 /a /b /a /b 1 AAAA"
    disks["/b"].fails = lambda bio: errnos.EIO
    assert submit(device, OP_CACHE, 4 * SECTOR, 512).status == errnos.EIO
    assert device.event_nr == before
    assert submit(device, OP_READ, 0, 512).status == 0
    assert submit(device, OP_READ, 0, 4096).status == errnos.EIO
    assert device.event_nr == before + 1
    assert (await device.status())[0][3] == "4 /a /b /a /b 1 ADAD"
    for _ in range(20):
        assert submit(device, OP_FLUSH).status == errnos.EIO
    assert device.event_nr == before + 14


async def test_extents_are_those_of_the_stripes_in_turn() -> None:
    chunk = CHUNK_SIZE
    disks = Disks(a=4 * chunk, b=4 * chunk)
    sectors = chunk // SECTOR
    device = await disks.create(f"0 {8 * sectors} striped 2 {sectors} /a 0 /b 0")
    assert await device.extents(0, 8 * chunk) == [Extent(8 * chunk, HOLE)]
    submit(device, OP_WRITE, chunk, b"x")
    submit(device, OP_WRITE, 2 * chunk, b"x")
    assert await device.extents(512, 4 * chunk) == [
        Extent(chunk - 512, HOLE),
        Extent(2 * chunk, EXTENT_DATA),
        Extent(chunk + 512, HOLE),
    ]
    assert await device.extents(chunk, 10) == [Extent(10, EXTENT_DATA)]


async def test_extents_end_where_a_stripe_answers_no_further() -> None:
    chunk = CHUNK_SIZE
    disks = Disks(a=4 * chunk, b=4 * chunk)
    sectors = chunk // SECTOR
    device = await disks.create(f"0 {8 * sectors} striped 2 {sectors} /a 0 /b 0")

    async def first_half(offset: int, length: int) -> list[Extent]:
        return [Extent(length // 2, EXTENT_DATA)]

    disks["/a"].extents = first_half  # type: ignore[method-assign]
    assert await device.extents(0, 6 * chunk) == [
        Extent(chunk, EXTENT_DATA),
        Extent(chunk, HOLE),
        Extent(chunk // 2, EXTENT_DATA),
    ]
