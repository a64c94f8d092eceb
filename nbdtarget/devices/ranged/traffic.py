# SPDX-License-Identifier: Apache-2.0
"""`Traffic`: what one remote image has cost so far, and whether it answers."""

from collections import Counter

__all__ = ["Traffic"]


class Traffic:
    """Counted since the image was opened.

    Attributes:
        requests: that were sent, those that failed included.
        bytes_received: of the image.
        retries: requests that were sent because an earlier one had failed.
        renewals: new credentials and URLs.
        failures: failed requests, by what was wrong: `away`, `denied`, `unfit`, `changed`.
        away_since_s: Unix time since when the image does not answer; 0.0: it does.
    """

    __slots__ = (
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
