# SPDX-License-Identifier: Apache-2.0
"""The crash matrix: short workloads, cut at every device operation, with every subset.

What is tried at each crash point, and what is asked of the images: `tests/support/crash/cuts.py`. Each
workload runs on devices that serve at once, and on ones that defer every bio and reorder them: one
order is tried here, and two more by `make test-long`.
The numbers are those of the crash points and the different images that a workload has had at
least; a run that has fewer tests less than it used to.

`CRASH_DEEP=1` runs every workload with many more orders and torn images: minutes.
"""

import logging
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support.crash.clone_matrix import (
    DEEP,
    MATRIX,
    Workload,
    cuts_of,
    eight_writes_without_a_flush,
)
from tests.support.crash.lazy_device import LazyDevice

# The share of bios that are served at once, and the seed of the others. Each fourth disk tears writes at 4 KiB.
QUICK = [(1.0, 0), (0.0, 3)]
LONG = [(0.0, seed) for seed in range(30)] if DEEP else [(0.0, 0), (0.0, 1)]


@pytest.fixture(autouse=True)
def devices_that_take_their_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tests.support.crash.rigs.CrashDevice", LazyDevice)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize(("workload", "points_min", "images_min"), MATRIX)
@pytest.mark.parametrize(
    "orders",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(LONG, id="more", marks=pytest.mark.long),
    ],
)
def test_no_power_cut_loses_what_was_flushed(
    orders: list[tuple[float, int]],
    workload: Workload,
    points_min: int,
    images_min: int,
) -> None:
    nr_points = nr_images = 0
    if workload is eight_writes_without_a_flush and not DEEP:
        orders = orders[:1]  # 256 subsets are the same ones in any order
    for inline, seed in orders:
        cuts = cuts_of(workload, inline, seed)
        cuts.verify()
        nr_points += cuts.nr_points
        nr_images += len(cuts.images)
    assert nr_points >= points_min
    assert nr_images >= images_min


def test_each_invariant_had_something_to_say() -> None:
    counts: Counter[str] = Counter()
    for workload, _, _ in MATRIX:
        counts += cuts_of(workload, 1.0, 0).rig.invariants.counts
    assert all(counts[f"I{nr}"] >= 6 for nr in range(2, 8)), counts
