# SPDX-License-Identifier: Apache-2.0
"""`Health`: what has gone wrong with one open device, for `status`, for `info`, and for FLUSH.

    state     meaning                                                 ends when the device
    OK        nothing that has been acknowledged is in doubt
    LATCHED   a write or a flush failed: FLUSH and FUA end with EIO   is opened again
    LOST      the server does not answer: everything ends with EIO    is connected or opened again

*Losses.* `losses` counts how often writes that had ended, and that no FLUSH had covered yet, may have
been lost although the device goes on. Each client must learn of each loss once, as each open file
learns of a lost page once from fsync. So each connection, and each other part that promises durability,
remembers the number that it has reported, and fails one FLUSH when the number has grown:
`nbdtarget.devices.losses`.
"""

import os
from collections import Counter
from collections.abc import Callable
from enum import Enum

from nbdtarget.common.clock import wall_clock_s

__all__ = ["Bequest", "Health", "HealthState"]


class HealthState(Enum):
    """See the module head."""

    OK = "ok"
    LATCHED = "latched"
    LOST = "lost"


class Bequest:
    """The state that closed connections to a device have left behind for the next one.

    Attributes:
        losses: the lowest number of losses that one of them had been told.
    """

    __slots__ = ("losses",)

    def __init__(self, losses: int) -> None:
        self.losses = losses


class Health:
    """The health of one open device.

    Attributes:
        state: see the module head.
        errno: why it is latched or lost; 0 while it is not.
        since_s: since when, in seconds of Unix time; 0.0 while it is OK.
        errors: how many requests have failed since the device was opened, by operation.
        last_error: the last of them in words; "" if there was none.
        losses: see the module head.
        bequest: see `nbdtarget.devices.losses`; None: nothing.
        watchers: each is called when the device becomes latched or lost, or loses something.
    """

    __slots__ = (
        "bequest",
        "errno",
        "errors",
        "last_error",
        "losses",
        "since_s",
        "state",
        "watchers",
    )

    def __init__(self) -> None:
        self.state = HealthState.OK
        self.errno = 0
        self.since_s = 0.0
        self.errors: Counter[str] = Counter()
        self.last_error = ""
        self.losses = 0
        self.bequest: Bequest | None = None
        self.watchers: list[Callable[[], None]] = []

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

    def note_loss(self) -> None:
        """Note that writes may be lost which had ended, and which no FLUSH had covered."""
        self.losses += 1
        self.notify()

    def notify(self) -> None:
        """Call the watchers."""
        for watcher in tuple(self.watchers):
            watcher()

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
        self.notify()
        return True
