# SPDX-License-Identifier: Apache-2.0
"""What a plan looks at before anything is touched. Nothing here changes anything."""

import errno as errnos
from pathlib import Path
from typing import Final

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.units import SECTOR
from nbdtarget.devices import resolve

__all__ = [
    "check_distinct",
    "default_name",
    "disk_size",
    "is_fresh",
    "metadata_name",
]

HEAD_BYTES: Final = 16384  # the superblocks of a metadata device


def metadata_name(given: str | None, disk: str, directory: str) -> str:
    """The metadata's name: as given, else beside `disk`, which is absolute."""
    if given is not None:
        return resolve.absolute_name(given, directory)
    if not disk.startswith("/"):
        raise ResolveError(
            disk, "is not a file: say where its metadata is (--metadata)"
        )
    if disk.startswith("/dev/"):
        raise ResolveError(
            disk, "is a device: say in which file its metadata is (--metadata)"
        )
    return f"{disk}.nbdtarget"


def default_name(disk: str, otherwise: str) -> str:
    """What an export is called if nobody says: as the file, if that makes a name."""
    stem = Path(disk).stem if disk.startswith("/") else ""
    is_name = stem.isprintable() and stem not in ("", ".", "control")
    return stem if is_name else otherwise


def check_distinct(**names: str) -> None:
    """Refuse one device in two roles. Raises: ResolveError."""
    seen: dict[object, str] = {}
    for role, name in names.items():
        other = seen.setdefault(resolve.identity(name), role)
        if other != role:
            raise ResolveError(name, f"is both {other} and {role}", errnos.EBUSY)


async def disk_size(name: str, *, read_only: bool) -> int:
    """The bytes of a disk that can be opened so. Raises: ResolveError: also if it has none."""
    device = await resolve.open_device(name, read_only=read_only)
    await device.close()
    if device.size == 0 or device.size % SECTOR:
        raise ResolveError(
            name, f"size {device.size} is not a multiple of {SECTOR} bytes"
        )
    return device.size


async def is_fresh(metadata: str) -> bool:
    """Whether the metadata is missing or all zero at its head."""
    if resolve.may_create(metadata):
        return True
    device = await resolve.open_device(metadata, read_only=True)
    try:
        head = await device.read(0, min(HEAD_BYTES, device.size))
    finally:
        await device.close()
    return not any(head)
