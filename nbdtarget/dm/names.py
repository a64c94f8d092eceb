# SPDX-License-Identifier: Apache-2.0
"""The ways to name a mapped device: its name, its UUID, its minor number.

Minor numbers are the lowest free ones, from 0, as in the kernel. They refer to nothing outside of this
process; they are there because `info` and `ls` show them.
"""

import errno as errnos
from collections.abc import Container
from typing import Final

from nbdtarget.common.errors import TableError

__all__ = [
    "MINOR_MAX",
    "NAME_LENGTH_MAX",
    "UUID_LENGTH_MAX",
    "check_name",
    "check_uuid",
    "free_minor",
]

NAME_LENGTH_MAX: Final = 127  # bytes
UUID_LENGTH_MAX: Final = 128  # characters
MINOR_MAX: Final = (1 << 20) - 1


def check_name(name: str) -> None:
    """Raise TableError unless `name` may name a mapped device (and an export)."""
    if not name:
        raise TableError("Empty device name")
    if len(name.encode("utf-8", "surrogateescape")) > NAME_LENGTH_MAX:
        raise TableError(f"Device name is longer than {NAME_LENGTH_MAX} bytes")
    if "/" in name or name in (".", "..", "control"):
        raise TableError(f"Device name {name!r} is not allowed")
    if not name.isprintable():
        raise TableError(f"Device name {name!r} has unprintable characters")


def check_uuid(uuid: str) -> None:
    """Raise TableError unless `uuid` may be the UUID of a mapped device."""
    if len(uuid) > UUID_LENGTH_MAX:
        raise TableError(f"UUID is longer than {UUID_LENGTH_MAX} characters")
    if not uuid.isprintable():
        raise TableError(f"UUID {uuid!r} has unprintable characters")


def free_minor(taken: Container[int], wanted: int | None) -> int:
    """The lowest number that is not taken, or the one that is wanted. Raises: TableError: it cannot be had."""
    if wanted is not None:
        if not 0 <= wanted <= MINOR_MAX:
            raise TableError(f"minor number {wanted} is out of range")
        if wanted in taken:
            raise TableError("Device or resource busy: minor exists", errnos.EBUSY)
        return wanted
    minor = 0
    while minor in taken:
        minor += 1
    return minor
