# SPDX-License-Identifier: Apache-2.0
"""The records of a clone: which regions are hydrated.

Theory of operation
===================

Two kinds of record, in both of which bits are only ever set, so reading them twice does no harm:

    SetRuns   runs of regions, as pairs (begin, count) of little-endian u32; any order
    SetBits   a packed bitmap from region `begin` on; in snapshots only, ascending

A transaction is one or more SetRuns of at most `RUNS_PER_RECORD_MAX` runs, O(what changed). A
snapshot has a record for each chunk of the bitmap that is not all zero: SetRuns when that is
shorter, else SetBits. So a fresh or a finished clone of any size has a snapshot of (nearly) nothing.
"""

import sys
from array import array
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
from bitarray import bitarray
from bitarray.util import intervals

from nbdtarget_metadata.errors import CorruptMetadata
from nbdtarget_metadata.log.chain import CHUNK_BYTES, RECORD_OVERHEAD_MAX, Chain
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, UNDECODABLE, blocks_for
from nbdtarget_metadata.operations import Write

__all__ = [
    "CHUNK_REGIONS",
    "RUNS_PER_RECORD_MAX",
    "Record",
    "Runs",
    "SetBits",
    "SetRuns",
    "append_content",
    "append_runs",
    "apply_record",
    "blocks_for_runs",
    "decode_record",
    "encode_chunk",
    "new_runs",
    "snapshot_blocks_max",
]

RUN_SIZE: Final = 8
RUNS_PER_RECORD_MAX: Final = (16 * BLOCK_SIZE - RECORD_OVERHEAD_MAX) // RUN_SIZE
CHUNK_REGIONS: Final = 8 * CHUNK_BYTES
# Finding a run costs about 0.5 us. A chunk with more runs is stored as bits, even if that is longer.
CHUNK_RUNS_MAX: Final = 1024

# Pairs (begin, count), flat. A plain list would take ten times the memory and need encoding.
if TYPE_CHECKING:
    Runs: TypeAlias = array[int]
else:
    Runs = array  # not subscriptable before 3.12


class SetRuns(
    msgspec.Struct, array_like=True, frozen=True, gc=False, kw_only=True, tag="runs"
):
    """Regions that are hydrated: `runs` is packed pairs."""

    generation: int
    previous: bytes
    runs: bytes


class SetBits(
    msgspec.Struct, array_like=True, frozen=True, gc=False, kw_only=True, tag="bits"
):
    """Regions that are hydrated: bit i of `bits`, least significant first, is `begin + i`."""

    generation: int
    previous: bytes
    begin: int
    bits: bytes


Record: TypeAlias = SetRuns | SetBits

_DECODER: Final[msgspec.msgpack.Decoder[Record]] = msgspec.msgpack.Decoder(
    SetRuns | SetBits
)


def new_runs() -> Runs:
    """Return an empty list of runs."""
    runs = array("I")
    assert runs.itemsize == 4
    return runs


def append_runs(runs: Runs, begin: int, count: int) -> None:
    """Append a run, or make the last one longer if this follows it."""
    if runs and runs[-2] + runs[-1] == begin:
        runs[-1] += count
    else:
        runs.append(begin)
        runs.append(count)


def pack_runs(runs: Runs) -> bytes:
    """Return `runs` as it is stored, little endian."""
    if sys.byteorder == "big":
        runs = runs[:]
        runs.byteswap()
    return runs.tobytes()


def unpack_runs(packed: bytes) -> Runs:
    """Invert `pack_runs`."""
    runs = new_runs()
    runs.frombytes(packed)
    if sys.byteorder == "big":
        runs.byteswap()
    return runs


def blocks_for_runs(nr_runs: int) -> int:
    """Return the most blocks that the records of a transaction of `nr_runs` runs occupy."""
    full, rest = divmod(nr_runs, RUNS_PER_RECORD_MAX)
    blocks = full * blocks_for(RECORD_OVERHEAD_MAX + RUNS_PER_RECORD_MAX * RUN_SIZE)
    return blocks + (blocks_for(RECORD_OVERHEAD_MAX + rest * RUN_SIZE) if rest else 0)


