# SPDX-License-Identifier: Apache-2.0
"""When the next migration may start, so that clients hardly notice.

Theory of operation. A migration costs the event loop some hundred microseconds, in several slices, and the commit
that a demotion waits for costs more. A hit that comes during a slice waits for its end. At queue depth 1,
each isolated slice delays one request; slices that run back to back delay only one request in all. So while
clients hit, migrations start in bursts, `BURST` in each `PERIOD_S`: those of a burst share the loop's turns, and
their commit. Measured with 64 KiB blocks: the p99 of hits is 0.9 to 1.4 times what it is without migrations.

There is no pause while many requests miss: then clients wait for the origin and not for migrations,
and a cache that is not warm yet must become so. (Measured with fio's zipf:1.1 behind an origin of
5 ms: with a pause in this case, too, the hit ratio was 42 % instead of 75 %.)
"""

from typing import Final

from nbdtarget.common.clock import Clock
from nbdtarget_metadata.cache.metadata import Statistics

__all__ = ["BURST", "HITS_PER_MISS", "LOOK_S", "PERIOD_S", "Throttle"]

BURST: Final = 10
PERIOD_S: Final = 0.1
LOOK_S: Final = 0.01
HITS_PER_MISS: Final = 10  # with fewer hits, many requests miss
_PERIOD_NS: Final = int(PERIOD_S * 1_000_000_000)
_LOOK_NS: Final = int(LOOK_S * 1_000_000_000)


class Throttle:
    """See the module head."""

    def __init__(self, clock: Clock, statistics: Statistics) -> None:
        self._clock = clock
        self._statistics = statistics
        self._period_end_ns = 0
        self._nr_started = 0  # in this period
        self._looked_ns = 0
        self._nr_hits = 0
        self._nr_misses = 0
        self._is_hit = False  # in the time before we looked

    @property
    def ready_ns(self) -> int:
        """The time at which the next migration may start (Clock.now_ns); past times mean now."""
        now_ns = self._clock.now_ns()
        if now_ns - self._looked_ns >= _LOOK_NS:
            self._look(now_ns)
        if now_ns >= self._period_end_ns:
            self._period_end_ns = now_ns + _PERIOD_NS
            self._nr_started = 0
        is_spent = self._is_hit and self._nr_started >= BURST
        return self._period_end_ns if is_spent else 0

    def note_start(self) -> None:
        """A migration starts."""
        self._nr_started += 1

    def _look(self, now_ns: int) -> None:
        self._looked_ns = now_ns
        seen = self._statistics
        nr_hits = seen.read_hits + seen.write_hits
        nr_misses = seen.read_misses + seen.write_misses
        self._is_hit = nr_hits - self._nr_hits > HITS_PER_MISS * (
            nr_misses - self._nr_misses
        )
        self._nr_hits, self._nr_misses = nr_hits, nr_misses
