# SPDX-License-Identifier: Apache-2.0
"""Random walks of a cache whose devices fail."""

import os
import random

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.common.errors import ConstructorError, TableError
from nbdtarget.dm.bio_path import State
from nbdtarget.targets.cache.target import CacheTarget
from tests.support.crash.cache_rigs import SwitchingCacheRig
from tests.support.crash.cache_walks import WEIGHTS, CacheDriver
from tests.support.crash.fault_walks import FAIL_AT_MAX
from tests.support.crash.rigs import DISK_SIZE, REGION_SIZE
from tests.support.crash.walks import Step
from tests.support.devices import (
    BadRange,
    CrashDevice,
    FailAfter,
    FailFlush,
    FaultDevice,
)
from tests.support.model import SECTOR

__all__ = ["LEFT_OUT", "STEPS", "FaultDriver", "FaultRig", "draw_walk"]

STEPS = int(os.environ.get("SIM_STEPS", "60"))
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
    """Draw a walk that writes whole sectors: a failed write of a part leaves the rest of its sector unknown."""
    kinds = {kind: weight for kind, weight in WEIGHTS.items() if kind not in LEFT_OUT}
    walk: list[Step] = []
    for kind in rng.choices(list(kinds), list(kinds.values()), k=STEPS):
        unit = rng.choice([REGION_SIZE, SECTOR])
        begin = rng.randrange(-(-DISK_SIZE // unit)) * unit
        length = rng.randrange(1, 3 * REGION_SIZE // unit + 1) * unit
        length = min(length, DISK_SIZE - begin)
        walk.append((kind, begin, length, rng.random() < 0.3))
    return walk
