# SPDX-License-Identifier: Apache-2.0
"""Background hydration in bulk: a client's write meets it, it is stopped, it fails and goes on."""

import asyncio
import errno
import random
from collections.abc import AsyncIterator

import pytest

from nbdtarget.bio import OP_DISCARD, OP_READ, OP_WRITE, PENDING
from nbdtarget.devices import bulk
from tests.support.bulk import LendingDisk, WritableDisk
from tests.support.clock import settle
from tests.support.clone import REGION, Rig
from tests.support.patience import PATIENCE_S, until

NR_REGIONS = 8
SIZE = NR_REGIONS * REGION
CONTENT = random.Random(9).randbytes(SIZE)


class BulkRig(Rig):
    """A clone whose source lends streams, and whose destination has a writer."""

    def __init__(self, *, in_flight: int = 4) -> None:
        words = f"8 0 4 hydration_threshold {in_flight} hydration_batch_size 2"
        super().__init__(size=SIZE, words=words)
        self.lending = LendingDisk(CONTENT)
        self.written = WritableDisk(SIZE)
        self.ctx.devices |= {"s": self.lending, "d": self.written}

    async def start(self) -> "BulkRig":
        await self.lending.write_content()
        await self.restart()
        return self

    async def until_hydrated(self) -> None:
        while await self.hydrated() != f"{NR_REGIONS}/{NR_REGIONS}":
            await asyncio.sleep(0.001)
            self.clock.advance(1.0)


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[BulkRig]:
    monkeypatch.setattr(bulk, "CHUNK_BYTES", REGION // 2)
    rig = BulkRig()
    yield rig
    rig.lending.gate.set()
    await rig.stop()
    await until(
        lambda: rig.lending.nr_to_lend == 3 - sum(map(bool, rig.lending.came_back))
    )


async def test_hydrates_all_and_gives_the_streams_back(rig: BulkRig) -> None:
    await rig.start()
    await rig.until_hydrated()
    assert rig.written.data == CONTENT
    assert not [bio for bio in rig.written.bios if bio[0] == OP_WRITE]
    await until(lambda: rig.lending.came_back == [""] * 3)


async def test_a_write_to_a_region_that_is_being_copied_comes_after_the_copy(
    rig: BulkRig,
) -> None:
    rig.lending.gate.clear()
    await rig.start()
    await settle()
    bio = rig.bio(OP_WRITE, 512, 512)
    discard = rig.bio(OP_DISCARD, REGION, REGION)
    await settle()
    assert bio.status == discard.status == PENDING
    assert rig.written.data == bytes(SIZE)
    rig.lending.gate.set()
    await rig.until_hydrated()
    await until(lambda: bio.status == discard.status == 0)
    want = bytearray(CONTENT)
    want[512:1024] = b"w" * 512
    want[REGION : 2 * REGION] = rig.written.data[REGION : 2 * REGION]
    assert rig.written.data == want


async def test_reads_meanwhile_see_the_source(rig: BulkRig) -> None:
    rig.lending.gate.clear()
    await rig.start()
    await settle()
    bio = rig.bio(OP_READ, 0, REGION)
    assert bio.payload is not None
    assert bytes(bio.payload) == CONTENT[:REGION]


async def test_no_more_is_under_way_than_the_threshold(rig: BulkRig) -> None:
    rig.lending.gate.clear()
    await rig.start()
    await settle()
    words = (await rig.target.status(noflush=True)).split()
    assert words[3:5] == [f"0/{NR_REGIONS}", "4"]


async def test_a_stop_in_the_middle_waits_for_what_is_under_way_and_records_it(
    rig: BulkRig,
) -> None:
    rig.lending.gate.clear()
    await rig.start()
    await settle()
    suspending = asyncio.ensure_future(rig.suspend())
    await settle()
    assert not suspending.done()
    rig.lending.gate.set()
    await asyncio.wait_for(suspending, PATIENCE_S)
    await until(lambda: rig.lending.came_back == [""] * 3)
    assert await rig.hydrated() == f"4/{NR_REGIONS}"
    assert rig.written.data == CONTENT[: SIZE // 2] + bytes(SIZE // 2)
    await rig.target.dtr()
    await rig.restart()
    await rig.until_hydrated()
    assert rig.written.data == CONTENT


@pytest.mark.parametrize("side", ["read", "write"])
async def test_a_bad_sector_costs_its_own_region(rig: BulkRig, side: str) -> None:
    """A range with a bad sector is tried again by halves, and later once more."""
    bad = 3 * REGION
    errors = rig.lending.errors if side == "read" else rig.written.errors
    errors[bad] = errno.EIO if side == "read" else errno.ENOSPC
    await rig.start()
    await until(lambda: rig.target._metadata.nr_hydrated == NR_REGIONS - 1)
    assert not rig.target._metadata.all_hydrated(3, 4)
    want = bytearray(CONTENT)
    want[bad : bad + REGION] = rig.written.data[bad : bad + REGION]
    assert rig.written.data == want
    errors.clear()
    await rig.until_hydrated()
    assert rig.written.data == CONTENT


async def test_a_server_that_leaves_and_comes_back(rig: BulkRig) -> None:
    """The regions that were being read when the server left are copied again, and none of them counts as hydrated."""
    rig.lending.gate.clear()
    await rig.start()
    await settle()
    rig.lending.breaks = True
    rig.lending.errors_of_bios = errno.EIO
    rig.lending.gate.set()
    await until(lambda: len(rig.lending.came_back) == 3)
    await settle()
    assert await rig.hydrated() == f"0/{NR_REGIONS}"
    rig.lending.breaks = False
    rig.lending.errors_of_bios = 0
    rig.lending.came_back.clear()
    rig.lending.nr_to_lend = 3
    await rig.until_hydrated()
    assert rig.written.data == CONTENT


async def test_what_clients_have_read_stays_in_the_page_cache(rig: BulkRig) -> None:
    rig.words[4:] = ["2", "no_hydration", "hydrate_on_read"]
    await rig.start()
    rig.bio(OP_READ, 2 * REGION, REGION)
    await until(lambda: rig.target._metadata.nr_hydrated == 1)
    assert rig.written.behind == []
    await rig.target.message(["disable_hydrate_on_read"])
    await rig.target.message(["enable_hydration"])
    await rig.until_hydrated()
    await rig.suspend()
    dropped = sum(end - begin for each in rig.written.behind for begin, end in each)
    assert dropped == SIZE - REGION
    await rig.target.dtr()
    await rig.restart()