def snapshot_blocks_max(nr_regions: int) -> int:
    """Return the most blocks that a snapshot of `nr_regions` regions occupies."""
    full, rest = divmod(blocks_for_bits(nr_regions), CHUNK_BYTES)
    blocks = full * blocks_for(RECORD_OVERHEAD_MAX + CHUNK_BYTES)
    return blocks + (blocks_for(RECORD_OVERHEAD_MAX + rest) if rest else 0)


def blocks_for_bits(nr_regions: int) -> int:
    """Return the bytes of a packed bitmap."""
    return -(-nr_regions // 8)


def append_content(
    chain: Chain, generation: int, content: Runs | tuple[int, bytes]
) -> Write:
    """Return the write of the next record: runs, or the first region and a packed bitmap.

    Durable: as `Chain.append`.
    """
    record: Record
    if isinstance(content, tuple):
        begin, bits = content
        record = SetBits(
            generation=generation, previous=chain.digest, begin=begin, bits=bits
        )
    else:
        packed = pack_runs(content)
        record = SetRuns(generation=generation, previous=chain.digest, runs=packed)
    return chain.append(record)


def encode_chunk(begin: int, chunk: bitarray) -> Runs | tuple[int, bytes] | None:
    """Return what a snapshot says of the regions from `begin` on, in the shorter way.

    None: nothing, as none of them is hydrated. Never longer than the bits themselves, which
    is what `snapshot_blocks_max` relies on.
    """
    nr_hydrated = chunk.count()
    if nr_hydrated == 0:
        return None
    nr_runs_max = min(CHUNK_RUNS_MAX, len(chunk) // 8 // RUN_SIZE)
    runs = new_runs()
    found = 0
    # Runs of ones and of zeroes alternate.
    for value, first, last in islice(intervals(chunk), 2 * nr_runs_max):
        if value:
            append_runs(runs, begin + first, last - first)
            found += last - first
    return runs if found == nr_hydrated else (begin, chunk.tobytes())


def decode_record(body: memoryview, where: str) -> Record:
    """Decode the body of an intact envelope. Raises: CorruptMetadata."""
    try:
        return _DECODER.decode(body)
    except UNDECODABLE as error:
        raise CorruptMetadata(where, "a snapshot or journal record", error) from error


def apply_record(
    bits: bitarray, record: Record, where: str, *, bits_begin_min: int | None
) -> int | None:
    """Set the bits that `record` says. Idempotent.

    `bits_begin_min` is where the next SetBits may begin, or None where it may not stand.
    Returns the new one. Raises: CorruptMetadata.
    """
    if isinstance(record, SetRuns):
        _apply_runs(bits, record.runs, where)
        return bits_begin_min
    end = record.begin + 8 * len(record.bits)
    if (
        bits_begin_min is None
        or record.begin < bits_begin_min
        or record.begin % 8
        or end - len(bits) >= 8
    ):
        raise CorruptMetadata(
            f"bits of {where}",
            "none" if bits_begin_min is None else f"{bits_begin_min} to {len(bits)}",
            f"{record.begin} to {end}",
        )
    if bits.find(1, record.begin, end) >= 0:
        # Ours never name a region twice in a snapshot, but the format allows it.
        packed = bitarray(endian="little")
        packed.frombytes(record.bits)
        bits[record.begin : end] |= packed[: len(bits) - record.begin]
        return end
    # The buffer is the bitmap, eight regions a byte: nothing is unpacked.
    with memoryview(bits) as buffer:
        first = record.begin // 8
        buffer[first : first + len(record.bits)] = record.bits
    return end


def _apply_runs(bits: bitarray, packed: bytes, where: str) -> None:
    nr_regions = len(bits)
    if not packed or len(packed) % RUN_SIZE:
        raise CorruptMetadata(f"length of {where}", "whole runs", len(packed))
    runs = unpack_runs(packed)
    begins, counts = runs[0::2], runs[1::2]
    if counts.count(1) == len(counts):
        # Scattered single regions are what a random workload leaves: one call for all.
        if max(begins) >= nr_regions:
            raise CorruptMetadata(
                f"regions of {where}", f"below {nr_regions}", max(begins)
            )
        bits[begins.tolist()] = 1
        return
    for begin, count in zip(begins, counts, strict=True):
        if not 0 < count <= nr_regions - begin:
            raise CorruptMetadata(
                f"regions of {where}", f"within {nr_regions}", f"{begin}+{count}"
            )
        bits[begin : begin + count] = True
