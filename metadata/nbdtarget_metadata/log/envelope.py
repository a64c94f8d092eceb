# SPDX-License-Identifier: Apache-2.0
"""The envelope around everything that is written: 32 bytes, then the body.

    offset  size  field
         0     8  magic         what kind of body this is
         8     4  version       format version of the body, little endian
        12     4  length        bytes of the body, little endian
        16    16  digest        BLAKE2b-128 over magic, version, length, block number (u64) and body

An envelope starts on a 4 KiB block and is padded with zeroes to whole blocks. Its block's
number is part of the digest, so a block that a disk wrote to the wrong place is as invalid as
a rotten one. This header keeps its shape in every future format version: otherwise an older
program could not tell newer metadata from damaged metadata.
"""

import hashlib
import struct
from typing import Final, NamedTuple

import msgspec

from nbdtarget_metadata.errors import CorruptMetadata, UnsupportedFormat

__all__ = [
    "BLOCK_SIZE",
    "DIGEST_SIZE",
    "FORMAT_VERSION",
    "HEADER_SIZE",
    "UNDECODABLE",
    "Opened",
    "blocks_for",
    "open_envelope",
    "peek_blocks",
    "seal",
    "seal_in_place",
]

BLOCK_SIZE: Final = 4096
FORMAT_VERSION: Final = 1
DIGEST_SIZE: Final = 16

# The errors that decoding may raise for a body that is intact but that this program has not written: for
# example wrong types, text that is not UTF-8, or arrays that are nested too deeply.
UNDECODABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_HEADER: Final = struct.Struct("<8sII16s")
_DIGESTED: Final = struct.Struct("<8sIIQ")
HEADER_SIZE: Final = _HEADER.size
assert HEADER_SIZE == 32


class Opened(NamedTuple):
    """A body whose envelope is intact."""

    body: memoryview
    digest: bytes


def blocks_for(length: int) -> int:
    """Return how many blocks `length` bytes occupy."""
    return -(-length // BLOCK_SIZE)


def seal(magic: bytes, block: int, body: bytes) -> tuple[bytes, bytes]:
    """Return the whole blocks to be written at `block`, and their digest."""
    data = bytearray(HEADER_SIZE)
    data += body
    digest = seal_in_place(magic, block, data)
    return bytes(data), digest


def seal_in_place(magic: bytes, block: int, data: bytearray) -> bytes:
    """Make the whole blocks for `block` of `data`, a body behind room for the header.

    Returns their digest. For large bodies: nothing is copied.
    """
    with memoryview(data)[HEADER_SIZE:] as body:
        length = len(body)
        digest = _digest(magic, FORMAT_VERSION, length, block, body)
    _HEADER.pack_into(data, 0, magic, FORMAT_VERSION, length, digest)
    data += bytes(-len(data) % BLOCK_SIZE)
    return digest


def peek_blocks(data: memoryview) -> int:
    """Return how many blocks the envelope at the start of `data` claims; trust nothing."""
    return blocks_for(HEADER_SIZE + int(_HEADER.unpack_from(data)[2]))


def open_envelope(magic: bytes, block: int, data: memoryview, where: str) -> Opened:
    """Check the envelope at the start of `data`, which was read from `block`.

    Raises:
        CorruptMetadata: not intact; `where` names the block in it.
        UnsupportedFormat: intact, but of another format version.
    """
    found, version, length, digest = _HEADER.unpack_from(data)
    if found != magic:
        raise CorruptMetadata(f"magic of {where}", magic, found)
    if length > len(data) - HEADER_SIZE:
        raise CorruptMetadata(
            f"length of {where}", f"at most {len(data) - HEADER_SIZE}", length
        )
    body = data[HEADER_SIZE : HEADER_SIZE + length]
    expected = _digest(magic, version, length, block, body)
    if digest != expected:
        raise CorruptMetadata(f"digest of {where}", expected.hex(), digest.hex())
    # Only after the digest: a rotten version number must not pass for a newer program's metadata.
    if version != FORMAT_VERSION:
        raise UnsupportedFormat(version, 0)
    return Opened(body, digest)


def _digest(
    magic: bytes, version: int, length: int, block: int, body: bytes | memoryview
) -> bytes:
    digest = hashlib.blake2b(
        _DIGESTED.pack(magic, version, length, block), digest_size=DIGEST_SIZE
    )
    digest.update(body)
    return digest.digest()
