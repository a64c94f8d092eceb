# SPDX-License-Identifier: Apache-2.0
"""`Opening`: one device of a configuration file that is not open yet, tried again until it is.

Theory of operation. From its first attempt on, the device is in the registry, without a table and with the
reason in `MappedDevice.failure`: `ls`, `info` and `status` show it, clients that ask for it are told
the reason, and what stands on it is refused as long as it is so.

    attempt     the table is loaded and resumed; if that is refused, the device is without one again
    between     RETRY_S_MIN after the first attempt, twice as long after each other one, at
                most RETRY_S_MAX; at once after `try_now` (SIGHUP, or a lower device is open)
    end         the device is open; or it was removed, or given a table, by command: then it is left
                as it is

The reason is logged when it is a new one, and not for each attempt.
"""

import asyncio
import logging
import shlex
from collections.abc import Callable, Sequence
from typing import Final

from nbdtarget.common.clock import timeout
from nbdtarget.common.errors import ConstructorError, NbdTargetError
from nbdtarget.common.permissions import option_of
from nbdtarget.config.file import DeviceConfig
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry

__all__ = ["RETRY_S_MAX", "RETRY_S_MIN", "Opening", "refusal"]

RETRY_S_MIN: Final = 1.0
RETRY_S_MAX: Final = 30.0
BEING_OPENED: Final = "is being opened"

log: Final = logging.getLogger(__name__)


def refusal(error: NbdTargetError, device: DeviceConfig) -> str:
    """The error; and the commands that allow what no word of a configuration file can allow."""
    if not isinstance(error, ConstructorError) or error.allowed_by is None:
        return str(error)
    name = shlex.quote(device.name)
    lines = " ".join(
        f"--table {shlex.quote(line)}" for line in device.table.splitlines()
    )
    return (
        f"{error} (a configuration file cannot allow this; to allow it once, run: nbdtarget load"
        f" {name} {option_of(error.allowed_by)} {lines} && nbdtarget resume {name})"
    )


class Opening:
    """Opens one device, however long that takes. See the module head.

    Attributes:
        device: what the file says.
        tried: set when the latest attempt has ended.
        is_open: the device is made as the file says.
    """

    def __init__(
        self,
        registry: Registry,
        device: DeviceConfig,
        *,
        path: str,
        directory: str,
        lower: Sequence["Opening"],
        ended: Callable[["Opening"], None],
    ) -> None:
        """Make one; nothing happens before `start`.

        Args:
            path: the file's, for the log.
            directory: absolute; where relative paths in the table are meant.
            lower: what it stands on and is not open yet; its first attempt comes after theirs.
            ended: called when nothing is left to try.
        """
        self.device = device
        self.tried = asyncio.Event()
        self.is_open = False
        self._lower = lower
        self._registry = registry
        self._what = f"{path}: device {device.name}"
        self._directory = directory
        self._ended = ended
        self._again = asyncio.Event()
        self._told = ""
        self._stand_in: MappedDevice | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Show the device as one that is being opened, and begin."""
        try:
            self._stand_in = await self._registry.create(
                self.device.name,
                None,
                uuid=self.device.uuid,
                failure=BEING_OPENED,
                rotational=self.device.rotational,
            )
        except NbdTargetError as error:
            log.error("%s: %s; it is not served", self._what, error)
            self.tried.set()
            self._ended(self)
            return
        self._task = asyncio.create_task(self._run())

    def try_now(self) -> None:
        """Do not wait any longer for the next attempt. `tried` is set when one that begins from now on has ended."""
        self.tried.clear()
        self._again.set()

    async def stop(self) -> None:
        """Try no more. Of a device that is not open, nothing is left."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._is_ours():
            await self._registry.remove(self.device.name)

    async def _run(self) -> None:
        try:
            await self._try_until_open()
        except Exception:
            # The last line of defence: the others are served all the same.
            log.exception("%s", self._what)
        finally:
            self.tried.set()
        self._ended(self)

    async def _try_until_open(self) -> None:
        for opening in self._lower:
            await opening.tried.wait()
        retry_s = RETRY_S_MIN
        while self._is_ours() and not await self._attempt():
            if not self._again.is_set():
                # An attempt that had begun before `try_now` says nothing of what is there now.
                self.tried.set()
            try:
                async with timeout(retry_s):
                    await self._again.wait()
            except TimeoutError:
                retry_s = min(2 * retry_s, RETRY_S_MAX)
            else:
                retry_s = RETRY_S_MIN
            self._again.clear()

    def _is_ours(self) -> bool:
        """Whether the device is still the one without a table that stands for it."""
        device = self._registry.maybe_device(self.device.name)
        return device is not None and device is self._stand_in and not device.has_table

    async def _attempt(self) -> bool:
        device, stand_in = self.device, self._stand_in
        assert stand_in is not None
        try:
            if device.specs:
                await self._registry.fill(
                    device.name,
                    device.table,
                    directory=self._directory,
                    read_only=device.read_only,
                )
        except NbdTargetError as error:
            self._tell(refusal(error, device))
            stand_in.failure = str(error)
            return False
        stand_in.failure = ""
        if self._told:
            log.warning("%s: is served now", self._what)
        self.is_open = True
        return True

    def _tell(self, reason: str) -> None:
        if reason == self._told:
            log.info("%s: %s", self._what, reason)
            return
        self._told = reason
        log.error(
            "%s: %s; it is not served; the server goes on trying to open it",
            self._what,
            reason,
        )
