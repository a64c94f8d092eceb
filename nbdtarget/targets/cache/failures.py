# SPDX-License-Identifier: Apache-2.0
"""Counts the failures of the disks below a cache, and logs them now and then."""

import logging

from nbdtarget.common.clock import Clock
from nbdtarget.common.errors import DeviceError
from nbdtarget.common.say_rarely import SayRarely

__all__ = ["Failures"]

log = logging.getLogger(__name__)


class Failures:
    """The failures of one table.

    Attributes:
        nr_errors: requests and copies that have failed.
        last_error: what the last of them says, in one line.
    """

    def __init__(self, name: str, clock: Clock) -> None:
        self._name = name
        self._errors = SayRarely(clock)
        self._actions = SayRarely(clock)
        self.nr_errors = 0
        self.last_error: str | None = None

    def note(self, what: str, error: DeviceError) -> None:
        """Count a failure of `what`, and log it unless one was logged a moment ago."""
        self.nr_errors += 1
        self.last_error = f"{what}: {error}"
        if self._errors.count():
            log.error(
                "%s: %s (%d failed so far)",
                self._name,
                self.last_error,
                self.nr_errors,
            )

    def say(self, what: str) -> None:
        """Log what was done about failures, unless that was said a moment ago."""
        if self._actions.count():
            log.warning("%s: %s", self._name, what)
