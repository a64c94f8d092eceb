# SPDX-License-Identifier: Apache-2.0
"""One job: look into a log of the log-writes target, or replay it onto a disk.

Log and disk are named as in a table line (a path, nbd://…). Neither is made here.
"""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

import msgspec

from nbdtarget.devices import resolve
from nbdtarget.devices.base import Device
from nbdtarget.targets.log_writes.format import (
    FLUSH,
    FUA,
    MARK,
    VERSION,
    LogError,
    flag_names,
)
from nbdtarget.targets.log_writes.replay import (
    Found,
    LogReader,
    Selection,
    replay,
    select,
)

__all__ = ["CHECKS", "Answer", "ReplayJob", "run"]

CHECKS: Final = {"flush": FLUSH, "fua": FUA}


class ReplayJob(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the command.

    Args:
        log, replay: names of devices; without `replay` nothing is written.
        find, num_entries, list_entries: what to print instead of replaying.
        fsck: shell command; what it ends with must be 0.
        check_every: run it after so many entries, or after each "flush" or "fua".
    """

    log: str
    replay: str | None = None
    find: bool = False
    num_entries: bool = False
    list_entries: bool = False
    verbose: bool = False
    fsck: str | None = None
    check_every: int | str = 0
    selection: Selection = Selection()


class LogInfo(msgspec.Struct, frozen=True):
    """The content of the superblock."""

    version: int
    sector_size: int
    entries: int

    def __str__(self) -> str:
        return (
            f"Log version={self.version}, sectorsize={self.sector_size},"
            f" entries={self.entries}"
        )


class EntryCount(msgspec.Struct, frozen=True):
    """How many entries there are."""

    entries: int

    def __str__(self) -> str:
        return str(self.entries)


class Place(msgspec.Struct, frozen=True):
    """Where a replay would stop. `at`: sector of the log behind the entry's own."""

    entry: int
    at: int

    def __str__(self) -> str:
        return f"{self.entry}@{self.at}"


class EntryLine(msgspec.Struct, frozen=True):
    """One entry. `size` is bytes; `verb` is "replaying", "skipping", or empty in a list."""

    verb: str
    entry: int
    at: int
    sector: int
    size: int
    flags: int
    names: str
    mark: str | None

    def __str__(self) -> str:
        mark = "" if self.mark is None else f" {self.mark}"
        return (
            f"{self.verb} {self.entry}@{self.at}: sector {self.sector},"
            f" size {self.size}, flags {self.flags:#x}({self.names}){mark}"
        ).lstrip()


Answer = LogInfo | EntryCount | Place | EntryLine


def run(job: ReplayJob, tell: Callable[[Answer], None]) -> None:
    """Do the job. Raises: ResolveError, LogError, DeviceError."""
    asyncio.run(_Run(job, tell).run())


class _Run:
    """The job under way."""

    _reader: LogReader
    _target: Device

    def __init__(self, job: ReplayJob, tell: Callable[[Answer], None]) -> None:
        self._job = job
        self._tell = tell
        self._nr_replayed = 0

    async def run(self) -> None:
        job = self._job
        async with AsyncExitStack() as opened:
            log = await resolve.open_device(job.log, read_only=True)
            opened.push_async_callback(log.close)
            self._reader = reader = await LogReader.open(log)
            if job.num_entries:
                self._tell(EntryCount(reader.nr_entries))
            elif job.find:
                await self._find()
            elif job.list_entries:
                async for found in select(reader, job.selection):
                    self._tell(self._line("", found))
            elif job.replay is None:
                self._tell(LogInfo(VERSION, reader.sector_size, reader.nr_entries))
            else:
                self._target = await resolve.open_device(job.replay)
                opened.push_async_callback(self._target.close)
                await replay(reader, self._target, job.selection, self._replayed)

    async def _find(self) -> None:
        selection = self._job.selection
        nr_seen = 0
        async for found in select(self._reader, selection):
            nr_seen += 1
            if selection.is_last(found.entry, nr_seen):
                self._tell(
                    Place(found.nr, found.data_sector + found.entry.nr_data_sectors)
                )
                return
        raise LogError(self._job.log, "Couldn't find entry")

    async def _replayed(self, found: Found) -> None:
        self._nr_replayed += 1
        if self._job.verbose:
            skips = self._job.selection.leaves_out(found.entry)
            is_skipped = skips and found.entry.nr_sectors
            self._tell(self._line("skipping" if is_skipped else "replaying", found))
        if self._job.fsck is not None and self._is_check_due(found):
            await self._target.flush()
            shell = await asyncio.create_subprocess_shell(self._job.fsck)
            status = await shell.wait()
            if status:
                raise LogError(
                    f"entry {found.nr}", f"Fsck errored out: it ended with {status}"
                )

    def _is_check_due(self, found: Found) -> bool:
        every = self._job.check_every
        if isinstance(every, str):
            return bool(found.entry.flags & CHECKS[every])
        return self._nr_replayed % every == 0

    def _line(self, verb: str, found: Found) -> EntryLine:
        entry = found.entry
        return EntryLine(
            verb,
            found.nr,
            found.data_sector,
            entry.sector,
            entry.nr_sectors * self._reader.sector_size,
            entry.flags,
            flag_names(entry.flags),
            entry.mark.decode("utf-8", "replace") if entry.flags & MARK else None,
        )
