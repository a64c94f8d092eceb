# SPDX-License-Identifier: Apache-2.0
"""Checklist 4.2: migrations, step by step. What the policy wants: tests/nbdtarget/policies."""

import asyncio
import errno as errnos

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE, PENDING
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle

BUSY = "2 migration_threshold 0"
WRITETHROUGH = f"1 writethrough smq {BUSY}"
A, B = 3, 4  # blocks of the origin


def hint(lab: CacheLab, oblock: int) -> int:
    """The level of a cached block."""
    cblock = lab.cblock(oblock)
    assert cblock is not None
    return lab.target._blocks.policy.get_hint(cblock)


def policy_agrees(lab: CacheLab) -> bool:
    """Whether policy and metadata have the same blocks dirty."""
    policy = lab.target._blocks.policy
    nr_queued_dirty = len(policy._dirty)  # type: ignore[attr-defined]
    return bool(nr_queued_dirty == lab.core.nr_dirty == lab.core.dirty.count())


# Steps


async def test_4_2_promotion_copies_then_inserts(lab: CacheLab) -> None:
    lab.put("o", bytes(range(256)))
    await lab.create(WRITETHROUGH)
    lab.hold("c", OP_WRITE)
    await lab.message(f"warm {A}")
    await settle()
    assert [entry for entry in lab.log if entry[0] != "m"] == [
        ("o", "read", A * BLOCK, BLOCK),
        ("c", "write", 0, BLOCK),
    ]
    assert lab.cblock(A) is None, "the copy has not ended"
    read = lab.submit(OP_READ, A * BLOCK, 512)
    write = lab.submit(OP_WRITE, A * BLOCK, 512)
    assert (read.status, write.status) == (0, PENDING)
    lab.cache.let_go()
    await settle()
    assert (lab.cblock(A), write.status) == (0, 0)
    assert await lab.read(A) == b"w" * 512 + (bytes(range(256)) * 128)[512:]


@pytest.mark.parametrize("is_dirty", [True, False])
async def test_4_2_demotion_copies_back_what_is_dirty_only(
    lab: CacheLab, is_dirty: bool
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(8))
    if is_dirty:
        for nr in range(8):
            await lab.write_part(nr)
    lab.log.clear()
    await lab.message("warm 20")
    await lab.pass_time(3)
    assert lab.cblock(20) is not None
    (gone,) = [nr for nr in range(8) if lab.cblock(nr) is None]
    copied = ("write", gone * BLOCK, BLOCK) in lab.asked("o", "write")
    assert copied == is_dirty
    want = b"w" * 512 + b"p" * 512 if is_dirty else b"w" * 1024
    assert (await lab.read(gone))[:1024] == want


async def test_4_2_block_that_turns_dirty_before_its_demotion_is_copied_back(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(8))
    assert lab.target._blocks.policy.maybe_promote(20) is None, (
        "a demotion is queued for it"
    )
    writes = [lab.submit(OP_WRITE, nr * BLOCK, 512, fill="d") for nr in range(8)]
    assert {write.status for write in writes} == {0}
    lab.target._blocks.wake()
    await lab.pass_time(2)
    (gone,) = [nr for nr in range(8) if lab.cblock(nr) is None]
    assert await lab.field("demotions") == "1"
    assert lab.on_disk("o", gone) == b"d" * 512 + b"w" * (BLOCK - 512)


