# SPDX-License-Identifier: Apache-2.0
"""Random walks of a target over crash devices, by a seed: steps, how to take them, and the shortest walk that fails."""

import os
import random
from collections import Counter
from collections.abc import Callable

from tests.support.crash.machine import Driver, Rig
from tests.support.crash.rigs import (
    DISK_SIZE,
    REGION_SIZE,
)
from tests.support.model import SECTOR

__all__ = [
    "KINDS",
    "SEED",
    "STEPS",
    "MakeRig",
    "Step",
    "draw_range",
    "draw_walk",
    "maybe_failure",
    "seeds_that_fail",
    "shortened",
    "take",
    "walk",
    "walk_or_tell",
]

STEPS = int(os.environ.get("SIM_STEPS", "60"))
SEED = int(os.environ.get("SIM_SEED", "0"))
Step = tuple[str, int, int, bool]
MakeRig = Callable[[int, float], Rig]
# How often each step is drawn.
KINDS = {
    "write": 5,
    "zero": 2,
    "discard": 1,
    "read": 4,
    "flush": 3,
    "turn": 6,
    "advance": 3,
    "drain": 1,
    "message": 1,
    "status": 1,
    "suspend": 1,
    "reload": 1,
    "stop": 1,
    "cut_power": 2,
}


def draw_walk(seed: int) -> list[Step]:
    rng = random.Random(seed)
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=STEPS)
    return [(kind, *draw_range(rng), rng.random() < 0.3) for kind in kinds]


def draw_range(rng: random.Random) -> tuple[int, int]:
    """Whole regions, whole sectors or ragged bytes, the ends of the disk among them."""
    unit = rng.choice([REGION_SIZE, SECTOR, 1])
    begin = rng.randrange(-(-DISK_SIZE // unit)) * unit
    length = rng.randrange(1, 3 * REGION_SIZE // unit + 1) * unit
    return begin, min(length, DISK_SIZE - begin)


def take(driver: Driver, step: Step) -> None:
    kind, offset, length, flag = step
    if kind == "write":
        driver.write(offset, length, fua=flag)
    elif kind == "zero":
        driver.zero(offset, length, fua=flag)
    elif kind == "discard":
        driver.discard(offset, length)
    elif kind == "read":
        driver.read(offset, length)
    elif kind == "flush":
        driver.flush()
    elif kind == "turn":
        driver.turn(length % 20)
    elif kind == "advance":
        driver.advance(1.5 if flag else 0.01)
        driver.turn(length % 3)
    elif kind == "drain":
        driver.drain()
    elif kind == "message":
        if messages := driver.rig.messages:
            driver.run(driver.rig.message(*messages[length % len(messages)]))
    elif kind == "status":
        assert driver.run(driver.rig.status()) != "Fail"
    elif kind == "suspend":
        if driver.suspended:
            driver.resume()
        else:
            driver.suspend()
    elif kind == "reload":
        if not driver.suspended:
            driver.reload()
    elif kind == "stop":
        driver.restart()
    elif kind == "cut_power":
        driver.cut_power(offset)
    else:
        raise AssertionError(kind)


def walk(make_rig: MakeRig, seed: int, steps: list[Step]) -> Driver:
    driver = Driver(make_rig(seed, (0.0, 0.5, 1.0)[seed % 3]))
    try:
        for step in steps:
            take(driver, step)
        driver.verify()
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
    """Leave out what the failure does not need."""
    at = len(steps) - 1
    while at >= 0:
        fewer = steps[:at] + steps[at + 1 :]
        if maybe_failure(make_rig, seed, fewer) is not None:
            steps = fewer
        at -= 1
    return steps


def seeds_that_fail(make_rig: MakeRig, walks: int) -> list[int]:
    return [
        seed
        for seed in range(SEED, SEED + walks)
        if maybe_failure(make_rig, seed, draw_walk(seed)) is not None
    ]


def walk_or_tell(make_rig: MakeRig, seed: int) -> Counter[str]:
    """Return what the invariants counted. Raises: AssertionError, with the shortest walk."""
    steps = draw_walk(seed)
    try:
        return walk(make_rig, seed, steps).rig.invariants.counts
    except Exception:
        shortest = shortened(make_rig, seed, steps)
        error = maybe_failure(make_rig, seed, shortest)
        lines = "\n".join(map(str, shortest))
        raise AssertionError(f"SIM_SEED={seed}: {error}\n{lines}") from error
