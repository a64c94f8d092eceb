# SPDX-License-Identifier: Apache-2.0
"""How late the loop is, on a clock that the test moves."""

from nbdtarget.monitor.loop_lag import BOUNDS_S, LoopLag
from tests.support.clock import SimClock


class LateClock(SimClock):
    """Its timers call `late_s` later than they were asked to."""

    late_s = 0.0

    def now_ns(self) -> int:
        return super().now_ns() + int(self.late_s * 1e9)


def test_what_is_late_counts_in_its_class() -> None:
    clock = LateClock()
    lag = LoopLag(clock)
    lag.start()
    lag.start()  # is one timer all the same
    clock.advance(1.0)
    assert lag.counts == [1, *[0] * len(BOUNDS_S)]
    clock.late_s = 0.02
    clock.advance(1.0)
    assert lag.counts[BOUNDS_S.index(0.05)] == 1
    assert lag.sum_s == 0.02
    lag.stop()
    clock.advance(5.0)
    assert sum(lag.counts) == 2