async def test_4_2_writeback_changes_no_mapping_and_commits_nothing(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.device.flush()
    lab.log.clear()
    await lab.clean()
    assert lab.ops() == ["c read", "o write"]
    assert lab.cblock(A) == 0


# How they end


async def test_4_2_promoted_block_is_clean_and_at_the_top(lab: CacheLab) -> None:
    await lab.create(WRITETHROUGH)
    await lab.message(f"warm {A}")
    await lab.pass_time(1)
    fields = await lab.fields()
    assert (fields["promotions"], fields["dirty"]) == ("1", "0")
    assert hint(lab, A) == 63


async def test_4_2_overwritten_block_is_dirty_and_at_the_top(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    assert (await lab.field("dirty"), hint(lab, A)) == ("1", 63)
    assert policy_agrees(lab)


@pytest.mark.parametrize("disk", ["o", "c"])
async def test_4_2_failed_promotion_frees_its_cblock(lab: CacheLab, disk: str) -> None:
    await lab.create(WRITETHROUGH)
    lab.fail(disk, OP_READ, OP_WRITE)
    await lab.message(f"warm {A}")
    await lab.pass_time(2)
    assert (await lab.used(), await lab.field("promotions")) == (0, "0")
    lab.fail(disk)
    await lab.message("warm 0-8")
    await lab.pass_time(2)
    assert await lab.used() == 8


async def test_4_2_demotion_frees_the_cblock_after_the_commit(lab: CacheLab) -> None:
    """An earlier reuse would be wrong: a crash would bring the mapping back, over another block's data."""
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(8))
    lab.hold("m")
    await lab.message("warm 20")
    await lab.pass_time(2)
    assert (await lab.used(), lab.asked("c", "write")) == (8, [])
    lab.metadata.let_go()
    await lab.pass_time(1)
    assert lab.cblock(20) is not None
    assert await lab.field("demotions") == "1"


@pytest.mark.parametrize("disk", ["o", "c"])
async def test_4_2_failed_demotion_leaves_the_block_as_it_was(
    lab: CacheLab, disk: str
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(8))
    lab.fail(disk, OP_WRITE if disk == "o" else OP_READ)
    await lab.message("warm 20")
    await lab.pass_time(3)
    fields = await lab.fields()
    assert (fields["demotions"], fields["dirty"]) == ("0", "8")
    assert policy_agrees(lab)
    lab.fail(disk)
    assert await lab.read(0) == b"w" * BLOCK


async def test_4_2_demotion_whose_commit_fails_leaves_the_block_readable(
    lab: CacheLab,
) -> None:
    """The policy keeps the entry, though the metadata have lost it in core; the mode is ro."""
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(8))
    lab.metadata.fails = lambda bio: (
        errnos.EIO if bio.op == OP_WRITE and len(lab.asked("m", "write")) == 1 else 0
    )
    await lab.message("warm 20")
    await lab.pass_time(1)
    assert (await lab.status())[-3:-1] == ["ro", "needs_check"]
    assert (await lab.used(), await lab.field("demotions")) == (8, "0")
    for nr in range(8):
        assert await lab.read(nr) == b"w" * BLOCK
        lab.submit(OP_WRITE, nr * BLOCK, 512, fill="n")
    # Whichever of the two is written, both places are read from the same one.
    reads = [await lab.read(nr) for nr in range(8)]
    assert [await lab.read(nr) for nr in range(8)] == reads


