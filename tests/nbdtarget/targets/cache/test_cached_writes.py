# SPDX-License-Identifier: Apache-2.0
"""Writes to cached blocks that meet a failing disk or a commit under way: which copy counts then."""

import errno as errnos

import pytest

from nbdtarget.bio import FUA, OP_WRITE
from tests.support.cache import BLOCK, CacheLab
from tests.support.clock import settle

THROUGH = "1 writethrough smq 0"
THROUGH_LOGGED = "2 writethrough dirty_log smq 0"
LOGGED = "1 dirty_log smq 2 migration_threshold 0"


async def cached_through(lab: CacheLab, words: str = THROUGH) -> int:
    """A writethrough cache that holds block 2, clean and committed; its cblock."""
    await lab.create(words)
    await lab.message("warm 2")
    await lab.pass_time(1.0)
    await lab.device.flush()
    cblock = lab.cblock(2)
    assert cblock is not None
    return cblock


async def test_write_through_that_the_cache_did_not_take_gives_the_block_up(
    lab: CacheLab,
) -> None:
    await cached_through(lab)
    lab.fail("c", OP_WRITE)
    bio = lab.submit(OP_WRITE, 2 * BLOCK, 512, fill="n")
    await settle()
    assert bio.status == 0
    assert lab.cblock(2) is None
    assert (await lab.recorded()).maybe_cblock(2) is None
    assert (await lab.read(2))[:512] == b"n" * 512
    assert await lab.field("cache_blocks") == "0/8"


async def test_write_through_that_the_origin_did_not_take_is_dirty_then(
    lab: CacheLab,
) -> None:
    cblock = await cached_through(lab)
    lab.fail("o", OP_WRITE)
    bio = lab.submit(OP_WRITE, 2 * BLOCK, 512, fill="n")
    await settle()
    assert bio.status == errnos.EIO
    assert lab.core.is_dirty(cblock)
    assert (await lab.read(2))[:512] == b"n" * 512
    lab.fail("o")
    await lab.clean()
    assert lab.on_disk("o", 2) == await lab.read(2)


async def test_write_through_to_the_same_bytes_waits_for_the_one_before(
    lab: CacheLab,
) -> None:
    await cached_through(lab)
    lab.hold("c", OP_WRITE)
    one = lab.submit(OP_WRITE, 2 * BLOCK, 1024, fill="1")
    two = lab.submit(OP_WRITE, 2 * BLOCK + 512, 1024, fill="2")
    beside = lab.submit(OP_WRITE, 2 * BLOCK + 4096, 512, fill="3")
    await settle()
    assert len(lab.asked("o", "write")) == 2, "the first one, and the one beside it"
    lab.cache.let_go()
    await settle()
    assert [one.status, two.status, beside.status] == [0, 0, 0]
    assert lab.on_disk("o", 2) == await lab.read(2)


async def test_write_through_in_flight_keeps_its_block_in_the_dirty_log(
    lab: CacheLab,
) -> None:
    cblock = await cached_through(lab, THROUGH_LOGGED)
    await lab.write_part(2)
    lab.hold("o", OP_WRITE)
    bio = lab.submit(OP_WRITE, 2 * BLOCK, 512, fill="n")
    await settle()
    assert bio.status < 0
    lab.core.clear_log()
    assert await lab.target._committer.commit()
    recorded = await lab.recorded()
    assert recorded.nr_logged == 1, "a crash now: the copies differ"
    assert recorded.gives_up_mappings, "and an older version would go by the log"
    lab.origin.let_go()
    await settle()
    assert bio.status == 0
    lab.core.clear_log()
    assert await lab.target._committer.commit()
    assert (await lab.recorded()).nr_logged == 0
    assert not (await lab.recorded()).is_dirty(cblock)


async def test_first_write_to_a_clean_block_waits_for_the_dirty_log(
    lab: CacheLab,
) -> None:
    await lab.create(LOGGED)
    await lab.message("warm 2")
    await lab.pass_time(1.0)
    await lab.device.flush()
    lab.log.clear()
    lab.hold("m", OP_WRITE)
    bios = [lab.submit(OP_WRITE, 2 * BLOCK + at, 512) for at in (0, 512, 4096)]
    await settle()
    assert not lab.asked("c", "write")
    lab.metadata.let_go()
    await settle()
    assert [bio.status for bio in bios] == [0, 0, 0]
    recorded = await lab.recorded()
    cblock = lab.cblock(2)
    assert cblock is not None
    assert recorded.is_dirty(cblock)


@pytest.mark.parametrize("flags", [0, FUA])
async def test_logged_write_whose_commit_fails_is_not_sent(
    lab: CacheLab, flags: int
) -> None:
    await lab.create(LOGGED)
    await lab.message("warm 2")
    await lab.pass_time(1.0)
    await lab.device.flush()
    lab.log.clear()
    lab.fail("m", OP_WRITE)
    bio = lab.submit(OP_WRITE, 2 * BLOCK, 512, flags)
    await settle()
    assert bio.status == errnos.EIO
    assert not lab.asked("c", "write")


async def test_write_that_waited_for_another_one_is_refused_after_a_failed_commit(
    lab: CacheLab,
) -> None:
    """The second write must be checked again after its wait, because no change can be recorded any more."""
    await cached_through(lab)
    lab.hold("c", OP_WRITE)
    one = lab.submit(OP_WRITE, 2 * BLOCK, 1024, fill="1")
    two = lab.submit(OP_WRITE, 2 * BLOCK + 512, 1024, fill="2")
    await settle()
    lab.fail("m", OP_WRITE)
    lab.core.record_disks(b"changed")
    assert not await lab.target._committer.commit()
    lab.log.clear()
    lab.cache.let_go()
    await settle()
    assert (one.status, two.status) == (0, errnos.EIO)
    assert not lab.asked("o", "write")


async def test_fua_to_a_clean_block_waits_for_one_commit_and_is_dirty_on_disk(
    lab: CacheLab,
) -> None:
    """The commit that logs the block has its mapping, too: no second wait."""
    await lab.create(LOGGED)
    await lab.message("warm 2")
    await lab.pass_time(1.0)
    await lab.device.flush()
    generation = lab.core.generation
    lab.log.clear()
    bio = lab.submit(OP_WRITE, 2 * BLOCK, 512, FUA, fill="n")
    await settle()
    assert bio.status == 0
    assert lab.core.generation == generation + 1
    assert [op for op, _, _ in lab.asked("c", "write")] == ["write"]
    cblock = lab.cblock(2)
    assert cblock is not None
    assert (await lab.recorded()).is_dirty(cblock)
