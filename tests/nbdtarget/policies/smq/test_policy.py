# SPDX-License-Identifier: Apache-2.0
"""The rules of smq, one by one. `test_model` tests all of them together."""

import random

import pytest

from nbdtarget.policies.base import (
    DEMOTE,
    MISS,
    MISS_WAKE,
    PROMOTE,
    WRITEBACK,
    MappingError,
)
from nbdtarget.policies.smq.policy import Smq
from nbdtarget.policies.smq.tracker import PENDING_MAX
from tests.support.small_smq import S, finish_all, new_smq


def full_smq(nr_cblocks: int = 64, *, dirty: bool = False, hint: int = 63) -> Smq:
    """Make a policy whose cblock n holds oblock n, and that promotes all misses."""
    smq = new_smq(nr_cblocks)
    for cblock in range(nr_cblocks):
        smq.load_mapping(cblock, cblock, dirty, hint)
    eager(smq)
    return smq


def eager(smq: Smq) -> None:
    """Access one block, far from all others, until the hotspot queue rates itself as doing well."""
    for n in range(3):
        smq.lookup(1 << 20, False)
        smq.tick(n + 1)
    while (work := smq.get_background_work(False)) is not None:
        smq.complete_background_work(work, False)


def test_worked_example_the_second_access_is_promoted() -> None:
    smq = new_smq(256)
    # Access 1: unknown, level 0. Nothing is promoted before the first tick.
    assert smq.lookup(5, True) == MISS
    # Its end is a tick; both periods are due. The lonely hotspot block rises to the first
    # level that has a share.
    smq.tick(1)
    assert list(smq._hotspot.queue.entries(56)) == [0]
    assert (smq._hotspot.promote_level, smq._hotspot.level_jump) == (48, 4)
    # Access 2: from 56 to 60, and 60 >= 48.
    assert smq.lookup(5, True) == MISS_WAKE
    assert list(smq._hotspot.queue.entries(60)) == [0]
    assert smq.residency == 1
    work = smq.get_background_work(False)
    assert work is not None
    assert (work.op, work.oblock, work.cblock) == (PROMOTE, 5, 0)
    # From then on the hotspot queue does well, until the period ends.
    smq.tick(2)
    assert smq._hotspot.promote_level == 0
    smq.complete_background_work(work, True)
    assert smq.lookup(5, True) == 0
    assert smq.get_hint(0) == 63


def test_nothing_is_promoted_before_the_first_tick() -> None:
    smq = new_smq()
    assert {smq.lookup(5, False) for _ in range(100)} == {MISS}


def test_write_without_copy_is_promoted_at_once_while_there_is_room() -> None:
    smq = new_smq()
    miss, work = smq.lookup_with_work(7, True)
    assert miss == MISS
    assert work is not None
    assert (work.op, work.oblock, work.cblock) == (PROMOTE, 7, 0)
    assert smq.get_background_work(False) is None


def test_read_without_copy_needs_a_hot_block_as_any_other() -> None:
    assert new_smq().lookup_with_work(7, False) == (MISS, None)


def test_write_with_a_copy_needs_a_hot_block() -> None:
    assert new_smq().lookup(7, True) == MISS


def test_hit_without_copy_hands_out_no_work() -> None:
    smq = full_smq(64)
    assert smq.lookup_with_work(3, True) == (3, None)


def test_oblock_with_pending_work_is_not_promoted_twice() -> None:
    smq = new_smq()
    _, work = smq.lookup_with_work(7, True)
    assert smq.lookup_with_work(7, True) == (MISS, None)
    assert smq.residency == 1
    assert work is not None


def test_free_cblocks_are_given_out_in_the_order_they_were_freed() -> None:
    smq = new_smq(3)
    works = [smq.lookup_with_work(oblock, True)[1] for oblock in (10, 20, 30)]
    given = [work for work in works if work is not None]
    assert [work.cblock for work in given] == [0, 1, 2]
    for work in (given[1], given[0]):
        smq.complete_background_work(work, False)
    again = [smq.lookup_with_work(oblock, True)[1] for oblock in (40, 50)]
    assert [work.cblock for work in again if work is not None] == [1, 0]


def test_failed_promotion_frees_its_cblock() -> None:
    smq = new_smq()
    _, work = smq.lookup_with_work(7, True)
    assert work is not None
    smq.complete_background_work(work, False)
    assert smq.residency == 0
    assert smq.lookup(7, False) == MISS


def test_full_cache_demotes_instead_of_promoting() -> None:
    smq = full_smq(64, hint=5)
    assert smq.lookup(1 << 20, False) == MISS_WAKE
    demotion = smq.get_background_work(False)
    assert demotion is not None
    assert (demotion.op, demotion.oblock) == (DEMOTE, demotion.cblock)
    assert smq.get_background_work(False) is None
    smq.complete_background_work(demotion, True)
    assert smq.residency == 63
    assert smq.lookup(1 << 20, False) == MISS_WAKE
    promotion = smq.get_background_work(False)
    assert promotion is not None
    assert (promotion.op, promotion.cblock) == (PROMOTE, demotion.cblock)


