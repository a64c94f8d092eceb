# SPDX-License-Identifier: Apache-2.0
"""`Below`: the devices on which the live table of a mapped device stands, their losses and their trouble.

Losses (see `nbdtarget.devices.health`). The losses of a mapped device are its own count, in its `health`, plus those of
the devices below its live table since that table became live (`Below.losses`). When a table is swapped
away, what was lost below it is added to the device's own count, so the sum neither shrinks nor jumps with a swap.
The device's own count also goes up when a table is swapped away with writes that had ended and were not flushed: the flush
of the suspend failed, the target says so (`has_lost_writes`), the table has failed, or `noflush` left the flush out
and the next table does not stand on the same devices, so that no later FLUSH reaches the writes. Whatever flushes a
mapped device learns of a loss from the number, on its way up through any number of tables, and not from the FLUSH.

Trouble. Whenever a device below is latched or lost, or loses something, that is an event of the mapped device, and
of those that stand on it (`Health.watchers`).
"""

from nbdtarget.devices.base import Device
from nbdtarget.devices.health import Health
from nbdtarget.dm.table import Table
from nbdtarget_metadata.disks import PIN_IDS

__all__ = ["Below"]


class Below:
    """See the module head.

    Attributes:
        devices: all of them, each once.
    """

    def __init__(self, health: Health) -> None:
        """Args: health: of the mapped device."""
        self._health = health
        self._data_devices: tuple[Device, ...] = ()
        self._losses_before = 0  # theirs, when the table became live
        self.devices: tuple[Device, ...] = ()

    @property
    def losses(self) -> int:
        """Return the number of losses below since the table became live."""
        return sum(each.losses for each in self._data_devices) - self._losses_before

    def adopt(self, table: Table | None) -> None:
        """Take over `table`, which is live from now on."""
        self._health.losses += self.losses
        self._data_devices = () if table is None else table.data_devices()
        self._losses_before = sum(each.losses for each in self._data_devices)
        self._watch(() if table is None else tuple(dict.fromkeys(table.devices())))

    async def pins(self, role: str) -> tuple[str, ...]:
        """Return what a remote image is pinned by, if it is all that lies below: a linear target on a URL, for example."""
        if len(self.devices) != 1:
            return ()
        found = await self.devices[0].identify(role)
        return tuple(each for each in found.ids if each.partition("=")[0] in PIN_IDS)

    def forget(self) -> None:
        """Hear of no trouble any more: the mapped device is gone."""
        self._watch(())

    def _watch(self, devices: tuple[Device, ...]) -> None:
        """Hear of the trouble of these devices, and of no others."""
        for device in self.devices:
            device.health.watchers.remove(self._health.notify)
        for device in devices:
            device.health.watchers.append(self._health.notify)
        self.devices = devices
