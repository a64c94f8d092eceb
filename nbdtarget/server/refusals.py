# SPDX-License-Identifier: Apache-2.0
"""`Refusals`: clients that were refused because of who they are, or are not: counted by reason, and logged.

    certificate       it showed one that is not accepted: of another authority, expired, withdrawn
    no_certificate    it showed none, and one is asked for
    no_tls            it does not use TLS, which is required
    tls               the handshake of TLS failed for another reason; often the client does not accept our certificate
    rules             no rule lets it attach the export

Any client that reaches the port can be refused as often as it likes. So at most REFUSALS_LOGGED_MAX are logged one by one in
REFUSALS_PERIOD_S; of the others one line says at the end of that time how many there were. All are counted. Connections that were closed
because of a bound count elsewhere (`Listener.nr_refused`).
"""

import logging
from typing import Final

from nbdtarget.common.clock import Clock, Timer

__all__ = ["REASONS", "REFUSALS_LOGGED_MAX", "REFUSALS_PERIOD_S", "Refusals"]

log = logging.getLogger(__name__)

REASONS: Final = ("certificate", "no_certificate", "no_tls", "tls", "rules")
REFUSALS_LOGGED_MAX: Final = 20  # lines
REFUSALS_PERIOD_S: Final = 60.0


class Refusals:
    """See the module head.

    Attributes: counts: by reason; all of them are there from the beginning.
    """

    __slots__ = ("_clock", "_left_out", "_nr_logged", "_timer", "counts")

    def __init__(self, clock: Clock) -> None:
        self.counts = dict.fromkeys(REASONS, 0)
        self._clock = clock
        self._nr_logged = 0  # since the period began
        self._left_out: dict[str, int] = {}  # by reason
        self._timer: Timer | None = None  # runs from the first line of a period

    def note(self, reason: str, line: str) -> None:
        """Count a refusal, and log its line unless there were too many."""
        self.counts[reason] += 1
        if self._timer is None:
            self._timer = self._clock.call_later(REFUSALS_PERIOD_S, self._end_period)
        if self._nr_logged < REFUSALS_LOGGED_MAX:
            self._nr_logged += 1
            log.warning("%s", line)
        else:
            self._left_out[reason] = self._left_out.get(reason, 0) + 1

    def close(self) -> None:
        """The listener ends: tell of those that were left out."""
        if self._timer is not None:
            self._timer.cancel()
        self._end_period()

    def _end_period(self) -> None:
        self._timer, self._nr_logged = None, 0
        left_out, self._left_out = self._left_out, {}
        if left_out:
            by_reason = ", ".join(f"{reason} {nr}" for reason, nr in left_out.items())
            nr_all = sum(left_out.values())
            log.warning("%d more clients were refused: %s", nr_all, by_reason)
