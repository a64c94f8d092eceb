# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget replay-log`: what it finds, prints and replays, and that damage leaves the disk alone."""

import json
from pathlib import Path

import pytest

from nbdtarget.cli.app import run
from nbdtarget.targets.log_writes.format import (
    DISCARD,
    FLUSH,
    FUA,
    MARK,
    Entry,
    pack_entry,
    pack_super,
)

S = 512
DISK = b"0" * 16 * S

# Number: what it is.
ENTRIES = [
    (Entry(0, 2, 0), b"a"),
    (Entry(4, 1, FUA), b"b"),
    (Entry(0, 0, FLUSH), b""),
    (Entry(0, 0, MARK, b"mkfs"), b""),
    (Entry(1, 2, 0), b"c"),
    (Entry(4, 1, DISCARD), b""),
    (Entry(0, 0, FLUSH), b""),
    (Entry(8, 1, FUA), b"d"),
    (Entry(0, 0, MARK, b"dm-log-writes-end"), b""),
]


def disk(sectors: str) -> bytes:
    """A disk of 16 sectors, each filled with one character; "." is zeroes."""
    return b"".join(
        (b"\0" if sector == "." else sector.encode()) * S
        for sector in sectors.ljust(16, "0")
    )


def pack_log(size: int = S) -> bytes:
    parts = [pack_super(len(ENTRIES), size)]
    for entry, fill in ENTRIES:
        parts += [pack_entry(entry, size), fill * size * entry.nr_data_sectors]
    return b"".join(parts) + b"\xee" * size


class ReplayLog:
    """Runs the command on a log and a disk in a directory of their own."""

    def __init__(self, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.log = work / "log"
        self.disk = work / "disk"
        self.log.write_bytes(pack_log())
        self.disk.write_bytes(DISK)
        self._capsys = capsys

    def __call__(self, *options: str, status: int = 0) -> str:
        assert run(["replay-log", "--log", str(self.log), *options]) == status
        out, err = self._capsys.readouterr()
        if status:
            assert err.count("\n") == 1
            return err
        assert err == ""
        return out

    def replay(self, *options: str, status: int = 0) -> str:
        return self("--replay", str(self.disk), *options, status=status)


@pytest.fixture
def replay_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> ReplayLog:
    return ReplayLog(tmp_path, capsys)


@pytest.mark.parametrize(
    ("options", "sectors"),
    [
        ("", "acc0.000d"),
        ("--end-mark mkfs", "aa00b"),
        ("--end-mark dm-log-writes-end", "acc0.000d"),
        ("--next-flush", "aa00b"),
        ("--next-fua", "aa00b"),
        ("--limit 1", "aa"),
        ("--limit 5", "acc0b"),
        ("--start-mark mkfs", "0cc0.000d"),
        ("--start-mark mkfs --next-flush", "0cc0."),
        ("--start-entry 4 --limit 1", "0cc"),
        ("--start-entry 5 --next-fua", "0000.000d"),
        ("--no-discard", "acc0b000d"),
        ("--start-sector 2", "0cc0.000d"),
        ("--end-sector 4", "acc0."),
        ("--start-sector 8 --end-sector 8", "00000000d"),
    ],
)
def test_replay(replay_log: ReplayLog, options: str, sectors: str) -> None:
    assert replay_log.replay(*options.split()) == ""
    assert replay_log.disk.read_bytes() == disk(sectors)
    assert replay_log.log.read_bytes() == pack_log()


def test_sectors_of_4096_bytes(replay_log: ReplayLog) -> None:
    replay_log.log.write_bytes(pack_log(4096))
    replay_log.disk.write_bytes(bytes(16 * 4096))
    replay_log.replay("--end-mark", "mkfs")
    written = replay_log.disk.read_bytes()
    assert written[: 2 * 4096] == b"a" * 2 * 4096
    assert written[4 * 4096 : 5 * 4096] == b"b" * 4096


def test_verbose_prints_what_replay_log_prints(replay_log: ReplayLog) -> None:
    out = replay_log.replay("-v", "--limit", "4", "--start-sector", "4")
    assert out.splitlines() == [
        "skipping 0@2: sector 0, size 1024, flags 0x0(NONE)",
        "replaying 1@5: sector 4, size 512, flags 0x2(FUA)",
        "replaying 2@7: sector 0, size 0, flags 0x1(FLUSH)",
        "replaying 3@8: sector 0, size 0, flags 0x8(MARK) mkfs",
    ]


def test_looking_into_a_log(replay_log: ReplayLog) -> None:
    assert replay_log() == "Log version=1, sectorsize=512, entries=9\n"
    assert replay_log("--num-entries") == "9\n"
    assert replay_log("--find", "--end-mark", "mkfs") == "3@8\n"
    assert replay_log("--find", "--next-flush", "--start-entry", "3") == "6@13\n"
    lines = replay_log("--list", "--start-mark", "mkfs").splitlines()
    assert lines[0] == "4@9: sector 1, size 1024, flags 0x0(NONE)"
    assert lines[1] == "5@12: sector 4, size 512, flags 0x4(DISCARD)"
    assert len(lines) == 5
    assert replay_log.disk.read_bytes() == DISK


def test_json(replay_log: ReplayLog) -> None:
    info = json.loads(replay_log("--json"))
    assert info == {"version": 1, "sector_size": 512, "entries": 9}
    (mark,) = replay_log("--list", "--json", "--start-entry", "8").splitlines()
    assert json.loads(mark)["mark"] == "dm-log-writes-end"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--end-mark nonsense", "mark nonsense: Couldn't find entry"),
        ("--start-mark nonsense", "mark nonsense: Couldn't find starting mark"),
        ("--start-entry 9", "entry 9: Invalid entry number: the log has 9 entries"),
        ("--start-mark mkfs --end-mark mkfs", "mark mkfs: Couldn't find entry"),
    ],
)
def test_what_is_not_there_is_said_and_nothing_written(
    replay_log: ReplayLog, options: str, reason: str
) -> None:
    assert replay_log.replay(*options.split(), status=1).endswith(f"{reason}\n")
    assert replay_log.disk.read_bytes() == DISK


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, 0, "superblock: Magic doesn't match"),
        (16, 200, "entry 9 at sector 16: Malformed entry"),
        (6 * S + 16, 64, "entry 2 at sector 6: Malformed entry: unknown flags"),
        (7 * S + 100, 1, "entry 3 at sector 7: Malformed entry: not padded"),
        (14 * S - S + 12, 1, "entry 7 at sector 13: its data ends behind the end"),
        (4 * S + 6, 1, "entry 1: writes up to byte"),
    ],
)
def test_damaged_log_is_named_and_nothing_written(
    replay_log: ReplayLog, at: int, value: int, reason: str
) -> None:
    damaged = bytearray(replay_log.log.read_bytes())
    damaged[at] = value
    replay_log.log.write_bytes(damaged)
    assert reason in replay_log.replay(status=1)
    assert replay_log.disk.read_bytes() == DISK


