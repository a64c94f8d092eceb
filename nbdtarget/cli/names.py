# SPDX-License-Identifier: Apache-2.0
"""Splits and mangles names and UUIDs of devices as dmsetup does: the parts of LVM, and the form for device nodes.

Names of devices stay here as the user wrote them: they are neither mangled on their way in nor unmangled on their way
out. dmsetup writes a character that is not allowed in the name of a device node as `\\xNN`.
"""

import os
import re
import stat
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control.messages import InfoLine

__all__ = [
    "BELOW_NAMES",
    "LvmName",
    "mangled",
    "name_below",
    "split_lvm_name",
    "subsystem_of",
    "unmangled",
]

BELOW_NAMES: Final = ("devno", "devname", "blkdevname")  # of `deps -o`
_MAPPER: Final = "/dev/mapper/"
_NODE_CHARACTERS: Final = frozenset(
    b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz#+-.:=@_"
)
_MANGLED: Final = re.compile(rb"\\x([0-9a-fA-F]{2})")


class LvmName(NamedTuple):
    """The parts of `VG-LV-LAYER`, where `--` stands for a hyphen."""

    vg: str
    lv: str
    layer: str


def split_lvm_name(name: str) -> LvmName:
    """Split the name of a device that LVM made. Anything after the third part is dropped."""
    parts = [""]
    at = 0
    while at < len(name):
        if name[at] == "-" and at + 1 < len(name):
            at += 1
            if name[at] != "-":
                parts.append("")
        parts[-1] += name[at]
        at += 1
    vg, lv, layer, *_ = [*parts, "", ""]
    return LvmName(vg, lv, layer)


def subsystem_of(uuid: str) -> str:
    """Return the program that made the device: the UUID up to its first hyphen."""
    subsystem, hyphen, _ = uuid.partition("-")
    return subsystem if hyphen else ""


def mangled(name: str) -> str:
    """Return `name` in the form for device nodes. A name in this form is returned as it is.

    Raises: NbdTargetError: one part of it is in this form, and another part is not.
    """
    data = name.encode("utf-8", "surrogateescape")
    rest = _MANGLED.sub(b"", data)
    if _NODE_CHARACTERS.issuperset(rest):
        return name
    if len(rest) != len(data):
        raise NbdTargetError(
            f"The name {name!r} contains mixed mangled and unmangled characters,"
            " or it is already mangled improperly: rename it first"
        )
    return "".join(
        chr(byte) if byte in _NODE_CHARACTERS else f"\\x{byte:02x}" for byte in data
    )


def unmangled(name: str) -> str:
    """Return `name` with each `\\xNN` replaced by its character."""
    data = name.encode("utf-8", "surrogateescape")
    plain = _MANGLED.sub(lambda match: bytes([int(match[1], 16)]), data)
    return plain.decode("utf-8", "surrogateescape")


def name_below(how: str, devices: Mapping[str, InfoLine]) -> Callable[[str], str]:
    """Return a function that names a disk below as `deps -o` does, given its name.

    Args: how: of BELOW_NAMES. devices: the mapped ones, by name.
    """

    def called(name: str) -> str:
        mapped = devices.get(name.removeprefix(_MAPPER))
        if mapped is not None and name.startswith(_MAPPER):
            return {
                "devno": f"{mapped.major}, {mapped.minor}",
                "devname": mapped.name,
                "blkdevname": f"dm-{mapped.minor}",
            }[how]
        number = _maybe_number(name)
        if number is None:
            return name  # a file, a server, memory: it has no other name
        if how == "devno":
            return f"{os.major(number)}, {os.minor(number)}"
        return os.path.basename(os.path.realpath(name))

    return called


def _maybe_number(path: str) -> int | None:
    """Return the device number of the block device `path`; None if it is not one."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_rdev if stat.S_ISBLK(found.st_mode) else None
