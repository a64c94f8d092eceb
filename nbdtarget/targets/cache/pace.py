# SPDX-License-Identifier: Apache-2.0
"""When the next migration may start, so that clients hardly notice.

Theory of operation. A migration costs the event loop some hundred microseconds, in several slices; a hit that comes
during one of them waits for its end. One client at depth 1 is hit once for each slice. So the
number of slices a second bounds how many of its requests are late, and with it the percentiles:
`PAUSE_S` apart, migrations touch fewer than one request in a hundred of a client that is as fast as
it can be. While nobody hits anything, as when everybody waits for the origin, there is no pause.
"""

from typing import Final

from metadata.cache import Statistics
from nbdtarget.clock import Clock

__all__ = ["PAUSE_S", "Pace"]

PAUSE_S: Final = 0.01
_PAUSE_NS: Final = int(PAUSE_S * 1_000_000_000)


class Pace:
    """See the module head."""

    def __init__(self, clock: Clock, statistics: Statistics) -> None:
        self._clock = clock
        self._statistics = statistics
        self._started_ns = 0
        self._looked_ns = 0
        self._nr_hits = 0
        self._is_hit = False  # in the time before we looked

    @property
    def ready_ns(self) -> int:
        """When the next migration may start (Clock.now_ns); past times mean now."""
        now_ns = self._clock.now_ns()
        if now_ns - self._looked_ns >= _PAUSE_NS:
            self._looked_ns = now_ns
            nr_hits = self._statistics.read_hits + self._statistics.write_hits
            self._is_hit = nr_hits != self._nr_hits
            self._nr_hits = nr_hits
        return self._started_ns + _PAUSE_NS if self._is_hit else 0

    def note_start(self) -> None:
        """A migration starts."""
        self._started_ns = self._clock.now_ns()
