# SPDX-License-Identifier: Apache-2.0
"""A recording: which writes each flush covered, and which lines the program had printed by then.

The record is a log of the target `log-writes`. It has the writes that a flush covers right before that flush, so the log is
a list of *epochs*: some writes, then a flush. A power cut during an epoch leaves everything of the epochs before it, and any part of its
own writes. The record goes on while the file system is unmounted. The power is cut up to the first flush after the end of the
program; what comes later is there for the disk that has lost nothing.

A line that the program prints is a promise: what it tells of must survive from then on. It stands in the log as a mark.
"""

import os
from pathlib import Path
from typing import Final

import msgspec

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.units import SECTOR
from nbdtarget.targets.log_writes.format import (
    DISCARD,
    FLUSH,
    FUA,
    MARK,
    Entry,
    parse_entry,
    parse_super,
)

__all__ = [
    "END_TEXT",
    "LINE_TEXT",
    "Epoch",
    "Recording",
    "RecordingFiles",
    "Write",
    "read_epochs",
]

LINE_TEXT: Final = "line"
END_TEXT: Final = "end"
HEAD_BYTES: Final = 4096
META_NAME: Final = "recording.json"


class Write(msgspec.Struct, frozen=True):
    """One write.

    Attributes:
        nr: from 1, in the order of the log.
        sector, nr_sectors: of 512 bytes.
        at: where its data is in the log, in bytes; None: it is zeroes.
        is_durable: it has FUA: a cut after it does not lose it.
    """

    nr: int
    sector: int
    nr_sectors: int
    at: int | None
    is_durable: bool = False


class Epoch(msgspec.Struct, frozen=True):
    """The writes that a flush covers.

    Attributes:
        nr: of the flush, from 1.
        nr_lines: lines that had been printed before the flush ended.
    """

    nr: int
    writes: tuple[Write, ...]
    nr_lines: int


class RecordingFiles:
    """Where a recording is.

    Attributes:
        base: the disk before the program.
        log: the log of log-writes.
        disk: the disk that the program used; not needed any more.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base = directory / "base.img"
        self.log = directory / "writes.log"
        self.disk = directory / "disk.img"
        self.meta = directory / META_NAME

    def case(self, nr: int) -> Path:
        return self.directory / f"case-{nr}.json"


class Recording(msgspec.Struct, frozen=True):
    """The result of a run: the recorded writes, and the output.

    Attributes:
        size: of the disk, in bytes.
        check: a shell command.
        lines: what the program printed.
    """

    size: int
    file_system: str
    command: tuple[str, ...]
    check: str
    lines: tuple[str, ...]

    def save(self, files: RecordingFiles) -> None:
        files.meta.write_bytes(msgspec.json.format(msgspec.json.encode(self)))

    @classmethod
    def load(cls, files: RecordingFiles) -> "Recording":
        """Raises: NbdTargetError: it is no recording."""
        try:
            return msgspec.json.decode(files.meta.read_bytes(), type=cls)
        except OSError as error:
            raise NbdTargetError(
                f"{files.meta}: {error.strerror}: it stands beside each case of a recording"
            ) from None
        except msgspec.MsgspecError as error:
            raise NbdTargetError(f"{files.meta}: {error}") from None


def read_epochs(log: Path) -> tuple[list[Epoch], int]:
    """Return all epochs of a log, and in how many of them the power may be cut.

    Raises: LogError: it is damaged; NbdTargetError: it has no mark that says that the program has ended.
    """
    epochs: list[Epoch] = []
    writes: list[Write] = []
    nr_writes = nr_lines = nr_epochs = 0
    fd = os.open(log, os.O_RDONLY)
    try:
        nr_entries, size = parse_super(os.pread(fd, HEAD_BYTES, 0))
        at = size
        for nr in range(nr_entries):
            entry = parse_entry(os.pread(fd, size, at), f"{log}: entry {nr}")
            at += size
            if entry.flags & MARK:
                if entry.mark == END_TEXT.encode():
                    nr_epochs = len(epochs) + 1
                nr_lines += entry.mark == LINE_TEXT.encode()
            if entry.nr_sectors:
                nr_writes += 1
                writes.append(_write(nr_writes, entry, at, size))
            if entry.flags & FLUSH:
                epochs.append(Epoch(len(epochs) + 1, tuple(writes), nr_lines))
                writes = []
            at += entry.nr_data_sectors * size
    finally:
        os.close(fd)
    if not 0 < nr_epochs <= len(epochs):
        raise NbdTargetError(
            f"{log}: the record is not complete: the log was full, or the disk has failed"
        )
    return epochs, nr_epochs


def _write(nr: int, entry: Entry, at: int, size: int) -> Write:
    scale = size // SECTOR
    return Write(
        nr,
        entry.sector * scale,
        entry.nr_sectors * scale,
        None if entry.flags & DISCARD else at,
        bool(entry.flags & FUA),
    )
