# SPDX-License-Identifier: Apache-2.0
"""The crash matrix of the cache: short workloads, cut at every device operation, every subset.

As `test_exhaustive.py`, which tells what is tried and asked. Background work after a cut is to write
back all that is dirty: then everything must read the same, and again after a clean restart.
"""

from collections import Counter

import pytest

from tests.support.crash.cache_matrix import (
    DEEP,
    MATRIX,
    LogRig,
    ThroughLogRig,
    Workload,
    cuts_of,
    demotion_and_reuse,
    small_blocks_that_take_their_time,
    write_through,
)
from tests.support.crash.cache_rigs import CacheRig

__all__ = ["small_blocks_that_take_their_time"]  # a fixture, for each test here

# The share of bios that are served at once, and the seed of the others. Each fourth disk tears writes at 4 KiB.
ORDERS = [(1.0, 0), *((0.0, seed) for seed in range(30))] if DEEP else [(0.0, 3)]

# These workloads are also run by another rig, so they run in `make test-long` only.
TWICE = [(LogRig, demotion_and_reuse), (ThroughLogRig, write_through)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rig", "workload", "points_min", "images_min"),
    [
        pytest.param(*each, marks=[pytest.mark.long] if each[:2] in TWICE else [])
        for each in MATRIX
    ],
)
def test_no_power_cut_loses_what_was_flushed(
    rig: type[CacheRig], workload: Workload, points_min: int, images_min: int
) -> None:
    nr_points = nr_images = 0
    for inline, seed in ORDERS:
        cuts = cuts_of(rig, workload, inline, seed)
        cuts.verify()
        nr_points += cuts.nr_points
        nr_images += len(cuts.images)
    assert nr_points >= points_min
    assert nr_images >= images_min


def test_each_invariant_had_something_to_say() -> None:
    counts: Counter[str] = Counter()
    for rig, workload, _, _ in MATRIX:
        counts += cuts_of(rig, workload, 1.0, 0).rig.invariants.counts
    assert all(counts[f"J{nr}"] >= 6 for nr in (1, 2, 3, 4, 5, 7)), counts
