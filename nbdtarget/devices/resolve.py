# SPDX-License-Identifier: Apache-2.0
"""From what the user wrote to an open device.

    PATH                              a regular file or block device
    memory:SIZE                       a sparse disk in memory
    nbd://HOST[:PORT]/EXPORT          an export of another NBD server
    nbd+unix:///EXPORT?socket=PATH    the same over a unix socket

A path that looks like a URI can be written ./so or /thus. Nothing is created or changed by a
call that fails.
"""

import asyncio
import errno as errnos
import os
import re
import stat
from collections.abc import Hashable
from typing import Final

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.base import Device
from nbdtarget.devices.file.open import create_file, open_file
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.devices.nbd.device import open_nbd
from nbdtarget.devices.nbd.uri import NBD_SCHEMES, parse_nbd_uri

__all__ = [
    "SIZE_MAX",
    "create_device",
    "identity",
    "may_create",
    "open_device",
    "parse_size",
    "remove_created",
]

SIZE_MAX: Final = (1 << 63) - 1  # bytes: the largest offset that Linux and NBD know

_SIZE: Final = re.compile(r"([0-9]{1,20})([KMGTPE]?)(iB)?", re.IGNORECASE)
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_SUPPORTED: Final = "a path, memory:SIZE, nbd:// and nbd+unix:// are supported"


def parse_size(text: str) -> int:
    """Return the bytes that `text` ("4096", "64K", "1G", "2TiB") says; suffixes count 1024.

    Raises: ValueError.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"not a size: {text!r} (write 4096, 64K, 1G, …)")
    size = int(match[1]) << 10 * " KMGTPE".index(match[2].upper() or " ")
    if size > SIZE_MAX:
        raise ValueError(f"too large: {text!r}")
    return size


async def open_device(name: str, *, read_only: bool = False) -> Device:
    """Open and lock the device that `name` names.

    Raises: ResolveError: missing, not a disk, no permission, in use, unknown kind of name.
    """
    scheme = _scheme(name)
    if scheme == "memory":
        return MemoryDevice(_memory_size(name), name=name, read_only=read_only)
    if scheme.startswith("nbd"):
        return await open_nbd(name, read_only=read_only)
    if scheme:
        raise _unsupported(name, scheme)
    return await open_file(name, _path(name), read_only=read_only)


async def create_device(name: str, size: int, *, sparse: bool = False) -> Device:
    """Create a missing file of `size` zero bytes and open it for writing.

    Args:
        sparse: take no space yet. Metadata is not sparse: a commit must not fail because
            the destination beside it has filled the file system.

    Raises: ResolveError; then nothing was created.
    Durable: the file, its size, its space and its name.
    """
    if _scheme(name):
        raise ResolveError(name, "only a file can be created")
    if not 0 < size <= SIZE_MAX:
        raise ResolveError(name, f"a device cannot have {size} bytes")
    return await create_file(name, _path(name), size, sparse=sparse)


async def remove_created(name: str) -> None:
    """Take back what `create_device` made, after its device was closed."""
    assert not _scheme(name)
    await asyncio.to_thread(os.unlink, _path(name))


def may_create(name: str) -> bool:
    """Whether `name` is a missing file whose directory is there."""
    if _scheme(name) or not name or "\0" in name or os.path.lexists(name):
        return False
    return not name.endswith("/") and os.path.isdir(os.path.dirname(name) or ".")


def identity(name: str) -> Hashable:
    """What two names of the same device have in common, open or not, there or not."""
    scheme = _scheme(name)
    if scheme == "memory":
        return (scheme, object())  # each one opened is another one
    if scheme in NBD_SCHEMES:
        try:
            return parse_nbd_uri(name).identity
        except ResolveError:
            return name
    if scheme:
        return name
    try:
        status = os.stat(name)
    except (OSError, ValueError):
        return ("missing", os.path.realpath(name) if "\0" not in name else name)
    if stat.S_ISBLK(status.st_mode):
        return ("block", status.st_rdev)
    return ("file", status.st_dev, status.st_ino)


def _scheme(name: str) -> str:
    """The lower-case scheme; empty for a path."""
    match = _SCHEME.match(name)
    return match[1].lower() if match else ""


def _path(name: str) -> str:
    if not name:
        raise ResolveError(name, "a device needs a name", errnos.ENOENT)
    if "\0" in name:
        raise ResolveError(name.replace("\0", "\\0"), "a path has no NUL byte")
    return name


def _memory_size(name: str) -> int:
    try:
        size = parse_size(name.partition(":")[2])
    except ValueError as error:
        raise ResolveError(name, str(error)) from None
    if size == 0:
        raise ResolveError(name, "is empty")
    return size


def _unsupported(name: str, scheme: str) -> ResolveError:
    return ResolveError(
        name,
        f"{scheme}: is not supported; {_SUPPORTED}; if it is a file, write ./{name}",
    )