async def test_4_2_failed_writeback_leaves_it_dirty_and_is_tried_again(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    lab.fail("o", OP_WRITE)
    await lab.message("clean_now")
    await lab.pass_time(2)
    assert await lab.field("dirty") == "1"
    assert policy_agrees(lab)
    nr_tries = len(lab.asked("o", "write"))
    await lab.pass_time(60, step=0.5)
    assert nr_tries < len(lab.asked("o", "write")) < nr_tries + 10, "ever more seldom"
    lab.fail("o")
    await lab.pass_time(70, step=0.5)
    assert await lab.field("dirty") == "0"
    assert lab.on_disk("o", A) == b"w" * BLOCK


async def test_4_2_bitset_and_policy_never_diverge(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    for step in range(40):
        nr = step * 7 % 12
        lab.submit(OP_WRITE, nr * BLOCK, BLOCK if step % 3 else 512)
        if step % 5 == 0:
            await lab.message("clean_now")
        await lab.pass_time(0.3, step=0.1)
    await lab.clean()
    assert policy_agrees(lab)


# When


async def test_4_2_nothing_migrates_in_passthrough(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean([A])
    await lab.recreate("1 passthrough smq 0")
    await lab.read(B)
    await lab.pass_time(20, step=1)
    assert lab.asked("c") == []
    assert await lab.field("promotions") == "0"


async def test_4_2_timer_cleans_an_idle_cache(lab: CacheLab) -> None:
    await lab.create("0 smq 0")
    await lab.fill(range(4))
    await lab.pass_time(0.5)
    assert await lab.field("dirty") == "4", "not idle for a second yet"
    await lab.pass_time(2.5)
    assert await lab.field("dirty") == "0"


async def test_4_2_cache_that_was_just_resumed_is_not_idle(lab: CacheLab) -> None:
    await lab.create("0 smq 0")
    await lab.fill(range(4))
    await lab.registry.suspend("c")
    await lab.registry.resume("c")
    await lab.pass_time(0.5)
    assert await lab.field("dirty") == "4", "clients may still come"
    await lab.pass_time(2.5)
    assert await lab.field("dirty") == "0"


async def test_4_2_busy_cache_is_not_idle(lab: CacheLab) -> None:
    await lab.create("0 smq 0")
    await lab.fill(range(4))
    for _ in range(12):
        await lab.device.read(0, 512)
        await lab.pass_time(0.5)
    assert await lab.field("dirty") == "4"


async def test_4_2_bio_that_lasts_is_not_idle(lab: CacheLab) -> None:
    await lab.create("0 smq 0")
    await lab.fill(range(4))
    lab.hold("o", OP_READ)
    read = lab.submit(OP_READ, 20 * BLOCK, 512)
    await lab.pass_time(5)
    assert (read.status, await lab.field("dirty")) == (PENDING, "4")
    lab.origin.let_go()


async def test_4_2_finished_migration_starts_the_next(lab: CacheLab) -> None:
    """The threshold has room for one block: the others need no timer."""
    await lab.create("0 smq 2 migration_threshold 64")
    await lab.fill(range(8))
    await lab.pass_time(2.25)
    assert await lab.field("dirty") == "0"


@pytest.mark.parametrize("threshold", [0, 63])
async def test_4_2_threshold_below_a_block_never_cleans_by_itself(
    lab: CacheLab, threshold: int
) -> None:
    await lab.create(f"0 smq 2 migration_threshold {threshold}")
    await lab.fill(range(4))
    await lab.pass_time(100, step=1)
    assert await lab.field("dirty") == "4"
    await lab.message("migration_threshold 2048")
    await lab.pass_time(2)
    assert await lab.field("dirty") == "0"


@pytest.mark.parametrize("nr_blocks", [1, 3])
async def test_4_2_threshold_bounds_idle_writebacks_under_way(
    lab: CacheLab, nr_blocks: int
) -> None:
    await lab.create(f"0 smq 2 migration_threshold {nr_blocks * 64}")
    await lab.fill(range(8))
    lab.hold("o", OP_WRITE)
    await lab.pass_time(4)
    assert len(lab.origin.held) == nr_blocks
    lab.origin.let_go()


async def test_4_2_threshold_bounds_nothing_but_idle_writebacks(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.message("warm 0-8")
    await lab.pass_time(1)
    assert await lab.field("promotions") == "8"
    await lab.message("warm 20-22")
    await lab.pass_time(2)
    assert await lab.field("demotions") == "2"


async def test_4_2_copies_are_throttled_by_migration_rate(lab: CacheLab) -> None:
    """Bytes a second, where the kernel has a percentage of time for all caches together."""
    await lab.create(f"0 smq 4 migration_threshold 0 migration_rate {2 * BLOCK}")
    await lab.fill(range(8))
    lab.log.clear()
    await lab.message("clean_now")
    await lab.pass_time(1)
    assert 1 <= len(lab.asked("o", "write")) <= 4
    await lab.pass_time(4)
    assert len(lab.asked("o", "write")) == 8


async def test_4_2_wish_makes_room_for_what_it_wants_and_no_more(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(8))
    lab.hold("m")
    await lab.message("warm 20-22")
    await lab.pass_time(1)
    lab.metadata.let_go()
    await lab.pass_time(2)
    assert await lab.field("demotions") == "2"
    assert [lab.cblock(nr) is not None for nr in (20, 21)] == [True, True]


async def test_4_2_suspend_waits_for_what_is_under_way(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A, B])
    lab.hold("o", OP_WRITE)
    await lab.message("clean_now")
    await settle()
    suspending = asyncio.create_task(lab.suspend())
    await settle()
    assert not suspending.done()
    lab.origin.let_go()
    await suspending
    assert (await lab.recorded()).nr_dirty == 0
