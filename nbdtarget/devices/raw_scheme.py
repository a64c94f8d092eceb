# SPDX-License-Identifier: Apache-2.0
"""Device names of the form `raw:DISK`: the disk called DISK, also if it begins like an image or an archive.

Without this word, clone and cache refuse a disk that begins like an image in another format (`image_format.py`). It
changes nothing else: it is the same disk as DISK.
"""

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, ClassVar

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.scheme import Scheme, scheme_of

if TYPE_CHECKING:
    from nbdtarget.devices.base import Device

__all__ = ["RawScheme"]


class RawScheme(Scheme):
    """Every question goes to the scheme of DISK, which is one of `schemes`."""

    name: ClassVar[str] = "raw"
    syntax: ClassVar[str] = "raw:DISK"
    summary: ClassVar[str] = "the same, and you know that DISK is no image in a format"
    says_format: ClassVar[bool] = True

    def __init__(self, schemes: Mapping[str, Scheme]) -> None:
        self._schemes = schemes

    async def open(self, name: str, *, read_only: bool) -> "Device":
        scheme, inner = self._inner(name)
        device = await scheme.open(inner, read_only=read_only)
        if device.secret_name:
            device.secret_name = f"{self.name}:{device.secret_name}"
        device.name = f"{self.name}:{device.name}"
        return device

    def identity(self, name: str) -> Hashable:
        try:
            scheme, inner = self._inner(name)
        except ResolveError:
            return name
        return scheme.identity(inner)

    def absolute(self, name: str, directory: str) -> str:
        try:
            scheme, inner = self._inner(name)
        except ResolveError:
            return name
        return f"{self.name}:{scheme.absolute(inner, directory)}"

    def may_start_programs(self, name: str) -> bool:
        try:
            scheme, inner = self._inner(name)
        except ResolveError:
            return False
        return scheme.may_start_programs(inner)

    def path(self, name: str) -> str | None:
        try:
            scheme, inner = self._inner(name)
        except ResolveError:
            return None
        return scheme.path(inner)

    def is_read_only(self, name: str) -> bool:
        try:
            scheme, inner = self._inner(name)
        except ResolveError:
            return False
        return scheme.is_read_only(inner)

    def copy_sizes(self, name: str) -> tuple[int, int]:
        try:
            scheme, inner = self._inner(name)
        except ResolveError:
            return super().copy_sizes(name)
        return scheme.copy_sizes(inner)

    def may_create(self, name: str) -> bool:
        try:
            scheme, inner = self._inner(name)
        except ResolveError:
            return False
        return scheme.may_create(inner)

    async def create(self, name: str, size: int, *, sparse: bool) -> "Device":
        scheme, inner = self._inner(name)
        device = await scheme.create(inner, size, sparse=sparse)
        device.name = f"{self.name}:{device.name}"
        return device

    async def remove_created(self, name: str) -> None:
        scheme, inner = self._inner(name)
        await scheme.remove_created(inner)

    def _inner(self, name: str) -> tuple[Scheme, str]:
        """Return the scheme of DISK, and DISK. Raises: ResolveError: there is no such scheme."""
        inner = name.partition(":")[2]
        return scheme_of(self._schemes, inner), inner
