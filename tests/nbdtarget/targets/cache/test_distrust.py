# SPDX-License-Identifier: Apache-2.0
"""The cache device dies under a writethrough cache: clients see no error, and no stale copy."""

import errno as errnos

import pytest

from nbdtarget.bio import FUA, OP_FLUSH, OP_READ, OP_WRITE, Bio
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle

THROUGH = "1 writethrough smq 0"
A, B = 2, 3


async def cached(lab: CacheLab, *oblocks: int) -> None:
    await lab.create(THROUGH)
    for oblock in oblocks:
        await lab.message(f"warm {oblock}")
        await lab.pass_time(1)
        assert lab.cblock(oblock) is not None
    await lab.device.flush()
    assert lab.core.is_recorded_complete
    lab.log.clear()


async def flushed(lab: CacheLab) -> int:
    bio = lab.flush()
    await settle()
    return bio.status


async def test_clients_see_no_error_when_the_cache_device_dies(lab: CacheLab) -> None:
    await cached(lab, A, B)
    events = lab.device.event_nr
    lab.cache.fails_inline = True
    await lab.reload(THROUGH)
    lab.cache.fails = lambda _: errnos.EIO
    for round_nr in range(3):
        for oblock in (A, B, 20):
            write = lab.submit(OP_WRITE, oblock * BLOCK, 512, fill=str(round_nr))
            fua = lab.submit(OP_WRITE, oblock * BLOCK + 512, 512, FUA, fill="f")
            read = lab.submit(OP_READ, oblock * BLOCK, 1024)
            await settle()
            assert (write.status, fua.status, read.status) == (0, 0, 0)
        assert await flushed(lab) == 0
        await lab.pass_time(2)
    assert lab.device.event_nr > events
    assert lab.target.status_fields()["distrusts_cache_device"]
    await lab.cut_power()
    await lab.create(THROUGH)
    for oblock in (A, B, 20):
        assert (await lab.read(oblock))[:1024] == b"2" * 512 + b"f" * 512


async def test_failed_flush_of_the_cache_leaves_no_stale_copy(
    lab: CacheLab,
) -> None:
    """The cache device may return old data for writes that it could not make durable, so only the origin counts."""
    await cached(lab, A)
    await lab.write_part(A, at=0)
    lab.fail("c", OP_FLUSH)
    assert await flushed(lab) == 0
    cblock = lab.cblock(A)
    assert cblock is not None
    lab.log.clear()
    assert (await lab.read(A))[:512] == b"p" * 512
    assert lab.asked("c", "read") == []
    await lab.remove()
    recorded = await lab.recorded()
    assert not recorded.is_recorded_clean
    assert recorded.gives_up_mappings
    lab.fail("c")
    await lab.create(THROUGH)
    assert await lab.used() == 0
    assert (await lab.read(A))[:512] == b"p" * 512


@pytest.mark.parametrize("words", [THROUGH, DIRTY_BUSY, "1 passthrough smq 0"])
async def test_next_table_begins_without_the_copies(lab: CacheLab, words: str) -> None:
    """The next table shares the metadata, unless the cache device says that it is latched. It gives the copies up all the same."""
    await cached(lab, A)
    lab.fail("c", OP_FLUSH)
    await lab.write_part(A, at=0)
    assert await flushed(lab) == 0
    lab.fail("c")
    await lab.reload(words)
    assert await lab.used() == 0
    assert (await lab.read(A))[:512] == b"p" * 512
    assert not lab.target._blocks.distrusts_cache
    assert await flushed(lab) == 0


async def test_same_table_resumed_still_distrusts(lab: CacheLab) -> None:
    await cached(lab, A)
    lab.fail("c", OP_FLUSH)
    assert await flushed(lab) == 0
    await lab.suspend()
    await lab.resume()
    lab.log.clear()
    write = lab.submit(OP_WRITE, A * BLOCK, 512, fill="z")
    await settle()
    assert write.status == 0
    assert (await lab.read(A))[:512] == b"z" * 512
    assert lab.asked("c", "read") == []
    assert await flushed(lab) == 0


async def test_commit_of_a_promotion_does_not_need_the_cache_devices_flush(
    lab: CacheLab,
) -> None:
    await cached(lab, A)
    lab.fail("c", OP_FLUSH)
    await lab.message(f"warm {B}")
    await lab.pass_time(2)
    assert await flushed(lab) == 0
    assert (await lab.status())[-3] == "rw"
    await lab.cut_power()
    await lab.create(THROUGH)
    assert await lab.used() == 0


