# SPDX-License-Identifier: Apache-2.0
"""Power cuts over the compiled fast path: the walks of the crash machine, with plain requests served by compiled code.

More walks: SIM_WALKS=200 SIM_SEED=7 python -m pytest tests/crash/test_compiled.py
"""

import os
from collections import Counter
from collections.abc import Iterator

import pytest
from bitarray import bitarray
from bitarray.util import ones

from nbdtarget.bio import OP_READ, OP_WRITE, Bio
from nbdtarget.fast import compiled
from nbdtarget.targets.clone.target import CloneTarget
from tests.support.crash import cache_rigs, cache_walks, rigs, walks
from tests.support.crash.fast_disk import DURABLE, LONE, FastCrashDevice, FastDriver
from tests.support.model import SECTOR

pytestmark = [
    pytest.mark.skipif(not compiled.IS_COMPILED, reason=compiled.describe()),
    pytest.mark.slow,
]

WALKS = int(os.environ.get("SIM_WALKS", "6"))
CACHE_WALKS = int(os.environ.get("SIM_WALKS", "2"))
PLANTED_WALKS = 12
HOT = 3  # requests to the same block, one after another
CLONES = (rigs.LinearRig, rigs.CloneRig, rigs.WornCloneRig)
CACHES = (cache_rigs.CacheRig, cache_rigs.WritethroughRig, cache_rigs.LoggedCacheRig)


class FastCacheDriver(FastDriver, cache_walks.CacheDriver):
    """Drives a cache through the compiled fast path."""


@pytest.fixture(autouse=True)
def compiled_disks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rigs, "CrashDevice", FastCrashDevice)
    monkeypatch.setattr(cache_rigs, "CrashDevice", FastCrashDevice)
    with cache_rigs.small_blocks():
        yield


def walk(make_rig: walks.MakeRig, seed: int) -> Counter[int]:
    """Take a walk; returns how many requests were served by compiled code. Raises: what is wrong."""
    driver = FastDriver(make_rig(seed, (0.0, 0.5, 1.0)[seed % 3]))
    try:
        for step in walks.draw_walk(seed):
            walks.take(driver, step)
        driver.verify()
        driver.restart()
        driver.verify()
    finally:
        driver.discard_loop()
        driver.close()
    return driver.nr_served


def cache_walk(make_rig: cache_walks.MakeRig, seed: int) -> Counter[int]:
    """As `walk`. A request is followed by others to its block, because compiled code serves hits inside of one."""
    driver = FastCacheDriver(make_rig(seed, (0.0, 0.5, 1.0)[seed % 3]))
    try:
        for step in cache_walks.draw_cache_walk(seed):
            cache_walks.take_cache(driver, step)
            kind, offset, length, is_fua = step
            if kind not in ("read", "write") or is_fua or driver.suspended:
                continue
            at = offset // SECTOR * SECTOR
            for nr in range(HOT):
                if kind == "read" or (length + nr) % 2:
                    driver.read(at, SECTOR)
                else:
                    driver.write(at, SECTOR, fua=False)
        driver.verify()
        driver.restart()
        driver.verify()
    finally:
        driver.discard_loop()
        driver.close()
    return driver.nr_served


@pytest.mark.parametrize("rig", CLONES)
def test_no_acknowledged_flush_is_lost(rig: walks.MakeRig) -> None:
    served: Counter[int] = Counter()
    for seed in range(walks.SEED, walks.SEED + WALKS):
        served += walk(rig, seed)
    assert served[OP_READ] > WALKS
    assert served[OP_WRITE] > WALKS
    assert served[DURABLE] > WALKS
    assert served[LONE] > WALKS


@pytest.mark.parametrize("rig", CACHES)
def test_no_acknowledged_flush_of_a_cache_is_lost(rig: cache_walks.MakeRig) -> None:
    served: Counter[int] = Counter()
    for seed in range(walks.SEED, walks.SEED + CACHE_WALKS):
        served += cache_walk(rig, seed)
    assert served[OP_READ] > CACHE_WALKS
    if rig is not cache_rigs.WritethroughRig:  # there nothing is dirty
        assert served[OP_WRITE]


# ---- what is caught ----


def nr_failures(make_rig: walks.MakeRig) -> int:
    failed = 0
    for seed in range(PLANTED_WALKS):
        try:
            walk(make_rig, seed)
        except AssertionError:
            failed += 1
    return failed


def test_compiled_write_to_a_region_that_is_not_hydrated_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_bitmap = compiled.Route.by_bitmap

    class AllHydrated:
        @staticmethod
        def by_bitmap(
            file: compiled.FastFile,
            other: compiled.FastFile | None,
            bits: bitarray,
            nr_bits: int,
            *place: int,
        ) -> compiled.Route:
            hydrated = ones(len(bits), "little")
            return by_bitmap(file, other, hydrated, nr_bits, *place)

    monkeypatch.setattr("nbdtarget.targets.clone.target.Route", AllHydrated)
    assert nr_failures(rigs.CloneRig)


def test_durable_request_that_is_answered_without_a_flush_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(driver: FastDriver, bio: Bio) -> None:
        bio.end(0)

    monkeypatch.setattr(FastDriver, "_flush_for", answer)
    assert nr_failures(rigs.LinearRig)


def test_sync_of_the_compiled_code_that_makes_nothing_stable_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The walks notice it, so they rely on these syncs."""
    monkeypatch.setattr(FastCrashDevice, "was_synced", lambda _: False)
    assert nr_failures(rigs.LinearRig)


def test_clone_that_says_that_a_flush_needs_no_commit_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CloneTarget, "_may_sync", lambda _: True)
    assert nr_failures(rigs.CloneRig)


def test_flush_that_leaves_out_what_compiled_code_has_written_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make_stable(device: FastCrashDevice, mark: int) -> None:
        if not device.nr_absorbed:
            honest(device, mark)

    honest = FastCrashDevice._make_stable
    monkeypatch.setattr(FastCrashDevice, "_make_stable", make_stable)
    assert nr_failures(rigs.LinearRig)
