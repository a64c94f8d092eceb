# SPDX-License-Identifier: Apache-2.0
"""Pins, and promotions that a user asks for."""

import pytest

from nbdtarget.policies.base import DEMOTE, MISS, PROMOTE, WRITEBACK, Work
from nbdtarget.policies.cleaner import Cleaner
from nbdtarget.policies.smq.policy import Smq
from nbdtarget.policies.smq.tracker import PENDING_MAX
from tests.support.small_smq import S, finish_all, new_smq

FAR = 1 << 20  # an oblock far from the cached ones


def full_smq(nr_cblocks: int = 64, kind: type[Smq] = Smq) -> Smq:
    """Make a policy whose cblock n holds oblock n, at the lowest level, so that all may be demoted."""
    smq = new_smq(nr_cblocks, kind)
    for cblock in range(nr_cblocks):
        smq.load_mapping(cblock, cblock, False, 0)
    return smq


def demote_all(smq: Smq) -> list[int]:
    """Promote and pin until there is no room. Returns the cblocks that were freed for it."""
    demoted: list[int] = []
    for oblock in range(FAR, FAR + 10 * smq.nr_cblocks):
        work = smq.maybe_promote(oblock)
        if work is not None:
            smq.complete_background_work(work, True)
            smq.pin(work.cblock)
            continue
        works = finish_all(smq)
        if not works:
            return demoted
        demoted += [done.cblock for done in works if done.op == DEMOTE]
    raise AssertionError("there is always more room")


def test_pinned_blocks_are_never_demoted_and_all_others_are() -> None:
    smq = full_smq(64)
    for cblock in (3, 40, 63):
        smq.pin(cblock)
    assert smq.nr_pinned == 3
    assert sorted(demote_all(smq)) == sorted({*range(64)} - {3, 40, 63})
    assert [smq.lookup(oblock, False) for oblock in (3, 40, 63)] == [3, 40, 63]


def test_when_all_are_pinned_nothing_is_promoted_and_nothing_is_queued() -> None:
    smq = full_smq(16)
    for cblock in range(16):
        smq.pin(cblock)
    for n in range(200):
        smq.lookup(FAR, False)
        assert smq.lookup_with_work(FAR, True) == (MISS, None)
        assert smq.maybe_promote(FAR) is None
        assert smq.get_background_work(idle=True) is None
        smq.tick(n * S)
    assert smq.residency == smq.nr_pinned == 16


def test_pinned_block_is_in_no_queue_and_hit_all_the_same() -> None:
    smq = full_smq(16)
    smq.pin(5)
    assert len(smq._clean) == 15
    assert [smq.lookup(5, n % 2 == 0) for n in range(5)] == [5] * 5
    # The hits after the first are answered without a look at the flags.
    assert smq._is_hit[5]


def test_pinned_block_that_is_dirty_is_written_back_and_stays() -> None:
    smq = full_smq(16)
    smq.pin(5)
    smq.set_dirty(5)
    (work,) = finish_all_writing(smq)
    assert (work.op, work.cblock) == (WRITEBACK, 5)
    assert (smq.lookup(5, False), smq.is_pinned(5)) == (5, True)
    assert 5 not in demote_all(smq)


def finish_all_writing(smq: Smq) -> list[Work]:
    done: list[Work] = []
    while (work := smq.get_background_work(True)) is not None:
        smq.clear_dirty(work.cblock)
        smq.complete_background_work(work, True)
        done.append(work)
    return done


def test_block_pinned_while_it_is_dirty_leaves_the_dirty_queue_when_clean() -> None:
    smq = full_smq(16)
    smq.set_dirty(5)
    smq.pin(5)
    assert (len(smq._clean), len(smq._dirty)) == (15, 1)
    smq.clear_dirty(5)
    assert (len(smq._clean), len(smq._dirty)) == (15, 0)


def test_unpinned_block_is_one_among_the_others_at_the_level_that_it_had() -> None:
    smq = new_smq(16)
    smq.load_mapping(5, 50, False, 17)
    smq.pin(5)
    smq.lookup(50, False)
    smq.unpin(5)
    assert (smq.get_hint(5), smq.nr_pinned, smq.is_pinned(5)) == (17, 0, False)
    assert list(smq._clean.entries(17)) == [5]


def test_pinning_twice_is_pinning_once() -> None:
    smq = full_smq(16)
    smq.unpin(5)
    smq.pin(5)
    smq.pin(5)
    assert smq.nr_pinned == 1
    smq.unpin(5)
    smq.unpin(5)
    assert (smq.nr_pinned, len(smq._clean)) == (0, 16)


def test_pin_drops_a_demotion_that_is_only_queued() -> None:
    smq = full_smq(16)
    assert smq.maybe_promote(FAR) is None
    (pending,) = [cblock for cblock in range(16) if cblock in smq.tracker]
    smq.pin(pending)
    assert finish_all(smq) == []
    assert (smq.residency, smq.tracker.nr_demotions) == (16, 0)
    assert smq.is_pinned(pending)
    assert pending not in demote_all(smq)
    smq.unpin(pending)
    assert pending in demote_all(smq)


@pytest.mark.parametrize("success", [True, False])
def test_pin_during_a_demotion_stays_if_the_block_stays(
    success: bool,
) -> None:
    smq = full_smq(16)
    smq.maybe_promote(FAR)
    work = smq.get_background_work(False)
    assert work is not None
    smq.pin(work.cblock)
    smq.complete_background_work(work, success)
    assert smq.is_pinned(work.cblock) is not success
    assert smq.nr_pinned == (0 if success else 1)
    assert smq.residency == (15 if success else 16)


