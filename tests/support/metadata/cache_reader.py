# SPDX-License-Identifier: Apache-2.0
"""Reads a cache's image by FORMAT.md's last chapter alone, with none of our code.

Numbers in brackets are that chapter's: elements of a superblock or a record.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

__all__ = ["Held", "held_in", "live_ranges", "read_records"]

DIRTY_CHUNK = 520192
HINTS_CHUNK = 130048


class Held(NamedTuple):
    """`values` of mapped cache blocks only."""

    values: dict[int, int]
    dirty: frozenset[int]
    hints: tuple[int, ...] | None
    discards: str | None


def _blocks(nr_bytes: int) -> int:
    return -(-nr_bytes // 4096)


def _chunks(nr_items: int, chunk: int, item_size: int) -> int:
    full, rest = divmod(nr_items, chunk)
    last = _blocks(96 + rest * item_size) if rest else 0
    return full * _blocks(96 + chunk * item_size) + last


def _sync_begin(fields: Sequence[Any]) -> int:
    longest = (
        _chunks(_bytes_of_bits(fields[19]), DIRTY_CHUNK, 1)
        + _chunks(fields[19], HINTS_CHUNK, 4)
        + _blocks(96 + 4097)
    )
    return int(4 + 2 * fields[9] + fields[23] * longest)


def _bytes_of_bits(nr_bits: int) -> int:
    return -(-nr_bits // 8)


def live_ranges(fields: Sequence[Any]) -> tuple[range, range, range]:
    """Return the blocks of the snapshot, the journal and the sync area that are vouched for."""
    snapshot = range(fields[11], fields[11] + fields[12])
    sync = _sync_begin(fields)
    return (
        snapshot,
        range(snapshot.stop, snapshot.stop + fields[14]),
        range(sync, sync + fields[24]),
    )


def read_records(image: bytes, blocks: range) -> Iterator[tuple[int, int, list[Any]]]:
    """Yield (block, bytes of header and body, body) of each record."""
    block = blocks.start
    while block < blocks.stop:
        at = block * 4096
        (length,) = struct.unpack_from("<I", image, at + 12)
        body = msgspec.msgpack.decode(image[at + 32 : at + 32 + length])
        yield block, 32 + length, body
        block += _blocks(32 + length)


def held_in(image: bytes, fields: Sequence[Any]) -> Held:
    """Return what the superblock with these elements vouches for."""
    values: dict[int, int] = {}
    snapshot, journal, sync = live_ranges(fields)
    for blocks in (snapshot, journal):
        for _, _, record in read_records(image, blocks):
            values.update(_statements(record))
    values = {cblock: value for cblock, value in values.items() if value}
    if not fields[3] & 1:
        dirty = [c for c, value in values.items() if value & 2 or not fields[6] & 1]
        dirty = [] if fields[3] & 4 else dirty
        return Held(values, frozenset(dirty), None, None)
    dirty, discards = [], None
    hints = [0] * fields[18] if fields[26] else None
    for _, _, record in read_records(image, sync):
        if record[0] == "dirty":
            dirty += [record[3] + bit for bit in _bits(record[4])]
        elif record[0] == "hints":
            assert hints is not None
            for nr, (hint,) in enumerate(struct.iter_unpack("<I", record[4])):
                hints[record[3] + nr] = hint
        else:
            found = set(_bits(record[3]))
            discards = "".join("01"[bit in found] for bit in range(fields[30]))
    found_hints = None if hints is None else tuple(hints)
    return Held(values, frozenset(dirty), found_hints, discards)


def _statements(record: list[Any]) -> Iterator[tuple[int, int]]:
    if record[0] == "entries":
        yield from struct.iter_unpack("<IQ", record[3])
    else:
        for nr, (value,) in enumerate(struct.iter_unpack("<Q", record[4])):
            yield record[3] + nr, value


def _bits(packed: bytes) -> Iterator[int]:
    number = int.from_bytes(packed, "little")
    return (bit for bit in range(8 * len(packed)) if number >> bit & 1)
