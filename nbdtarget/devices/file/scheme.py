# SPDX-License-Identifier: Apache-2.0
"""Device names that are paths: of regular files and of block devices."""

import errno as errnos
import os
import stat
from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.scheme import Scheme

if TYPE_CHECKING:
    from nbdtarget.devices.base import Device

__all__ = ["FileScheme", "path_of"]


class FileScheme(Scheme):
    name: ClassVar[str] = ""
    syntax: ClassVar[str] = "PATH"
    summary: ClassVar[str] = "a regular file or a block device"

    async def open(self, name: str, *, read_only: bool) -> "Device":
        from nbdtarget.devices.file.open import open_file

        return await open_file(name, path_of(name), read_only=read_only)

    def identity(self, name: str) -> Hashable:
        try:
            status = os.stat(name)
        except (OSError, ValueError):
            return ("missing", os.path.realpath(name) if "\0" not in name else name)
        if stat.S_ISBLK(status.st_mode):
            return ("block", status.st_rdev)
        return ("file", status.st_dev, status.st_ino)

    def absolute(self, name: str, directory: str) -> str:
        return os.path.normpath(os.path.join(directory, name))

    def path(self, name: str) -> str | None:
        return name

    def may_create(self, name: str) -> bool:
        """Whether `name` is a missing file whose directory exists."""
        if not name or "\0" in name or os.path.lexists(name):
            return False
        return not name.endswith("/") and os.path.isdir(os.path.dirname(name) or ".")

    async def create(self, name: str, size: int, *, sparse: bool) -> "Device":
        from nbdtarget.devices.file.open import create_file

        return await create_file(name, path_of(name), size, sparse=sparse)

    async def remove_created(self, name: str) -> None:
        import asyncio  # which the command line's help can do without

        await asyncio.to_thread(os.unlink, path_of(name))


def path_of(name: str) -> str:
    """Return the path that `name` is. Raises: ResolveError: it cannot be one."""
    if not name:
        raise ResolveError(name, "a device needs a name", errnos.ENOENT)
    if "\0" in name:
        raise ResolveError(name.replace("\0", "\\0"), "a path has no NUL byte")
    return name
