# SPDX-License-Identifier: Apache-2.0
"""Looks at names, sizes and formats before anything is changed. Nothing here changes anything."""

import errno as errnos
import logging
from pathlib import Path
from typing import Final

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.units import SECTOR
from nbdtarget.devices import resolve
from nbdtarget.devices.base import Device
from nbdtarget.devices.image_format import ImageFormat
from nbdtarget.devices.image_look import maybe_image_on
from nbdtarget.devices.rounded import RoundedDevice
from nbdtarget.porcelain.kept import KeptSource

__all__ = [
    "check_directory",
    "check_distinct",
    "disk_size",
    "export_name",
    "is_fresh",
    "metadata_name",
    "warn_of_image",
]

METADATA_HEAD_BYTES: Final = 16384  # the superblocks of a metadata device

log = logging.getLogger(__name__)


def metadata_name(given: str | None, disk: str, directory: str) -> str:
    """Return the name of the metadata: as given, else beside `disk`, which is absolute."""
    if given is not None:
        return resolve.absolute_name(given, directory)
    path = resolve.path_of(disk)
    if path is None:
        raise ResolveError(
            disk, "is not a file: say where its metadata is to be, with --metadata FILE"
        )
    if path.startswith("/dev/"):
        raise ResolveError(
            disk, "is a device: say where its metadata is to be, with --metadata FILE"
        )
    return f"{path}.nbdtarget"


def export_name(given: str | None, disk: str, otherwise: str) -> str:
    """Return the name of the export: as given, else as the file of `disk`, if that makes a name."""
    if given is not None:
        return given
    path = resolve.path_of(disk)
    stem = "" if path is None else Path(path).stem
    is_name = stem.isprintable() and stem not in ("", ".", "control")
    return stem if is_name else otherwise


def check_distinct(**names: str) -> None:
    """Refuse one device in two roles.

    Args: names: role and name of each device.
    Raises: ResolveError.
    """
    seen: dict[object, str] = {}
    for role, name in names.items():
        other = seen.setdefault(resolve.identity(name), role)
        if other != role:
            reason = f"is both {other} and {role}: they must be different"
            raise ResolveError(name, reason, errnos.EBUSY)


def check_directory(name: str) -> None:
    """Refuse a path in a directory that is missing. Raises: ResolveError."""
    path = resolve.path_of(name)
    if path is not None and not Path(path).parent.is_dir():
        reason = f"the directory {Path(path).parent} does not exist: make it first"
        raise ResolveError(name, reason, errnos.ENOENT)


async def disk_size(
    name: str, *, read_only: bool, kept: KeptSource | None = None
) -> int:
    """Return the bytes of a disk; one that is only read is rounded up to whole sectors, with a note.

    Args: kept: may keep the disk open, for the table that is loaded next.

    Raises: ResolveError: it cannot be opened, is empty, or its size is not a multiple of a sector.
    DeviceError: it cannot be read.
    """
    device = await resolve.open_device(name, read_only=read_only)
    try:
        size = device.size
        is_odd = size % SECTOR or isinstance(device, RoundedDevice)
        # A file of such a size is no disk that a guest could have written a header to.
        image = await _maybe_image(device, name) if is_odd else None
        is_kept = (
            kept is not None and size > 0 and not is_odd and kept.keep(name, device)
        )
    except BaseException:  # a cancelled look leaves no disk open
        await device.close()
        raise
    if not is_kept:
        await device.close()
    if image is not None:
        raise ResolveError(name, image.refusal(name, resolve.path_of(name)))
    if size == 0:
        raise ResolveError(name, "is empty")
    if size % SECTOR:
        raise ResolveError(
            name,
            f"its size, {size} bytes, is not a multiple of {SECTOR}, and it is opened for writing:"
            f" `truncate -s %{SECTOR} {name}' makes it a little larger",
        )
    if isinstance(device, RoundedDevice):
        log.warning("%s: %s", name, device.note)
    return size


async def warn_of_image(name: str, *, read_only: bool) -> None:
    """Log a warning if a disk that counts as raw begins or ends like an image in a format.

    Raises: ResolveError: it cannot be opened. DeviceError: it cannot be read.
    """
    device = await resolve.open_device(name, read_only=read_only)
    try:
        image = await _maybe_image(device, name)
    finally:
        await device.close()
    if image is not None:
        advice = image.advice_for(name, resolve.path_of(name))
        log.warning(
            "%s: %s like %s, and is served as a raw disk all the same: %s; raw:%s says that"
            " this is meant",
            name,
            image.verb,
            image.what,
            advice,
            name,
        )


async def _maybe_image(device: Device, name: str) -> ImageFormat | None:
    """Return the format whose mark the device has, if its name does not say its format. Raises: DeviceError."""
    if resolve.says_format(name) or not device.may_be_container:
        return None
    return await maybe_image_on(device)


async def is_fresh(metadata: str) -> bool:
    """Whether the metadata is missing or all zero at its head."""
    check_directory(metadata)
    if resolve.may_create(metadata):
        return True
    device = await resolve.open_device(metadata, read_only=True)
    try:
        head = await device.read(0, min(METADATA_HEAD_BYTES, device.size))
    finally:
        await device.close()
    return not any(head)
