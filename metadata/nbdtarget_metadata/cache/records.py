# SPDX-License-Identifier: Apache-2.0
"""The records that a cache writes into its arenas and its sync area: mappings; dirty bits, hints, discards.

Theory of operation
===================

A cache block's **value** is 64 bits, 0 if it is not mapped:

    bits 16 to 63  oblock, the origin block that it holds
    bit 1          LOGGED: after an unclean shutdown it may be dirty (see `dirty_log` in metadata.py)
    bit 0          VALID

An arena holds a snapshot and a journal (log/chain.py explains how they are chained):

    SetEntries   pairs (cblock u32, value u64) in any order: what these blocks are now
    SetValues    values of the blocks from `begin` on; in snapshots only, ascending

Each says what a block **is**, not what was done to it, and later records win: reading a
block twice does no harm, as long as the last one that is read is the newest. A transaction is SetEntries of
the changed blocks. A snapshot has one record for each chunk that is not all unmapped, in the shorter way.

The sync area holds, while `clean_shutdown` is set, one chain more: what only an orderly
shutdown writes and only one opening believes, whose records all have the generation of that commit
(commits that follow before the next `start` only heal superblock copies):

    DirtyBits    packed bitmap of cache blocks, from `begin` on
    Hints        packed u32 of cache blocks, from `begin` on
    Discards     packed bitmap of discard blocks, from 0 on

A record is at most 512 KiB: hashing one is the longest step between two yields.
"""

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
from bitarray import bitarray

from nbdtarget_metadata.errors import CorruptMetadata
from nbdtarget_metadata.log.chain import CHUNK_BYTES, RECORD_OVERHEAD_MAX
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, UNDECODABLE, blocks_for

__all__ = [
    "CHUNK_CBLOCKS",
    "ENTRIES_PER_RECORD_MAX",
    "LOGGED",
    "NONE_BEFORE",
    "NR_CBLOCKS_MAX",
    "NR_OBLOCKS_MAX",
    "OBLOCK_SHIFT",
    "VALID",
    "ArenaRecord",
    "DirtyBits",
    "Discards",
    "Hints",
    "SetEntries",
    "SetValues",
    "SyncRecord",
    "Words",
    "apply_arena_record",
    "bits_of",
    "blocks_for_entries",
    "chunk_record",
    "decode_arena_record",
    "decode_sync_record",
    "entry_records",
    "pack_words",
    "snapshot_blocks_max",
    "sync_blocks_max",
    "unpack_hints",
    "unpack_values",
]

VALID: Final = 1
LOGGED: Final = 2
OBLOCK_SHIFT: Final = 16
_FLAGS_KNOWN: Final = VALID | LOGGED
_FLAGS: Final = (1 << OBLOCK_SHIFT) - 1
_FLAGS_LEGAL: Final = bytes([0, VALID, VALID | LOGGED])

NR_OBLOCKS_MAX: Final = 1 << 48
NR_CBLOCKS_MAX: Final = 1 << 31

ENTRY_SIZE: Final = 12
ENTRIES_PER_RECORD_MAX: Final = (8 * BLOCK_SIZE - RECORD_OVERHEAD_MAX) // ENTRY_SIZE
VALUE_SIZE: Final = 8
CHUNK_CBLOCKS: Final = CHUNK_BYTES // VALUE_SIZE
# To pack an entry costs 0.2 us, a value nothing: more of them are stored as values.
CHUNK_ENTRIES_MAX: Final = 4096

NONE_BEFORE: Final[Mapping[int, int]] = MappingProxyType({})

if TYPE_CHECKING:
    Words: TypeAlias = array[int]
else:
    Words = array  # not subscriptable before 3.12


class SetEntries(
    msgspec.Struct, array_like=True, frozen=True, gc=False, kw_only=True, tag="entries"
):
    """The new state of some cache blocks: `entries` is packed pairs."""

    generation: int
    previous: bytes
    entries: bytes


class SetValues(
    msgspec.Struct, array_like=True, frozen=True, gc=False, kw_only=True, tag="values"
):
    """The new state of the cache blocks from `begin` on."""

    generation: int
    previous: bytes
    begin: int
    values: bytes