async def test_loss_of_the_cache_device_fails_no_request(lab: CacheLab) -> None:
    await cached(lab, A)
    lab.disks["c"].health.note_loss()
    lab.cache.health.note_loss()
    await settle()
    assert (await lab.status())[-3] == "rw"
    assert await flushed(lab) == 0
    lab.log.clear()
    await lab.read(A)
    assert lab.asked("c", "read") == []


async def test_clean_shutdown_needs_the_flush(lab: CacheLab) -> None:
    """A clean shutdown vouches for the copies, so the cache device must have been flushed."""
    await cached(lab, A)
    await lab.write_part(A, at=0)
    left = [0, errnos.EIO]  # the flush of the suspend, and that of its commit

    def fails(bio: Bio) -> int:
        return left.pop(0) if bio.op == OP_FLUSH and left else 0

    lab.cache.fails = fails
    await lab.remove()
    assert not left
    assert not (await lab.recorded()).is_recorded_clean


@pytest.mark.parametrize("words", [DIRTY_BUSY, "1 writeback smq 0"])
async def test_writeback_cache_needs_the_flush(lab: CacheLab, words: str) -> None:
    await lab.create(words)
    await lab.fill_clean([A])
    lab.fail("c", OP_FLUSH)
    assert await flushed(lab) == errnos.EIO
    assert not lab.target._blocks.distrusts_cache


async def test_dirty_block_in_a_writethrough_cache_needs_the_flush(
    lab: CacheLab,
) -> None:
    await cached(lab, A)
    lab.fail("o", OP_WRITE)
    write = lab.submit(OP_WRITE, A * BLOCK, 512)
    await settle()
    assert write.status == errnos.EIO
    assert lab.core.nr_dirty == 1
    lab.fail("c", OP_FLUSH)
    assert await flushed(lab) == errnos.EIO


async def test_write_that_the_origin_fails_does_not_make_an_old_copy_count(
    lab: CacheLab,
) -> None:
    """The copy has the bytes of that write; what else it holds may be older than the origin."""
    await cached(lab, A)
    cblock = lab.cblock(A)
    assert cblock is not None
    before = lab.on_disk("c", cblock)
    await lab.write_part(A, at=0)
    lab.fail("c", OP_FLUSH)
    assert await flushed(lab) == 0
    lab.put("c", before)  # the page that could not be written reads as it was
    for flags in (0, FUA):
        lab.fail("o", OP_WRITE)
        write = lab.submit(OP_WRITE, A * BLOCK + 1024, 512, flags, fill="z")
        await settle()
        assert write.status == errnos.EIO
        assert not lab.core.nr_dirty
        lab.fail("o")
        assert (await lab.read(A))[:512] == b"p" * 512
        assert await flushed(lab) == 0
        await lab.pass_time(3)
        assert lab.on_disk("o", A)[:512] == b"p" * 512
    write = lab.submit(OP_WRITE, A * BLOCK + 1024, 512, fill="y")
    await settle()
    assert write.status == 0
    assert (await lab.read(A))[1024:1536] == b"y" * 512


async def test_flush_that_fails_after_a_block_has_become_dirty_is_no_success(
    lab: CacheLab,
) -> None:
    """When the flush began, no data depended on it. Now the cached copy counts, and it may be lost."""
    await cached(lab, A)
    await lab.write_part(A, at=0)
    lab.hold("c", OP_FLUSH)
    flush = lab.flush()
    await settle()
    assert flush.status < 0
    lab.fail("o", OP_WRITE)
    write = lab.submit(OP_WRITE, A * BLOCK + 1024, 512, fill="z")
    await settle()
    assert write.status == errnos.EIO
    assert lab.core.nr_dirty == 1
    lab.fail("o")
    lab.fail("c", OP_FLUSH)
    lab.cache.let_go()
    await settle()
    assert flush.status == errnos.EIO
    assert not lab.target._blocks.distrusts_cache


async def test_failing_cache_device_is_not_tried_for_every_block(
    lab: CacheLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdtarget.targets.cache.bad_blocks.GIVEN_UP_MAX", 2)
    lab.cache.fails_inline = True
    await cached(lab, *range(6))
    lab.fail("c", OP_READ)
    for oblock in range(6):
        read = lab.submit(OP_READ, oblock * BLOCK, 512)
        await settle()
        assert read.status == 0
    assert len(lab.asked("c", "read")) == 2
    assert lab.target.status_fields()["blocks_given_up"] == 2
