# SPDX-License-Identifier: Apache-2.0
"""`SayRarely`: a line in the log now and then, for what may happen thousands of times a second."""

from typing import Final

from nbdtarget.common.clock import Clock

__all__ = ["SAY_S_MIN", "SayRarely"]

SAY_S_MIN: Final = 5.0  # from one line to the next

_NS: Final = 1_000_000_000


class SayRarely:
    """Decides when a line is due. The caller writes it, in its own words:

        if nr := self._rarely.count():
            log.error("%s: %s (and %d more)", name, error, nr - 1)

    The first line is due at once. Events within `period_s` of a line are only counted.
    """

    __slots__ = ("_clock", "_next_ns", "_nr_unsaid", "_period_ns")

    def __init__(self, clock: Clock, period_s: float = SAY_S_MIN) -> None:
        self._clock = clock
        self._period_ns = int(period_s * _NS)
        self._next_ns: int | None = None
        self._nr_unsaid = 0

    def count(self) -> int:
        """Count one more.

        Returns how many there were since the last line, this one included, if a line is due now; else 0.
        """
        self._nr_unsaid += 1
        now_ns = self._clock.now_ns()
        if self._next_ns is not None and now_ns < self._next_ns:
            return 0
        self._next_ns = now_ns + self._period_ns
        nr_unsaid, self._nr_unsaid = self._nr_unsaid, 0
        return nr_unsaid