class DirtyBits(
    msgspec.Struct, array_like=True, frozen=True, gc=False, kw_only=True, tag="dirty"
):
    """Which cache blocks from `begin` on are dirty; others are not."""

    generation: int
    previous: bytes
    begin: int
    bits: bytes


class Hints(
    msgspec.Struct, array_like=True, frozen=True, gc=False, kw_only=True, tag="hints"
):
    """The policy's hints for the cache blocks from `begin` on."""

    generation: int
    previous: bytes
    begin: int
    hints: bytes


class Discards(
    msgspec.Struct, array_like=True, frozen=True, gc=False, kw_only=True, tag="discards"
):
    """Which discard blocks are discarded."""

    generation: int
    previous: bytes
    bits: bytes


ArenaRecord: TypeAlias = SetEntries | SetValues
SyncRecord: TypeAlias = DirtyBits | Hints | Discards

_ARENA_DECODER: Final[msgspec.msgpack.Decoder[ArenaRecord]] = msgspec.msgpack.Decoder(
    SetEntries | SetValues
)
_SYNC_DECODER: Final[msgspec.msgpack.Decoder[SyncRecord]] = msgspec.msgpack.Decoder(
    DirtyBits | Hints | Discards
)
_ENTRY: Final = struct.Struct("<IQ")
assert _ENTRY.size == ENTRY_SIZE


def decode_arena_record(body: memoryview, where: str) -> ArenaRecord:
    """Decode the body of an intact envelope. Raises: CorruptMetadata."""
    try:
        return _ARENA_DECODER.decode(body)
    except UNDECODABLE as error:
        raise CorruptMetadata(where, "a snapshot or journal record", error) from error


def decode_sync_record(body: memoryview, where: str) -> SyncRecord:
    """Decode the body of an intact envelope. Raises: CorruptMetadata."""
    try:
        return _SYNC_DECODER.decode(body)
    except UNDECODABLE as error:
        raise CorruptMetadata(where, "a record of a clean shutdown", error) from error


# Sizes


def blocks_for_entries(nr_entries: int) -> int:
    """Return the most blocks that the records of `nr_entries` entries occupy."""
    full, rest = divmod(nr_entries, ENTRIES_PER_RECORD_MAX)
    blocks = full * blocks_for(
        RECORD_OVERHEAD_MAX + ENTRIES_PER_RECORD_MAX * ENTRY_SIZE
    )
    return blocks + (blocks_for(RECORD_OVERHEAD_MAX + rest * ENTRY_SIZE) if rest else 0)


def snapshot_blocks_max(nr_cblocks: int) -> int:
    """Return the most blocks that a snapshot of `nr_cblocks` cache blocks occupies."""
    return _array_blocks(nr_cblocks, VALUE_SIZE)


