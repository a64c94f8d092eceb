# SPDX-License-Identifier: Apache-2.0
"""Random walks over a clone one of whose devices fails, or lies, on the way; then the power is
cut.

Reads may fail, and go back to what was there before an unflushed write: only that they end
is asked here. What an acknowledged FLUSH or FUA covered is there after the crash all the same.
A table that is loaded once something has failed may find that what was never flushed is gone; if it
says so, what is flushed after that, and what was before it, is held to as ever.
"""

import os
import random
from collections import Counter

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE, Bio
from nbdtarget.common.errors import ConstructorError, DeviceError, TableError
from nbdtarget.devices.losses import FlushObserver
from nbdtarget.dm.table import Table
from tests.crash.test_machine import KINDS, Step, take
from tests.support.crash.machine import Driver
from tests.support.crash.rigs import DISK_SIZE, REGION_SIZE, CloneRig
from tests.support.devices import (
    BadRange,
    CrashDevice,
    FailAfter,
    FailFlush,
    FaultDevice,
)
from tests.support.model import SECTOR

WALKS = int(os.environ.get("SIM_WALKS", "100"))
STEPS = int(os.environ.get("SIM_STEPS", "60"))
SEED = int(os.environ.get("SIM_SEED", "0"))

FAIL_AT_MAX = 70
LEFT_OUT = ("status", "stop", "cut_power")  # they ask for a disk that works


class FaultRig(CloneRig):
    """A clone on devices of which one will fail; sound again after the crash."""

    fault: CrashDevice | FaultDevice

    def arm(self, rng: random.Random) -> None:
        """Choose the device and how it fails: an operation, or a lie of its own."""
        self.fault = rng.choice([self.destination, self.metadata, self.source])
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

    @property
    def active(self) -> Table | None:
        return self._registry.get("d").active

    @property
    def losses(self) -> int:
        return self._registry.get("d").losses


class FaultDriver(Driver):
    """Holds reads to nothing but their end."""

    def __init__(self, rig: FaultRig) -> None:
        try:
            super().__init__(rig)
        except ConstructorError:
            self.discard_loop()
            raise

    def read(self, offset: int, length: int) -> None:
        if self.overlaps(offset, length):
            self.drain()

        def ended(bio: Bio) -> None:
            self.in_flight.pop(bio, None)

        payload = memoryview(bytearray(length))
        self._submit(Bio(OP_READ, offset, length, payload, 0, ended), offset, length)


def draw_walk(rng: random.Random) -> list[Step]:
    """Whole sectors: of part of one, nobody can say what a failed write left around it."""
    kinds = {kind: weight for kind, weight in KINDS.items() if kind not in LEFT_OUT}
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
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    rig = FaultRig(seed, rng.choice([0.0, 0.5, 1.0]))
    rig.arm(rng)
    try:
        driver = FaultDriver(rig)
    except ConstructorError:
        return counts  # it was refused: there is nothing to lose
    try:
        for step in draw_walk(rng):
            table, losses = rig.active, rig.losses
            try:
                take(driver, step)
            except (ConstructorError, TableError, DeviceError):
                assert rig.fault.failed, "refused without a reason"
            if rig.active is not table and rig.losses > losses:
                assert rig.fault.failed, "lost without a reason"
                driver.model.lose_unflushed()
                counts["lost"] += 1
        if rng.random() < 0.5:
            driver.drain()
        driver.cut_power(rng.randrange(1 << 30))
        driver.verify()
        driver.run(driver.rig.stop())
    finally:
        driver.discard_loop()
    counts["failed"] = rig.fault.failed > 0
    return counts


def test_clone_keeps_its_word_when_a_device_fails() -> None:
    counts: Counter[str] = Counter()
    for seed in range(SEED, SEED + WALKS):
        try:
            counts += run_walk(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert counts["failed"] > WALKS // 4, "faults that nothing meets prove nothing"
    assert counts["lost"], "tables that lose nothing prove nothing"


class LateDevice(CrashDevice):
    """A failed write takes effect some operations later, over what was written since."""

    def _carry_out(self, bio: Bio, mark: int, errno: int) -> None:
        late = self.__dict__.setdefault("late", [])
        if errno and bio.op == OP_WRITE:
            bio.own()
            late.append((len(self.trace) + 5, bio))
        super()._carry_out(bio, mark, errno)
        while late and late[0][0] <= len(self.trace):
            self._happen_all_the_same(late.pop(0)[1], mark)


def test_fault_walks_catch_a_failed_write_that_lands_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.support.crash.rigs.CrashDevice", LateDevice)

    def fails(seed: int) -> bool:
        try:
            run_walk(seed)
        except AssertionError:
            return True
        return False

    assert any(fails(seed) for seed in range(100))


@pytest.mark.parametrize("noflush", [False, True])
async def test_flush_after_reloads_does_not_promise_a_write_that_a_commit_lost(
    noflush: bool,
) -> None:
    rig = CloneRig(1, 1.0)
    fault = FaultDevice(rig.metadata)
    rig.devices["/metadata"] = fault
    await rig.start()
    await rig.message("disable_hydration")
    clients = [FlushObserver(rig.disk) for _ in range(2)]
    written = bytes([7]) * REGION_SIZE
    await rig.disk.write(0, written)  # never flushed
    fault.fail_at = fault.count
    if noflush:
        await rig._registry.suspend("d", noflush=True)  # it cannot commit
    else:
        await rig.load()
        await rig.resume()  # nor can this one's suspend
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
