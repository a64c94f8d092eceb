# SPDX-License-Identifier: Apache-2.0
"""`KeptSource`: a source that a plan has opened to learn its size stays open until the table is loaded.

To open an image by a helper starts two programs, and a remote image costs a request to a distant server. Doing that twice at each start would
be a third of a second of nothing. So the plan hands the open device over: the registry gets this as its opener.
"""

from collections.abc import Hashable

from nbdtarget.devices import resolve
from nbdtarget.devices.base import Device

__all__ = ["KeptSource"]


class KeptSource:
    """See the module head. Everything but `open_device` is as in `nbdtarget.devices.resolve`."""

    def __init__(self) -> None:
        self._name = ""
        self._device: Device | None = None

    def keep(self, name: str, device: Device) -> bool:
        """Keep a device that was opened read-only, if it is worth it; the caller closes it otherwise."""
        if self._device is not None or not resolve.is_read_only(name):
            return False
        self._name, self._device = name, device
        return True

    async def open_device(self, name: str, *, read_only: bool = False) -> Device:
        """Raises: ResolveError."""
        device = self._device
        if device is None or name != self._name or not read_only:
            return await resolve.open_device(name, read_only=read_only)
        self._device = None
        return device

    async def close(self) -> None:
        """Close the disk, unless a table has taken it."""
        device, self._device = self._device, None
        if device is not None:
            await device.close()

    async def create_device(
        self, name: str, size: int, *, sparse: bool = False
    ) -> Device:
        """Raises: ResolveError."""
        return await resolve.create_device(name, size, sparse=sparse)

    async def remove_created(self, name: str) -> None:
        await resolve.remove_created(name)

    def may_create(self, name: str) -> bool:
        return resolve.may_create(name)

    def identity(self, name: str) -> Hashable:
        return resolve.identity(name)