def sync_blocks_max(nr_cblocks: int) -> int:
    """Return the most blocks that a clean shutdown of `nr_cblocks` cache blocks occupies."""
    # 32769 discard blocks are 4097 bytes.
    return (
        _array_blocks(-(-nr_cblocks // 8), 1)
        + _array_blocks(nr_cblocks, 4)
        + blocks_for(RECORD_OVERHEAD_MAX + 4097)
    )


def _array_blocks(nr_items: int, item_size: int) -> int:
    full, rest = divmod(nr_items, CHUNK_BYTES // item_size)
    blocks = full * blocks_for(RECORD_OVERHEAD_MAX + CHUNK_BYTES)
    return blocks + (blocks_for(RECORD_OVERHEAD_MAX + rest * item_size) if rest else 0)


# Packing


def pack_words(words: Words) -> bytes:
    """Return `words` as they are stored, little endian."""
    if sys.byteorder == "big":
        words = words[:]
        words.byteswap()
    return words.tobytes()


def unpack_values(packed: bytes) -> Words:
    """Invert `pack_words` for values."""
    return _unpack("Q", packed)


def unpack_hints(packed: bytes) -> Words:
    """Invert `pack_words` for hints."""
    return _unpack("I", packed)


def _unpack(typecode: str, packed: bytes) -> Words:
    words: Words = array(typecode)
    words.frombytes(packed)
    if sys.byteorder == "big":
        words.byteswap()
    return words


def entry_records(
    cblocks: Iterable[int], values: Words, before: Mapping[int, int] = NONE_BEFORE
) -> Iterator[bytes]:
    """Yield the packed entries of `cblocks`, as much as one record holds at a time.

    Values in `before` stand for those in `values`. Each is looked up when its turn comes.
    """
    pack = _ENTRY.pack
    entries: list[bytes] = []
    for cblock in cblocks:
        value = before[cblock] if cblock in before else values[cblock]
        entries.append(pack(cblock, value))
        if len(entries) == ENTRIES_PER_RECORD_MAX:
            yield b"".join(entries)
            entries.clear()
    if entries:
        yield b"".join(entries)


def chunk_record(begin: int, chunk: Words) -> bytes | tuple[int, bytes] | None:
    """Return what a snapshot says of the blocks from `begin` on, in the shorter way.

    Packed entries, or begin and packed values; None: nothing, as none of them is mapped.
    """
    nr_mapped = len(chunk) - chunk.count(0)
    if nr_mapped == 0:
        return None
    if nr_mapped > CHUNK_ENTRIES_MAX or nr_mapped * ENTRY_SIZE > VALUE_SIZE * len(
        chunk
    ):
        return begin, pack_words(chunk)
    pack = _ENTRY.pack
    return b"".join(pack(begin + at, value) for at, value in enumerate(chunk) if value)


# Reading


def apply_arena_record(
    values: Words,
    record: ArenaRecord,
    where: str,
    *,
    nr_cblocks_max: int,
    begin_min: int | None,
) -> int | None:
    """Let `values` be what `record` says; they grow as needed, up to `nr_cblocks_max`.

    `begin_min` is where the next SetValues may begin, or None where it may not stand.
    Returns the new one. Raises: CorruptMetadata.
    """
    if isinstance(record, SetEntries):
        _apply_entries(values, record.entries, where, nr_cblocks_max)
        return begin_min
    if not record.values or len(record.values) % VALUE_SIZE:
        raise CorruptMetadata(f"length of {where}", "whole values", len(record.values))
    begin = record.begin
    end = begin + len(record.values) // VALUE_SIZE
    if begin_min is None or begin < begin_min or end > nr_cblocks_max:
        raise CorruptMetadata(
            f"cache blocks of {where}",
            "no values" if begin_min is None else f"{begin_min} to {nr_cblocks_max}",
            f"{begin} to {end}",
        )
    new = unpack_values(record.values)
    # Without a loop: the lowest byte of each value is its flags, the next is zero.
    flags = record.values[::VALUE_SIZE]
    wrong = flags.translate(None, _FLAGS_LEGAL) + record.values[1::VALUE_SIZE]
    if any(wrong) or flags.count(0) != new.count(0):
        for value in new:
            _check_value(value, where)
    _grow(values, end)
    values[begin:end] = new
    return end


def _apply_entries(
    values: Words, packed: bytes, where: str, nr_cblocks_max: int
) -> None:
    if not packed or len(packed) % ENTRY_SIZE:
        raise CorruptMetadata(f"length of {where}", "whole entries", len(packed))
    for cblock, value in _ENTRY.iter_unpack(packed):
        if cblock >= nr_cblocks_max:
            raise CorruptMetadata(
                f"cache blocks of {where}", f"below {nr_cblocks_max}", cblock
            )
        _check_value(value, where)
        if cblock >= len(values):
            _grow(values, cblock + 1)
        values[cblock] = value


def _grow(values: Words, end: int) -> None:
    if end > len(values):
        values.frombytes(bytes(VALUE_SIZE * (end - len(values))))


def _check_value(value: int, where: str) -> None:
    flags = value & _FLAGS
    if value and (not flags & VALID or flags & ~_FLAGS_KNOWN):
        raise CorruptMetadata(
            f"mapping in {where}", "0, or a valid one with known flags", f"{value:#x}"
        )


def bits_of(packed: bytes, nr_bits: int) -> bitarray:
    """Return the first `nr_bits` bits of a packed bitmap."""
    bits = bitarray(endian="little")
    bits.frombytes(packed)
    del bits[nr_bits:]
    return bits
