# SPDX-License-Identifier: Apache-2.0
"""Walks directed at the places where an order matters, on devices that take their time.

The drawn walks of `test_machine.py` go anywhere; these cut the power all along the few ways on
which a clone can get its order wrong. What they catch is proven by `tests/mutants`: most of
its mutants of the clone must fail here.
"""

from collections.abc import Iterator

import pytest

from tests.support.crash.lazy_device import lazy_devices
from tests.support.crash.rigs import REGION_SIZE, CloneRig
from tests.support.crash.walks import Step, draw_walk, maybe_failure

__all__ = ["lazy_devices"]  # a fixture, for each test here

WALKS_MAX = 50


# Steps of the walks below. A seed that is a multiple of three defers every bio.
QUIET: Step = ("message", 0, 1, False)  # disable_hydration
FLUSH: Step = ("flush", 0, 0, False)
DRAIN: Step = ("drain", 0, 0, False)


def turn(turns: int) -> Step:
    return ("turn", 0, turns % 20, False)


def write(region: int, length: int = REGION_SIZE, *, fua: bool = False) -> Step:
    return ("write", region * REGION_SIZE, length, fua)


def directed_walks() -> Iterator[tuple[int, list[Step]]]:
    """Power cuts all along the places where an order matters."""
    for seed in range(0, 120, 3):
        cut: Step = ("cut_power", seed, 0, False)
        few, many = turn(seed % 7), turn(seed)
        # A FLUSH overtakes a write that hydrates.
        yield seed, [QUIET, write(3), FLUSH, many, many, cut]
        # A plain write and a FLUSH of it while a commit is under way.
        hydrated = [QUIET, write(3), FLUSH, DRAIN]
        late = [write(3, 512), turn(9), FLUSH, turn(19), many, cut]
        yield seed, [*hydrated, write(5), FLUSH, few, *late]
        # FUA to a region whose bit is not durable, and FUA that sets one.
        yield seed, [QUIET, write(3), DRAIN, write(3, 512, fua=True), many, many, cut]
        yield seed, [QUIET, write(3, fua=True), turn(19), many, cut]
        # Two parts of one region at the same time.
        beside: Step = ("write", 3 * REGION_SIZE + 1024, 512, False)
        yield seed, [QUIET, write(3, 512), beside, DRAIN]


def walks() -> Iterator[tuple[int, list[Step]]]:
    yield from directed_walks()
    for seed in range(WALKS_MAX):
        yield seed, draw_walk(seed)


@pytest.mark.long
def test_no_order_is_wrong_where_it_matters() -> None:
    for seed, steps in walks():
        error = maybe_failure(CloneRig, seed, steps)
        if error is not None:
            raise AssertionError(f"seed {seed}: {error}: {steps}") from error
