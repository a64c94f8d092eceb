# SPDX-License-Identifier: Apache-2.0
"""Replaying a log of `log-writes` onto a disk, up to a mark, a flush, or so many entries.

Theory of operation. Two passes. The first reads the entries' heads from the beginning of the log:
it finds where to start and where to stop, and that all between is in order and fits the disk.
Only then does the second write. So a damaged log, a mark that is not there or a disk too small
is said in one line, and the disk is as it was.

Entries are numbered from 0. A stop is *after* the entry that it names. A discard is
replayed as zeroes, which the disk may give back as holes: what a discarded range reads as is
the same every time.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, NamedTuple

import msgspec

from nbdtarget.devices.base import Device
from nbdtarget.devices.losses import FlushObserver
from nbdtarget.targets.log_writes.format import (
    DISCARD,
    FLUSH,
    FUA,
    MARK,
    SECTOR_SIZE_MIN,
    Entry,
    LogError,
    Super,
    parse_entry,
    parse_super,
)

__all__ = ["Found", "LogReader", "Selection", "replay", "select"]

COPY_BYTES_MAX: Final = 4 << 20


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Which entries are meant. Names as replay-log's options.

    Args:
        start_entry: number of the first one.
        start_mark: begin after this mark instead.
        end_mark, next_flush, next_fua: stop after the first entry that is one of these.
        limit: stop after so many; 0 is no limit.
        start_sector, end_sector: leave out what lies wholly outside; sectors of the log.
        discard: replay discards.
    """

    start_entry: int = 0
    start_mark: str | None = None
    end_mark: str | None = None
    next_flush: bool = False
    next_fua: bool = False
    limit: int = 0
    start_sector: int = 0
    end_sector: int | None = None
    discard: bool = True

    def is_last(self, entry: Entry, nr_seen: int) -> bool:
        """Whether to stop after `entry`, with which so many have been seen."""
        return bool(
            (self.limit and nr_seen == self.limit)
            or (self.next_flush and entry.flags & FLUSH)
            or (self.next_fua and entry.flags & FUA)
            or (self.end_mark is not None and is_mark(entry, self.end_mark))
        )

    def leaves_out(self, entry: Entry) -> bool:
        """Whether `entry` changes nothing that is to be replayed."""
        if not entry.nr_sectors:
            return True
        if entry.flags & DISCARD and not self.discard:
            return True
        if entry.sector + entry.nr_sectors <= self.start_sector:
            return True
        return self.end_sector is not None and entry.sector > self.end_sector


class Found(NamedTuple):
    """An entry and where it is.

    Attributes:
        nr: from 0.
        data_sector: of the log's sectors; where the entry's data begins.
    """

    nr: int
    data_sector: int
    entry: Entry


class LogReader:
    """A log on a device. Reads only."""

    def __init__(self, device: Device, superblock: Super) -> None:
        self._device = device
        self.nr_entries, self.sector_size = superblock
        self._nr_sectors = device.size // self.sector_size

    @classmethod
    async def open(cls, device: Device) -> "LogReader":
        """Read the superblock. Raises: LogError, DeviceError."""
        head = await device.read(0, min(SECTOR_SIZE_MIN, device.size))
        try:
            superblock = parse_super(head)
        except LogError as error:
            raise LogError(f"{device.name}: {error.where}", error.reason) from None
        return cls(device, superblock)

    async def entries(self) -> AsyncIterator[Found]:
        """Every entry in order. Raises: LogError, DeviceError."""
        at = 1
        for nr in range(self.nr_entries):
            where = f"{self._device.name}: entry {nr} at sector {at}"
            if at >= self._nr_sectors:
                raise LogError(where, "lies behind the end of the log")
            head = await self._device.read(at * self.sector_size, self.sector_size)
            entry = parse_entry(head, where)
            found = Found(nr, at + 1, entry)
            at += 1 + entry.nr_data_sectors
            if at > self._nr_sectors:
                raise LogError(where, "its data ends behind the end of the log")
            yield found

    async def read(self, found: Found, begin: int, length: int) -> memoryview:
        """Return a part of an entry's data; bytes."""
        return await self._device.read(
            found.data_sector * self.sector_size + begin, length
        )


async def select(reader: LogReader, selection: Selection) -> AsyncIterator[Found]:
    """The entries that are meant, in order.

    Raises: LogError: the log is damaged, or has no such entry or mark; DeviceError.
    """
    started = selection.start_mark is None
    nr_seen = 0
    async for found in reader.entries():
        if not started:
            assert selection.start_mark is not None
            started = is_mark(found.entry, selection.start_mark)
            continue
        if found.nr < selection.start_entry:
            continue
        nr_seen += 1
        yield found
        if selection.is_last(found.entry, nr_seen):
            return
    if not started:
        raise LogError(f"mark {selection.start_mark}", "Couldn't find starting mark")
    if selection.start_entry and selection.start_entry >= reader.nr_entries:
        raise LogError(
            f"entry {selection.start_entry}",
            f"Invalid entry number: the log has {reader.nr_entries} entries",
        )
    if selection.end_mark is not None:
        raise LogError(f"mark {selection.end_mark}", "Couldn't find entry")


async def replay(
    reader: LogReader,
    target: Device,
    selection: Selection,
    replayed: Callable[[Found], Awaitable[None]],
) -> int:
    """Write the entries that are meant onto `target`; `replayed` is called after each.

    Returns: how many these were. Raises: LogError: nothing has been written; DeviceError.
    Durable: all of it.
    """
    async for found in select(reader, selection):
        entry = found.entry
        end = (entry.sector + entry.nr_sectors) * reader.sector_size
        if not selection.leaves_out(entry) and end > target.size:
            raise LogError(
                f"entry {found.nr}",
                f"writes up to byte {end}, {target.name} has {target.size}",
            )
    observer = FlushObserver(target)
    nr_replayed = 0
    async for found in select(reader, selection):
        if not selection.leaves_out(found.entry):
            await _replay_entry(reader, target, found)
        nr_replayed += 1
        await replayed(found)
    await observer.flush()
    return nr_replayed


async def _replay_entry(reader: LogReader, target: Device, found: Found) -> None:
    size = reader.sector_size
    offset, length = found.entry.sector * size, found.entry.nr_sectors * size
    if found.entry.flags & DISCARD:
        await target.write_zeroes(offset, length)
        return
    for at in range(0, length, COPY_BYTES_MAX):
        part = await reader.read(found, at, min(COPY_BYTES_MAX, length - at))
        await target.write(offset + at, part)


def is_mark(entry: Entry, text: str) -> bool:
    """Whether `entry` is the mark called `text`."""
    return bool(entry.flags & MARK) and entry.mark == text.encode(
        "utf-8", "surrogateescape"
    )
