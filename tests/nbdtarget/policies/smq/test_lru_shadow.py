# SPDX-License-Identifier: Apache-2.0
"""`LruShadow`, and how long the period of a cache is."""

import pytest

from nbdtarget.policies.base import WRITEBACK
from nbdtarget.policies.smq import lru_shadow
from nbdtarget.policies.smq.lru_shadow import LEAD_MIN, LruShadow
from nbdtarget.policies.smq.policy import EVENTS_MIN, HIT_BLOCKS_PER_MISS, Smq
from tests.support.small_smq import finish_all, new_smq


def decided(shadow: LruShadow) -> bool:
    shadow.decide(may_lead=True)
    return shadow.is_ahead


def take_the_lead(shadow: LruShadow, nr_blocks: int) -> int:
    """Miss what LRU would have. Returns the number of votes."""
    for oblock in range(nr_blocks):
        shadow.note(oblock, False)
    for n in range(1000):
        if decided(shadow):
            return n
        shadow.note(n % nr_blocks, False)
    raise AssertionError("it never took the lead")


def test_misses_that_lru_would_not_have_put_it_ahead() -> None:
    shadow = LruShadow(100)
    assert LEAD_MIN < take_the_lead(shadow, 100) < LEAD_MIN * 17 // 16


def test_hits_that_lru_would_not_have_count_against_it() -> None:
    shadow = LruShadow(100)
    for n in range(100):
        shadow.note(n, False)
    for n in range(1000):  # one each way
        shadow.note(n % 50, False)
        shadow.note(1000 + n, True)
        assert not decided(shadow)


def test_blocks_that_lru_would_have_dropped_are_no_votes_for_it() -> None:
    shadow = LruShadow(100)
    for n in range(1010):  # a loop that is a bit longer than the cache
        shadow.note(n % 101, False)
    assert not decided(shadow)


def test_lru_stays_ahead_for_a_while_and_longer_if_it_was_needed_again() -> None:
    shadow, stays = LruShadow(100), []
    for _ in range(5):
        take_the_lead(shadow, 100)
        before = shadow._nr_events
        while decided(shadow):
            shadow.note(5, True)
            before += 1
        stays.append(before)
    assert stays == [800, 3200, 6400, 6400, 6400]


def test_lead_long_after_the_last_one_is_a_new_one() -> None:
    shadow = LruShadow(100)
    take_the_lead(shadow, 100)
    for _ in range(10_000):
        shadow.note(5, True)
        shadow.decide(may_lead=True)
    take_the_lead(shadow, 100)
    assert shadow._stay == 200


def test_lru_is_never_ahead_of_a_policy_that_may_not_migrate() -> None:
    shadow = LruShadow(100)
    take_the_lead(shadow, 100)
    shadow.decide(may_lead=False)
    assert not shadow.is_ahead
    assert not decided(shadow)


def test_large_cache_looks_at_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lru_shadow, "BLOCKS_MAX", 128)
    shadow = LruShadow(1024)
    for oblock in range(800):
        shadow.note(oblock, False)
    assert shadow._nr_blocks == 128
    assert 90 <= len(shadow._blocks) <= 110  # an eighth


def full_smq(nr_cblocks: int) -> Smq:
    smq = new_smq(nr_cblocks)
    for cblock in range(nr_cblocks):
        smq.load_mapping(cblock, cblock, False, None)
    smq.tick(1)
    return smq


def test_period_of_a_busy_cache_ends_by_use() -> None:
    smq = full_smq(4096)
    for oblock in range(1947):
        smq.lookup(oblock, False)
        smq.lookup(oblock, False)
    for n in range(100):
        smq.lookup((1 << 20) + n, False)
    smq.tick(2)
    assert smq._is_hit[5]
    smq.lookup(1 << 20, False)
    smq.tick(3)
    assert not any(smq._is_hit)


def test_period_of_a_cache_that_mostly_hits_has_its_full_length() -> None:
    smq = full_smq(4096)
    for oblock in range(4096):
        smq.lookup(oblock, False)
    for n in range(4096 // HIT_BLOCKS_PER_MISS):
        smq.lookup((1 << 20) + n, False)
    smq.tick(2)
    assert smq._is_hit[5]
    smq.lookup(1 << 20, False)  # one miss too many to be rare
    smq.tick(3)
    assert not smq._is_hit[5]


def test_period_of_a_small_cache_has_enough_accesses_to_tell() -> None:
    smq = full_smq(16)
    smq.lookup(5, False)
    for n in range(EVENTS_MIN - 2):
        smq.lookup((1 << 20) + n % 3, False)
    smq.tick(2)
    assert smq._is_hit[5]
    smq.lookup(1 << 20, False)
    smq.tick(3)
    assert not smq._is_hit[5]


def test_cache_that_lru_would_beat_does_as_lru_does() -> None:
    smq = full_smq(64)
    for cblock in range(64):
        smq.set_dirty(cblock)
    for n in range(200):
        smq.lookup(1000 + n % 50, False)
    smq.tick(2)
    assert smq._lru.is_ahead
    assert smq._hotspot.promote_level == 0
    # A block is dirty and young, and is written back and demoted at once.
    for oblock in (2000, 2001, 2002):
        smq.lookup(oblock, False)
        for work in finish_all(smq):
            if work.op == WRITEBACK:
                smq.clear_dirty(work.cblock)
    assert smq._table.find(2002) >= 0
    # A block that is hit goes to the top level, and no other block moves down for it.
    entry = next(smq._clean.entries(10), None) or next(smq._dirty.entries(10))
    before = smq._clean.level_lengths()[63] + smq._dirty.level_lengths()[63]
    smq.lookup(smq._table.blocks[entry], False)
    assert smq._links.levels[entry] == 63
    assert smq._clean.level_lengths()[63] + smq._dirty.level_lengths()[63] == before + 1
