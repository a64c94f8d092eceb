# SPDX-License-Identifier: Apache-2.0
"""Device names of the form `memory:SIZE`."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.units import parse_size
from nbdtarget.devices.scheme import Scheme

if TYPE_CHECKING:
    from nbdtarget.devices.base import Device

__all__ = ["MemoryScheme"]


class MemoryScheme(Scheme):
    name: ClassVar[str] = "memory"
    syntax: ClassVar[str] = "memory:SIZE"
    summary: ClassVar[str] = "a sparse disk in memory, empty each time it is opened"
    is_volatile: ClassVar[bool] = True

    async def open(self, name: str, *, read_only: bool) -> "Device":
        from nbdtarget.devices.memory import MemoryDevice

        return MemoryDevice(_size(name), name=name, read_only=read_only)

    def identity(self, name: str) -> Hashable:
        return (self.name, object())  # each time that it is opened, it is another disk


def _size(name: str) -> int:
    try:
        size = parse_size(name.partition(":")[2])
    except ValueError as error:
        raise ResolveError(name, str(error)) from None
    if size == 0:
        raise ResolveError(name, "is empty")
    return size