def test_at_most_a_quarter_of_the_cache_is_on_its_way_out() -> None:
    smq = full_smq(64, hint=5)
    for n in range(200):
        smq.lookup((1 << 20) + n % 16, False)
    assert smq.tracker.nr_demotions == 16


def test_upper_half_of_the_levels_is_never_demoted() -> None:
    smq = full_smq(64, hint=63)
    smq._clean.start_redistribution()
    smq._clean.redistribute(1000)
    demoted = []
    for n in range(200):
        smq.lookup((1 << 20) + n % 16, False)
        while (work := smq.get_background_work(False)) is not None:
            demoted += [smq.get_hint(work.cblock)]
            smq.complete_background_work(work, False)
            smq._take(work.cblock)  # keep it out of the way
    assert sorted(demoted) == list(range(32))


def test_without_a_clean_block_to_demote_an_old_dirty_one_is_written_back() -> None:
    smq = full_smq(64)
    for cblock in range(64):
        smq.set_dirty(cblock)
    smq.lookup(1 << 20, False)
    assert smq.get_background_work(False) is None
    smq.tick(11 * S)
    smq.tick(22 * S)
    smq.lookup(1 << 20, False)
    work = smq.get_background_work(False)
    assert work is not None
    assert work.op == WRITEBACK


def test_idle_cache_writes_everything_back_and_a_busy_one_nothing() -> None:
    smq = full_smq(64)
    for cblock in range(64):
        smq.set_dirty(cblock)
    assert smq.get_background_work(False) is None
    works = []
    while (work := smq.get_background_work(True)) is not None:
        works.append(work)
        smq.clear_dirty(work.cblock)
        smq.complete_background_work(work, True)
    assert sorted(work.cblock for work in works) == list(range(64))
    assert {work.op for work in works} == {WRITEBACK}


def test_clean_idle_cache_wants_nothing() -> None:
    assert finish_all(full_smq(), idle=True) == []


def test_failed_writeback_leaves_the_block_dirty_for_another_try() -> None:
    smq = full_smq(16)
    smq.set_dirty(0)
    for _ in range(3):
        work = smq.get_background_work(True)
        assert work is not None
        smq.complete_background_work(work, False)


def test_block_that_became_dirty_during_its_writeback_is_dirty_after_it() -> None:
    smq = full_smq(16)
    smq.set_dirty(0)
    work = smq.get_background_work(True)
    assert work is not None
    smq.clear_dirty(0)
    smq.set_dirty(0)
    smq.complete_background_work(work, True)
    assert smq.get_background_work(True) is not None


def test_hit_rises_one_level_once_in_a_period_of_60_s() -> None:
    smq = new_smq()
    smq.load_mapping(9, 1234, False, 10)
    smq._cache_period_end_ns = 60 * S
    assert [smq.lookup(1234, False) for _ in range(5)] == [9] * 5
    assert smq.get_hint(9) == 11


def test_hits_count_anew_after_60_s() -> None:
    smq = new_smq()
    smq.load_mapping(9, 1234, False, 10)
    smq.lookup(1234, False)
    smq.tick(1)
    level = smq.get_hint(9)
    smq.lookup(1234, False)
    smq.lookup(1234, False)
    assert smq.get_hint(9) == level + 1
    smq.tick(60 * S)
    smq.lookup(1234, False)
    assert smq.get_hint(9) == level + 1
    smq.tick(60 * S + 2)
    assert not smq._is_hit[9]


def test_hint_is_the_level_and_gives_it_back() -> None:
    smq = new_smq()
    smq.load_mapping(3, 33, True, 17)
    smq.load_mapping(4, 44, False, 1000)
    assert [smq.get_hint(n) for n in (3, 4, 5)] == [17, 63, 0]


def test_without_hints_levels_are_a_hash_of_the_cblock() -> None:
    smq = new_smq()
    for cblock in range(256):
        smq.load_mapping(cblock, cblock, False, None)
    hints = [smq.get_hint(cblock) for cblock in range(256)]
    # Worked out by hand from 0x61C88647 * n, bits 23 to 28.
    assert hints[:4] == [
        0,
        0x61C88647 >> 23 & 63,
        0xC3910C8E >> 23 & 63,
        0x255992D5 >> 23 & 63,
    ]
    assert len(set(hints)) > 32


def test_loaded_blocks_stand_ahead_of_the_sentinels() -> None:
    smq = new_smq()
    smq.load_mapping(3, 33, True, 17)
    assert smq._dirty.peek(past_sentinels=False) == 3


