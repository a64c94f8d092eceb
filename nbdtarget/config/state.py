# SPDX-License-Identifier: Apache-2.0
"""`StateDirectory`: devices that were made by `create --persist`, and are there again after a restart.

Theory of operation. The directory holds `devices.toml` (`nbdtarget.config.state_file`) and a lock, which the one server has that
uses it. For each device that is kept, the file has its name, UUID and live table, as `table` shows it. The file is written:

    after each verb          that changes which devices there are, before its answer: what a client was told is durable
    while a table is swapped, after the old table has committed and before a request runs through the new one (`before_live`). So the
                             table in the file is never older than a write that was acknowledged. If the new one refuses, the old
                             one is written down again before a request runs through it

At the start the devices are made before clients can connect, in the same way as those of a configuration file: one that cannot be opened
is shown as failed, tried again, and stays in the file. A file that is damaged ends the start, and is left as it is.

Not kept: minor numbers, inactive tables, a suspension, access rules, geometry, statistics.

If the file cannot be written, the verb fails and says so. Its change of the device stays, but for `create`, which is undone.
"""

import asyncio
import errno as errnos
import fcntl
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from nbdtarget.common.clock import sleep
from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.common.turns import to_the_end
from nbdtarget.config.devices import ConfiguredDevices
from nbdtarget.config.file import FILE_SIZE_MAX, Config, DeviceConfig
from nbdtarget.config.state_file import read_state, render_state, replace_file
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from nbdtarget.targets.base import Target

__all__ = ["DEVICES_FILE", "StateDirectory"]

log: Final = logging.getLogger(__name__)

DEVICES_FILE: Final = "devices.toml"
LOCK_FILE: Final = "lock"
DEVICES_AT_ONCE: Final = 64  # are looked at in one turn of the loop


class _AnyName:
    """Names of devices on which others may stand: what is missing at the start is waited for."""

    def __contains__(self, name: object) -> bool:
        return True


