# SPDX-License-Identifier: Apache-2.0
"""The advice for traces whose answer is known."""

import random
from array import array

import pytest

from nbdtarget.advise.advice import Ratios, Request, advise, enough, sizes_of
from nbdtarget.advise.traces import Trace
from nbdtarget.common.errors import NbdTargetError

KIB = 1024
BLOCK = 64 * KIB


def trace_of(blocks: list[int]) -> Trace:
    return Trace(max(blocks) + 1, array("Q", blocks), bytearray(len(blocks)))


def test_a_hot_set_is_enough() -> None:
    rng = random.Random(1)
    blocks = [rng.randrange(64) for _ in range(8000)]
    told: list[Ratios] = []
    sizes = tuple(nr * BLOCK for nr in (128, 16, 64))
    advice = advise(trace_of(blocks), Request(BLOCK, sizes=sizes), told.append)
    assert tuple(told) == advice.rows
    assert [row.size for row in advice.rows] == sorted(sizes)
    small, fits, large = advice.rows
    assert small.policy < 0.5
    assert fits.policy > 0.97
    assert large.policy == large.best == 1
    assert advice.enough == 64 * BLOCK
    assert (advice.nr_accesses, advice.nr_counted, advice.nr_writes) == (8000, 4000, 0)
    assert advice.touched == 64 * BLOCK
    for row in advice.rows:
        assert row.policy <= row.best
        assert row.lru <= row.best


def test_what_is_used_once_needs_no_cache() -> None:
    advice = advise(trace_of(list(range(2000))), Request(BLOCK))
    assert advice.enough is None
    assert {row.best for row in advice.rows} == {0.0}


def test_sizes_are_shares_of_what_is_touched() -> None:
    assert sizes_of(1280 * BLOCK, BLOCK)[0] == 16 * BLOCK
    assert sizes_of(1280 * BLOCK, BLOCK)[-1] == 1280 * BLOCK
    assert sizes_of(3 * BLOCK, BLOCK) == [16 * BLOCK]


def test_more_stops_to_help_where_nothing_larger_is_a_point_better() -> None:
    rows = [Ratios(size, hits, 0, 1) for size, hits in ((1, 0.3), (2, 0.495), (4, 0.5))]
    assert enough(rows) == 2
    assert enough([Ratios(1, 0.009, 0, 0)]) is None


def test_what_cannot_be_answered_is_refused() -> None:
    trace = trace_of([1, 2, 3, 4])
    with pytest.raises(NbdTargetError, match="none is left to count after 4"):
        advise(trace, Request(BLOCK, warm_up=4))
    with pytest.raises(NbdTargetError, match="less than 16 blocks"):
        advise(trace, Request(BLOCK, sizes=(BLOCK,)))
