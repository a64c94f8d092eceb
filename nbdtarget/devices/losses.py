# SPDX-License-Identifier: Apache-2.0
"""`FlushObserver`: how many losses of its devices one connection, or one committer, has reported.

Theory of operation. A device goes on after a loss (see `nbdtarget.devices.health`), and its next
flush succeeds. So the number of losses is compared before and after each flush, by all code that tells others
that data is durable: by a connection, which answers its client's FLUSH, and by a committer, whose
superblock says that data is there.

    mark = observer.mark()             when the flush is submitted
    errno = observer.end(mark, errno)  when it has ended: EIO if there has been a loss

A mark is the number of losses that had been reported by then, not the number that had happened. So if several
flushes are in flight when the first of them reports the loss, all of them report it: each of them
was asked about writes that may be gone. The first flush that is submitted after that succeeds.

FUA. A write with FUA promises only its own data, which it has just written: it is not failed.

New connections. Nothing of what a client writes over a new connection is hit by an old loss, so
an observer begins with the current number. But a FLUSH covers what other connections have written
(that is what CAN_MULTI_CONN means), and a client that lost its connection comes back with a new
one. So what a `ConnectionObserver` leaves behind when it closes, and no successful flush has
covered since, is passed on: the next one begins with the number of the one that closed, and reports
all losses since then. Linux does the same with a file that is opened while an error
of its page cache has not been reported to any.
"""

import asyncio
import errno as errnos
from typing import NamedTuple

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import Device
from nbdtarget.devices.health import Bequest

__all__ = ["ConnectionObserver", "FlushObserver"]


class FlushObserver:
    """See the module head. One for all `devices` together, each of them counted once."""

    def __init__(self, *devices: Device) -> None:
        self._devices = tuple({id(device): device for device in devices}.values())
        self._told = self._losses

    @property
    def _losses(self) -> int:
        return sum(device.losses for device in self._devices)

    def mark(self) -> int:
        """Take this when a flush is submitted, for `end`."""
        return self._told

    def end(self, mark: int, errno: int) -> int:
        """The flush has ended with `errno`: return what to answer, which also tells of losses."""
        losses = self._losses
        if not errno and losses != mark:
            errno = errnos.EIO
        if errno:
            self._told = losses
        return errno

    async def flush(self) -> None:
        """Flush all devices at the same time, and tell of their losses.

        Returns, or raises, when none of them is in flight any more.
        Raises: DeviceError: of the first device whose flush failed; or something was lost.
        Durable: every write to the devices that had ended when this was called.
        """
        mark = self.mark()
        try:
            await self._flush_all()
        except DeviceError as error:
            self.end(mark, error.errno)
            raise
        if errno := self.end(mark, 0):
            names = ", ".join(device.name for device in self._devices)
            raise DeviceError(errno, names, "flush", 0, 0)

    async def _flush_all(self) -> None:
        if len(self._devices) == 1:
            await self._devices[0].flush()
            return
        flushes = (device.flush() for device in self._devices)
        for result in await asyncio.gather(*flushes, return_exceptions=True):
            if result is not None:
                raise result


class _Mark(NamedTuple):
    told: int
    bequest: Bequest | None


class ConnectionObserver:
    """The observer of one connection to `device`. See *New connections* in the module head."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._inherited = device.health.bequest
        self._told = (
            device.losses if self._inherited is None else self._inherited.losses
        )

    def mark(self) -> _Mark:
        """As `FlushObserver.mark`."""
        return _Mark(self._told, self._device.health.bequest)

    def end(self, mark: _Mark, errno: int) -> int:
        """As `FlushObserver.end`."""
        losses = self._device.losses
        health = self._device.health
        bequest = health.bequest
        if not errno and losses != mark.told:
            errno = errnos.EIO
        if errno:
            self._told = losses
        if bequest is not None and bequest is mark.bequest:
            # Either all that it stands for is durable now, or the observer that inherited it has reported it.
            is_covered = not errno and bequest.losses == losses
            if is_covered or (errno and bequest is self._inherited):
                health.bequest = None
        return errno

    def has_none(self) -> bool:
        """Whether there is nothing to tell: a FLUSH that succeeds now would be answered so, and change nothing here."""
        health = self._device.health
        return health.bequest is None and self._device.losses == self._told

    def close(self) -> None:
        """The connection is gone: leave behind what it has not been told."""
        health = self._device.health
        bequest = health.bequest
        told = self._told if bequest is None else min(self._told, bequest.losses)
        health.bequest = Bequest(told)
