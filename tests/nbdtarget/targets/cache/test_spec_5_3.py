# SPDX-License-Identifier: Apache-2.0
"""Checklist 5.3: a cache's tables: loaded, suspended, resumed, resized, refused.

What a resume refuses is tested with the parts alone in test_activation; here with tables.
"""

import asyncio
import errno as errnos

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE, PENDING
from nbdtarget.common.errors import ConstructorError, TableError
from nbdtarget.dm.mapped_device import State
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle

BUSY = "2 migration_threshold 0"
PASSTHROUGH = f"1 passthrough smq {BUSY}"
WRITETHROUGH = f"1 writethrough smq {BUSY}"
UNCLEAN = "unable to resume into passthrough mode after unclean shutdown"
NOT_CLEAN = "cannot enter passthrough mode unless all blocks are clean"
RELOAD = "unable to resume cache due to missing proper cache table reload"
A, B = 3, 4  # blocks of the origin


# Shared metadata


async def test_5_3_live_and_inactive_table_share_one_metadata(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.load(WRITETHROUGH)
    inactive = lab.device.inactive
    assert inactive is not None
    (target,) = inactive.targets
    assert target._metadata is lab.core  # type: ignore[attr-defined]
    await lab.fill([A])
    await lab.resume()
    assert (lab.cblock(A), lab.core.nr_dirty) == (0, 1)


async def test_5_3_second_opener_must_use_the_same_block_size(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    lab.block_size = 2 * BLOCK
    error = await lab.refused("0 smq 0", loading=True)
    assert error.errno == errnos.EINVAL
    lab.block_size = BLOCK


async def test_5_3_reload_after_a_crash_knows_what_was_cleaned_since(
    lab: CacheLab,
) -> None:
    """The kernel takes all blocks for dirty until the last table is gone. Here a reload knows which were cleaned."""
    await lab.create(DIRTY_BUSY)
    await lab.fill([A, B])
    await lab.device.flush()
    await lab.cut_power()
    await lab.create(DIRTY_BUSY)
    assert await lab.field("dirty") == "2"
    await lab.clean()
    await lab.reload(DIRTY_BUSY)
    assert await lab.field("dirty") == "0"
    await lab.reload(PASSTHROUGH)
    assert await lab.used() == 2


# The constructor


async def test_5_3_constructor_loads_no_mappings_and_starts_nothing(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.device.read(20 * BLOCK, 512)
    await lab.remove()
    await lab.registry.create("c", None)
    await lab.load("0 smq 0")
    table = lab.device.inactive
    assert table is not None
    (target,) = table.targets
    lab.log.clear()
    await lab.pass_time(5)
    assert lab.log == []
    status = (await target.status(noflush=True)).split(" ")
    assert status[3] == "0/8"
    assert status[4:11] == ["0", "1", "0", "0", "0", "0", "0"]


async def test_5_3_loading_a_table_does_not_disturb_the_live_one(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.load(PASSTHROUGH)
    await lab.fill([B])
    assert await lab.read(A) == b"w" * BLOCK
    await lab.registry.clear("c")
    assert await lab.field("dirty") == "2"


# preresume, in order


async def test_5_3_step_1_resume_that_failed_once_needs_another_table(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.load(PASSTHROUGH)
    await lab.fill([A])
    first, second = await lab.resume_refused(), await lab.resume_refused()
    assert (first.errno, first.reason) == (errnos.EBUSY, f"cache: {NOT_CLEAN}")
    assert (second.errno, second.reason) == (errnos.EINVAL, f"cache: {RELOAD}")
    # The kernel leaves the device suspended. Here the old table continues.
    assert lab.device.state is State.ACTIVE
    assert await lab.read(A) == b"w" * BLOCK
    await lab.reload(DIRTY_BUSY)
    assert await lab.read(A) == b"w" * BLOCK


@pytest.mark.parametrize("oblocks", [(), (A,)])
async def test_5_3_step_2_passthrough_after_an_unclean_shutdown(
    lab: CacheLab, oblocks: tuple[int, ...]
) -> None:
    await lab.create(f"1 writeback smq {BUSY}")
    for nr in oblocks:
        await lab.message(f"warm {nr}")
    await lab.pass_time(2)
    await lab.cut_power(kills_only=True)
    with pytest.raises(TableError) as caught:
        await lab.create(PASSTHROUGH)
    assert (caught.value.errno, caught.value.reason) == (
        errnos.EINVAL,
        f"cache: {UNCLEAN}",
    )
    with pytest.raises(TableError, match="does not exist"):
        lab.registry.get("c")
    # A table that cleans first solves it.
    await lab.create("0 cleaner 0")
    await lab.pass_time(3)
    await lab.recreate(PASSTHROUGH)
    assert await lab.used() == len(oblocks)


async def test_5_3_step_2_passthrough_after_a_crash_in_writethrough(
    lab: CacheLab,
) -> None:
    """No block is dirty then, and the metadata say so. The kernel refuses this, too."""
    await lab.create(WRITETHROUGH)
    await lab.message(f"warm {A}")
    await lab.pass_time(2)
    assert await lab.used() == 1
    await lab.cut_power(kills_only=True)
    await lab.create(PASSTHROUGH)
    assert await lab.used() == 0


async def test_5_3_step_2_no_needs_check(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.device.flush()
    await lab.cut_power()
    with pytest.raises(TableError, match=UNCLEAN):
        await lab.create(PASSTHROUGH)
    assert not (await lab.recorded()).needs_check


async def test_5_3_step_3_grown_cache_device_needs_a_reload(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.suspend()
    lab.resize("c", 12 * BLOCK)
    await lab.resume()  # which the kernel refuses
    assert await lab.field("cache_blocks") == "1/8"
    assert await lab.read(A) == b"w" * BLOCK
    await lab.reload(DIRTY_BUSY)
    assert await lab.field("cache_blocks") == "1/12"
    await lab.fill(range(10, 21))
    assert await lab.used() == 12


async def test_5_3_step_3_shrunken_cache_device_with_a_dirty_block_cut_off(
    lab: CacheLab,
) -> None:
    """The resume is refused, and nothing else happens. In the kernel it is a failure that needs a check."""
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(8))
    await lab.suspend()
    lab.resize("c", 4 * BLOCK)
    error = await lab.resume_refused()
    assert error.errno == errnos.EINVAL
    assert "unable to shrink cache; cache block 4 is dirty" in error.reason
    assert lab.core.mode.value == "rw"


@pytest.mark.parametrize("how", ["suspend", "reload", "recreate"])
async def test_5_3_step_3_shrunken_cache_device_keeps_the_prefix(
    lab: CacheLab, how: str
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(8))
    await lab.write_part(0)
    if how == "recreate":
        await lab.remove()
        lab.resize("c", 4 * BLOCK)
        await lab.create(DIRTY_BUSY)
    else:
        await lab.suspend()
        lab.resize("c", 4 * BLOCK)
        if how == "reload":
            await lab.load(DIRTY_BUSY)
        await lab.resume()
    assert await lab.field("cache_blocks") == "4/4"
    assert [nr for nr in range(8) if lab.cblock(nr) is not None] == [0, 1, 2, 3]
    assert await lab.field("dirty") == "1"
    for nr in range(8):
        assert (await lab.read(nr))[1024:] == b"w" * (BLOCK - 1024)
    await lab.message("warm 20-24")
    await lab.pass_time(5)
    assert await lab.used() == 4, "no block that is gone is used"


async def test_5_3_step_4_dirty_block_beyond_the_new_origin(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A, 20])
    whole = lab.length
    lab.length = 16 * BLOCK
    await lab.load(DIRTY_BUSY)
    error = await lab.resume_refused()
    assert error.errno == errnos.EFBIG
    assert not (await lab.recorded()).needs_check
    lab.length = whole
    await lab.reload(DIRTY_BUSY)
    assert await lab.read(20) == b"w" * BLOCK


@pytest.mark.parametrize("how", ["reload", "recreate"])
async def test_5_3_step_5_clean_blocks_beyond_the_new_origin_are_dropped(
    lab: CacheLab, how: str
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean([A, 15, 16, 20])
    lab.length = 16 * BLOCK
    await (lab.reload if how == "reload" else lab.recreate)(DIRTY_BUSY)
    assert await lab.used() == 2
    assert [nr for nr in (A, 15) if lab.cblock(nr) is not None] == [A, 15]
    assert lab.device.size == 16 * BLOCK
    assert (await lab.recorded()).nr_mapped == 2


async def test_5_3_step_6_discards_are_loaded_the_first_time_only(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.device.discard(A * BLOCK, 2 * BLOCK)
    await lab.suspend()
    await lab.resume()
    await lab.write_part(B)
    assert lab.target._discards.nr_discarded == 1
    await lab.recreate(DIRTY_BUSY)
    assert lab.target._discards.is_discarded(A)
    assert not lab.target._discards.is_discarded(B)


# resume and postsuspend


async def test_5_3_resume_starts_the_timer_and_the_migrations(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.reload("0 smq 0")
    await lab.pass_time(2)
    assert await lab.field("dirty") == "0"


async def test_5_3_postsuspend_stops_the_timer(lab: CacheLab) -> None:
    await lab.create("0 smq 0")
    await lab.fill([A])
    await lab.suspend()
    lab.log.clear()
    await lab.pass_time(30, step=1)
    assert lab.log == []
    assert lab.core.nr_dirty == 1


async def test_5_3_bios_that_come_while_suspended_run_on_the_next_table(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.suspend()
    read = lab.submit(OP_READ, A * BLOCK, 512)
    write = lab.submit(OP_WRITE, B * BLOCK, 512)
    assert (read.status, write.status) == (PENDING, PENDING)
    await lab.reload(WRITETHROUGH)
    await settle()
    assert (read.status, write.status) == (0, 0)
    assert read.payload is not None
    assert bytes(read.payload) == b"w" * 512


async def test_5_3_bio_that_waits_for_a_lock_is_pushed_back_by_noflush(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    lab.hold("o", OP_WRITE)
    await lab.message("clean_now")
    await settle()
    write = lab.submit(OP_WRITE, A * BLOCK, 512, fill="n")
    suspending = asyncio.create_task(lab.registry.suspend("c", noflush=True))
    await settle()
    lab.origin.let_go()
    await suspending
    assert write.status == PENDING
    await lab.resume()
    await settle()
    assert write.status == 0
    assert (await lab.read(A))[:512] == b"n" * 512


# Resizing the origin


async def test_5_3_origin_grows_by_a_longer_table(lab: CacheLab) -> None:
    whole = lab.length
    lab.length = 16 * BLOCK
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    lab.length = whole
    await lab.reload(DIRTY_BUSY)
    assert lab.device.size == whole
    await lab.fill([30])
    assert (await lab.read(A), await lab.read(30)) == (b"w" * BLOCK,) * 2


# Passthrough in one place


async def test_5_3_loading_a_passthrough_table_always_succeeds(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.load(PASSTHROUGH)
    assert await lab.field("dirty") == "1"


@pytest.mark.parametrize("words", [DIRTY_BUSY, WRITETHROUGH])
async def test_5_3_refused_passthrough_is_left_by_loading_another_table(
    lab: CacheLab, words: str
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.load(PASSTHROUGH)
    await lab.fill([A])
    await lab.resume_refused()
    assert "passthrough" not in lab.device.table()[0][3]
    assert "passthrough" in lab.device.table(inactive=True)[0][3]
    await lab.reload(words)
    assert await lab.read(A) == b"w" * BLOCK
    assert await lab.field("dirty") == "1"


async def test_5_3_refused_table_costs_nothing_that_is_flushed_afterwards(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.load(PASSTHROUGH)
    await lab.resume_refused()
    await lab.fill([A + 1])
    await lab.device.flush()
    await lab.cut_power()
    await lab.create(DIRTY_BUSY)
    for block in (A, A + 1):
        assert await lab.read(block) == b"w" * BLOCK


async def test_5_3_dirty_log_tells_what_is_dirty_after_a_crash(lab: CacheLab) -> None:
    """A feature of ours: a cache whose blocks are all clean may enter passthrough, also after a crash."""
    await lab.create(f"2 writeback dirty_log smq {BUSY}")
    await lab.message(f"warm {A}")
    await lab.pass_time(2)
    await lab.cut_power(kills_only=True)
    await lab.create("2 passthrough dirty_log smq 0")
    assert await lab.used() == 1
    await lab.recreate(f"2 writeback dirty_log smq {BUSY}")
    await lab.write_part(A)
    await lab.cut_power(kills_only=True)
    with pytest.raises(TableError, match=NOT_CLEAN):
        await lab.create("2 passthrough dirty_log smq 0")


# CLEAN_SHUTDOWN


async def test_5_3_clean_shutdown_is_cleared_before_the_first_io(lab: CacheLab) -> None:
    """It is cleared in resume. The kernel clears it when it opens the metadata, and again only with a later commit."""
    await lab.create(DIRTY_BUSY)
    for _ in range(2):
        assert not (await lab.recorded()).is_recorded_clean
        await lab.suspend()
        assert (await lab.recorded()).is_recorded_clean
        await lab.resume()
    assert not (await lab.recorded()).is_recorded_clean


async def test_5_3_refused_activation_leaves_the_flag(lab: CacheLab) -> None:
    """The kernel has cleared the flag by then, so its next activation takes all blocks for dirty."""
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean([A])
    await lab.fill([B])
    await lab.remove()
    with pytest.raises(TableError, match=NOT_CLEAN):
        await lab.create(PASSTHROUGH)
    with pytest.raises(ConstructorError):
        await lab.create("0 nonsense 0")
    assert (await lab.recorded()).is_recorded_clean
    await lab.create(DIRTY_BUSY)
    assert await lab.field("dirty") == "1"
