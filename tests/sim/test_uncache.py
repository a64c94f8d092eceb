# SPDX-License-Identifier: Apache-2.0
"""`uncache` on simulated machines: that it is got through, broken off, and that a wrong one is noticed."""

from collections import Counter

import pytest

from nbdtarget.control.uncache import UncacheJob
from tests.sim.uncache import INTERRUPTED, KILLED
from tests.sim.world import simulate

SEEDS_MAX = 60
ENDS = (0, INTERRUPTED, KILLED)


@pytest.mark.long
def test_uncache_is_finished_interrupted_killed_and_cut() -> None:
    counts: Counter[str] = Counter()
    for seed in range(SEEDS_MAX):
        history = simulate(seed, rig_name="cache_switching")
        assert history.failure is None, f"make sim SEED={seed} RIG=cache_switching"
        counts += history.counts
        ends = {status: counts[f"uncached {status}"] for status in ENDS}
        is_cut = counts["uncaches"] > sum(ends.values())
        if all(ends.values()) and is_cut and counts["uncached writes"]:
            break
    else:
        raise AssertionError(counts)


async def says_it_is_empty(*_: object) -> bool:
    """Leaves out the cleaner, and passthrough."""
    return True


async def leaves_the_blocks(*_: object) -> None:
    """Leaves the old blocks for the old line."""


@pytest.mark.parametrize(
    ("name", "mutant", "rig"),
    [
        ("_empty", says_it_is_empty, "cache"),
        pytest.param(
            "_empty", says_it_is_empty, "cache_over_backends", marks=pytest.mark.long
        ),
        pytest.param(
            "_invalidate",
            leaves_the_blocks,
            "cache_passthrough",
            marks=pytest.mark.long,
        ),
    ],
)
def test_simulation_catches_an_uncache_that_leaves_something(
    name: str, mutant: object, rig: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UncacheJob, name, mutant)
    assert any(simulate(seed, rig_name=rig).failure for seed in range(SEEDS_MAX))
