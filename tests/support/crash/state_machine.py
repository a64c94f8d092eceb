# SPDX-License-Identifier: Apache-2.0
"""A target over crash devices as a state machine of hypothesis."""

import os
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nbdtarget.targets.powercut.volatile_cache import Fate
from tests.support.crash.machine import Driver, Rig
from tests.support.crash.rigs import REGION_SIZE
from tests.support.model import SECTOR

__all__ = [
    "DEEP",
    "EXAMPLES",
    "REGIONS_AT_ONCE_MAX",
    "SEEDS",
    "SETTINGS",
    "MakeRig",
    "TargetMachine",
    "ranges",
    "run_machine",
]

DEEP = bool(os.environ.get("CRASH_DEEP"))
EXAMPLES = 600 if DEEP else 100
SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=60 if DEEP else 30,
    derandomize=not DEEP,
    database=None,
    deadline=None,
    print_blob=DEEP,
    # To shorten a failure takes minutes; the gate need not.
    phases=list(Phase) if DEEP else [Phase.explicit, Phase.generate],
)
REGIONS_AT_ONCE_MAX = 3
SEEDS = st.integers(0, 1 << 20)
MakeRig = Callable[[int, float], Rig]


def ranges(data: st.DataObject, size: int) -> tuple[int, int]:
    """Draw offset and length: whole regions, whole sectors or ragged bytes."""
    unit = data.draw(st.sampled_from([REGION_SIZE, SECTOR, 1]))
    begin = data.draw(st.integers(0, -(-size // unit) - 1)) * unit
    length = data.draw(st.integers(1, REGIONS_AT_ONCE_MAX * REGION_SIZE // unit)) * unit
    return begin, min(length, size - begin)


class TargetMachine(RuleBasedStateMachine):
    """See the module head."""

    make_rig: ClassVar[MakeRig]
    counts: ClassVar[Counter[str]]

    driver: Driver
    images: tuple[bytes, ...] | None = None  # the power is off: what the devices hold
    is_sound = False  # the last step has come to its end

    @initialize(seed=SEEDS, inline=st.sampled_from([0.0, 0.5, 1.0]))
    def boot(self, seed: int, inline: float) -> None:
        self.seed = seed
        self.driver = Driver(type(self).make_rig(seed, inline))
        self.is_sound = True

    def step(self, action: Callable[[Driver], Any]) -> None:
        self.is_sound = False
        action(self.driver)
        self.is_sound = True

    @property
    def is_up(self) -> bool:
        return self.images is None

    @property
    def is_running(self) -> bool:
        return self.is_up and not self.driver.suspended

    # ---- clients ----

    @precondition(lambda self: self.is_up)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        at = ranges(data, self.driver.model.size)
        self.step(lambda driver: driver.read(*at))

    @precondition(lambda self: self.is_up)
    @rule(data=st.data())
    def cache(self, data: st.DataObject) -> None:
        at = ranges(data, self.driver.model.size)
        self.step(lambda driver: driver.cache(*at))

    @precondition(lambda self: self.is_up)
    @rule(data=st.data(), fua=st.booleans())
    def write(self, data: st.DataObject, fua: bool) -> None:
        at = ranges(data, self.driver.model.size)
        self.step(lambda driver: driver.write(*at, fua=fua))

    @precondition(lambda self: self.is_up)
    @rule(data=st.data(), fua=st.booleans())
    def write_zeroes(self, data: st.DataObject, fua: bool) -> None:
        at = ranges(data, self.driver.model.size)
        self.step(lambda driver: driver.zero(*at, fua=fua))

    @precondition(lambda self: self.is_up)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        at = ranges(data, self.driver.model.size)
        self.step(lambda driver: driver.discard(*at))

    @precondition(lambda self: self.is_up)
    @rule()
    def flush(self) -> None:
        self.step(lambda driver: driver.flush())

    @precondition(lambda self: self.is_running)
    @rule(place=st.integers(0, 1 << 10), turns=st.sampled_from([0, 2, 5, 30]))
    def write_wait_and_flush(self, place: int, turns: int) -> None:
        """Write, wait and FLUSH. Drawn steps seldom come in this order, in which the FLUSH has something to promise."""
        offset = place * REGION_SIZE % (self.driver.model.size // SECTOR * SECTOR)
        self.step(lambda driver: driver.write(offset, SECTOR, fua=False))
        self.step(lambda driver: driver.drain())
        self.step(lambda driver: driver.flush())
        self.step(lambda driver: driver.turn(turns))

    # ---- time ----

    @precondition(lambda self: self.is_up)
    @rule(turns=st.integers(1, 20))
    def turn(self, turns: int) -> None:
        self.step(lambda driver: driver.turn(turns))

    @precondition(lambda self: self.is_up)
    @rule(seconds=st.sampled_from([0.01, 0.1, 1.5]))
    def let_time_pass(self, seconds: float) -> None:
        self.step(lambda driver: driver.advance(seconds))

    @precondition(lambda self: self.is_up)
    @rule()
    def wait_for_all(self) -> None:
        self.step(lambda driver: driver.drain())

    @precondition(lambda self: self.is_running)
    @rule()
    def hydrate_a_step(self) -> None:
        self.step(lambda driver: driver.hydrate_a_step())

    # ---- the administrator ----

    @precondition(lambda self: self.is_up and self.driver.rig.messages)
    @rule(data=st.data())
    def message(self, data: st.DataObject) -> None:
        words = data.draw(st.sampled_from(self.driver.rig.messages))
        self.step(lambda driver: driver.run(driver.rig.message(*words)))

    @precondition(lambda self: self.is_running)
    @rule()
    def suspend(self) -> None:
        self.step(lambda driver: driver.suspend())

    @precondition(lambda self: self.is_up)
    @rule()
    def load(self) -> None:
        self.step(lambda driver: driver.load())

    @precondition(lambda self: self.is_up)
    @rule()
    def resume(self) -> None:
        self.step(lambda driver: driver.resume())

    # ---- power ----

    @precondition(lambda self: self.is_up)
    @rule(seed=SEEDS, fate=st.sampled_from(Fate))
    def crash(self, seed: int, fate: Fate) -> None:
        """The power goes; what was pending meets one fate, in any order."""
        self.images = self.driver.crash_images(seed, fate)

    @precondition(lambda self: self.is_up)
    @rule(data=st.data())
    def crash_with_a_subset(self, data: st.DataObject) -> None:
        """The power goes; hypothesis chooses which of the pending writes are there."""
        images = []
        for device in self.driver.rig.at_risk:
            possible = list(device.crash_images(samples=0))
            images.append(possible[data.draw(st.integers(0, len(possible) - 1))])
        self.images = tuple(images)

    @rule(seed=SEEDS)
    def reopen(self, seed: int) -> None:
        """The power comes back; or, if it was never gone, a clean shutdown and a start."""
        images, self.images = self.images, None
        if images is None:
            self.step(lambda driver: driver.restart())
        else:
            self.step(lambda driver: driver.boot(seed, images))

    # ---- what must hold ----

    @invariant()
    def what_is_promised_would_survive(self) -> None:
        """I1 and the oracle, on the best and the worst that a cut now may leave."""
        if not (self.is_sound and self.is_up):
            return
        self.is_sound = False
        driver = self.driver
        promised = driver.rig.invariants.promised()
        for fate in (Fate.DROP, Fate.KEEP):
            rig = driver.rig.reboot(self.seed, driver.crash_images(self.seed, fate))
            rig.check_survivors(driver.model, promised)
        self.is_sound = True

    @invariant()
    def nothing_is_broken(self) -> None:
        """I2 to I7: whatever was found while the devices worked."""
        if self.is_sound:
            self.step(lambda driver: driver.rig.invariants.look())

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        try:
            if self.is_sound:
                self.reopen(0)
                self.driver.verify()
                self.driver.restart()
                self.driver.verify()
                type(self).counts += self.driver.rig.invariants.counts
        finally:
            self.driver.discard_loop()


def run_machine(make_rig: MakeRig, examples: int = EXAMPLES) -> Counter[str]:
    """Run that many examples; return how often each invariant was held against something.

    Raises: AssertionError, whatever does not hold.
    """

    class Machine(TargetMachine):
        pass

    Machine.make_rig = staticmethod(make_rig)
    Machine.counts = Counter()
    run_state_machine_as_test(
        Machine, settings=settings(SETTINGS, max_examples=examples)
    )
    return Machine.counts
