# SPDX-License-Identifier: Apache-2.0
"""Checklist 7.3, as far as it is behaviour: the bytes are our own (metadata/FORMAT.md)."""

import pytest

from nbdtarget.common.errors import ConstructorError
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab

BUSY = "2 migration_threshold 0"
A, B = 3, 4  # blocks of the origin


async def test_7_3_mappings_are_durable_with_any_commit(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([A])
    await lab.device.flush()
    await lab.cut_power()
    await lab.create(DIRTY_BUSY)
    assert lab.cblock(A) == 0
    assert await lab.read(A) == b"w" * BLOCK


async def test_7_3_the_rest_is_durable_with_a_clean_sync_only(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean([A])
    await lab.device.discard(8 * BLOCK, BLOCK)
    await lab.suspend()
    await lab.resume()
    recorded = await lab.recorded()
    assert not recorded.is_recorded_clean
    assert (recorded.nr_dirty, recorded.discarded) == (1, None)


async def test_7_3_counters_after_a_crash_are_those_of_the_last_commit(
    lab: CacheLab,
) -> None:
    """The kernel's counters are those of the last clean sync."""
    await lab.create(DIRTY_BUSY)
    await lab.device.read(A * BLOCK, 512)
    await lab.write(B)
    await lab.device.flush()
    await lab.device.read(A * BLOCK, 512)
    await lab.cut_power()
    await lab.create(DIRTY_BUSY)
    assert await lab.field("read_misses") == "1"


async def test_7_3_crash_in_writethrough_leaves_nothing_dirty_and_nothing_cached(
    lab: CacheLab,
) -> None:
    """To the kernel all blocks are dirty then. Here the origin has everything, and may have been used alone."""
    for words in (
        f"1 writethrough smq {BUSY}",
        f"2 writethrough dirty_log smq {BUSY}",
    ):
        await lab.create(words)
        await lab.message(f"warm {A}")
        await lab.pass_time(2)
        await lab.clean()
        await lab.pass_time(3)
        await lab.cut_power(kills_only=True)
        await lab.create(words)
        assert await lab.field("dirty") == "0"
        assert await lab.used() == 0
        await lab.remove()


async def test_7_3_needs_check_refuses_the_constructor(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.remove()
    await lab.mark_needs_check()
    for _ in range(2):
        with pytest.raises(ConstructorError, match="please check/repair metadata"):
            await lab.create(DIRTY_BUSY)


async def test_7_3_growing_appends_and_shrinking_truncates(lab: CacheLab) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(8))
    before = [lab.core.maybe_oblock(nr) for nr in range(8)]
    await lab.remove()
    lab.resize("c", 12 * BLOCK)
    await lab.create(DIRTY_BUSY)
    assert [lab.core.maybe_oblock(nr) for nr in range(12)] == before + [None] * 4
    await lab.remove()
    lab.resize("c", 4 * BLOCK)
    await lab.create(DIRTY_BUSY)
    assert [lab.core.maybe_oblock(nr) for nr in range(4)] == before[:4]
