# SPDX-License-Identifier: Apache-2.0
"""Device names of the form `direct:PATH`: a file or a block device without the page cache."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar

from nbdtarget.devices.file.scheme import FileScheme, path_of

if TYPE_CHECKING:
    from nbdtarget.devices.base import Device

__all__ = ["DirectScheme"]


class DirectScheme(FileScheme):
    """A path with a word before it. It is the same disk as the path alone."""

    name: ClassVar[str] = "direct"
    syntax: ClassVar[str] = "direct:PATH"
    summary: ClassVar[str] = "the same, without the page cache (direct I/O)"

    async def open(self, name: str, *, read_only: bool) -> "Device":
        from nbdtarget.devices.file.direct import DirectDevice
        from nbdtarget.devices.file.open import open_file

        path = path_of(_path(name))
        return await open_file(name, path, read_only=read_only, kind=DirectDevice)

    def identity(self, name: str) -> Hashable:
        return super().identity(_path(name))

    def absolute(self, name: str, directory: str) -> str:
        return f"{self.name}:{super().absolute(_path(name), directory)}"

    def path(self, name: str) -> str | None:
        return _path(name)

    def may_create(self, name: str) -> bool:
        return super().may_create(_path(name))

    async def create(self, name: str, size: int, *, sparse: bool) -> "Device":
        from nbdtarget.devices.file.direct import DirectDevice
        from nbdtarget.devices.file.open import create_file

        path = path_of(_path(name))
        return await create_file(name, path, size, sparse=sparse, kind=DirectDevice)

    async def remove_created(self, name: str) -> None:
        await super().remove_created(_path(name))


def _path(name: str) -> str:
    return name.partition(":")[2]