@pytest.mark.parametrize("success", [True, False])
def test_pin_under_a_writeback_outlives_it(success: bool) -> None:
    smq = full_smq(16)
    smq.set_dirty(5)
    work = smq.get_background_work(True)
    assert work is not None
    smq.pin(5)
    assert (smq.nr_pinned, smq.get_hint(5)) == (1, 64)
    if success:
        smq.clear_dirty(5)
    smq.complete_background_work(work, success)
    assert (smq.is_pinned(5), len(smq._dirty)) == (True, 0 if success else 1)


@pytest.mark.parametrize("success", [True, False])
def test_pin_under_a_promotion_is_for_what_it_brings(success: bool) -> None:
    smq = new_smq(16)
    work = smq.maybe_promote(7)
    assert work is not None
    smq.pin(work.cblock)
    assert (smq.get_hint(work.cblock), smq.nr_pinned) == (0, 1)
    smq.complete_background_work(work, success)
    assert smq.is_pinned(work.cblock) is success
    assert smq.nr_pinned == success
    assert smq.get_hint(work.cblock) == (64 + 63 if success else 0)
    assert len(smq._clean) == 0


def test_pin_is_forgotten_with_its_mapping() -> None:
    smq = full_smq(16)
    smq.pin(5)
    assert smq.invalidate(5)
    assert (smq.nr_pinned, smq.is_pinned(5), smq.get_hint(5)) == (0, False, 0)
    smq.load_mapping(5, 50, False, 9)
    assert (smq.is_pinned(5), smq.get_hint(5)) == (False, 9)


def test_pin_of_a_free_block_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="cache block 3 is free"):
        new_smq().pin(3)


@pytest.mark.parametrize("dirty", [False, True])
def test_hint_keeps_the_pin_and_the_level(dirty: bool) -> None:
    before, after = new_smq(), new_smq()
    before.load_mapping(3, 33, dirty, 17)
    before.pin(3)
    hint = before.get_hint(3)
    assert min(hint, 63) == 63  # what the kernel makes of it
    after.load_mapping(3, 33, dirty, hint)
    assert (after.is_pinned(3), after.nr_pinned) == (True, 1)
    assert after.get_hint(3) == hint
    after.unpin(3)
    assert after.get_hint(3) == 17


@pytest.mark.parametrize("hint", [128, 1 << 31, (1 << 32) - 1])
def test_hint_that_no_policy_of_ours_has_given_pins_nothing(hint: int) -> None:
    smq = new_smq()
    smq.load_mapping(3, 33, False, hint)
    assert (smq.is_pinned(3), smq.get_hint(3)) == (False, 63)


# ---- promotions on demand ----


def test_promotion_on_demand_needs_no_hot_block_and_is_handed_out_at_once() -> None:
    smq = new_smq(16)
    work = smq.maybe_promote(7)
    assert work is not None
    assert (work.op, work.oblock, work.cblock) == (PROMOTE, 7, 0)
    assert 7 in smq.tracker
    assert smq.get_background_work(True) is None
    smq.complete_background_work(work, True)
    assert smq.lookup(7, False) == 0


def test_nothing_is_promoted_that_is_cached_or_pending() -> None:
    smq = new_smq(16)
    smq.load_mapping(3, 33, False, 0)
    assert smq.maybe_promote(33) is None
    assert smq.maybe_promote(34) is not None
    assert smq.maybe_promote(34) is None
    smq.set_dirty(3)
    assert smq.get_background_work(True) is not None
    assert smq.maybe_promote(33) is None
    assert smq.residency == 2


def test_nothing_is_promoted_while_migrations_are_not_allowed() -> None:
    smq = full_smq(16)
    smq.allow_migrations(False)
    assert smq.maybe_promote(FAR) is None
    assert smq.get_background_work(False) is None
    cleaner = new_smq(16, Cleaner)
    cleaner.allow_migrations(True)
    assert cleaner.maybe_promote(FAR) is None
    assert cleaner.residency == 0


def test_nothing_is_promoted_beyond_the_bound() -> None:
    smq = new_smq(PENDING_MAX + 2)
    works = [smq.maybe_promote(oblock) for oblock in range(PENDING_MAX + 1)]
    assert works[-2] is not None
    assert works[-1] is None
    assert smq.residency == PENDING_MAX


def test_without_room_each_call_asks_for_a_demotion_past_the_free_target() -> None:
    smq = full_smq(64)
    for n in range(40):
        assert smq.maybe_promote(FAR + n) is None
    assert [work.op for work in finish_all(smq)] == [DEMOTE] * 40
    assert smq.residency == 24


def test_without_room_hot_blocks_go_too_but_the_coldest_first() -> None:
    smq = new_smq(4)
    for cblock, level in enumerate((60, 40, 63, 50)):
        smq.load_mapping(cblock, cblock, False, level)
    demoted = []
    for _ in range(4):
        assert smq.maybe_promote(FAR) is None
        work = smq.get_background_work(False)
        assert work is not None
        demoted.append(work.cblock)
    assert demoted == [1, 3, 0, 2]


def test_without_room_and_clean_blocks_even_a_young_one_is_written_back() -> None:
    smq = full_smq(4)
    for cblock in range(4):
        smq.set_dirty(cblock)
    assert smq.maybe_promote(FAR) is None
    work = smq.get_background_work(False)
    assert work is not None
    assert work.op == WRITEBACK
    smq.clear_dirty(work.cblock)
    smq.complete_background_work(work, True)
    assert smq.maybe_promote(FAR) is None
    demotion = smq.get_background_work(False)
    assert demotion is not None
    assert (demotion.op, demotion.cblock) == (DEMOTE, work.cblock)
    smq.complete_background_work(demotion, True)
    assert smq.maybe_promote(FAR) is not None
