# SPDX-License-Identifier: Apache-2.0
"""From what the user wrote to an open device.

A name is handed to its scheme (`nbdtarget.devices.registry`); a name without a scheme is a path. A
path that looks like a URI can be written ./so or /thus. Nothing is created or changed by a call
that fails.
"""

import re
from collections.abc import Hashable
from typing import Final

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.units import SIZE_MAX
from nbdtarget.devices.base import Device
from nbdtarget.devices.registry import SCHEMES, scheme_list
from nbdtarget.devices.scheme import Scheme

__all__ = [
    "absolute_name",
    "create_device",
    "identity",
    "is_volatile",
    "may_create",
    "open_device",
    "remove_created",
]

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


async def open_device(name: str, *, read_only: bool = False) -> Device:
    """Open and lock the device that `name` names.

    Raises: ResolveError: missing, not a disk, no permission, in use, unknown scheme.
    """
    return await _scheme(name).open(name, read_only=read_only)


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
    """
    scheme = _maybe_scheme(name)
    return name if scheme is None else scheme.absolute(name, directory)


def is_volatile(name: str) -> bool:
    """Whether what is stored there is gone as soon as the device is closed."""
    scheme = _maybe_scheme(name)
    return scheme is not None and scheme.is_volatile


def _scheme_name(name: str) -> str:
    """Return the scheme's name in lower case; empty for a path."""
    match = _SCHEME.match(name)
    return match[1].lower() if match else ""


def _maybe_scheme(name: str) -> Scheme | None:
    return SCHEMES.get(_scheme_name(name))


def _scheme(name: str) -> Scheme:
    """Raises: ResolveError: there is no such scheme."""
    scheme = _maybe_scheme(name)
    if scheme is None:
        raise ResolveError(
            name,
            f"{_scheme_name(name)}: is not supported; write {scheme_list()};"
            f" if it is a file, write ./{name}",
        )
    return scheme
