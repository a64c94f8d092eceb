# SPDX-License-Identifier: Apache-2.0
r"""Devices on one line, as `create --concise` takes them and `table --concise` prints them.

    NAME,UUID,MINOR,FLAGS,TABLE[,TABLE...][;NAME,...]

FLAGS is `ro`, `rw` or empty; UUID and MINOR may be empty. After a backslash the next character is taken as
it is, for example a comma that is part of a name or a table.
"""

from collections.abc import Iterable
from typing import NamedTuple

from nbdtarget.common.errors import NbdTargetError

__all__ = ["ConciseDevice", "format_concise", "parse_concise"]


class ConciseDevice(NamedTuple):
    """One device. `minor` None: any. No lines: a device without a table."""

    name: str
    uuid: str
    minor: int | None
    read_only: bool
    lines: tuple[str, ...]


def parse_concise(text: str) -> list[ConciseDevice]:
    """Parse any number of devices. Raises: NbdTargetError, naming the device."""
    return [_device(fields) for fields in _split(text) if fields != [""]]


def _device(fields: list[str]) -> ConciseDevice:
    name = fields[0].strip()
    if len(fields) < 4:
        raise NbdTargetError(
            f"Five comma-separated fields are required for each device: {name or '?'}"
            f" has {len(fields)}"
        )
    uuid, minor, flags, *lines = fields[1:]
    if minor and not (minor.isascii() and minor.isdecimal() and len(minor) < 10):
        raise NbdTargetError(f"{name}: invalid minor number {minor!r}")
    if flags not in ("", "ro", "rw"):
        raise NbdTargetError(
            f"{name}: Invalid flags parameter {flags!r} must be 'ro' or 'rw' or empty"
        )
    return ConciseDevice(
        name,
        uuid,
        int(minor) if minor else None,
        flags == "ro",
        tuple(line for line in lines if line.strip()),
    )


def _split(text: str) -> list[list[str]]:
    devices, fields, field = [], [], ""
    characters = iter(text.rstrip("\n"))
    for character in characters:
        if character == "\\":
            following = next(characters, "")
            # A table line keeps the escapes that are its own: of blanks in words.
            field += following if following in ",;\\" else "\\" + following
        elif character == ",":
            fields.append(field)
            field = ""
        elif character == ";":
            devices.append([*fields, field])
            fields, field = [], ""
        else:
            field += character
    devices.append([*fields, field])
    return devices


def format_concise(devices: Iterable[ConciseDevice]) -> str:
    """The inverse of `parse_concise`."""
    return ";".join(
        ",".join(
            [
                _escaped(device.name),
                _escaped(device.uuid),
                "" if device.minor is None else str(device.minor),
                "ro" if device.read_only else "rw",
                *(_escaped(line) for line in device.lines),
            ]
        )
        for device in devices
    )


def _escaped(text: str) -> str:
    for special in ("\\", ",", ";"):
        text = text.replace(special, "\\" + special)
    return text
