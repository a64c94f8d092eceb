# SPDX-License-Identifier: Apache-2.0
"""Copies that no client waits for: in bulk where the devices can, and kept out of the page cache.

Theory of operation. A copy goes through threads (`nbdtarget.devices.bulk`), or, where the source lends no streams,
through a `Copier`, by bios. Copied ranges gather in windows of `WINDOW_BYTES`. A full window is handed to
`Device.write_behind`, one window at a time: it is written back while the next one is being copied, and then dropped
from the page cache of the destination.

*Bound.* While `WINDOWS_MAX` windows wait to be written, no copy begins: a copy is not faster than the disk for
longer than that, so clients that write do not find the disk's queue full of copies.

A copy orders nothing and flushes nothing; see `nbdtarget.targets.copier`.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final
from weakref import WeakMethod

from nbdtarget.bio import OP_NAMES, OP_READ, OP_WRITE
from nbdtarget.common.errors import DeviceError
from nbdtarget.common.turns import Tasks
from nbdtarget.devices.base import Device
from nbdtarget.devices.bulk import BulkCopies
from nbdtarget.devices.bulk_streams import BulkFailure
from nbdtarget.targets.copier import Copier, CopyError

__all__ = ["WINDOWS_MAX", "WINDOW_BYTES", "BackgroundCopier"]

WINDOW_BYTES: Final = 16 << 20
WINDOWS_MAX: Final = 4  # full ones, the one that is being written included

_Range = tuple[int, int]


class BackgroundCopier:
    """Copies ranges to the same place on the destination.

    Args:
        failed: takes the exception of a hint that should have raised none (a bug).
    """

    def __init__(
        self,
        source: Device,
        destination: Device,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._copier = Copier(source, destination, behind=True)
        self._source = source
        self._destination = destination
        self._bulk = BulkCopies(source, destination)
        self._window: list[_Range] = []
        self._window_bytes = 0
        self._full: deque[list[_Range]] = deque()
        # Weak: a copier that its own tasks kept alive would be left to the garbage collector, with both disks.
        write_next = WeakMethod(self._write_next)
        self._writing = Tasks(failed=failed, ended=lambda: _call(write_next))
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._is_behind = False  # something was handed over, and not dropped yet

    async def copy(self, offset: int, length: int) -> None:
        """Copy `length` bytes at `offset`. Raises: CopyError: the first failure.

        Durable: nothing before a flush of the destination.
        """
        await self._has_room.wait()
        copying = self._bulk.maybe_copy(offset, length)
        if copying is None:
            await self._copier.copy(offset, length)
        elif (failure := await copying) is not None:
            raise self._error(failure)
        self._note_copied(offset, offset + length)

    def rest(self) -> None:
        """Nothing is to be copied for a while: hand over the last window, and give the streams back."""
        self._bulk.rest()
        self._copier.drop_buffers()
        if self._window:
            self._close_window()
        elif self._is_behind and not self._full and not self._writing:
            self._full.append([])  # to drop the last one
            self._write_next()

    async def quiesce(self) -> None:
        """Wait until nothing is being written back. After `rest`."""
        await self._writing.wait()

    def _error(self, failure: BulkFailure) -> CopyError:
        status, is_read, offset, length = failure
        device = self._source if is_read else self._destination
        op = OP_NAMES[OP_READ if is_read else OP_WRITE]
        return CopyError(
            DeviceError(status, device.name, op, offset, length), is_read=is_read
        )

    def _note_copied(self, begin: int, end: int) -> None:
        window = self._window
        if window and window[-1][1] == begin:
            window[-1] = (window[-1][0], end)
        else:
            window.append((begin, end))
        self._window_bytes += end - begin
        if self._window_bytes >= WINDOW_BYTES:
            self._close_window()

    def _close_window(self) -> None:
        self._full.append(sorted(self._window))
        self._window = []
        self._window_bytes = 0
        self._write_next()

    def _write_next(self) -> None:
        nr_waiting = len(self._full) + len(self._writing)
        if nr_waiting >= WINDOWS_MAX:
            self._has_room.clear()
        else:
            self._has_room.set()
        if self._full and not self._writing:
            ranges = self._full.popleft()
            self._is_behind = bool(ranges)
            self._writing.start(self._destination.write_behind(ranges))


def _call(method: "WeakMethod[Callable[[], None]]") -> None:
    """Call it, unless its object is gone."""
    if (call := method()) is not None:
        call()
