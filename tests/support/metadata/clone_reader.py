# SPDX-License-Identifier: Apache-2.0
"""Reads a clone's image by FORMAT.md alone, with none of our code, in sixty lines."""

import hashlib
import struct
from typing import Any

import msgspec

__all__ = ["FLAGS", "Reader"]

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
