# SPDX-License-Identifier: Apache-2.0
"""Walks directed at the places where an order matters, on devices that take their time.

The drawn walks of `test_machine.py` go anywhere; these cut the power all along the few ways on
which a clone can get its order wrong. What they catch is proven by `tests/mutants`: most of
its mutants of the clone must fail here.
"""

import asyncio
import logging
from collections.abc import Iterator
from functools import cached_property

import pytest

from nbdtarget.devices.base import EXTENT_DATA, EXTENT_ZERO, Extent
from tests.crash.test_machine import Step, draw_walk, maybe_failure
from tests.support.crash.rigs import REGION_SIZE, CloneRig
from tests.support.devices import CrashDevice
from tests.support.model import SECTOR

WALKS_MAX = 50


class LazyDevice(CrashDevice):
    """Carries a deferred bio out some turns of the loop later, not on the next one.

    Only so does a FLUSH overtake a write, and one device's write another device's. Some
    are far lazier than others: then a commit's last step overtakes another's first. It
    also tells its zeroes.
    """

    @cached_property
    def _laziness(self) -> float:
        return self._random.choice([0.5, 0.8, 0.95])

    async def extents(self, offset: int, length: int) -> list[Extent]:
        image = self.image()[offset : offset + length]
        await asyncio.sleep(0)
        return [
            Extent(len(piece), EXTENT_DATA if any(piece) else EXTENT_ZERO)
            for piece in (image[at : at + SECTOR] for at in range(0, length, SECTOR))
        ]

    def _carry_out_one(self) -> None:
        if self._random.random() < self._laziness:
            asyncio.get_running_loop().call_soon(self._carry_out_one)
        else:
            super()._carry_out_one()


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


@pytest.fixture(autouse=True)
def lazy_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tests.support.crash.rigs.CrashDevice", LazyDevice)
    monkeypatch.setattr("nbdtarget.targets.clone.holes.HOLE_BYTES_MIN", SECTOR)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
def test_no_order_is_wrong_where_it_matters() -> None:
    for seed, steps in walks():
        error = maybe_failure(CloneRig, seed, steps)
        if error is not None:
            raise AssertionError(f"seed {seed}: {error}: {steps}") from error
