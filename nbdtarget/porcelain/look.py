# SPDX-License-Identifier: Apache-2.0
"""What a plan looks at before anything is changed: names, sizes, images. Nothing here changes anything."""

import errno as errnos
import logging
from pathlib import Path
from typing import Final

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.units import SECTOR
from nbdtarget.devices import resolve

__all__ = [
    "check_directory",
    "check_distinct",
    "disk_size",
    "export_name",
    "is_fresh",
    "metadata_name",
]

HEAD_BYTES: Final = 16384  # the superblocks of a metadata device
IMAGE_HEAD_BYTES: Final = 512
# The offset and the bytes by which a format is recognised.
IMAGE_MAGICS: Final = {
    "qcow2": (0, b"QFI\xfb"),
    "vmdk": (0, b"KDMV"),
    "vhdx": (0, b"vhdxfile"),
    "vhd": (0, b"conectix"),
    "vdi": (64, b"\x7f\x10\xda\xbe"),
}
IMAGE_ADVICE: Final = (
    "looks like an image in the format {image}, and is used as a raw disk here; to use the disk inside,"
    " serve it with qemu-nbd and give the URI"
)

log = logging.getLogger(__name__)


def metadata_name(given: str | None, disk: str, directory: str) -> str:
    """Return the name of the metadata: as given, else beside `disk`, which is absolute."""
    if given is not None:
        return resolve.absolute_name(given, directory)
    if not disk.startswith("/"):
        raise ResolveError(
            disk, "is not a file: say where its metadata is to be, with --metadata FILE"
        )
    if disk.startswith("/dev/"):
        raise ResolveError(
            disk, "is a device: say where its metadata is to be, with --metadata FILE"
        )
    return f"{disk}.nbdtarget"


def export_name(given: str | None, disk: str, otherwise: str) -> str:
    """Return the name of the export: as given, else as the file of `disk`, if that makes a name."""
    if given is not None:
        return given
    stem = Path(disk).stem if disk.startswith("/") else ""
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
    if name.startswith("/") and not Path(name).parent.is_dir():
        reason = f"the directory {Path(name).parent} does not exist: make it first"
        raise ResolveError(name, reason, errnos.ENOENT)


async def disk_size(name: str, *, read_only: bool) -> int:
    """Return the bytes of a disk. A file that looks like an image in a format is warned about.

    Raises: ResolveError: it cannot be opened, is empty, or its size is not a multiple of a sector.
    """
    device = await resolve.open_device(name, read_only=read_only)
    try:
        head = await device.read(0, min(IMAGE_HEAD_BYTES, device.size))
    finally:
        await device.close()
    image = _image_format(head) if name.startswith("/") else ""
    advice = IMAGE_ADVICE.format(image=image) if image else ""
    if device.size == 0:
        raise ResolveError(name, "is empty")
    if device.size % SECTOR:
        raise ResolveError(
            name,
            f"its size, {device.size} bytes, is not a multiple of {SECTOR}: "
            + (advice or f"`truncate -s %{SECTOR} {name}` makes it a little larger"),
        )
    if advice:
        log.warning("%s: %s", name, advice)
    return device.size


def _image_format(head: bytes | bytearray | memoryview) -> str:
    """Return the format that the file seems to be in, or "" for a raw disk."""
    head = bytes(head)
    for image, (offset, magic) in IMAGE_MAGICS.items():
        if head[offset : offset + len(magic)] == magic:
            return image
    return ""


async def is_fresh(metadata: str) -> bool:
    """Whether the metadata is missing or all zero at its head."""
    check_directory(metadata)
    if resolve.may_create(metadata):
        return True
    device = await resolve.open_device(metadata, read_only=True)
    try:
        head = await device.read(0, min(HEAD_BYTES, device.size))
    finally:
        await device.close()
    return not any(head)
