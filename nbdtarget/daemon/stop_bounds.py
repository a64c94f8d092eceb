# SPDX-License-Identifier: Apache-2.0
"""How long the end of a server may take. What happens at each bound: `nbdtarget.daemon.daemon`."""

from typing import Final, NamedTuple

__all__ = ["STOP_S_MAX", "StopBounds"]

STOP_S_MAX: Final = 60.0  # systemd kills after 90
REQUESTS_S_MAX: Final = 10.0
DEVICES_S_MAX: Final = 30.0


class StopBounds(NamedTuple):
    """How long the end may take; seconds from the signal. See `nbdtarget.daemon.daemon`.

    Attributes: total_s: None: for ever.
    """

    total_s: float | None = STOP_S_MAX

    @classmethod
    def of(cls, seconds: float | None) -> "StopBounds":
        """Return the bounds for `--stop-timeout`. Args: seconds: 0: no bound; None: the default."""
        return cls() if seconds is None else cls(seconds or None)

    @property
    def requests_s(self) -> float:
        """The time after which reads of devices that hang are given up."""
        total_s = self.total_s
        return REQUESTS_S_MAX if total_s is None else min(REQUESTS_S_MAX, total_s / 6)

    @property
    def connections_s(self) -> float:
        """The time after which the connections that are left are closed. Clients have had their EIO by then."""
        return self.requests_s * 1.1

    @property
    def devices_s(self) -> float | None:
        """The time after which devices that do not answer are not waited for any more."""
        total_s = self.total_s
        return None if total_s is None else min(DEVICES_S_MAX, total_s / 2)