class StateDirectory:
    """The devices that are kept in one directory. First `open`; from then on verbs may be carried out. Then `restore`."""

    def __init__(
        self, directory: str, registry: Registry, types: Mapping[str, type[Target]]
    ) -> None:
        self._directory = os.path.abspath(directory)
        self._path = os.path.join(self._directory, DEVICES_FILE)
        self._registry = registry
        self._types = types
        self._kept: dict[MappedDevice, DeviceConfig] = {}
        # Devices in the file that `restore` has not made yet. Each write of the file keeps them in it.
        self._waiting: tuple[DeviceConfig, ...] = ()
        # The text of the file; None: it may have this one or that.
        self._written: str | None = ""
        self._config: Config | None = None  # as it was at the start
        self._restored: ConfiguredDevices | None = None
        self._lock_fd: int | None = None
        self._saving = asyncio.Lock()

    def open(self, taken: Mapping[str, str]) -> None:
        """Take the directory, make it if it is missing, and read it. It may block.

        Args: taken: names of devices that come from elsewhere, and from where.
        Raises: NbdTargetError: nothing has changed.
        """
        self._take()
        self._read(taken)

    def _read(self, taken: Mapping[str, str]) -> None:
        """Raises: NbdTargetError."""
        config = read_state(self._path, self._types, _AnyName())
        for device in config.devices:
            if device.name in taken:
                raise NbdTargetError(
                    f"{self._path} and {taken[device.name]} both have a device {device.name}:"
                    " remove it from the latter, or rename it there"
                )
        self._written = Path(self._path).read_text() if config.devices else ""
        self._config = config
        self._waiting = tuple(config.devices)
        self._restored = ConfiguredDevices(self._registry, config)

    def _take(self) -> None:
        """Raises: NbdTargetError: the directory cannot be used, or another server has it."""
        try:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            fd = os.open(os.path.join(self._directory, LOCK_FILE), flags, 0o600)
        except OSError as error:
            raise NbdTargetError(
                f"{self._directory}: {error.strerror or error}"
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise NbdTargetError(
                f"{self._directory}: another server keeps its state here: name another directory"
            ) from None
        self._lock_fd = fd

    async def restore(self) -> None:
        """Make the devices; one that cannot be opened goes on being tried. Verbs may be carried out meanwhile."""
        assert self._restored is not None
        assert self._config is not None
        await self._restored.start()
        waiting, self._waiting = self._waiting, ()
        for config in waiting:
            device = self._registry.maybe_device(config.name)
            if device is not None:
                self._keep(device, config)
        try:
            await self.save()  # what clients have removed meanwhile
        except TableError as error:
            log.error("%s", error)

    async def pause(self) -> None:
        """Let go of the directory, for the process that takes over. `resume` undoes it."""
        await self.close()

    async def resume(self) -> None:
        """Go on as before `pause`: the other process has failed. Raises: NbdTargetError."""
        self._take()
        # Devices that are not open have been given up, and others may have been removed since the start.
        await asyncio.to_thread(self._read, {})
        await self.restore()

    async def close(self) -> None:
        """Write nothing any more, and try no more to open anything. The devices stay in the file."""
        async with self._saving:
            if self._lock_fd is not None:
                os.close(self._lock_fd)
                self._lock_fd = None
        if self._restored is not None:
            await self._restored.close()

    # ---- what the verbs call ----

    async def keep(self, device: MappedDevice) -> None:
        """Keep a device from now on. Raises: TableError: that could not be written, and it is not kept.

        Durable: the device is there after a restart.
        """
        self._keep(device, DeviceConfig(device.dm_name, "", ()))
        try:
            await self.save()
        except BaseException:  # it may be cancelled, and then the device is not kept
            self._forget(device)
            raise

    async def save(self) -> None:
        """Write down what has changed of the devices that are kept. Raises: TableError.

        Durable: all of them are there after a restart, with the tables that they have now.
        """
        if not self._kept and self._written == "":
            return  # quick, for the many servers that keep nothing
        async with self._saving:
            text = await self._text()
            if text == self._written:
                return
            if self._lock_fd is None:
                raise TableError(
                    "Device or resource busy: the server is stopping or handing over",
                    errnos.EBUSY,
                )
            if len(text.encode()) > FILE_SIZE_MAX:
                raise TableError(
                    f"{self._path}: more than {FILE_SIZE_MAX} bytes would not be read at the next start:"
                    " after a restart the devices are as they were before this",
                    errnos.EFBIG,
                )
            self._written = None
            try:
                await to_the_end(asyncio.to_thread(replace_file, self._path, text))
            except OSError as error:
                reason = error.strerror or str(error)
                raise TableError(
                    f"{self._path}: {reason}: after a restart the devices may be as they were before this",
                    error.errno or errnos.EIO,
                ) from None
            self._written = text

    def _keep(self, device: MappedDevice, config: DeviceConfig) -> None:
        self._kept[device] = config
        device.before_live = self.save

    def _forget(self, device: MappedDevice) -> None:
        del self._kept[device]
        device.before_live = None

    async def _text(self) -> str:
        existing = set(self._registry.devices())
        for device in set(self._kept) - existing:
            self._forget(device)
        for nr, (device, config) in enumerate(list(self._kept.items())):
            if nr % DEVICES_AT_ONCE == 0:
                await sleep(0)  # others have their turn
            self._kept[device] = await _config_of(device, config)
        return render_state([*self._kept.values(), *self._waiting])


async def _config_of(device: MappedDevice, before: DeviceConfig) -> DeviceConfig:
    """Return the record of a device to keep; of one that is not open yet, with the table that it had."""
    named = replace(
        before, name=device.dm_name, uuid=device.uuid, table=before.table.strip()
    )
    table = device.active
    if table is None:
        return named
    lines = await table.lines_in_turns(lambda target: target.table_words())
    return replace(
        named,
        table="\n".join(" ".join(map(str, line)).rstrip() for line in lines),
        read_only=table.read_only,
        rotational=device.said_rotational,
    )
