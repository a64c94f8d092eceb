# SPDX-License-Identifier: Apache-2.0
"""Records, and the chain that they form: what fills an arena.

Theory of operation
===================

A snapshot and the journal behind it are one chain of records. Each record is an envelope that
starts on a block and occupies whole blocks, so appending never rewrites a block that holds an
acknowledged record. Each names the digest of its predecessor; the first names the device's
uuid. The superblock vouches for the chain's length and last digest, and through
that for every byte of it and for their order. Data behind that end belongs to a
transaction that was not acknowledged, or is older still: it is never read, and will be overwritten.

The content of a record is defined by its kind: see clone/records.py and cache/records.py.

A record is at most 512 KiB: hashing one is the longest step between two yields.
"""

from collections.abc import Callable
from typing import Final, Protocol, TypeVar

import msgspec

from nbdtarget_metadata.errors import CorruptMetadata
from nbdtarget_metadata.log.envelope import (
    BLOCK_SIZE,
    HEADER_SIZE,
    open_envelope,
    peek_blocks,
    seal_in_place,
)
from nbdtarget_metadata.operations import Steps, Write, read

__all__ = [
    "CHUNK_BYTES",
    "READ_BLOCKS",
    "RECORD_MAGIC",
    "RECORD_OVERHEAD_MAX",
    "Chain",
    "Linked",
    "R",
    "read_chain",
]

RECORD_MAGIC: Final = b"nbdt-rec"

# Header, msgpack framing, tag, generation, previous digest, begin: 32 + 47, rounded up.
RECORD_OVERHEAD_MAX: Final = 96
# A full record is 128 blocks, what `read_chain` reads at a time. Copying and hashing that takes
# one to two milliseconds.
CHUNK_BYTES: Final = (1 << 19) - BLOCK_SIZE
READ_BLOCKS: Final = 128
STEP_BLOCKS: Final = 16  # of records applied between two yields
_ENCODER: Final = msgspec.msgpack.Encoder()


class Linked(Protocol):
    """The fields that the records of all kinds have."""

    @property
    def generation(self) -> int: ...

    @property
    def previous(self) -> bytes: ...


R = TypeVar("R", bound=Linked)


class Chain:
    """The writing end of a chain.

    Attributes:
        block: where the next record goes.
        end: the block that records must not reach.
        digest: of the last record (at first: the uuid).
    """

    def __init__(self, *, block: int, end: int, digest: bytes) -> None:
        self.block = block
        self.end = end
        self.digest = digest

    def append(self, record: msgspec.Struct) -> Write:
        """Return the write of `record`, which names `digest` as its predecessor.

        Durable: once a flush after the write has ended **and** a superblock vouches for it.
        """
        data = bytearray(HEADER_SIZE)
        _ENCODER.encode_into(record, data, HEADER_SIZE)
        self.digest = seal_in_place(RECORD_MAGIC, self.block, data)
        offset = self.block * BLOCK_SIZE
        self.block += len(data) // BLOCK_SIZE
        assert self.block <= self.end, "there must be room for the record"
        return Write(offset, data)


def read_chain(
    *,
    kind: str,
    begin: int,
    end: int,
    digest: bytes,
    generation_max: int,
    decode: Callable[[memoryview, str], R],
    apply: Callable[[R, str], None],
    generation_min: int = 0,
) -> Steps[bytes]:
    """Read the records in blocks [begin, end), check each, hand it to `apply` with its place.

    Returns the digest of the last record (`digest` if there is none).
    Raises: CorruptMetadata, UnsupportedFormat.
    """
    block = begin
    generation = generation_min
    applied = 0
    while block < end:
        blocks = min(READ_BLOCKS, end - block)
        piece = yield from read(block * BLOCK_SIZE, blocks * BLOCK_SIZE)
        at = 0
        while at < blocks:
            where = f"{kind} record at block {block + at}"
            data = piece[at * BLOCK_SIZE :]
            size = peek_blocks(data)
            if size > blocks - at and at > 0:
                break  # the record goes on behind this piece: read on from its first block
            opened = open_envelope(RECORD_MAGIC, block + at, data, where)
            record = decode(opened.body, where)
            # An intact record of an earlier life of the arena names another predecessor.
            if record.previous != digest:
                raise CorruptMetadata(
                    f"predecessor of {where}", digest.hex(), record.previous.hex()
                )
            # A record that is newer than the superblock was not vouched for by it.
            if not generation <= record.generation <= generation_max:
                raise CorruptMetadata(
                    f"generation of {where}",
                    f"{generation} to {generation_max}",
                    record.generation,
                )
            generation = record.generation
            digest = opened.digest
            at += size
            apply(record, where)
            applied += size
            if applied >= STEP_BLOCKS:
                applied = 0
                yield ()  # setting some thousand runs takes a millisecond
        block += at
    return digest
