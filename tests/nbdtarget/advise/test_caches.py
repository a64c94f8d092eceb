# SPDX-License-Identifier: Apache-2.0
"""The yardsticks of a policy are right. What they say of smq: tests/scripts/test_hit_ratio.py."""

import random
from array import array
from functools import cache

import pytest

from nbdtarget.advise.caches import belady_hits, lru_hits
from nbdtarget.advise.traces import Trace


def trace_of(*blocks: int) -> Trace:
    return Trace(max(blocks) + 1, array("Q", blocks), bytearray(len(blocks)))


def best_hits(blocks: tuple[int, ...], nr_cblocks: int) -> int:
    """Return the largest number of hits, by trying every choice of the block to drop."""

    @cache
    def best(at: int, cached: frozenset[int]) -> int:
        if at == len(blocks):
            return 0
        block = blocks[at]
        hit = block in cached
        candidates = cached | {block}
        if len(candidates) <= nr_cblocks:
            return hit + best(at + 1, candidates)
        return hit + max(best(at + 1, candidates - {drop}) for drop in candidates)

    return best(0, frozenset())


@pytest.mark.parametrize("seed", range(20))
def test_belady_is_the_best_there_is(seed: int) -> None:
    rng = random.Random(seed)
    blocks = tuple(rng.choices(range(6), k=14))
    for nr_cblocks in (1, 2, 3):
        expected = best_hits(blocks, nr_cblocks)
        assert belady_hits(trace_of(*blocks), nr_cblocks, 0) == expected


def test_lru_drops_what_was_not_used_for_longest() -> None:
    trace = trace_of(1, 2, 1, 3, 1, 2)
    assert lru_hits(trace, 2, 0) == 2
    assert lru_hits(trace, 2, 3) == 1
    assert lru_hits(trace, 3, 0) == 3
