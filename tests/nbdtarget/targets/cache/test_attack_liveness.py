# SPDX-License-Identifier: Apache-2.0
"""Cases in which a cache was seen to hang, to hold the loop, or to give up too early."""

import errno as errnos

import pytest

from nbdtarget.bio import OP_DISCARD, OP_WRITE
from nbdtarget.targets.cache.promotion_requests import PATIENCE_TICKS
from nbdtarget_metadata.mode import Mode
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle

NO_PASSDOWN = "1 no_discard_passdown smq 2 migration_threshold 0"


async def test_discards_that_overlap_like_tiles_all_end_when_the_first_may() -> None:
    # A file system's trim, cut where no block ends: each waits for the one before.
    nr_discards = 256  # that one connection may have in flight
    lab = CacheLab(nr_oblocks=nr_discards + 1)
    await lab.create(NO_PASSDOWN)
    lab.origin.hold = True
    first = lab.submit(OP_WRITE, 0, 512)
    discards = [
        lab.submit(OP_DISCARD, nr * BLOCK + 512, BLOCK) for nr in range(nr_discards)
    ]
    parked = lab.submit(OP_WRITE, nr_discards * BLOCK, 512)
    assert parked.status < 0
    lab.origin.let_go()
    await settle()
    assert {bio.status for bio in (first, *discards, parked)} == {0}
    await lab.close()


async def test_range_to_warm_is_not_given_up_while_the_rate_holds_it_up(
    lab: CacheLab,
) -> None:
    await lab.create(f"0 smq 2 migration_rate {BLOCK // 16}")
    await lab.message("warm 0-3")
    await lab.pass_time(16 * 3 + 1)
    assert None not in [lab.cblock(oblock) for oblock in range(3)]


async def test_range_to_warm_is_not_given_up_while_the_origin_is_slow() -> None:
    lab = CacheLab(nr_cblocks=64, nr_oblocks=64)
    await lab.create()
    lab.origin.hold = True
    await lab.message("warm 0-64")
    await lab.pass_time(2 * PATIENCE_TICKS)
    lab.origin.let_go()
    await lab.pass_time(1)
    assert await lab.used() == 64
    await lab.close()


async def test_range_to_warm_is_not_given_up_while_room_is_made_for_it(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill(range(8))
    lab.origin.hold = True
    await lab.message("warm 8")
    await lab.pass_time(2 * PATIENCE_TICKS)
    lab.origin.let_go()
    await lab.pass_time(10)
    assert lab.cblock(8) is not None


async def test_range_to_warm_is_given_up_when_all_blocks_are_pinned(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.message("pin 0-8")
    await lab.pass_time(5)
    await lab.message("warm 8 0")
    await lab.pass_time(PATIENCE_TICKS + 2)
    assert lab.target._migrations.requests.is_empty
    assert lab.cblock(8) is None


@pytest.mark.parametrize("success", [True, False])
async def test_bug_in_a_migration_fails_the_device_and_all_waiting_bios(
    lab: CacheLab, monkeypatch: pytest.MonkeyPatch, success: bool
) -> None:
    await lab.create(DIRTY_BUSY)

    def broken(*_: object) -> None:
        raise AssertionError("of our own making")

    if success:
        monkeypatch.setattr(
            lab.target._blocks.policy, "complete_background_work", broken
        )
    else:
        monkeypatch.setattr(lab.core, "insert", broken)
    lab.origin.hold = True
    await lab.message("warm 3")
    await settle()
    parked = lab.submit(OP_WRITE, 3 * BLOCK, 512)
    discard = lab.submit(OP_DISCARD, 0, lab.length - 512)
    lab.origin.let_go()
    await settle()
    assert lab.core.mode is Mode.FAIL
    assert parked.status == errnos.EIO
    assert discard.status >= 0
    await lab.remove()


async def test_bug_in_an_overwrite_fails_the_device_and_all_waiting_bios(
    lab: CacheLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    await lab.create(DIRTY_BUSY)

    def broken(*_: object) -> None:
        raise AssertionError("of our own making")

    lab.hold("c", OP_WRITE)
    bio = lab.submit(OP_WRITE, 0, BLOCK)
    parked = lab.submit(OP_WRITE, 0, 512)
    monkeypatch.setattr(lab.target._blocks.policy, "complete_background_work", broken)
    lab.cache.let_go()
    await settle()
    assert lab.core.mode is Mode.FAIL
    assert [bio.status, parked.status] == [errnos.EIO, errnos.EIO]
    await lab.remove()