@pytest.mark.parametrize(
    ("cblock", "oblock", "reason"),
    [
        (8, 2, "the cache has 8 blocks"),
        (-1, 2, "the cache has 8 blocks"),
        (0, 2, "the cache block is in use"),
        (1, 1, "also in cache block 0"),
    ],
)
def test_mapping_that_contradicts_another_is_refused_by_name(
    cblock: int, oblock: int, reason: str
) -> None:
    smq = new_smq(8)
    smq.load_mapping(0, 1, False, None)
    with pytest.raises(MappingError) as caught:
        smq.load_mapping(cblock, oblock, False, None)
    text = f"cache block {cblock} -> origin block {oblock}: {reason}"
    assert str(caught.value) == text
    assert smq.residency == 1


def test_invalidate_forgets_the_block_and_frees_it() -> None:
    smq = full_smq(64)
    assert smq.invalidate(2)
    assert not smq.invalidate(2)
    assert smq.lookup(2, False) < 0
    assert smq.residency == 63


def test_invalidate_drops_a_queued_migration() -> None:
    smq = full_smq(64, hint=0)
    smq.lookup(1 << 20, False)
    (pending,) = [cblock for cblock in range(64) if cblock in smq.tracker]
    assert smq.invalidate(pending)
    assert smq.get_background_work(False) is None
    assert smq.residency == 63


def test_invalidate_of_a_block_under_migration_is_our_mistake() -> None:
    smq = full_smq(64, hint=0)
    smq.lookup(1 << 20, False)
    work = smq.get_background_work(False)
    assert work is not None
    with pytest.raises(AssertionError, match="is being migrated"):
        smq.invalidate(work.cblock)


def test_reserved_cblock_has_no_mapping_to_invalidate() -> None:
    smq = new_smq()
    smq.lookup_with_work(7, True)
    assert not smq.invalidate(0)
    assert smq.residency == 1


def test_work_is_completed_once() -> None:
    smq = new_smq()
    _, work = smq.lookup_with_work(7, True)
    assert work is not None
    smq.complete_background_work(work, True)
    with pytest.raises(AssertionError, match="is not under way"):
        smq.complete_background_work(work, True)


def test_policy_that_may_not_migrate_serves_hits_only() -> None:
    smq = full_smq(64, hint=0)
    smq.allow_migrations(False)
    assert smq.lookup(1 << 20, False) == MISS_WAKE
    assert smq.lookup_with_work(1 << 20, True) == (MISS, None)
    assert smq.get_background_work(True) is None
    assert smq.lookup(2, True) == 2


def test_promotions_beyond_the_bound_are_dropped_and_their_cblocks_freed() -> None:
    smq = new_smq(PENDING_MAX + 10)
    works = [smq.lookup_with_work(n, True)[1] for n in range(PENDING_MAX + 10)]
    assert [work is not None for work in works] == [True] * PENDING_MAX + [False] * 10
    assert smq.residency == PENDING_MAX


def test_writebacks_beyond_the_bound_stay_in_their_queue() -> None:
    smq = full_smq(PENDING_MAX + 10)
    for cblock in range(PENDING_MAX + 10):
        smq.set_dirty(cblock)
    works = 0
    while smq.get_background_work(True) is not None:
        works += 1
    assert works == PENDING_MAX
    assert len(smq._dirty) == 10


def test_full_cache_promotes_only_from_the_top_levels() -> None:
    smq = full_smq(64, hint=5)
    assert smq._hotspot.promote_level == 56
    for _ in range(16):
        smq.lookup(1 << 20, False)
        finish_all(smq)
    assert smq.lookup(1 << 20, False) >= 0
    smq.lookup((1 << 20) + 1, False)
    finish_all(smq)
    assert smq.residency == 63
    # Not yet a quarter of it is free.
    smq.tick(4)
    assert smq._hotspot.promote_level == 56
    for cblock in range(20):
        smq.invalidate(cblock)
    smq.tick(5)
    assert smq._hotspot.promote_level == 0


def history(seed: int) -> list[object]:
    rng, smq, seen = random.Random(seed), new_smq(32), list[object]()
    for n in range(5000):
        oblock = int(rng.paretovariate(0.7)) * 7 % 1000
        seen.append(smq.lookup(oblock, rng.random() < 0.3))
        if n % 7 == 0:
            smq.tick(n * S // 10)
            seen += [repr(work) for work in finish_all(smq)]
    return seen


def test_same_calls_give_the_same_answers() -> None:
    seen = history(1)
    assert seen == history(1)
    assert seen != history(2)
    assert sum("demote" in str(answer) for answer in seen) > 20


def test_policy_with_a_lookup_of_its_own_sees_each_hit() -> None:
    """The compiled fast path would pass its hits by."""

    class Counting(Smq):
        def lookup(self, oblock: int, is_write: bool) -> int:
            return super().lookup(oblock, is_write)

    sizes = {"origin_size": 1 << 30, "block_size": 1 << 16}
    assert Smq(4, **sizes, now_ns=0).hit_tables() is not None
    assert Counting(4, **sizes, now_ns=0).hit_tables() is None
