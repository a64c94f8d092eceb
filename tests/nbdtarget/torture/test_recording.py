# SPDX-License-Identifier: Apache-2.0
"""The log of a recording, read as flushes with the writes that they cover."""

from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.targets.log_writes.format import (
    DISCARD,
    FLUSH,
    FUA,
    MARK,
    Entry,
    LogError,
    pack_entry,
    pack_super,
)
from nbdtarget.torture.recording import (
    Epoch,
    Recording,
    RecordingFiles,
    Write,
    read_epochs,
)

END = Entry(0, 0, MARK, b"end")
LINE = Entry(0, 0, MARK, b"line")
FLUSHED = Entry(0, 0, FLUSH)


def write_log(path: Path, entries: list[Entry], size: int = 512) -> Path:
    data = pack_super(len(entries), size)
    for entry in entries:
        data += pack_entry(entry, size) + bytes(entry.nr_data_sectors * size)
    path.write_bytes(data)
    return path


def test_epochs_end_with_their_flush_and_count_lines(tmp_path: Path) -> None:
    entries = [
        *[Entry(8, 2, 0), FLUSHED],
        *[LINE, Entry(0, 1, FUA), Entry(4, 4, DISCARD), FLUSHED],
        *[LINE, END, Entry(9, 1, 0), FLUSHED],
        *[Entry(1, 1, 0), FLUSHED],
    ]
    epochs, nr_epochs = read_epochs(write_log(tmp_path / "log", entries))
    assert nr_epochs == 3
    assert epochs == [
        Epoch(1, (Write(1, 8, 2, 1024),), 0),
        Epoch(2, (Write(2, 0, 1, 3584, True), Write(3, 4, 4, None)), 1),
        Epoch(3, (Write(4, 9, 1, 6656),), 2),
        Epoch(4, (Write(5, 1, 1, 8192),), 2),
    ]


def test_sectors_of_a_log_with_larger_ones_are_those_of_512_bytes(
    tmp_path: Path,
) -> None:
    log = write_log(tmp_path / "log", [Entry(2, 1, 0), FLUSHED, END, FLUSHED], 4096)
    epochs, _ = read_epochs(log)
    assert epochs[0].writes == (Write(1, 16, 8, 8192),)


@pytest.mark.parametrize("entries", [[], [FLUSHED], [FLUSHED, END]])
def test_record_that_is_not_complete_is_refused(
    tmp_path: Path, entries: list[Entry]
) -> None:
    with pytest.raises(NbdTargetError, match="the record is not complete"):
        read_epochs(write_log(tmp_path / "log", entries))


def test_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"no log" * 1000)
    with pytest.raises(LogError, match="not a log"):
        read_epochs(tmp_path / "log")


def test_recording_is_kept_beside_its_files(tmp_path: Path) -> None:
    files = RecordingFiles(tmp_path)
    with pytest.raises(NbdTargetError, match=r"recording\.json: No such file"):
        Recording.load(files)
    recording = Recording(1 << 20, "ext4", ("a", "b c"), "check", ("1", "2"))
    recording.save(files)
    assert Recording.load(files) == recording
    files.meta.write_text("{}")
    with pytest.raises(NbdTargetError, match="missing required field"):
        Recording.load(files)
