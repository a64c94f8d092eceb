# SPDX-License-Identifier: Apache-2.0
"""Random walks of a cache over crash devices, by a seed; see walks.py."""

import os
import random
import time
from collections import Counter

from tests.support.crash.cache_rigs import (
    CacheRig,
)
from tests.support.crash.machine import Driver
from tests.support.crash.walks import KINDS, Step, draw_range, take
from tests.support.model import SECTOR

__all__ = [
    "SHORTENING_S_MAX",
    "STEPS",
    "WEIGHTS",
    "CacheDriver",
    "MakeRig",
    "draw_cache_walk",
    "maybe_failure",
    "shortened",
    "take_cache",
    "walk",
    "walk_or_tell",
]

STEPS = int(os.environ.get("SIM_STEPS", "80"))
SHORTENING_S_MAX = 60.0
WEIGHTS = {
    **KINDS,
    "discard": 2,
    "message": 4,
    "reload": 2,
    "suspend": 2,
    "cache": 2,
    "burst": 2,
    "quiet": 1,
    "hydrate": 1,
    "race": 3,
}
MakeRig = type[CacheRig]


class CacheDriver(Driver):
    """A driver that can also wait, and check that an idle cache does no I/O."""

    def quiet(self) -> None:
        """Wait until nothing is dirty, and then a minute, and check J8. Raises: AssertionError, also if blocks stay dirty."""
        self.drain()
        rig = self.rig
        assert isinstance(rig, CacheRig)
        self.run(rig.set_background(on=True))
        for _ in range(200):
            self.turn(2)
            self.advance(0.1)
        target = rig.maybe_target()
        assert target is not None
        assert rig.is_settled, "no client writes, and the cache never becomes clean"
        assert not target._blocks.locks.nr_holds
        assert not target._blocks.locks.locked
        before = rig.nr_operations
        for _ in range(60):
            self.turn(10)
            self.advance(1.0)
        self.turn(10)
        rig.invariants.j8_idle_and_clean_is_quiet(rig.nr_operations - before)


def draw_cache_walk(seed: int) -> list[Step]:
    rng = random.Random(seed)
    kinds = rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=STEPS)
    return [(kind, *draw_range(rng), rng.random() < 0.3) for kind in kinds]


def take_cache(driver: CacheDriver, step: Step) -> None:
    kind, offset, length, _ = step
    if kind == "cache":
        driver.cache(offset, length)
    elif kind == "burst":
        # Time in which migrations get somewhere.
        for _ in range(10):
            driver.turn(5)
            driver.advance(0.05)
    elif kind == "quiet":
        driver.quiet()
    elif kind == "race":
        driver.drain()
        driver.run(driver.rig.message("clean_now"))
        driver.turn(length % 7)
        driver.write(offset // SECTOR * SECTOR, SECTOR, fua=False)
    elif kind == "hydrate":
        driver.hydrate_a_step()
    else:
        take(driver, step)


def walk(make_rig: MakeRig, seed: int, steps: list[Step]) -> CacheDriver:
    driver = CacheDriver(make_rig(seed, (0.0, 0.5, 1.0)[seed % 3]))
    try:
        for step in steps:
            take_cache(driver, step)
        driver.verify()
        driver.quiet()
        driver.restart()
        driver.verify()
    finally:
        driver.discard_loop()
    return driver


def maybe_failure(make_rig: MakeRig, seed: int, steps: list[Step]) -> Exception | None:
    try:
        walk(make_rig, seed, steps)
    except Exception as error:
        return error
    return None


def shortened(make_rig: MakeRig, seed: int, steps: list[Step]) -> list[Step]:
    """Leave out what the failure does not need, as far as there is time."""
    end_s = time.monotonic() + SHORTENING_S_MAX
    at = len(steps) - 1
    while at >= 0 and time.monotonic() < end_s:
        fewer = steps[:at] + steps[at + 1 :]
        if maybe_failure(make_rig, seed, fewer) is not None:
            steps = fewer
        at -= 1
    return steps


def walk_or_tell(make_rig: MakeRig, seed: int) -> Counter[str]:
    """Return what the invariants counted. Raises: AssertionError, with the shortest walk."""
    steps = draw_cache_walk(seed)
    try:
        return walk(make_rig, seed, steps).rig.invariants.counts
    except Exception:
        shortest = shortened(make_rig, seed, steps)
        error = maybe_failure(make_rig, seed, shortest)
        lines = "\n".join(map(str, shortest))
        raise AssertionError(f"SIM_SEED={seed}: {error}\n{lines}") from error
