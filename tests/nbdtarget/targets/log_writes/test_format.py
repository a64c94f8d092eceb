# SPDX-License-Identifier: Apache-2.0
"""The log's bytes, as the kernel writes them, and what is no log."""

import random

import pytest

from nbdtarget.targets.log_writes.format import (
    DISCARD,
    FLUSH,
    FUA,
    MARK,
    METADATA,
    Entry,
    LogError,
    Super,
    flag_names,
    pack_entry,
    pack_super,
    parse_entry,
    parse_super,
)

# Written by hand from the kernel's structures: little endian, no padding between fields.
SUPER = bytes.fromhex("72687377 66736a00 01000000 00000000 0300000000000000 00020000")
WRITE = bytes.fromhex(
    "0800000000000000 0200000000000000 0200000000000000 0000000000000000"
)
MARK_MKFS = bytes.fromhex(
    "0000000000000000 0000000000000000 0800000000000000 04000000000000006d6b6673"
)


def padded(data: bytes, size: int = 512) -> bytes:
    return data.ljust(size, b"\0")


def test_superblock() -> None:
    assert pack_super(3, 512) == padded(SUPER)
    assert parse_super(SUPER) == parse_super(padded(SUPER)) == Super(3, 512)


@pytest.mark.parametrize(
    ("data", "entry"),
    [(WRITE, Entry(8, 2, FUA)), (MARK_MKFS, Entry(0, 0, MARK, b"mkfs"))],
)
@pytest.mark.parametrize("size", [512, 4096])
def test_entry(data: bytes, entry: Entry, size: int) -> None:
    assert pack_entry(entry, size) == padded(data, size)
    assert parse_entry(padded(data, size), "") == entry


@pytest.mark.parametrize("flags", [FLUSH, FUA, DISCARD, METADATA, FLUSH | FUA, 0])
def test_entry_comes_back(flags: int) -> None:
    entry = Entry(1 << 60, 7, flags)
    assert parse_entry(pack_entry(entry, 512), "") == entry
    assert entry.nr_data_sectors == (0 if flags & DISCARD else 7)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (SUPER[:-1], "27 bytes are too few for a log"),
        (b"x" + SUPER[1:], "Magic doesn't match"),
        (SUPER[:8] + b"\2" + SUPER[9:], "Version mismatch, wanted 1, have 2"),
        (SUPER[:24] + bytes(4), "sector size 0 cannot be"),
        (SUPER[:24] + b"\1\2\0\0", "sector size 513 cannot be"),
        (SUPER[:24] + b"\0\0\2\0", "sector size 131072 cannot be"),
    ],
)
def test_superblock_refused(data: bytes, reason: str) -> None:
    with pytest.raises(LogError, match=f"^superblock: {reason}"):
        parse_super(data)


def changed(data: bytes, at: int, value: int) -> bytes:
    copy = bytearray(padded(data))
    copy[at] = value
    return bytes(copy)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bytes(512), "nothing is written"),
        (changed(WRITE, 16, 32), "unknown flags 0x20"),
        (changed(WRITE, 23, 1), "unknown flags"),
        (changed(WRITE, 24, 1), "a text that is no mark"),
        (changed(WRITE, 32, 1), "not padded with zeroes"),
        (changed(WRITE, 511, 1), "not padded with zeroes"),
        (changed(MARK_MKFS, 25, 2), "a mark that does not fit"),
        (changed(MARK_MKFS, 8, 1), "a mark that does not fit"),
        (changed(MARK_MKFS, 36, 1), "not padded with zeroes"),
    ],
)
def test_entry_refused(data: bytes, reason: str) -> None:
    with pytest.raises(LogError, match=f"^entry 5: Malformed entry: {reason}"):
        parse_entry(data, "entry 5")


def test_any_bytes_are_an_entry_or_a_log_error() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        data = bytearray(pack_entry(Entry(1, 1, MARK | FUA), 512))
        for _ in range(rng.randrange(4)):
            data[rng.choice([*range(40), 511])] = rng.randrange(256)
        try:
            entry = parse_entry(bytes(data), "")
        except LogError:
            continue
        assert pack_entry(entry, 512) == data


def test_flag_names() -> None:
    assert flag_names(0) == "NONE"
    assert flag_names(FLUSH | FUA) == "FLUSH|FUA"
    assert flag_names(31) == "FLUSH|FUA|DISCARD|MARK|METADATA"
