# SPDX-License-Identifier: Apache-2.0
"""SIGTERM on simulated machines over servers that hang: a stop without a bound is noticed."""

from collections import Counter

import pytest

from nbdtarget.daemon.stop_bounds import StopBounds
from nbdtarget.dm.registry import Registry
from tests.sim.world import simulate

SEEDS = 12
SEEDS_MAX = 150
FIRST = 140  # a clone must be reading from its source just then, which is rare


@pytest.mark.long
def test_stop_over_what_hangs_ends_within_its_bound() -> None:
    counts: Counter[str] = Counter()
    for seed in range(1000, 1000 + SEEDS):
        history = simulate(seed, rig_name="clone_over_backends")
        assert history.failure is None, f"make sim SEED={seed} RIG=clone_over_backends"
        counts += history.counts
    assert counts["stops over what hangs"] > counts["stops without a source"] > 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("owner", "name", "mutant", "rig", "first"),
    [
        # Devices that do not answer are waited for.
        (StopBounds, "devices_s", None, "cache_over_backends", 0),
        # Reads of a source are waited for.
        (Registry, "give_up_reads", lambda _: None, "clone_over_backends", FIRST),
    ],
)
def test_simulation_catches_a_stop_that_waits(
    owner: type[object],
    name: str,
    mutant: object,
    rig: str,
    first: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, mutant)
    seeds = range(first, first + SEEDS_MAX)
    assert any(simulate(seed, rig_name=rig).failure for seed in seeds)
