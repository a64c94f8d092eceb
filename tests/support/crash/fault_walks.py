# SPDX-License-Identifier: Apache-2.0
"""Random walks of a clone whose devices fail."""

import os
import random

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.common.errors import ConstructorError
from nbdtarget.dm.table import Table
from tests.support.crash.machine import Driver
from tests.support.crash.rigs import DISK_SIZE, REGION_SIZE, CloneRig
from tests.support.crash.walks import KINDS, Step
from tests.support.devices import (
    BadRange,
    CrashDevice,
    FailAfter,
    FailFlush,
    FaultDevice,
)
from tests.support.model import SECTOR

__all__ = ["FAIL_AT_MAX", "LEFT_OUT", "STEPS", "FaultDriver", "FaultRig", "draw_walk"]

STEPS = int(os.environ.get("SIM_STEPS", "60"))
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
    """Draw a walk that writes whole sectors: a failed write of a part leaves the rest of its sector unknown."""
    kinds = {kind: weight for kind, weight in KINDS.items() if kind not in LEFT_OUT}
    walk: list[Step] = []
    for kind in rng.choices(list(kinds), list(kinds.values()), k=STEPS):
        unit = rng.choice([REGION_SIZE, SECTOR])
        begin = rng.randrange(-(-DISK_SIZE // unit)) * unit
        length = rng.randrange(1, 3 * REGION_SIZE // unit + 1) * unit
        length = min(length, DISK_SIZE - begin)
        walk.append((kind, begin, length, rng.random() < 0.3))
    return walk
