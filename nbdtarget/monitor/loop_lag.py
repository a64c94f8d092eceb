# SPDX-License-Identifier: Apache-2.0
"""`LoopLag`: how late the event loop is. Once a second it looks how much later than due it was called.

It begins when it is first asked, so that a server whose figures are never read is not woken.
"""

from bisect import bisect_left
from typing import Final

from nbdtarget.common.clock import Clock, Timer

__all__ = ["BOUNDS_S", "LoopLag"]

BOUNDS_S: Final = (0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
PERIOD_S: Final = 1.0


class LoopLag:
    """See the module head.

    Attributes:
        counts: how many looks were how late; one for each of BOUNDS_S, and one more.
        sum_s: all of it, added up.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0
        self._due_ns = 0
        self._timer: Timer | None = None

    def start(self) -> None:
        """Begin, unless it has begun."""
        if self._timer is None:
            self._wait()

    def stop(self) -> None:
        """End; what was counted stays."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        self._due_ns = self._clock.now_ns() + int(PERIOD_S * 1e9)
        self._timer = self._clock.call_later(PERIOD_S, self._look)

    def _look(self) -> None:
        # A loop whose timers have whole milliseconds may call a little early.
        lag_s = max(0, self._clock.now_ns() - self._due_ns) / 1e9
        self.counts[bisect_left(BOUNDS_S, lag_s)] += 1
        self.sum_s += lag_s
        self._wait()
