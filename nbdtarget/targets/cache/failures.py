# SPDX-License-Identifier: Apache-2.0
"""What has failed below a cache so far: counted, and logged now and then."""

import logging
from typing import Final

from nbdtarget.common.clock import Clock
from nbdtarget.common.errors import DeviceError

__all__ = ["Failures"]

SAY_S_MIN: Final = 5.0  # between two lines in the log of one kind
_NS: Final = 1_000_000_000

log = logging.getLogger(__name__)


class Failures:
    """The failures of one table.

    Attributes:
        nr_errors: requests and copies that have failed.
        last_error: what the last of them says, in one line.
    """

    def __init__(self, name: str, clock: Clock) -> None:
        self._name = name
        self._clock = clock
        self._error_ns = self._said_ns = 0
        self.nr_errors = 0
        self.last_error: str | None = None

    def note(self, what: str, error: DeviceError) -> None:
        """Count a failure of `what`, and log it unless one was logged a moment ago."""
        self.nr_errors += 1
        self.last_error = f"{what}: {error}"
        now_ns = self._clock.now_ns()
        if now_ns >= self._error_ns:
            self._error_ns = now_ns + int(SAY_S_MIN * _NS)
            log.error(
                "%s: %s (%d failed so far)",
                self._name,
                self.last_error,
                self.nr_errors,
            )

    def say(self, what: str) -> None:
        """Log what was done about failures, unless that was said a moment ago."""
        now_ns = self._clock.now_ns()
        if now_ns >= self._said_ns:
            self._said_ns = now_ns + int(SAY_S_MIN * _NS)
            log.warning("%s: %s", self._name, what)
