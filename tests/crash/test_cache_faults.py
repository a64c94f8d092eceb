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

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.common.errors import ConstructorError, DeviceError, TableError
from nbdtarget.devices.losses import FlushObserver
from nbdtarget.dm.mapped_io import State
from nbdtarget.targets.cache.target import CacheTarget
from tests.crash.test_cache_machine import WEIGHTS, CacheDriver, take_cache
from tests.crash.test_directed import LazyDevice
from tests.crash.test_faults import FAIL_AT_MAX
from tests.crash.test_machine import Step
from tests.support.crash.cache_rigs import CacheRig, SwitchingCacheRig, small_blocks
from tests.support.crash.rigs import DISK_SIZE, REGION_SIZE
from tests.support.devices import (
    BadRange,
    CrashDevice,
    FailAfter,
    FailFlush,
    FaultDevice,
)
from tests.support.model import SECTOR

WALKS = int(os.environ.get("SIM_WALKS", "25"))
STEPS = int(os.environ.get("SIM_STEPS", "60"))
SEED = int(os.environ.get("SIM_SEED", "0"))

# They ask for a disk that works.
LEFT_OUT = ("status", "stop", "cut_power", "quiet", "hydrate")


class FaultRig(SwitchingCacheRig):
    """A cache on devices of which one will fail; sound again after the crash."""

    fault: CrashDevice | FaultDevice | None = None

    def arm(self, rng: random.Random) -> None:
        """Choose the device and how it fails: an operation, or a lie of its own."""
        self.fault = rng.choice(self.at_risk)
        self.invariants.may_differ = True
        at = rng.randrange(1, FAIL_AT_MAX)
        match rng.randrange(4):
            case 0:
                self.fault.lie = FailFlush(at % 8)
            case 1:
                self.fault.lie = FailAfter(at)
            case 2:
                begin = rng.randrange(self.fault.size // SECTOR) * SECTOR
                self.fault.lie = BadRange(begin, begin + at * SECTOR)
            case _:
                sticky = rng.random() < 0.5
                fault = FaultDevice(self.fault, at, sticky=sticky)
                self.devices[self.fault.name] = self.fault = fault
        self._let_happen(rng)

    def _let_happen(self, rng: random.Random) -> None:
        """In half of the walks, what fails takes effect all the same, more or less of it."""
        if rng.random() < 0.5:
            return
        if isinstance(self.fault, FaultDevice):
            self.fault.happens = rng
        elif self.fault is not None:
            self.fault.happens = rng.choice([0.5, 1.0])

    def _check_refusal(self, error: TableError, before: CacheTarget | None) -> None:
        if self.has_failed:
            raise error
        super()._check_refusal(error, before)

    @property
    def has_failed(self) -> bool:
        return self.fault is not None and self.fault.failed > 0

    @property
    def losses(self) -> int:
        return self._registry.get("d").losses

    @property
    def is_stuck(self) -> bool:
        return self._registry.get("d").state is State.SUSPENDED


class FaultDriver(CacheDriver):
    """Lets reads fail."""

    def __init__(self, rig: FaultRig) -> None:
        try:
            super().__init__(rig)
        except (ConstructorError, TableError):
            self.discard_loop()
            raise

    def read(self, offset: int, length: int) -> None:
        if self.overlaps(offset, length):
            self.drain()

        def ended(bio: Bio) -> None:
            if self.in_flight.pop(bio, None) is None or bio.status:
                return
            assert bio.payload is not None
            self.model.check_read(offset, bio.payload)

        payload = memoryview(bytearray(length))
        self._submit(Bio(OP_READ, offset, length, payload, 0, ended), offset, length)


def draw_walk(rng: random.Random) -> list[Step]:
    """Whole sectors: of part of one, nobody can say what a failed write left around it."""
    kinds = {kind: weight for kind, weight in WEIGHTS.items() if kind not in LEFT_OUT}
    walk: list[Step] = []
    for kind in rng.choices(list(kinds), list(kinds.values()), k=STEPS):
        unit = rng.choice([REGION_SIZE, SECTOR])
        begin = rng.randrange(-(-DISK_SIZE // unit)) * unit
        length = rng.randrange(1, 3 * REGION_SIZE // unit + 1) * unit
        length = min(length, DISK_SIZE - begin)
        walk.append((kind, begin, length, rng.random() < 0.3))
    return walk


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
