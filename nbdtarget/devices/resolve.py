# SPDX-License-Identifier: Apache-2.0
"""From what the user wrote to an open device.

A name is handed to its scheme (`nbdtarget.devices.registry`); a name without a scheme is a path. A
path that looks like a URI can be written ./so or /thus. Nothing is created or changed by a call
that fails.

A disk that is only read may have any size: the last sector, which is there in part, is filled up with zeroes (`rounded.py`).
"""

from collections.abc import Hashable

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.units import SECTOR, SIZE_MAX
from nbdtarget.devices.base import Device
from nbdtarget.devices.registry import SCHEMES
from nbdtarget.devices.rounded import RoundedDevice
from nbdtarget.devices.scheme import Scheme, maybe_scheme, scheme_of

__all__ = [
    "absolute_name",
    "copy_sizes",
    "create_device",
    "identity",
    "is_read_only",
    "is_volatile",
    "may_create",
    "open_device",
    "path_of",
    "remove_created",
    "says_format",
    "starts_programs",
]


async def open_device(name: str, *, read_only: bool = False) -> Device:
    """Open and lock the device that `name` names.

    Raises: ResolveError: missing, not a disk, no permission, in use, unknown scheme.
    """
    device = await _scheme(name).open(name, read_only=read_only)
    if read_only and device.size % SECTOR:
        return RoundedDevice(device)
    return device


async def create_device(name: str, size: int, *, sparse: bool = False) -> Device:
    """Create a missing file of `size` zero bytes and open it for writing.

    Args:
        sparse: allocate no space yet. Metadata is not sparse: a commit must not fail because
            the destination beside it has filled the file system.

    Raises: ResolveError; then nothing was created.
    Durable: the file, its size, its space and its name.
    """
    scheme = _scheme(name)
    if not 0 < size <= SIZE_MAX:
        raise ResolveError(name, f"a device cannot have {size} bytes")
    return await scheme.create(name, size, sparse=sparse)


async def remove_created(name: str) -> None:
    """Remove what `create_device` made, after its device was closed."""
    await _scheme(name).remove_created(name)


def may_create(name: str) -> bool:
    """Whether there is no disk of this name, and `create_device` could make one."""
    scheme = _maybe_scheme(name)
    return scheme is not None and scheme.may_create(name)


def identity(name: str) -> Hashable:
    """Return a value that all names of one disk share, whether it is open, closed or missing."""
    scheme = _maybe_scheme(name)
    return name if scheme is None else scheme.identity(name)


def absolute_name(name: str, directory: str) -> str:
    """Return `name` as it is called from anywhere, if it was meant as seen from `directory`.

    A name of an unknown scheme stays as it is: opening it says what is wrong.
    Raises: ResolveError: it is not UTF-8.
    """
    scheme = _maybe_scheme(name)
    found = name if scheme is None else scheme.absolute(name, directory)
    try:
        found.encode()
    except UnicodeEncodeError:
        # JSON, and all that is sent to other programs, could not have it.
        raise ResolveError(
            found,
            "this name is not UTF-8: rename the file or its directory, or give a link to it",
        ) from None
    return found


def is_volatile(name: str) -> bool:
    """Whether what is stored there is gone as soon as the device is closed."""
    scheme = _maybe_scheme(name)
    return scheme is not None and scheme.is_volatile


def is_read_only(name: str) -> bool:
    """Whether a device of this name can only be read."""
    scheme = _maybe_scheme(name)
    return scheme is not None and scheme.is_read_only(name)


def copy_sizes(name: str) -> tuple[int, int]:
    """Return how many bytes a background copy from it should be for, and how many all of them together."""
    return (_maybe_scheme(name) or Scheme()).copy_sizes(name)


def says_format(name: str) -> bool:
    """Whether `name` says in which format the disk is."""
    scheme = _maybe_scheme(name)
    return scheme is not None and scheme.says_format


def starts_programs(name: str) -> bool:
    """Whether opening `name` starts another program."""
    scheme = _maybe_scheme(name)
    return scheme is not None and scheme.may_start_programs(name)


def path_of(name: str) -> str | None:
    """Return the path of the file or block device that `name` names; None if it names something else."""
    scheme = _maybe_scheme(name)
    return None if scheme is None else scheme.path(name)


def _maybe_scheme(name: str) -> Scheme | None:
    return maybe_scheme(SCHEMES, name)


def _scheme(name: str) -> Scheme:
    """Raises: ResolveError: there is no such scheme."""
    return scheme_of(SCHEMES, name)
