# SPDX-License-Identifier: Apache-2.0
"""The log of `log-writes`, byte for byte the kernel's. Pure: bytes in, entries out.

    sector 0        superblock   magic u64, version u64, number of entries u64, sector size u32
    sector 1 …      entry        sector u64, number of sectors u64, flags u64, data length u64;
                                 of a mark, its text follows in the same sector
                    data         as many sectors as the entry says, unless it is a discard
                    entry, data, …

All little endian. Sectors are of the size that the superblock says (512 in most logs), both
where an entry says what was written and where it lies in the log; the rest of an entry's sector
is zeroes. Data behind the last entry means nothing.
"""

import struct
from typing import Final, NamedTuple

from nbdtarget.common.errors import NbdTargetError

__all__ = [
    "DISCARD",
    "END_MARK",
    "ENTRY_SIZE",
    "FLUSH",
    "FUA",
    "MARK",
    "METADATA",
    "SECTOR_SIZE_MAX",
    "SECTOR_SIZE_MIN",
    "Entry",
    "LogError",
    "Super",
    "flag_names",
    "pack_entry",
    "pack_super",
    "parse_entry",
    "parse_super",
]

MAGIC: Final = 0x6A736677736872
VERSION: Final = 1
SECTOR_SIZE_MIN: Final = 512
SECTOR_SIZE_MAX: Final = 65536

FLUSH: Final = 1
FUA: Final = 2
DISCARD: Final = 4
MARK: Final = 8
METADATA: Final = 16
_ALL_FLAGS: Final = FLUSH | FUA | DISCARD | MARK | METADATA
_NAMES: Final = ("FLUSH", "FUA", "DISCARD", "MARK", "METADATA")

END_MARK: Final = "dm-log-writes-end"

_SUPER: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")
ENTRY_SIZE: Final = _ENTRY.size


class LogError(NbdTargetError):
    """A log cannot be read. `where` says which part of it."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Super(NamedTuple):
    """The superblock. `sector_size` is bytes."""

    nr_entries: int
    sector_size: int


class Entry(NamedTuple):
    """One entry; `sector` and `nr_sectors` count sectors of the log's own size."""

    sector: int
    nr_sectors: int
    flags: int
    mark: bytes = b""

    @property
    def nr_data_sectors(self) -> int:
        """How many sectors of data follow in the log."""
        return 0 if self.flags & DISCARD else self.nr_sectors


def pack_super(nr_entries: int, sector_size: int) -> bytes:
    """Return the superblock, one sector."""
    packed = _SUPER.pack(MAGIC, VERSION, nr_entries, sector_size)
    return packed.ljust(sector_size, b"\0")


def pack_entry(entry: Entry, sector_size: int) -> bytes:
    """Return the entry, one sector."""
    assert len(entry.mark) <= sector_size - ENTRY_SIZE
    sector, nr_sectors, flags, mark = entry
    packed = _ENTRY.pack(sector, nr_sectors, flags, len(mark))
    return (packed + mark).ljust(sector_size, b"\0")


def parse_super(data: bytes | memoryview) -> Super:
    """Parse the first bytes of a log. Raises: LogError."""
    if len(data) < _SUPER.size:
        raise LogError("superblock", f"{len(data)} bytes are too few for a log")
    magic, version, nr_entries, sector_size = _SUPER.unpack_from(data)
    if magic != MAGIC:
        raise LogError("superblock", "Magic doesn't match: not a log of log-writes")
    if version != VERSION:
        raise LogError(
            "superblock", f"Version mismatch, wanted {VERSION}, have {version}"
        )
    if not SECTOR_SIZE_MIN <= sector_size <= SECTOR_SIZE_MAX or sector_size & (
        sector_size - 1
    ):
        raise LogError("superblock", f"sector size {sector_size} cannot be")
    return Super(nr_entries, sector_size)


def parse_entry(data: bytes | memoryview, where: str) -> Entry:
    """Parse one whole sector. Raises: LogError, about `where`."""
    sector, nr_sectors, flags, data_length = _ENTRY.unpack_from(data)
    if flags & ~_ALL_FLAGS:
        raise LogError(where, f"Malformed entry: unknown flags {flags:#x}")
    if not flags and not nr_sectors:
        raise LogError(where, "Malformed entry: nothing is written")
    room = len(data) - ENTRY_SIZE
    if flags & MARK:
        if data_length > room or nr_sectors:
            raise LogError(where, "Malformed entry: a mark that does not fit")
    elif data_length:
        raise LogError(where, "Malformed entry: a text that is no mark")
    text = bytes(data[ENTRY_SIZE : ENTRY_SIZE + data_length])
    if any(data[ENTRY_SIZE + data_length :]):
        raise LogError(where, "Malformed entry: not padded with zeroes")
    return Entry(sector, nr_sectors, flags, text)


def flag_names(flags: int) -> str:
    """The names of an entry's flags, as replay-log prints them."""
    names = [name for bit, name in enumerate(_NAMES) if flags >> bit & 1]
    return "|".join(names) or "NONE"
