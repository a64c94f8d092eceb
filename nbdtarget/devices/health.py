# SPDX-License-Identifier: Apache-2.0
"""`Health`: what has gone wrong with one open device, for `status`, for `info`, and for FLUSH.

    state     meaning                                                 ends when the device
    OK        nothing that has been acknowledged is in doubt
    LATCHED   a write or a flush failed: FLUSH and FUA end with EIO   is opened again
    LOST      nobody answers any more: everything ends with EIO       is connected or opened again

*Losses.* `losses` counts how often writes that had ended, and that no FLUSH had covered yet, may have
been lost although the device goes on. Everybody who flushes must learn of each loss once, as each
open file learns of a lost page once from fsync: whoever promises durability remembers the
number that it has reported, and fails one FLUSH when the number has grown.
"""

import os
from collections import Counter
from enum import Enum

from nbdtarget.clock import wall_clock_s

__all__ = ["Health", "HealthState"]


class HealthState(Enum):
    """See the module head."""

    OK = "ok"
    LATCHED = "latched"
    LOST = "lost"


class Health:
    """The health of one open device.

    Attributes:
        state: see the module head.
        errno: why it is latched or lost; 0 while it is not.
        since_s: since when, in seconds of Unix time; 0.0 while it is OK.
        errors: how many requests have failed since the device was opened, by operation.
        last_error: the last of them in words; "" if there was none.
        losses: see the module head.
    """

    __slots__ = ("errno", "errors", "last_error", "losses", "since_s", "state")

    def __init__(self) -> None:
        self.state = HealthState.OK
        self.errno = 0
        self.since_s = 0.0
        self.errors: Counter[str] = Counter()
        self.last_error = ""
        self.losses = 0

    @property
    def is_usable(self) -> bool:
        """Whether a table that is loaded now may stand on it: neither latched nor lost."""
        return self.state is HealthState.OK

    def note_error(self, operation: str, errno: int) -> None:
        """Count a request that failed."""
        self.errors[operation] += 1
        self.last_error = f"{operation}: {os.strerror(errno)}"

    def latch(self, errno: int) -> bool:
        """Go to LATCHED; returns whether that is news."""
        return self._become(HealthState.LATCHED, errno)

    def lose(self, errno: int) -> bool:
        """Go to LOST; returns whether that is news."""
        return self._become(HealthState.LOST, errno)

    def recover(self) -> None:
        """The device answers again; nothing that it had acknowledged is in doubt but `losses`."""
        self.state = HealthState.OK
        self.errno = 0
        self.since_s = 0.0

    def _become(self, state: HealthState, errno: int) -> bool:
        if self.state in (state, HealthState.LOST):
            return False
        self.state = state
        self.errno = errno
        self.since_s = wall_clock_s()
        return True
