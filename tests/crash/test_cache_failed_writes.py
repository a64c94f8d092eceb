# SPDX-License-Identifier: Apache-2.0
"""One write to a cached block fails, on the cache device, on the origin or on both; then all is well again.

Whatever the kind of write, and wherever the block was: what was flushed before is read, and is there after a
power cut; a later write to the same place is read, and stays. Beside the failing write another
one goes to the same block: it does not fail, and is not lost with it.
"""

import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from nbdtarget.bio import OP_DISCARD, OP_WRITE, OP_WRITE_ZEROES
from tests.support.crash.cache_fault_walks import FaultDriver
from tests.support.crash.cache_rigs import (
    BLOCK_SIZE,
    CacheRig,
    cache_table,
    small_blocks,
)
from tests.support.crash.machine import Driver
from tests.support.devices import FaultDevice
from tests.support.model import SECTOR

pytestmark = pytest.mark.long

MODES = (("writethrough",), ("writethrough", "dirty_log"), ("writeback",))
STATES = ("not cached", "clean", "written", "distrusted")
KINDS = ("write", "zero", "discard")
FAILING = (("/cache",), ("/origin",), ("/cache", "/origin"))
WRITES = frozenset((OP_WRITE, OP_WRITE_ZEROES, OP_DISCARD))


@pytest.fixture(autouse=True)
def small_and_quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    with small_blocks():
        yield
    logging.disable(logging.NOTSET)


class FailingRig(CacheRig):
    """Cache device and origin can fail the next writes."""

    def wrap(self, features: tuple[str, ...]) -> None:
        self.tables = (cache_table(*features),)
        self.table = self.tables[0]
        self.invariants.may_differ = True
        self.faults = {
            device.name: FaultDevice(device, ops=WRITES)
            for device in (self.cache, self.origin)
        }
        self.devices.update(self.faults)


def settled(driver: Driver) -> None:
    driver.drain()
    for _ in range(8):
        driver.turn(10)
        driver.advance(0.25)


def prepare(driver: Driver, rig: FailingRig, state: str) -> None:
    """Bring block 0 into the state that `state` names, and flush its data."""
    driver.write(0, 2 * BLOCK_SIZE, fua=False)
    if state != "not cached":
        driver.drain()
        driver.cache(0, BLOCK_SIZE)
        settled(driver)
        if state != "clean":
            driver.write(SECTOR, SECTOR, fua=False)
    driver.drain()
    driver.flush()
    settled(driver)
    target = rig.maybe_target()
    assert target is not None
    if state == "distrusted" and not target._metadata.nr_dirty:
        before = bytes(rig.cache._stable)
        driver.write(2 * SECTOR, SECTOR, fua=False)
        driver.drain()
        rig.faults["/cache"].health.note_loss()
        driver.flush()
        settled(driver)
        if target._blocks.distrusts_cache:
            # The cache device loses its unflushed data: the copy is older than the origin.
            rig.cache._stable[:] = before
            rig.cache._cache.clear()


def change(driver: Driver, kind: str, offset: int, length: int, *, fua: bool) -> None:
    if kind == "write":
        driver.write(offset, length, fua=fua)
    elif kind == "zero":
        driver.zero(offset, length, fua=fua)
    else:
        driver.discard(offset, length)


def run_case(
    seed: int,
    features: tuple[str, ...],
    state: str,
    kind: str,
    failing: tuple[str, ...],
    *,
    fua: bool,
    is_whole: bool,
) -> Counter[str]:
    """Run one case. Returns a word for its outcome. Raises: Violation, AssertionError."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    rig = FailingRig(seed, rng.choice([0.0, 0.5, 1.0]))
    rig.wrap(features)
    driver = FaultDriver(rig)  # type: ignore[arg-type]  # it asks for no more than a rig
    offset, length = (0, BLOCK_SIZE) if is_whole else (3 * SECTOR, SECTOR)
    try:
        prepare(driver, rig, state)
        target = rig.maybe_target()
        assert target is not None
        counts["distrusted"] = target._blocks.distrusts_cache
        counts["cached"] = target._metadata.maybe_cblock(0) is not None
        for name in failing:
            fault = rig.faults[name]
            fault.sticky = False
            fault.fail_at = fault.count
            fault.happens = rng if rng.random() < 0.5 else None
        change(driver, kind, offset, length, fua=fua)
        if not is_whole:
            driver.write(5 * SECTOR, SECTOR, fua=False)
        driver.drain()
        for fault in rig.faults.values():
            counts["failed"] += fault.failed
            fault.clear()
        driver.read(0, 2 * BLOCK_SIZE)
        settled(driver)
        driver.flush()
        driver.drain()
        driver.read(0, 2 * BLOCK_SIZE)
        driver.drain()
        driver.write(offset, SECTOR, fua=fua)
        driver.drain()
        driver.read(0, 2 * BLOCK_SIZE)
        settled(driver)
        if rng.random() < 0.5:
            driver.flush()
            driver.drain()
        driver.cut_power(seed)
        driver.verify()
        driver.run(driver.rig.stop())
    finally:
        driver.discard_loop()
    return counts


@pytest.mark.parametrize("features", MODES, ids=" ".join)
def test_a_write_that_fails_takes_nothing_else_with_it(
    features: tuple[str, ...],
) -> None:
    counts: Counter[str] = Counter()
    cases = itertools.product(STATES, KINDS, FAILING, (False, True), (False, True))
    for seed, (state, kind, failing, fua, is_whole) in enumerate(cases):
        try:
            counts += run_case(
                seed, features, state, kind, failing, fua=fua, is_whole=is_whole
            )
        except BaseException as error:
            error.add_note(f"{state}, {kind}, {failing}, {fua=}, {is_whole=}")
            raise
    nr_cases = len(STATES) * len(KINDS) * len(FAILING) * 4
    assert counts["failed"] > nr_cases // 2, counts
    assert counts["cached"] > nr_cases // 2, counts
    if features == ("writethrough",):
        assert counts["distrusted"] == nr_cases // len(STATES), counts
