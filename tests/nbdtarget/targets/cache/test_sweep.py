# SPDX-License-Identifier: Apache-2.0
"""The sweep through the dirty blocks: in which order, and in which steps."""

import asyncio

import pytest

from nbdtarget.bio import OP_DISCARD
from nbdtarget.targets.cache import migrations, sweep
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle

SORTED = "1 sorted_writeback smq 2 migration_threshold 100000"


def cleaned(lab: CacheLab) -> list[int]:
    """The oblocks that were written home, in the order of that."""
    return [at // BLOCK for op, at, _ in lab.asked("o", "write") if op == "write"]


async def test_blocks_are_written_back_in_the_order_of_the_origin(
    lab: CacheLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "STEP_CBLOCKS", 3)
    await lab.create(DIRTY_BUSY)
    order = [17, 3, 30, 8, 1, 22, 9, 4]
    await lab.fill(order)
    await lab.clean()
    assert cleaned(lab) == sorted(order)


async def test_blocks_cleaned_meanwhile_are_skipped_in_steps(
    lab: CacheLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(8))
    target = lab.target
    await target._migrations._sweep.gather()
    for cblock in range(7):
        target._blocks.set_clean(cblock)
    monkeypatch.setattr(sweep, "STEP_CBLOCKS", 3)
    seen = [target._migrations._sweep.maybe_next() for _ in range(3)]
    assert seen == [None, None, (7, 7)]
    assert not target._migrations._sweep.has_ended
    await lab.clean()
    assert cleaned(lab) == [7]


async def test_sweep_does_not_run_through_blocks_that_a_discard_has_locked(
    lab: CacheLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCKED_MAX", 2)
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(8))
    lab.origin.hold = True
    discard = lab.submit(OP_DISCARD, 0, lab.length - 512)
    await lab.message("clean_now")
    await settle()
    assert discard.status < 0
    assert not lab.target._migrations._sweep.has_ended
    lab.origin.let_go()
    await lab.pass_time(3)
    assert not lab.core.nr_dirty


async def test_one_gathering_at_a_time(
    lab: CacheLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "STEP_CBLOCKS", 1)
    await lab.create(SORTED)
    await lab.fill(range(8))
    migrates = lab.target._migrations
    migrates.clean_now()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(migrates._tasks) == 1
    for _ in range(3):
        lab.clock.advance(1)
        await asyncio.sleep(0)
        assert len(migrates._tasks) == 1
    await lab.clean()


async def test_gathering_ends_when_the_metadata_fail(
    lab: CacheLab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sweep, "STEP_CBLOCKS", 1)
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(8))
    lab.target._migrations.clean_now()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert lab.target._migrations._is_gathering
    lab.core.fail()
    await settle()
    assert not lab.target._migrations._tasks
    assert "CRITICAL" not in [record.levelname for record in caplog.records]
