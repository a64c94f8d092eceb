# SPDX-License-Identifier: Apache-2.0
"""`Reopenings`: devices that a hand-over has closed, and that could not be opened again when it failed.

Each is tried again until it is open. In between it is a device whose disk could not be opened at the start: without a table,
with the reason in `MappedDevice.failure`, and its requests end with EIO. Its clients stay attached, and their next requests
are carried out as soon as the device is open again.

    between attempts    RETRY_S_MIN after the first, twice as long after each other one, at most RETRY_S_MAX; at once after
                        `try_now` (SIGHUP), or when another one of them is open, on which it may stand
    end                 the device is open; or a command has removed it or given it a table: then it is left as it is
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from nbdtarget.common.clock import timeout
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.dm.mapped_device import MappedDevice, State

__all__ = ["RETRY_S_MAX", "RETRY_S_MIN", "Reopenings"]

RETRY_S_MIN: Final = 1.0
RETRY_S_MAX: Final = 30.0

log = logging.getLogger(__name__)


class Reopenings:
    """Those of one registry. See the module head.

    Attributes:
        opened: called after each device that is open again.
    """

    def __init__(self) -> None:
        self.opened: Callable[[], None] = _nothing
        self._tasks: dict[MappedDevice, asyncio.Task[None]] = {}
        self._again: dict[MappedDevice, asyncio.Event] = {}

    def __contains__(self, device: MappedDevice) -> bool:
        return device in self._tasks

    def start(
        self, device: MappedDevice, attempt: Callable[[], Awaitable[bool]]
    ) -> None:
        """Begin to try.

        Args: attempt: opens the device as it was; False: a command has given it another table. It raises NbdTargetError if it
            fails, and leaves the device as before then.
        """
        assert device not in self._tasks
        self._again[device] = asyncio.Event()
        self._tasks[device] = asyncio.create_task(self._run(device, attempt))

    def try_now(self) -> None:
        """Do not wait any longer for the next attempts."""
        for again in self._again.values():
            again.set()

    async def close(self) -> None:
        """Try no more."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(
        self, device: MappedDevice, attempt: Callable[[], Awaitable[bool]]
    ) -> None:
        try:
            if await self._try_until_open(device, attempt):
                log.warning("%s: is open again", device.name)
                self.opened()
        except Exception:
            # A bug of ours. This device is not tried again, and shows why it is not open; the others are tried.
            log.exception("%s: opening it again", device.name)
        finally:
            del self._tasks[device], self._again[device]
        self.try_now()

    async def _try_until_open(
        self, device: MappedDevice, attempt: Callable[[], Awaitable[bool]]
    ) -> bool:
        retry_s = RETRY_S_MIN
        again = self._again[device]
        while True:
            try:
                async with timeout(retry_s):
                    await again.wait()
            except TimeoutError:
                retry_s = min(2 * retry_s, RETRY_S_MAX)
            else:
                retry_s = RETRY_S_MIN
            again.clear()
            if device.state is State.REMOVED:
                return False
            try:
                return await attempt()
            except NbdTargetError as error:
                log.info("%s: not open again: %s", device.name, error)


def _nothing() -> None:
    """Do nothing: there is no job that has to be told."""
