# SPDX-License-Identifier: Apache-2.0
"""Random walks with power cuts in which bios overlap in flight, over every target.

NBD leaves the order of two requests that overlap in flight open; what must hold all the same:
once both have ended, the range holds one of the two, stays so, and a FLUSH makes it durable. The
walks write to a few hot sectors, whole, and wait for little.
"""

import logging
import os
import random
from collections.abc import Iterator

import pytest

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.targets.cache.cached_writes import CachedWrite, CachedWrites
from tests.support.crash.cache_rigs import (
    CacheRig,
    LoggedCacheRig,
    PassthroughRig,
    SwitchingCacheRig,
    WritethroughRig,
    small_blocks,
)
from tests.support.crash.cache_walks import CacheDriver, take_cache
from tests.support.crash.lazy_device import LazyDevice
from tests.support.crash.rigs import (
    DISK_SIZE,
    REGION_SIZE,
    CloneRig,
    LinearRig,
    QuietCloneRig,
)
from tests.support.crash.walks import MakeRig, Step
from tests.support.devices import CrashDevice
from tests.support.model import SECTOR
from tests.support.overlap_model import OverlapModel

DEEP = 40 if os.environ.get("CRASH_DEEP") else 1
WALKS = int(os.environ.get("SIM_WALKS", "4")) * DEEP
STEPS = int(os.environ.get("SIM_STEPS", "200"))
SEED = int(os.environ.get("SIM_SEED", "0"))
MUTANT_WALKS_MAX = 20

HOT_SECTORS = 2 * REGION_SIZE // SECTOR  # where most bios go
WEIGHTS = {
    "write": 12,
    "zero": 2,
    "discard": 1,
    "read": 6,
    "flush": 4,
    "turn": 5,
    "advance": 2,
    "drain": 1,
    "message": 2,
    "suspend": 1,
    "reload": 1,
    "cache": 1,
    "cut_power": 2,
}


class OverlapDriver(CacheDriver):
    """Waits for nothing before a bio; counts those that meet another one."""

    model_type = OverlapModel
    model: OverlapModel
    nr_overlaps = 0

    def overlaps(self, offset: int, length: int) -> bool:
        self.nr_overlaps += super().overlaps(offset, length)
        return False

    def read(self, offset: int, length: int) -> None:
        scratch = bytearray(b"\xdd" * length)
        read = self.model.start_read(offset, length)

        def ended(bio: Bio) -> None:
            if self.in_flight.pop(bio, None) is None:
                return  # of a life that has ended
            assert bio.status == 0, f"read failed: {bio}"
            assert bio.payload is not None
            self.model.end_read(read, offset, bio.payload)

        bio = Bio(OP_READ, offset, length, memoryview(scratch), 0, ended, borrowed=True)
        self._submit(bio, offset, length)
        scratch[:] = b"\xdd" * length


def draw_overlaps(seed: int) -> list[Step]:
    rng = random.Random(seed)
    hot = rng.randrange(DISK_SIZE // SECTOR - HOT_SECTORS)
    walk: list[Step] = []
    for kind in rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=STEPS):
        if rng.random() < 0.8:
            begin = hot + rng.randrange(HOT_SECTORS)
            length = rng.randrange(1, HOT_SECTORS // 2)
        else:
            begin = rng.randrange(DISK_SIZE // SECTOR)
            length = rng.randrange(1, 3 * REGION_SIZE // SECTOR)
        length = min(length, DISK_SIZE // SECTOR - begin)
        walk.append((kind, begin * SECTOR, length * SECTOR, rng.random() < 0.2))
    return walk


def run_walk(make_rig: MakeRig, seed: int) -> int:
    """Returns how many bios met another one. Raises: Violation, AssertionError."""
    driver = OverlapDriver(make_rig(seed, (0.0, 0.0, 0.5)[seed % 3]))
    try:
        for step in draw_overlaps(seed):
            take_cache(driver, step)
        driver.verify()
        driver.verify()
        driver.drain()
        driver.flush()
        driver.drain()
        driver.cut_power(seed)
        driver.verify()
        driver.restart()
        driver.verify()
    finally:
        driver.discard_loop()
    return driver.nr_overlaps


@pytest.fixture(autouse=True)
def small_and_lazy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for rigs in ("rigs", "cache_rigs"):
        monkeypatch.setattr(f"tests.support.crash.{rigs}.CrashDevice", LazyDevice)
    logging.disable(logging.CRITICAL)
    with small_blocks():
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rig",
    [
        LinearRig,
        CloneRig,
        LoggedCacheRig,
        *(
            pytest.param(rig, marks=pytest.mark.long)
            for rig in (
                QuietCloneRig,
                CacheRig,
                WritethroughRig,
                PassthroughRig,
                SwitchingCacheRig,
            )
        ),
    ],
)
def test_bios_that_overlap_in_flight_leave_one_of_the_two(rig: MakeRig) -> None:
    met = 0
    for seed in range(SEED, SEED + WALKS):
        try:
            met += run_walk(rig, seed)
        except BaseException as error:
            error.add_note(f"SIM_SEED={seed}")
            raise
    assert met > 5 * WALKS, "bios that never meet prove nothing"


def find_no_overlap(writes: CachedWrites, write: CachedWrite) -> None:
    """Has a write through sent at once, whatever overlapping one is under way."""


class OldWriteComesBack(CrashDevice):
    """Some time after a write has ended, what was there before it is there again for a read."""

    def _take_write(self, bio: Bio, data: bytes | memoryview) -> None:
        before = self._read(bio.offset, bio.length)
        super()._take_write(bio, data)
        if self._random.random() < 0.05:
            self.stale = bio.offset, before

    def _read(self, offset: int, length: int) -> bytearray:
        data = super()._read(offset, length)
        at, before = self.__dict__.get("stale", (0, b""))
        if offset <= at and at + len(before) <= offset + length:
            data[at - offset : at - offset + len(before)] = before
        return data


def fails(make_rig: MakeRig, seed: int) -> bool:
    try:
        run_walk(make_rig, seed)
    except TimeoutError:
        return False  # a walk that hangs proves nothing about the written data
    except Exception:
        return True
    return False


def test_overlap_walks_catch_write_throughs_that_take_different_orders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.support.crash.machine.RUN_S_MAX", 1.0)
    monkeypatch.setattr(CachedWrites, "_maybe_overlapping", find_no_overlap)
    assert any(fails(WritethroughRig, seed) for seed in range(MUTANT_WALKS_MAX))


def test_overlap_walks_catch_a_value_that_does_not_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.support.crash.rigs.CrashDevice", OldWriteComesBack)
    assert any(fails(LinearRig, seed) for seed in range(MUTANT_WALKS_MAX))
