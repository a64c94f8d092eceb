# SPDX-License-Identifier: Apache-2.0
"""Migrations that fail, meet clients, or are called off."""

import asyncio
import errno as errnos

from nbdtarget.bio import FUA, OP_FLUSH, OP_READ, OP_WRITE
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle


async def test_writebacks_that_fail_back_off_and_do_not_spin(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(4))
    lab.fail("o", OP_WRITE)
    lab.log.clear()
    await lab.message("clean_now")
    await lab.pass_time(60.0)
    # 0, 1, 3, 7, 15, 31 s: six rounds, or a few more as each block doubles the pause.
    assert 4 <= len(lab.asked("o", "write")) <= 24
    lab.fail("o")
    await lab.pass_time(65.0)
    assert not lab.core.nr_dirty
    assert lab.on_disk("o", 3) == b"w" * BLOCK


async def test_write_that_waited_for_a_writeback_dirties_the_block_again(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([2])
    lab.hold("o", OP_WRITE)
    await lab.message("clean_now")
    await settle()
    late = lab.submit(OP_WRITE, 2 * BLOCK, 512, fill="n")
    read = lab.submit(OP_READ, 2 * BLOCK, 512)
    await settle()
    assert late.status < 0
    assert read.status == 0, "what is only copied can be read"
    lab.hold("c", OP_WRITE)
    lab.origin.let_go()
    await settle(5)
    cblock = lab.cblock(2)
    assert cblock is not None
    await settle()
    assert lab.core.is_dirty(cblock), "before it is written"
    assert late.status < 0
    lab.cache.let_go()
    await settle()
    assert late.status == 0


async def test_writeback_waits_for_a_write_that_is_under_way(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([2])
    lab.hold("c", OP_WRITE)
    late = lab.submit(OP_WRITE, 2 * BLOCK, 512, fill="n")
    lab.log.clear()
    await lab.message("clean_now")
    await settle()
    assert late.status < 0
    assert not lab.asked("o", "write")
    lab.cache.let_go()
    await lab.pass_time(1.0)
    assert late.status == 0
    assert lab.on_disk("o", 2)[:513] == b"n" * 512 + b"w"


async def test_promotion_waits_for_a_write_that_is_under_way(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    lab.hold("o", OP_WRITE)
    late = lab.submit(OP_WRITE, 2 * BLOCK, 512, fill="n")
    await settle()
    await lab.message("warm 2")
    await lab.pass_time(1.0)
    assert late.status < 0
    assert lab.cblock(2) is None
    lab.origin.let_go()
    await lab.pass_time(1.0)
    assert late.status == 0
    assert lab.cblock(2) is not None
    assert (await lab.read(2))[:512] == b"n" * 512


async def test_demotion_waits_for_reads_of_its_cblock_before_that_is_reused(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(8))
    await lab.clean()
    lab.hold("c", OP_READ)
    reads = [lab.submit(OP_READ, oblock * BLOCK, BLOCK) for oblock in range(8)]
    lab.log.clear()
    await lab.message("warm 20")
    await lab.pass_time(3.0)
    assert not lab.asked("c", "write"), "all cblocks are being read"
    lab.cache.let_go()
    await lab.pass_time(3.0)
    assert lab.cblock(20) is not None
    for read in reads:
        assert read.status == 0
        assert bytes(read.payload or b"") == b"w" * BLOCK


async def test_failed_demotion_commit_keeps_the_cblock_for_its_block(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(8))
    await lab.clean()
    await lab.device.flush()
    await lab.write_part(21)  # it goes to the origin
    lab.fail("o", OP_FLUSH)
    lab.log.clear()
    await lab.message("warm 20")
    await lab.pass_time(3.0)
    assert lab.cblock(20) is None
    assert not lab.asked("c", "write")
    assert [await lab.read(oblock) for oblock in range(8)] == [b"w" * BLOCK] * 8


async def test_cancelled_demotion_refuses_writes_to_the_removed_block(
    lab: CacheLab,
) -> None:
    """Only the end of the loop cancels it: the metadata have lost a mapping that the policy has."""
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(8))
    await lab.clean()
    before = asyncio.all_tasks()
    lab.metadata.hold = True
    await lab.message("warm 20")
    await lab.pass_time(1.0)
    gone = next(oblock for oblock in range(8) if lab.core.maybe_cblock(oblock) is None)
    write = lab.submit(OP_WRITE, gone * BLOCK, 512, FUA)
    for task in asyncio.all_tasks() - before:
        if "_migrate" in repr(task.get_coro()):
            task.cancel()
    await settle()
    lab.metadata.let_go()
    await settle()
    assert write.status == errnos.EIO


async def test_what_is_written_back_is_counted(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(3))
    assert lab.target.status_fields()["written_back_bytes"] == 0
    lab.fail("o", OP_WRITE)
    await lab.message("clean_now")
    await lab.pass_time(1.0)
    assert lab.target.status_fields()["written_back_bytes"] == 0, "that has failed"
    lab.fail("o")
    await lab.pass_time(65.0)
    assert lab.target.status_fields()["written_back_bytes"] == 3 * BLOCK
