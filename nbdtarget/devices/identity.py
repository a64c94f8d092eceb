# SPDX-License-Identifier: Apache-2.0
"""The identity of a device, by which it is recognised at the next start.

    a file              its device number, inode and time of last modification, and a mark: the
                        extended attribute `user.nbdtarget.ROLE`, "UUID GENERATION"
    a block device      what the kernel knows: WWN, serial number, uuid of a device-mapper or md
                        device or of a partition, the file behind a loop device; else its link
                        in /dev/disk/by-id
    an NBD export       the name of the export and the server's address
    a remote image      its URL without secrets, and its pin: size, ETag, version or time of last
                        modification (`nbdtarget.devices.ranged.pin`)
    what a helper opens its format and image, or its plugin and parameters, or its name; when an image was
                        last written to
    a mapped device     its uuid, if it was given one
    a disk in memory    a number that is drawn anew each time

How it is compared with what was recorded: `nbdtarget_metadata.disks`. Everything here that takes a file
descriptor or a path may block and runs in a worker. What cannot be found out is
left out, and what cannot be marked is not. Only a sync that fails is an error.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from nbdtarget.devices.nbd.uri import NbdUri
from nbdtarget_metadata.disks import FILE, Disk, Evidence, Mark

__all__ = [
    "BLOCK",
    "HELPER",
    "MAPPED",
    "MEMORY",
    "NBD",
    "URL",
    "block_ids",
    "identify_fd",
    "is_still_there",
    "mark_fd",
    "nbd_ids",
    "sync_attributes_fd",
]

BLOCK: Final = "block"
NBD: Final = "nbd"
MEMORY: Final = "memory"
MAPPED: Final = "mapped"
URL: Final = "url"
HELPER: Final = "helper"

XATTR: Final = "user.nbdtarget."
UUID_BYTES: Final = 16
GENERATION_DIGITS_MAX: Final = 20

# The ids in sysfs for a whole disk, strongest first: the key that we record, and where it stands.
_SYSFS: Final = (
    ("wwid", "wwid"),
    ("wwid", "device/wwid"),
    ("serial", "serial"),
    ("serial", "device/serial"),
    ("dm-uuid", "dm/uuid"),
    ("md-uuid", "md/uuid"),
    ("backing-file", "loop/backing_file"),
)


def identify_fd(name: str, fd: int, size: int, role: str) -> Evidence:
    """Collect the evidence of an open file or block device; `mark` is that of `role`."""
    name = os.path.abspath(name)
    status = os.fstat(fd)
    # Opening a file to write changes its time, and puts it back; only the owner may do that.
    is_owner = os.geteuid() in (0, status.st_uid)
    if stat.S_ISBLK(status.st_mode):
        return Evidence(BLOCK, name, size, block_ids(status.st_rdev))
    return Evidence(
        FILE,
        name,
        size,
        place=(status.st_dev, status.st_ino),
        mtime_ns=status.st_mtime_ns if is_owner else 0,
        can_be_marked=True,
        mark=_read_mark(fd, role),
    )


def mark_fd(fd: int, role: str, mark: Mark) -> bool:
    """Mark an open regular file; False: it cannot carry a mark, or not now.

    Durable: the mark, if this returns True. Raises: OSError, as `sync_attributes_fd`.
    """
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return False
    value = f"{mark.uuid.hex()} {mark.generation}".encode()
    try:
        os.setxattr(fd, XATTR + role, value)
    except OSError:
        return False
    return sync_attributes_fd(fd)


def sync_attributes_fd(fd: int) -> bool:
    """Make the times and marks of an open file durable; False: that cannot be said.

    fdatasync does not do it. And it is done by a descriptor of its own: an error that the kernel has recorded for
    the file is not taken away from the device's own flush, as each open file learns of it once. But some errors
    are not recorded: a file system that cannot begin to write pages back, and a disk that cannot empty its cache, may tell only the caller.

    Raises: OSError: the sync has failed, and the device has to latch.
    """
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.fsync(own)
    finally:
        os.close(own)
    return True


def is_still_there(recorded: Disk) -> bool:
    """Whether the recorded file still stands under its name."""
    if recorded.kind != FILE:
        return False
    try:
        status = os.stat(recorded.name)
    except (OSError, ValueError):
        return False
    return (status.st_dev, status.st_ino) == recorded.place


def block_ids(rdev: int) -> tuple[str, ...]:
    """Return the ids that the kernel has for a block device, as "key=value"."""
    number = f"{os.major(rdev)}:{os.minor(rdev)}"
    ids = dict(_sysfs_ids(Path("/sys/dev/block", number)))
    if not ids:
        links = sorted(_links(Path("/dev/disk/by-id"), rdev))
        if links:
            ids["by-id"] = links[0]
    return tuple(f"{key}={value}" for key, value in ids.items())


def nbd_ids(uri: NbdUri) -> tuple[str, ...]:
    """Return the facts that tell an export from others."""
    return (f"export={uri.export_name}", f"server={uri.server}")


def _read_mark(fd: int, role: str) -> Mark | None:
    try:
        uuid, _, generation = os.getxattr(fd, XATTR + role).decode().partition(" ")
        if len(generation) > GENERATION_DIGITS_MAX or not generation.isdecimal():
            return None
        mark = Mark(bytes.fromhex(uuid), int(generation))
    except (OSError, ValueError):
        return None  # none, or none of ours
    return mark if len(mark.uuid) == UUID_BYTES else None


def _sysfs_ids(directory: Path) -> Iterator[tuple[str, str]]:
    partition = _read_line(directory / "partition")
    if partition:
        uuids = sorted(_links(Path("/dev/disk/by-partuuid"), _rdev_of(directory)))
        if uuids:
            yield "partuuid", uuids[0]
        with suppress(OSError):
            for key, value in _sysfs_ids(directory.resolve().parent):
                yield f"{key}-partition", f"{value} {partition}"
        return
    found: set[str] = set()
    for key, path in _SYSFS:
        value = _read_line(directory / path)
        if value and key not in found:
            found.add(key)
            yield key, value


def _rdev_of(directory: Path) -> int:
    major, _, minor = _read_line(directory / "dev").partition(":")
    return os.makedev(int(major), int(minor)) if major and minor else 0


def _read_line(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _links(directory: Path, rdev: int) -> Iterator[str]:
    """Names in `directory` that lead to the device."""
    with suppress(OSError):
        for link in directory.iterdir():
            with suppress(OSError):
                if link.stat().st_rdev == rdev:
                    yield link.name
