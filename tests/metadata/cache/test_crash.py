# SPDX-License-Identifier: Apache-2.0
"""The power is cut after every event of a cache's life, and every image must be right.

And the test itself is tested: each deliberate bug of the owner in `OWNER_MUTANTS` must make it
fail, and so must those that `make mutants` patches into the code.
"""

from collections import Counter

import pytest

from nbdtarget_metadata.cache.metadata import FLUSH_CACHE, FLUSH_ORIGIN
from nbdtarget_metadata.errors import MetadataError
from tests.support.metadata.cache_workload import CacheWorkload, Mutant

pytestmark = [pytest.mark.usefixtures("small_cache_chunks"), pytest.mark.slow]

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2, 3))]
NR_EVENTS = 600
OVERTAKING_SEED = 3
RESTLESS_SEEDS = (
    1,
    4,
)  # both or the other one: an abort in a resize, a commit that heals
MUTANT_SEEDS = range(20)


@pytest.mark.parametrize("lazy", [False, True], ids=["compacted", "overtaken"])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_crash_image_opens_at_an_acknowledged_state(
    seed: int, lazy: bool
) -> None:
    world = CacheWorkload(seed, lazy=lazy)
    world.run(NR_EVENTS)
    assert world.acknowledged > 20


@pytest.mark.parametrize("seed", SEEDS)
def test_every_crash_image_of_a_resized_cache_is_right(
    seed: int,
) -> None:
    CacheWorkload(seed, lazy=bool(seed % 2), restless=True).run(NR_EVENTS)


def test_restless_workload_comes_by_every_way() -> None:
    ways: Counter[str] = Counter()
    for seed in RESTLESS_SEEDS:
        world = CacheWorkload(seed, lazy=bool(seed % 2), restless=True)
        world.run(NR_EVENTS)
        ways.update({name: n for name, n in vars(world).items() if name[:3] == "nr_"})
    assert [name for name, times in ways.items() if not times] == []


def test_workload_comes_by_every_way() -> None:
    world = CacheWorkload(OVERTAKING_SEED, lazy=True)
    world.run(NR_EVENTS)
    assert world.nr_overtaken > 0
    assert world.nr_clean > 0
    assert world.nr_needs_check > 0
    assert world.nr_clean_blocks_after_crash > 0


OWNER_MUTANTS = {
    "cache not flushed before insertions are committed": Mutant(
        flushes_ignored=FLUSH_CACHE
    ),
    "origin not flushed before removals are committed": Mutant(
        flushes_ignored=FLUSH_ORIGIN
    ),
    "origin written while the old mapping may come back": Mutant(
        origin_written_before_removal_is_durable=True
    ),
    "acknowledged before the superblock has ended": Mutant(acknowledged_early=True),
    "superblock before the journal's flush": Mutant(journal_unflushed=True),
}


@pytest.mark.parametrize("name", OWNER_MUTANTS)
def test_mutant_of_the_owner_is_caught(name: str) -> None:
    for seed in MUTANT_SEEDS:
        try:
            CacheWorkload(seed, OWNER_MUTANTS[name], lazy=bool(seed % 2)).run(NR_EVENTS)
        except (AssertionError, MetadataError):
            return
    pytest.fail("not caught")
