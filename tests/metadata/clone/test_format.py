# SPDX-License-Identifier: Apache-2.0
"""Read every fixture of a clone by FORMAT.md alone, with none of our code: in sixty lines.

What it finds must be what the dump beside the image says, and what our code finds.
"""

import hashlib
import json
import struct
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"
IMAGES = sorted(FIXTURES.glob("clone-*.img"))
FLAGS = {1: "clean_shutdown", 2: "needs_check", 4: "origin_complete"}


class Reader:
    """FORMAT.md in Python. `fixed`: what no commit changes."""

    fixed = (2, 9, 16, 17)

    def __init__(self, image: bytes) -> None:
        self.image = image

    def envelope(self, magic: bytes, block: int) -> tuple[list[Any], bytes, int] | None:
        """Return the body at `block`, its digest, and the block after it; None if rotten."""
        at = block * 4096
        found, version, length = struct.unpack_from("<8sII", self.image, at)
        digest = self.image[at + 16 : at + 32]
        body = self.image[at + 32 : at + 32 + length]
        hashed = self.image[at : at + 16] + struct.pack("<Q", block) + body
        if (found, version) != (magic, 1):
            return None
        if hashlib.blake2b(hashed, digest_size=16).digest() != digest:
            return None
        end = block + (32 + length + 4095) // 4096
        assert not any(self.image[at + 32 + length : end * 4096])
        return msgspec.msgpack.decode(body), digest, end

    def superblock(self) -> list[Any]:
        copies = [self.envelope(b"nbdt-sb\0", block) for block in range(4)]
        valid = [copy[0] for copy in copies if copy]
        newest: list[Any] = max(valid, key=lambda fields: int(fields[1]))
        for block, copy in enumerate(copies):
            assert copy
            assert copy[0][1] % 2 == block % 2
        for index in self.fixed:
            assert all(fields[index] == newest[index] for fields in valid)
        return newest

    def hydrated(self, fields: list[Any]) -> set[int]:
        """Walk the snapshot and the journal, and hold them to their rules."""
        regions: set[int] = set()
        block, journal = fields[11], fields[11] + fields[12]
        link, generation, bits_begin = fields[2], 0, 0
        while block < journal + fields[14]:
            if block == journal:
                assert link == fields[13]
            opened = self.envelope(b"nbdt-rec", block)
            assert opened
            record, digest, end = opened
            assert record[2] == link
            assert generation <= record[1] <= fields[1]
            assert end - block <= 128
            if record[0] == "runs":
                assert record[3]
                for begin, count in struct.iter_unpack("<II", record[3]):
                    regions.update(range(begin, begin + count))
            else:
                assert (record[0], block < journal) == ("bits", True)
                assert record[3] % 8 == 0
                assert record[3] >= bits_begin
                number = int.from_bytes(record[4], "little")
                bits_begin = record[3] + 8 * len(record[4])
                regions |= {
                    at
                    for at in range(record[3], bits_begin)
                    if number >> at - record[3] & 1
                }
            link, generation, block = digest, record[1], end
        assert (block, link) == (journal + fields[14], fields[15])
        return regions


def runs_of(regions: set[int]) -> list[list[int]]:
    grouped = groupby(enumerate(sorted(regions)), key=lambda pair: pair[1] - pair[0])
    runs = [[region for _, region in pairs] for _, pairs in grouped]
    return [[run[0], len(run)] for run in runs]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_format_md_describes_the_image(path: Path) -> None:
    reader = Reader(path.read_bytes())
    fields = reader.superblock()
    regions = reader.hydrated(fields)
    assert len(regions) == fields[18]
    arena_begin, arena_end = (4 + (fields[10] + nr) * fields[9] for nr in (0, 1))
    assert arena_begin <= fields[11]
    assert fields[11] + fields[12] + fields[14] <= arena_end <= len(reader.image) / 4096
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "format": "nbdtarget metadata dump",
        "version": 1,
        "kind": fields[0],
        "generation": fields[1],
        "uuid": fields[2].hex(),
        "flags": [name for bit, name in FLAGS.items() if fields[3] & bit],
        "compat": fields[4],
        "ro_compat": fields[5],
        "nr_commits": fields[7],
        "nr_compactions": fields[8],
        "region_size_bytes": fields[16],
        "target_size_bytes": fields[17],
        "nr_regions": -(-fields[17] // fields[16]),
        "nr_hydrated": len(regions),
        "hydrated": runs_of(regions),
    }


def test_every_state_worth_keeping_has_its_image() -> None:
    layouts = {}
    for path in IMAGES:
        fields = Reader(path.read_bytes()).superblock()
        arena_begin = 4 + fields[10] * fields[9]
        layouts[path.stem] = (fields[11] > arena_begin, fields[12] > 0, fields[14] > 0)
    assert layouts == {
        "clone-v1": (False, True, True),
        "clone-v1-torn": (False, False, True),
        "clone-v1-overtaken": (True, True, True),
    }
