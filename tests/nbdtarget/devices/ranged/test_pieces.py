# SPDX-License-Identifier: Apache-2.0
"""Clients' reads: one request for a miss, no more waiting than needed, and reading ahead."""

import asyncio
import errno

import pytest

from nbdtarget.bio import OP_READ, PENDING, Bio
from nbdtarget.common.turns import Tasks
from nbdtarget.devices.health import Health
from nbdtarget.devices.ranged import pieces as module
from nbdtarget.devices.ranged.fetcher import Fetcher
from nbdtarget.devices.ranged.pieces import (
    AHEAD_CELLS_MAX,
    CELL_BYTES,
    Pieces,
)
from nbdtarget.devices.ranged.store import SourceAway
from nbdtarget.devices.ranged.traffic import Traffic
from tests.support.image_server import image_of
from tests.support.patience import until
from tests.support.ranged import MemoryStore, in_simulated_time

IMAGE = image_of(16 * CELL_BYTES + 700)


class Rig:
    def __init__(self, image: bytes = IMAGE) -> None:
        self.image = image
        self.store = MemoryStore(image)
        self.store.latency_s = 0.03
        self.tasks = Tasks()
        fetcher = Fetcher(
            "source",
            self.store,
            self.store.pin,
            Health(),
            Traffic(),
            source_timeout_s=5.0,
            changed=lambda _: None,
        )
        self.pieces = Pieces(fetcher, len(image), self.tasks)

    def begin(self, offset: int, length: int, *, borrowed: bool = False) -> Bio:
        buffer = memoryview(bytearray(b"\xee" * length))
        bio = Bio(OP_READ, offset, length, buffer, 0, lambda _: None, borrowed=borrowed)
        self.pieces.read(bio)
        return bio

    async def ended(self, bio: Bio) -> Bio:
        await until(lambda: bio.status != PENDING)
        return bio

    async def read(self, offset: int, length: int) -> bytes:
        bio = await self.ended(self.begin(offset, length))
        assert bio.status == 0
        assert bio.payload is not None
        return bytes(bio.payload)

    @property
    def asked(self) -> list[tuple[int, int]]:
        """The ranges that were requested, in cells."""
        return [(b // CELL_BYTES, -(-e // CELL_BYTES)) for b, e, *_ in self.store.noted]


def test_miss_brings_its_cell_and_the_next_read_finds_it() -> None:
    async def work() -> None:
        rig = Rig()
        at = 5 * CELL_BYTES + 4096
        assert await rig.read(at, 4096) == IMAGE[at : at + 4096]
        bio = rig.begin(at + 8192, 4096, borrowed=True)
        assert bio.status == 0  # at once, and into the client's own buffer
        assert bio.borrowed
        assert bytes(bio.payload or b"") == IMAGE[at + 8192 : at + 12288]
        assert rig.asked == [(5, 6)]

    in_simulated_time(work())


def test_reads_of_one_cell_share_its_request() -> None:
    async def work() -> None:
        rig = Rig()
        await asyncio.gather(*(rig.read(nr * 4096, 4096) for nr in (9, 3, 27, 3)))
        assert rig.asked == [(0, 1)]

    in_simulated_time(work())


def test_read_ends_as_soon_as_its_bytes_are_here() -> None:
    async def work() -> None:
        rig = Rig()
        rig.store.bytes_per_s = CELL_BYTES  # a second for the cell
        await rig.read(0, 4096)
        assert asyncio.get_running_loop().time() < 0.3
        await rig.read(CELL_BYTES - 4096, 4096)
        assert asyncio.get_running_loop().time() >= 1.0

    in_simulated_time(work())


def test_random_reads_are_not_read_ahead_of() -> None:
    async def work() -> None:
        rig = Rig()
        for cell in (9, 2, 12, 5, 0):
            await rig.read(cell * CELL_BYTES, 4096)
        assert rig.asked == [(9, 10), (2, 3), (12, 13), (5, 6), (0, 1)]

    in_simulated_time(work())


def test_sequence_is_read_ahead_of() -> None:
    async def work() -> None:
        rig = Rig(image_of(120 * CELL_BYTES))
        for at in range(0, 100 * CELL_BYTES, 64 << 10):
            assert await rig.read(at, 64 << 10) == rig.image[at : at + (64 << 10)]
        # All but the first few were there, or on their way, when they were wanted.
        assert asyncio.get_running_loop().time() < 0.03 * 12
        assert len(rig.asked) < 40
        assert max(end for _, end in rig.asked) <= 100 + AHEAD_CELLS_MAX
        cells = [nr for begin, end in rig.asked for nr in range(begin, end)]
        assert len(cells) == len(set(cells)), "nothing is fetched twice"

    in_simulated_time(work())


def test_two_sequences_at_once_are_two_streams() -> None:
    async def work() -> None:
        rig = Rig(image_of(100 * CELL_BYTES))
        for nr in range(20):
            await rig.read(nr * CELL_BYTES, CELL_BYTES)
            await rig.read((50 + nr) * CELL_BYTES, CELL_BYTES)
        assert asyncio.get_running_loop().time() < 0.03 * 16

    in_simulated_time(work())


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (CELL_BYTES - 512, 1024),
        (0, 3 * CELL_BYTES),
        (CELL_BYTES // 2, 9 * CELL_BYTES),
        (16 * CELL_BYTES, 1024),  # the last bytes, and what rounds them up
        (16 * CELL_BYTES - 4096, 4096 + 1024),
    ],
)
def test_any_range_is_right(offset: int, length: int) -> None:
    async def work() -> None:
        rig = Rig()
        wanted = (IMAGE + bytes(512))[offset : offset + length]
        for _ in range(2):  # from the source, and from here
            assert await rig.read(offset, length) == wanted.ljust(length, b"\0")

    in_simulated_time(work())


def test_what_is_kept_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CELLS_MAX", 6)

    async def work() -> None:
        rig = Rig()
        for cell in (2, 4, 6, 8, 10, 12, 14):
            await rig.read(cell * CELL_BYTES, 512)
            await rig.read(0, 512)  # used again and again: it stays
        nr_before = len(rig.asked)
        for cell in (0, 14, 12, 10, 8, 6):
            await rig.read(cell * CELL_BYTES, 512)
        assert len(rig.asked) == nr_before == 8
        await rig.read(4 * CELL_BYTES, 512)  # used longest ago
        assert len(rig.asked) == nr_before + 1

    in_simulated_time(work())


def test_failed_fetch_ends_its_reads_and_the_next_asks_again() -> None:
    async def work() -> None:
        rig = Rig()

        def trouble(_: int) -> None:
            raise SourceAway("no")

        rig.store.trouble = trouble
        bios = [rig.begin(0, 4096), rig.begin(4096, CELL_BYTES)]
        for bio in bios:
            assert (await rig.ended(bio)).status == errno.EIO
        rig.store.trouble = None
        assert await rig.read(0, 4096) == IMAGE[:4096]
        assert rig.pieces.nr_waiting == 0

    in_simulated_time(work())


def test_cancelled_fetch_ends_its_reads() -> None:
    async def work() -> None:
        rig = Rig()
        bio = rig.begin(0, 4096)
        for task in rig.tasks:
            task.cancel()  # before its first step
        assert (await rig.ended(bio)).status == errno.EIO

    in_simulated_time(work())


def test_head_that_came_with_the_opening_is_used() -> None:
    async def work() -> None:
        rig = Rig()
        rig.pieces.seed(IMAGE[: CELL_BYTES + 5])
        assert await rig.read(0, CELL_BYTES) == IMAGE[:CELL_BYTES]
        assert rig.asked == []
        assert rig.pieces.has(0, CELL_BYTES)
        assert not rig.pieces.has(0, CELL_BYTES + 1)

    in_simulated_time(work())


def test_whole_small_image_is_its_head() -> None:
    async def work() -> None:
        rig = Rig(image_of(700))
        rig.pieces.seed(rig.image)
        assert await rig.read(0, 1024) == rig.image + bytes(324)
        assert rig.asked == []

    in_simulated_time(work())


def test_read_keeps_the_cells_that_it_drives_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CELLS_MAX", 4)

    async def work() -> None:
        rig = Rig()
        for cell in (5, 9, 12, 2):
            await rig.read(cell * CELL_BYTES, 4096)
        at = 6 * CELL_BYTES - 4096  # cell 5 is the next one to go, and 6 is missing
        assert await rig.read(at, 8192) == rig.image[at : at + 8192]

    in_simulated_time(work())
