# SPDX-License-Identifier: Apache-2.0
"""Reports to the service manager while the server runs: a line about its devices, and signs of life.

    STATUS=…      every `STATUS_PERIOD_S`, if the line has changed: "web 43 % hydrated, 2 clients"
    WATCHDOG=1    twice in the time after which the manager takes the process for dead (`WatchdogSec=`)

Both are sent by tasks on the event loop. A loop that stands still sends nothing, so a watchdog sees it.

With more than `DEVICES_LOOKED_AT_MAX` devices the line counts them and says nothing about single ones: that would take too long.
"""

from collections.abc import Callable, Sequence
from typing import Final

from nbdtarget.common.clock import sleep
from nbdtarget.common.turns import Tasks
from nbdtarget.common.units import describe_bytes
from nbdtarget.daemon.notify import Notifier
from nbdtarget.dm.mapped_device import MappedDevice

__all__ = ["ServiceReports", "status_line"]

STATUS_PERIOD_S: Final = 5.0
DEVICES_LOOKED_AT_MAX: Final = 64
NAMES_MAX: Final = 4  # the others are counted


class ServiceReports:
    """Tells the service manager how the server is, until it is stopped.

    Args: line: returns the status line.
    """

    def __init__(self, notifier: Notifier, line: Callable[[], str]) -> None:
        self._notifier = notifier
        self._line = line
        self._told = ""
        self._tasks = Tasks()

    def ready(self) -> None:
        """Tell that clients can connect, and begin to report. Idempotent."""
        self._told = self._line()
        self._notifier.ready(self._told)
        if self._notifier.has_manager and not self._tasks:
            self._tasks.start(self._tell_changes())
            if self._notifier.watchdog_s is not None:
                self._tasks.start(self._feed_watchdog(self._notifier.watchdog_s / 2))

    async def stop(self) -> None:
        """Report nothing any more. Idempotent."""
        await self._tasks.cancel()

    async def _tell_changes(self) -> None:
        while True:
            await sleep(STATUS_PERIOD_S)
            self._notifier.retry()
            if (line := self._line()) != self._told:
                self._told = line
                self._notifier.status(line)

    async def _feed_watchdog(self, period_s: float) -> None:
        while True:
            self._notifier.watchdog()
            await sleep(period_s)


def status_line(devices: Sequence[MappedDevice], nr_clients: int) -> str:
    """Return one line for people.

    For example "3 devices, web 43 % hydrated, db 12.0 MiB dirty, 2 clients; not open yet: old".
    """
    closed = [each for each in devices if each.failure and not each.has_table]
    served = [each for each in devices if each not in closed]
    details = []
    if len(served) <= DEVICES_LOOKED_AT_MAX:
        told = [(each.dm_name, _detail(each)) for each in served]
        details = [f"{name} {detail}" for name, detail in told if detail]
    parts = _shortened(details)
    if len(served) != 1:
        parts.insert(0, f"{len(served)} devices")
    elif not parts:
        parts = [f"{served[0].dm_name} is served"]
    parts.append(f"{nr_clients} client{'' if nr_clients == 1 else 's'}")
    line = ", ".join(parts)
    if closed:
        names = _shortened([each.dm_name for each in closed])
        line += f"; not open yet: {', '.join(names)}"
    return line


def _shortened(words: list[str]) -> list[str]:
    rest = len(words) - NAMES_MAX
    return words if rest <= 0 else [*words[:NAMES_MAX], f"{rest} more"]


def _detail(device: MappedDevice) -> str:
    """Return the words about a device that are worth reporting now, or ""."""
    table = device.active
    if table is None:
        return "has no table"
    if table.failed:
        return "has failed"
    hydrated = regions = dirty_bytes = 0
    for target in table.targets:
        fields = target.status_fields()
        hydrated += int(fields.get("regions_hydrated") or 0)
        regions += int(fields.get("regions_total") or 0)
        dirty_bytes += int(fields.get("dirty_bytes") or 0)
    details = []
    if hydrated < regions:
        details.append(f"{hydrated * 100 // regions} % hydrated")
    if dirty_bytes:
        details.append(f"{describe_bytes(dirty_bytes)} dirty")
    return " and ".join(details)
