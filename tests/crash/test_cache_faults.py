# SPDX-License-Identifier: Apache-2.0
"""Random walks over a cache one of whose devices fails, or lies, on the way; then the power is cut.

What is read must be right, as long as it can be read: a cache whose commit has failed keeps its mappings in
core. A table that is loaded over metadata that failed may say that unflushed writes are lost: then a read
may find older values, but none from before the last FLUSH that ended well. What an acknowledged FLUSH or
FUA covered is there after the crash, once somebody has taken back `needs_check`. When a resume is refused, the walk ends there: a cache whose
metadata need a check is none for the running machine to mend.
"""

import logging
import os
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from nbdtarget.common.errors import ConstructorError, DeviceError, TableError
from nbdtarget.devices.losses import FlushObserver
from tests.support.crash.cache_fault_walks import FaultDriver, FaultRig, draw_walk
from tests.support.crash.cache_rigs import CacheRig, small_blocks
from tests.support.crash.cache_walks import take_cache
from tests.support.crash.lazy_device import LazyDevice
from tests.support.crash.rigs import REGION_SIZE
from tests.support.devices import (
    FaultDevice,
)

WALKS = int(os.environ.get("SIM_WALKS", "25"))
SEED = int(os.environ.get("SIM_SEED", "0"))


def run_walk(seed: int) -> Counter[str]:
    """Returns what has happened. Raises: Violation, AssertionError."""
    rng = random.Random(seed)
    rig = FaultRig(seed, rng.choice([0.0, 0.5, 1.0]))
    rig.arm(rng)
    counts: Counter[str] = Counter()
    try:
        driver = FaultDriver(rig)
    except (ConstructorError, TableError):
        return counts  # it was refused: there is nothing to lose
    try:
        for step in draw_walk(rng):
            target, losses = rig.maybe_target(), rig.losses
            try:
                take_cache(driver, step)
            except (ConstructorError, TableError, DeviceError):
                assert rig.has_failed, "refused without a reason"
                if rig.is_stuck and not driver.suspended:
                    counts["stuck"] += 1
                    break
            if rig.maybe_target() is not target and rig.losses > losses:
                assert rig.has_failed, "lost without a reason"
                # A table on what the disks hold: unflushed writes are gone, and that is said.
                driver.model.lose_unflushed()
                counts["lost"] += 1
        else:
            if not driver.suspended:
                driver.drain()
        counts["failed"] = rig.has_failed
        target = rig.maybe_target()
        if target is not None:
            counts[target._metadata.mode.value] += 1
        driver.cut_power(rng.randrange(1 << 30))
        driver.verify()
        driver.run(driver.rig.stop())
    finally:
        driver.discard_loop()
    return counts


@pytest.fixture(autouse=True)
def small_and_lazy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tests.support.crash.cache_rigs.CrashDevice", LazyDevice)
    logging.disable(logging.CRITICAL)
    with small_blocks():
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
def test_cache_keeps_its_word_when_a_device_fails() -> None:
    counts: Counter[str] = Counter()
    for seed in range(SEED, SEED + WALKS):
        try:
            counts += run_walk(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert counts["failed"] > WALKS // 4, "faults that nothing meets prove nothing"
    assert counts["ro"] > WALKS // 10, counts
    assert counts["lost"], counts


@pytest.mark.parametrize("noflush", [False, True])
async def test_flush_after_reloads_does_not_promise_a_write_that_a_commit_lost(
    noflush: bool,
) -> None:
    rig = CacheRig(1, 1.0)
    rig.invariants.may_differ = True
    fault = FaultDevice(rig.metadata)
    rig.devices["/metadata"] = fault
    await rig.start()
    clients = [FlushObserver(rig.disk) for _ in range(2)]
    written = bytes([7]) * REGION_SIZE
    await rig.disk.write(0, written)  # never flushed; its mapping is in core alone
    target = rig.maybe_target()
    assert target is not None
    assert target._metadata.nr_dirty == 1
    fault.fail_at = fault.count
    with pytest.raises(DeviceError, match="flush"):
        await clients[0].flush()
    if noflush:
        await rig._registry.suspend("d", noflush=True)
    fault.clear()
    await rig.load()
    await rig.resume()
    assert bytes(await rig.disk.read(0, REGION_SIZE)) != written
    for client in clients:  # as each open file learns of a lost page once
        with pytest.raises(DeviceError, match="flush"):
            await client.flush()
    for client in clients:
        await client.flush()
    await rig.stop()
