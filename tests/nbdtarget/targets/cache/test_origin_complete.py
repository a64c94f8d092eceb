# SPDX-License-Identifier: Apache-2.0
"""A cache that does not write back: the origin has everything, also after a crash."""

import pytest

from nbdtarget.bio import FUA, OP_WRITE
from tests.support.cache import BLOCK, CacheLab
from tests.support.clock import settle

THROUGH = "1 writethrough smq 0"
PASS = "1 passthrough smq 0"
BUSY = "1 writeback smq 2 migration_threshold 0"
THROUGH_BUSY = "1 writethrough smq 2 migration_threshold 0"


async def cached(lab: CacheLab, *oblocks: int, words: str = THROUGH) -> None:
    """A cache that holds these blocks, clean and committed."""
    await lab.create(words)
    for oblock in oblocks:
        await lab.message(f"warm {oblock}")
        await lab.pass_time(1.0)
        assert lab.cblock(oblock) is not None
    await lab.device.flush()
    await settle()


@pytest.mark.parametrize("log", ["", "dirty_log "])
@pytest.mark.parametrize("mode", ["writethrough", "passthrough"])
async def test_crash_writes_nothing_back_over_an_origin_that_was_used_alone(
    lab: CacheLab, mode: str, log: str
) -> None:
    words = f"{1 + bool(log)} {mode} {log}smq 0"
    await cached(lab, 2, 3)
    await lab.write_part(2)
    if mode == "passthrough":
        await lab.reload(words)
    await lab.cut_power(kills_only=True)
    lab.put("o", b"newer")
    newer = lab.on_disk("o", 2)
    await lab.create(words)
    assert await lab.field("dirty") == "0"
    assert await lab.used() == 0
    assert await lab.read(2) == newer
    await lab.message("clean_now")
    await lab.pass_time(5)
    assert not lab.asked("o", "write")
    await lab.remove()
    assert lab.on_disk("o", 2) == newer


@pytest.mark.parametrize("only", ["o", "c"])
async def test_half_done_write_through_reads_the_same_after_a_crash(
    lab: CacheLab, only: str
) -> None:
    await cached(lab, 2)
    other = "c" if only == "o" else "o"
    lab.hold(other, OP_WRITE)
    bio = lab.submit(OP_WRITE, 2 * BLOCK, 512, FUA, fill="n")
    await settle()
    assert bio.status < 0
    await lab.cut_power()
    await lab.create(THROUGH)
    first = await lab.read(2)
    assert first == lab.on_disk("o", 2)
    await lab.message("warm 2")
    await lab.pass_time(2)
    assert await lab.read(2) == first
    await lab.recreate(BUSY)
    assert await lab.read(2) == first
    await lab.recreate(PASS)
    assert await lab.read(2) == first


async def test_writeback_after_writethrough_commits_before_the_first_write(
    lab: CacheLab,
) -> None:
    await cached(lab, 2)
    assert (await lab.recorded()).gives_up_mappings
    await lab.reload(BUSY)
    assert not (await lab.recorded()).gives_up_mappings
    await lab.write(2, "n", fua=True)
    assert lab.core.nr_dirty == 1
    await lab.cut_power()
    await lab.create(BUSY)
    assert await lab.read(2) == b"n" * BLOCK


async def test_writethrough_keeps_dirty_blocks_until_they_are_written_back(
    lab: CacheLab,
) -> None:
    await lab.create(BUSY)
    await lab.fill([2, 3])
    await lab.device.flush()
    await lab.reload(THROUGH_BUSY)
    await lab.device.flush()
    assert not (await lab.recorded()).gives_up_mappings
    await lab.cut_power()
    await lab.create(THROUGH_BUSY)
    assert await lab.read(2) == b"w" * BLOCK
    assert await lab.field("dirty") == "2"
    await lab.clean()
    assert not (await lab.recorded()).gives_up_mappings
    await lab.pass_time(2)
    assert (await lab.recorded()).gives_up_mappings, "without that anybody asks"
    assert lab.on_disk("o", 2) == b"w" * BLOCK
    await lab.cut_power()
    await lab.create(THROUGH)
    assert await lab.used() == 0
    assert await lab.read(3) == b"w" * BLOCK


@pytest.mark.parametrize("kind", ["flush", "fua"])
async def test_flushed_write_survives_a_later_write_error_of_the_origin(
    lab: CacheLab, kind: str
) -> None:
    """The block is dirty then, although the metadata say that no block is. The next promise corrects them."""
    await cached(lab, 2)
    lab.fail("o", OP_WRITE)
    bio = lab.submit(OP_WRITE, 2 * BLOCK, BLOCK, fill="n")
    await settle()
    assert bio.status > 0
    assert lab.core.nr_dirty == 1
    if kind == "flush":
        await lab.device.flush()
    else:
        await lab.write(2, "n", fua=True)
    assert not (await lab.recorded()).gives_up_mappings
    await lab.cut_power()
    await lab.create(THROUGH_BUSY)
    assert await lab.read(2) == b"n" * BLOCK


async def test_clean_stop_keeps_what_is_cached(lab: CacheLab) -> None:
    await cached(lab, 2, 3)
    await lab.recreate(THROUGH)
    assert await lab.used() == 2
    await lab.recreate(PASS)
    assert await lab.used() == 2


async def test_steady_writes_through_cost_no_commit(lab: CacheLab) -> None:
    await cached(lab, 2)
    await lab.pass_time(3)
    lab.log.clear()
    for at in range(0, 4096, 512):
        await lab.write_part(2, at=at)
    await lab.device.flush()
    await lab.pass_time(3)
    assert not lab.asked("m", "write", "flush")


async def test_crash_in_the_start_that_gives_up_gives_up_again(lab: CacheLab) -> None:
    await cached(lab, 2)
    await lab.cut_power()
    lab.fail("m", OP_WRITE)
    with pytest.raises(Exception, match="m cannot be written"):
        await lab.create(BUSY)
    lab.fail("m")
    assert (await lab.recorded()).gives_up_mappings
    await lab.create(BUSY)
    assert await lab.used() == 0
