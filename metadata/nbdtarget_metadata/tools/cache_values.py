# SPDX-License-Identifier: Apache-2.0
"""The values in the records of a cache's arena, believed or not, and the mappings that cannot be. For offline tools.

`load` (cache/load.py) refuses the whole for the first thing that is wrong. Here one goes on.
"""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.cache.index import OblockIndex
from nbdtarget_metadata.cache.records import (
    LOGGED,
    OBLOCK_SHIFT,
    VALID,
    ArenaRecord,
    SetEntries,
    SyncRecord,
    Words,
    decode_arena_record,
    decode_sync_record,
    unpack_values,
)
from nbdtarget_metadata.cache.superblock import CacheSuperblock
from nbdtarget_metadata.errors import CorruptMetadata
from nbdtarget_metadata.operations import Steps

__all__ = [
    "Fault",
    "decode_any_record",
    "faults_of",
    "flagged",
    "statements",
    "value_fault",
]

STEP_CBLOCKS: Final = 4096
_FLAGS: Final = (1 << OBLOCK_SHIFT) - 1


class Fault(NamedTuple):
    """Why the value of a cache block is impossible; `other` has the same origin block."""

    cblock: int
    other: int | None
    error: CorruptMetadata


def decode_any_record(body: memoryview, where: str) -> ArenaRecord | SyncRecord:
    """Decode a record of an arena or of a sync area. Raises: CorruptMetadata."""
    try:
        return decode_arena_record(body, where)
    except CorruptMetadata:
        return decode_sync_record(body, where)


def statements(record: ArenaRecord) -> Iterator[tuple[int, int]]:
    """Yield each cache block that `record` names, and its value; believe nothing."""
    if isinstance(record, SetEntries):
        entry = struct.Struct("<IQ")
        whole = len(record.entries) // entry.size * entry.size
        yield from entry.iter_unpack(record.entries[:whole])
    elif record.begin >= 0:  # an intact record may still say anything
        whole = len(record.values) // 8 * 8
        yield from enumerate(unpack_values(record.values[:whole]), record.begin)


def flagged(values: Words, flag: int) -> bitarray:
    """Return which cache blocks have `flag` in their values."""
    bits = zeros(len(values), "little")
    for cblock, value in enumerate(values):
        if value & flag:
            bits[cblock] = 1
    return bits


def value_fault(
    superblock: CacheSuperblock, cblock: int, value: int
) -> CorruptMetadata | None:
    """Say why no cache block can have this value."""
    if value and (not value & VALID or value & _FLAGS & ~(VALID | LOGGED)):
        return CorruptMetadata(
            f"mapping of cache block {cblock}",
            "0, or a valid one with known flags",
            f"{value:#x}",
        )
    nr_oblocks = superblock.nr_oblocks
    if value >> OBLOCK_SHIFT >= nr_oblocks and value:
        return CorruptMetadata(
            f"origin block of cache block {cblock}",
            f"below {nr_oblocks}",
            value >> OBLOCK_SHIFT,
        )
    return None


def faults_of(superblock: CacheSuperblock, values: Words) -> Steps[list[Fault]]:
    """Return each cache block of `values` that cannot be; of two with one origin block, the later."""
    found: list[Fault] = []
    index = yield from OblockIndex.new(values)
    for cblock, value in enumerate(values):
        if cblock % STEP_CBLOCKS == 0:
            yield ()
        if not value:
            continue
        error = value_fault(superblock, cblock, value)
        if error is not None:
            found.append(Fault(cblock, None, error))
            continue
        other = index.add(cblock)
        if other is not None:
            error = CorruptMetadata(
                f"cache blocks of origin block {value >> OBLOCK_SHIFT}",
                "one at most",
                f"{other} and {cblock}",
            )
            found.append(Fault(cblock, other, error))
    return found
