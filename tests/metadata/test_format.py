# SPDX-License-Identifier: Apache-2.0
"""Read the fixture by FORMAT.md alone, with none of our code."""

import hashlib
import struct
from pathlib import Path
from typing import Any

import msgspec

IMAGE = (Path(__file__).parent / "fixtures" / "clone-v1.img").read_bytes()


def envelope(magic: bytes, block: int) -> tuple[list[Any], bytes, int]:
    """Return the body at `block`, its digest, and the block after it."""
    at = block * 4096
    found, version, length = struct.unpack_from("<8sII", IMAGE, at)
    digest = IMAGE[at + 16 : at + 32]
    body = IMAGE[at + 32 : at + 32 + length]
    end = block + (32 + length + 4095) // 4096
    assert (found, version) == (magic, 1)
    hashed = IMAGE[at : at + 16] + struct.pack("<Q", block) + body
    assert hashlib.blake2b(hashed, digest_size=16).digest() == digest
    assert not any(IMAGE[at + 32 + length : end * 4096])
    return msgspec.msgpack.decode(body), digest, end


def test_format_md_describes_the_fixture() -> None:
    newest: list[Any] = max(
        (envelope(b"nbdt-sb\0", block)[0] for block in range(4)),
        key=lambda fields: int(fields[1]),
    )
    assert newest[0] == "clone"
    assert envelope(b"nbdt-sb\0", newest[1] % 2)[0] == newest
    assert envelope(b"nbdt-sb\0", newest[1] % 2 + 2)[0] == newest
    arena_blocks, arena, block = newest[9], newest[10], newest[11]
    assert block == 4 + arena * arena_blocks
    hydrated: set[int] = set()
    link, digests = newest[2], {}
    journal_end = newest[11] + newest[12] + newest[14]
    while block < journal_end:
        record, digest, block = envelope(b"nbdt-rec", block)
        assert record[2] == link
        link = digests[block] = digest
        if record[0] == "runs":
            for begin, count in struct.iter_unpack("<II", record[3]):
                hydrated.update(range(begin, begin + count))
        else:
            assert record[0] == "bits"
            number = int.from_bytes(record[4], "little")
            hydrated |= {
                record[3] + at for at in range(8 * len(record[4])) if number >> at & 1
            }
    assert digests[newest[11] + newest[12]] == newest[13]
    assert digests[journal_end] == newest[15]
    assert len(hydrated) == newest[18]
    assert hydrated == {*range(1000, 3000), *range(5000, 9000, 2), 40000, 40002, 69999}
    assert -(-newest[17] // newest[16]) == 70000
