# SPDX-License-Identifier: Apache-2.0
"""Sectors, and sizes as people write them: "4096", "64K", "1G", "2TiB"."""

import re
from typing import Final

__all__ = ["SECTOR", "SIZE_MAX", "describe_bytes", "parse_sectors", "parse_size"]

# Bytes. Table lines count in sectors of this size, also for a disk whose own blocks are larger.
SECTOR: Final = 512
SIZE_MAX: Final = (1 << 63) - 1  # bytes: the largest offset that Linux and NBD know

_SIZE: Final = re.compile(r"([0-9]{1,20})([KMGTPE]?)(iB)?", re.IGNORECASE)
_SECTORS: Final = re.compile(r"([0-9]{1,18})([bs]?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the number of bytes that `text` stands for; a suffix counts in powers of 1024.

    Raises: ValueError.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"not a size: {text!r} (write 4096, 64K, 1G, …)")
    size = int(match[1]) << 10 * " KMGTPE".index(match[2].upper() or " ")
    if size > SIZE_MAX:
        raise ValueError(f"too large: {text!r}")
    return size


def parse_sectors(text: str) -> int:
    """Return the number of bytes that an offset or a length stands for, as dmsetup's tools take them.

    A plain number counts sectors, and so does one with the suffix s; with b it counts bytes. Anything else is a
    size with a suffix, for example 64K. Raises: ValueError.
    """
    if match := _SECTORS.fullmatch(text):
        return int(match[1]) * (1 if match[2].lower() == "b" else SECTOR)
    return parse_size(text)


def describe_bytes(nr_bytes: int) -> str:
    """A size for people, for example "3.5 GiB"."""
    size, units = float(nr_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
