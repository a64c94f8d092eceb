# SPDX-License-Identifier: Apache-2.0
"""Bios of many blocks: a few pieces in a turn of the loop, and a bounded number in flight."""

import asyncio
import errno as errnos
import random

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE, OP_WRITE_ZEROES, Bio
from nbdtarget.targets.cache.pieces import BYTES_AT_ONCE, PIECES_AT_ONCE, PIECES_MAX
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle

NR_OBLOCKS = 600


@pytest.fixture
def lab() -> CacheLab:
    return CacheLab(nr_cblocks=8, nr_oblocks=NR_OBLOCKS, tail=512)


async def ended(bio: Bio, turns: int = 1000) -> int:
    for _ in range(turns):
        if bio.status >= 0:
            break
        await asyncio.sleep(0)
    return bio.status


@pytest.mark.parametrize("op", [OP_READ, OP_WRITE, OP_WRITE_ZEROES])
async def test_turn_of_the_loop_starts_few_pieces(lab: CacheLab, op: int) -> None:
    await lab.create(DIRTY_BUSY)
    bio = lab.submit(op, 0, lab.length)
    assert bio.status < 0
    seen = len(lab.log)
    assert seen <= PIECES_AT_ONCE
    for _ in range(5):
        await asyncio.sleep(0)
        assert len(lab.log) <= seen + PIECES_AT_ONCE
        seen = len(lab.log)
    assert await ended(bio) == 0
    await lab.close()


async def test_pieces_in_flight_are_bounded(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    lab.origin.hold = True
    bio = lab.submit(OP_WRITE_ZEROES, 16 * BLOCK, lab.length - 16 * BLOCK)
    await settle(200)
    assert len(lab.origin.held) <= PIECES_MAX
    assert lab.target._blocks.locks.nr_holds <= PIECES_MAX
    lab.origin.let_go()
    assert await ended(bio) == 0
    await lab.close()


async def test_long_write_is_read_back_as_it_was_written(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    data = random.Random(3).randbytes(lab.length - 1024)
    await lab.device.write(512, data)
    assert bytes(await lab.device.read(512, len(data))) == data
    await lab.close()


async def test_long_write_owns_its_payload(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    memory = bytearray(b"w" * 2 * BYTES_AT_ONCE)
    bio = Bio(
        OP_WRITE,
        0,
        len(memory),
        memoryview(memory),
        0,
        lambda _: None,
        borrowed=True,
    )
    lab.device.submit(bio)
    memory[:] = b"?" * len(memory)  # as the receive buffer is used for what comes next
    assert await ended(bio) == 0
    assert set(bytes(await lab.device.read(0, len(memory)))) == {ord("w")}
    await lab.close()


async def test_long_read_of_a_borrowed_buffer_has_the_data(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    lab.put("o", b"o")
    memory = memoryview(bytearray(2 * BYTES_AT_ONCE))
    bio = Bio(OP_READ, 0, len(memory), memory, 0, lambda _: None, borrowed=True)
    lab.device.submit(bio)
    assert await ended(bio) == 0
    assert bio.payload is not None
    assert set(bytes(bio.payload)) == {ord("o")}
    await lab.close()


async def test_after_a_failed_piece_no_other_is_started(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    lab.fail("o", OP_READ)
    bio = lab.submit(OP_READ, 0, lab.length)
    assert await ended(bio) == errnos.EIO
    assert len(lab.asked("o")) == 1
    await lab.close()


async def test_suspend_waits_for_pieces_that_are_not_started_yet(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    bio = lab.submit(OP_WRITE_ZEROES, 0, lab.length)
    await lab.registry.suspend("c", noflush=True)
    assert bio.status == 0
    await lab.resume()
    await lab.close()
