# SPDX-License-Identifier: Apache-2.0
"""`MetricsOptions`: where a server tells its metrics alone, and of what they tell."""

from typing import Final, NamedTuple

from nbdtarget.control.paths import ControlAddress, control_address

__all__ = ["NO_METRICS", "MetricsOptions"]


class MetricsOptions(NamedTuple):
    """The options about metrics, of the command line or of the configuration file.

    Attributes:
        address: as it was written; None: metrics have no address of their own.
        has_devices: metrics tell of each device; None: nothing was said.
    """

    address: str | None = None
    has_devices: bool | None = None

    def or_else(self, other: "MetricsOptions") -> "MetricsOptions":
        """Return these options, and those of `other` for the ones that are not given here."""
        return MetricsOptions(
            self.address or other.address,
            other.has_devices if self.has_devices is None else self.has_devices,
        )

    @property
    def where(self) -> ControlAddress | None:
        """Raises: NbdTargetError: it is no address."""
        return None if self.address is None else control_address(self.address)

    @property
    def tells_of_devices(self) -> bool:
        return self.has_devices is not False


NO_METRICS: Final = MetricsOptions()
