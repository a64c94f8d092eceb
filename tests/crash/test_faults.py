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

from nbdtarget.bio import OP_WRITE, Bio
from nbdtarget.common.errors import ConstructorError, DeviceError, TableError
from nbdtarget.devices.losses import FlushObserver
from tests.support.crash.fault_walks import FaultDriver, FaultRig, draw_walk
from tests.support.crash.rigs import REGION_SIZE, CloneRig
from tests.support.crash.walks import take
from tests.support.devices import (
    CrashDevice,
    FaultDevice,
)

WALKS = int(os.environ.get("SIM_WALKS", "100"))
SEED = int(os.environ.get("SIM_SEED", "0"))


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


@pytest.mark.long
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
