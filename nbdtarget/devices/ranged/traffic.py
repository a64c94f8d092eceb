# SPDX-License-Identifier: Apache-2.0
"""`Traffic`: what one remote disk has cost so far, and whether it answers."""

from collections import Counter

from nbdtarget.common.clock import wall_clock_s

__all__ = ["Traffic"]


class Traffic:
    """Counted since the disk was opened.

    Attributes:
        requests: that were sent, those that failed included.
        bytes_received: of its content.
        retries: requests that were sent because an earlier one had failed; of an NBD server, attempts to connect again.
        renewals: new credentials and URLs.
        failures: failed requests, by what was wrong: `away`, `denied`, `unfit`, `changed`.
        away_since_s: Unix time since when it does not answer; 0.0: it does.
    """

    __slots__ = (
        "_away_s",
        "away_since_s",
        "bytes_received",
        "failures",
        "renewals",
        "requests",
        "retries",
    )

    def __init__(self) -> None:
        self.requests = 0
        self.bytes_received = 0
        self.retries = 0
        self.renewals = 0
        self.failures: Counter[str] = Counter()
        self.away_since_s = 0.0
        self._away_s = 0.0  # before it came back last

    @property
    def away_s(self) -> float:
        """Seconds that it has not answered, added up."""
        return self._away_s + self._gone_s()

    def went_away(self) -> bool:
        """Note that the server does not answer. Returns whether that is news."""
        if self.away_since_s:
            return False
        self.away_since_s = wall_clock_s()
        return True

    def came_back(self) -> bool:
        """Note that the server answers. Returns whether that is news."""
        if not self.away_since_s:
            return False
        self._away_s += self._gone_s()
        self.away_since_s = 0.0
        return True

    def _gone_s(self) -> float:
        # The clock may have been set back meanwhile.
        return (
            max(0.0, wall_clock_s() - self.away_since_s) if self.away_since_s else 0.0
        )