@pytest.mark.parametrize("size", [1, 27, 100, 3 * S, 15 * S])
def test_log_cut_short_is_named_and_nothing_written(
    replay_log: ReplayLog, size: int
) -> None:
    replay_log.log.write_bytes(pack_log()[:size])
    replay_log.replay(status=1)
    assert replay_log.disk.read_bytes() == DISK


def test_disk_that_is_too_small_is_left_alone(replay_log: ReplayLog) -> None:
    replay_log.disk.write_bytes(DISK[: 8 * S])
    assert "entry 7: writes up to byte 4608" in replay_log.replay(status=1)
    assert replay_log.disk.read_bytes() == DISK[: 8 * S]
    replay_log.replay("--end-mark", "mkfs")
    assert replay_log.disk.read_bytes() == disk("aa00b")[: 8 * S]


@pytest.mark.parametrize(
    ("check", "times"), [("flush", 2), ("fua", 2), ("1", 9), ("4", 2), ("10", 0)]
)
def test_fsck_runs_where_check_says(
    replay_log: ReplayLog, tmp_path: Path, check: str, times: int
) -> None:
    runs = tmp_path / "runs"
    replay_log.replay("--fsck", f"echo x >> '{runs}'", "--check", check)
    assert (runs.read_text() if runs.exists() else "").count("x") == times


def test_fsck_that_fails_stops_the_replay_there(replay_log: ReplayLog) -> None:
    command = f"test $(head -c 1 '{replay_log.disk}') = 0 || exit 3"
    err = replay_log.replay("--fsck", command, "--check", "flush", status=1)
    assert err == "nbdtarget: entry 2: Fsck errored out: it ended with 3\n"
    assert replay_log.disk.read_bytes() == disk("aa00b")


@pytest.mark.parametrize(
    "options",
    [
        "--fsck true",
        "--check fua",
        "--fsck true --check fua",
        "--replay x --fsck true --check 0",
        "--replay x --fsck true --check nonsense",
        "--replay x --find",
        "--list --num-entries",
        "--start-mark a --start-entry 1",
        "--limit -1",
    ],
)
def test_usage(replay_log: ReplayLog, options: str) -> None:
    replay_log(*options.split(), status=2)
