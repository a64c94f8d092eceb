# SPDX-License-Identifier: Apache-2.0
"""`Replacements`: a target asks that another one take its place, and gets it while clients go on.

For example, a hydrated clone asks for a `linear` on its destination. The new target gets the open devices that the old
one hands over, and not what their names mean by now. Each replacement is a task of its own. It holds the
lock of the loads, so no table is loaded meanwhile. If it cannot be done, the table is what it was.
"""

import asyncio
import errno as errnos
import logging
from collections.abc import Mapping
from typing import Protocol

from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.common.units import SECTOR
from nbdtarget.devices.base import Device
from nbdtarget.dm.mapped_device import MappedDevice, State
from nbdtarget.dm.open_devices import MappedDevices, TableContext
from nbdtarget.dm.table import TargetSpec
from nbdtarget.targets.base import Target

__all__ = ["Replacements"]

log = logging.getLogger(__name__)


class _Registry(MappedDevices, Protocol):
    """The methods of the registry that are called here."""

    types: Mapping[str, type[Target]]

    def maybe_load_lock(self, device: MappedDevice) -> asyncio.Lock | None: ...


class Replacements:
    """The replacements that are under way. See the module head."""

    def __init__(self, registry: _Registry) -> None:
        self._registry = registry
        self._tasks: dict[TableContext, asyncio.Task[None]] = {}

    def request(
        self,
        device: MappedDevice,
        context: TableContext,
        type_name: str,
        args: tuple[str, ...],
        devices: tuple[Device, ...],
    ) -> None:
        """Begin one, unless one for this target is under way. See `TargetContext.request_replacement`."""
        if context in self._tasks:
            return
        task = asyncio.get_running_loop().create_task(
            self._replace_and_tell(device, context, type_name, args, devices)
        )
        self._tasks[context] = task

    async def ended(self, device: MappedDevice) -> None:
        """Wait until no replacement holds anything open for `device` any more."""
        tasks = [
            task
            for context, task in self._tasks.items()
            if context.mapped_device is device
        ]
        if tasks:
            await asyncio.wait(tasks)

    async def _replace_and_tell(
        self,
        device: MappedDevice,
        context: TableContext,
        type_name: str,
        args: tuple[str, ...],
        devices: tuple[Device, ...],
    ) -> None:
        what = f"{device.name}: {type_name} in the place of sector"
        what = f"{what} {context.begin // SECTOR} of the table"
        try:
            await self._replace(device, context, type_name, args, devices)
        except NbdTargetError as error:
            # After a suspend, or with another table, the person who did that expects it: no warning.
            is_live = device.maybe_live_target(context) is not None
            is_news = is_live and device.state is State.ACTIVE
            level = logging.WARNING if is_news else logging.INFO
            log.log(level, "%s: not done: %s", what, error)
        except Exception:
            # A bug of ours. The table is what it was, and the next request is heard.
            log.critical("%s: failed", what, exc_info=True)
            return
        else:
            log.info("%s", what)
        finally:
            del self._tasks[context]
        device.event()

    async def _replace(
        self,
        device: MappedDevice,
        context: TableContext,
        type_name: str,
        args: tuple[str, ...],
        devices: tuple[Device, ...],
    ) -> None:
        """Raises: TableError, ConstructorError: the table is what it was."""
        lock = self._registry.maybe_load_lock(device)
        if lock is None:
            raise TableError("Device does not exist", errnos.ENXIO)
        async with lock:
            old = device.maybe_live_target(context)
            if old is None:
                raise TableError("another table is live")
            spec = TargetSpec(old.begin, old.length, type_name, args)
            new_context = TableContext(
                self._registry,
                device,
                spec,
                directory="/",
                read_only=device.read_only,
                kept=devices,
            )
            try:
                new = await self._registry.types[type_name].ctr(new_context, args)
            except BaseException:
                await new_context.undo()
                raise
            try:
                await device.replace_target(old, new)
            except BaseException:
                if device.maybe_live_target(new_context) is not new:
                    await new.dtr()
                raise
