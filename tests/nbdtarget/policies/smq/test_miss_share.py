# SPDX-License-Identifier: Apache-2.0
"""`MissShare`, and how long the period of a cache is."""

import pytest

from nbdtarget.policies.smq.miss_share import EVENTS_MIN, MissShare
from nbdtarget.policies.smq.policy import HIT_BLOCKS_PER_MISS, Smq
from tests.support.small_smq import S, new_smq


def test_first_share_is_the_mean_and_has_not_risen() -> None:
    share = MissShare()
    share.note(900, 124)
    assert not share.has_risen


@pytest.mark.parametrize(("misses", "has_risen"), [(1145, False), (1155, True)])
def test_risen_is_a_seventh_above_the_mean(misses: int, has_risen: bool) -> None:
    share = MissShare()
    share.note(1000, 9000)
    share.note(misses, 10_000 - misses)
    assert share.has_risen is has_risen


def test_few_accesses_wait_for_more() -> None:
    share = MissShare()
    share.note(EVENTS_MIN // 10, EVENTS_MIN)
    share.note(EVENTS_MIN - 1, 0)
    assert not share.has_risen
    share.note(1, 0)
    assert share.has_risen


def test_load_that_stays_worse_becomes_the_usual_one() -> None:
    share = MissShare()
    share.note(2000, 8000)
    risen = []
    for _ in range(100):
        share.note(4000, 6000)
        risen.append(share.has_risen)
    assert risen[0]
    assert not risen[-1]
    # Back to the old load, then the worse one anew: it is noticed again, later.
    for _ in range(200):
        share.note(2000, 8000)
    share.note(4000, 6000)
    assert share.has_risen


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


def test_full_cache_that_misses_more_than_before_promotes_freely() -> None:
    smq = full_smq(1024)
    smq.allow_migrations(False)  # so it stays full
    now = 2
    for _ in range(3):
        now += 61 * S
        for oblock in range(1000):
            smq.lookup(oblock, False)
        for n in range(100):
            smq.lookup((1 << 20) + n, False)
        smq.tick(now)
    assert smq._hotspot.promote_level_min == 56
    # Other blocks are hot now.
    for n in range(1100):
        smq.lookup((1 << 20) + n, False)
    smq.tick(now + 1)
    assert smq._hotspot.promote_level_min == 0
