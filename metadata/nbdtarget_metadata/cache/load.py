# SPDX-License-Identifier: Apache-2.0
"""Read all that a cache's superblock vouches for, and check it."""

from array import array
from typing import Final, NamedTuple

from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.cache.index import OblockIndex
from nbdtarget_metadata.cache.records import (
    LOGGED,
    OBLOCK_SHIFT,
    ArenaRecord,
    DirtyBits,
    Hints,
    SyncRecord,
    Words,
    apply_arena_record,
    bits_of,
    decode_arena_record,
    decode_sync_record,
    unpack_hints,
)
from nbdtarget_metadata.cache.superblock import (
    DIRTY_LOG,
    CacheSuperblock,
    check_device_size,
)
from nbdtarget_metadata.errors import CorruptMetadata
from nbdtarget_metadata.log.chain import read_chain
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN
from nbdtarget_metadata.operations import Steps

__all__ = ["Discarded", "Loaded", "Sync", "load", "load_values", "new_words"]

STEP_CBLOCKS: Final = 2048  # 1 us each
STEP_BYTES: Final = 2 << 20


class Discarded(NamedTuple):
    """Which parts of the origin are discarded, in units of `block_size` bytes."""

    block_size: int
    bits: bitarray


class Loaded(NamedTuple):
    """The state in core. Bitmaps are of cache blocks.

    Attributes:
        dirty: exact after a clean shutdown; else every block that may be dirty. None if the
            superblock `gives_up_mappings`.
        logged: LOGGED, as the values have it.
        hints, discarded: only after a clean shutdown that recorded any.
    """

    values: Words
    by_oblock: OblockIndex
    dirty: bitarray
    logged: bitarray
    hints: Words | None
    discarded: Discarded | None


def load(superblock: CacheSuperblock, device_size: int) -> Steps[Loaded]:
    """Read and check everything.

    Raises: CorruptMetadata, UnsupportedFormat; MetadataTooSmall: the device has shrunk.
    """
    check_device_size(superblock, device_size)
    values = yield from load_values(superblock)
    index = yield from OblockIndex.new(values)
    mapped = zeros(superblock.nr_cblocks, "little")
    logged = zeros(superblock.nr_cblocks, "little")
    for begin in range(0, superblock.nr_cblocks, STEP_CBLOCKS):
        _index_values(superblock, values, index, begin, mapped, logged)
        yield ()
    _expect_count("mapped cache blocks", superblock.nr_mapped, mapped.count())
    _expect_count("logged cache blocks", superblock.nr_logged, logged.count())
    if not superblock.flags & CLEAN_SHUTDOWN:
        if superblock.gives_up_mappings:
            dirty = zeros(superblock.nr_cblocks, "little")
        else:
            dirty = (logged if superblock.incompat & DIRTY_LOG else mapped).copy()
        return Loaded(values, index, dirty, logged, None, None)
    sync = Sync(superblock)
    yield from sync.read()
    _refuse_any(sync.dirty & ~mapped, "unmapped")
    if superblock.incompat & DIRTY_LOG:
        _refuse_any(sync.dirty & ~logged, "not logged")
    _expect_count("dirty cache blocks", superblock.nr_dirty, sync.dirty.count())
    return Loaded(values, index, sync.dirty, logged, sync.hints, sync.discarded())


def new_words(typecode: str, nr_words: int) -> Steps[Words]:
    """Return zeroes. In steps, as touching 8 MiB for the first time takes some ms."""
    words: Words = array(typecode)
    missing = nr_words * words.itemsize
    while missing:
        size = min(STEP_BYTES, missing)
        words.frombytes(bytes(size))
        missing -= size
        yield ()
    return words


def load_values(superblock: CacheSuperblock) -> Steps[Words]:
    """Read and check the snapshot and the journal: what each cache block holds.

    Raises: CorruptMetadata, UnsupportedFormat.
    """
    values = yield from new_words("Q", superblock.nr_cblocks)
    begin_min: int | None = 0

    def apply(record: ArenaRecord, where: str) -> None:
        nonlocal begin_min
        begin_min = apply_arena_record(
            values,
            record,
            where,
            nr_cblocks_max=superblock.nr_cblocks_max,
            begin_min=begin_min,
        )

    digest = yield from read_chain(
        kind="snapshot",
        begin=superblock.snapshot_block,
        end=superblock.journal_block,
        digest=superblock.uuid,
        generation_max=superblock.generation,
        decode=decode_arena_record,
        apply=apply,
    )
    _expect("digest of the snapshot", superblock.snapshot_digest, digest)
    begin_min = None
    digest = yield from read_chain(
        kind="journal",
        begin=superblock.journal_block,
        end=superblock.journal_end,
        digest=digest,
        generation_max=superblock.generation,
        decode=decode_arena_record,
        apply=apply,
    )
    _expect("digest of the journal", superblock.journal_digest, digest)
    # Of a cache that was larger: removed before it shrank.
    beyond = values[superblock.nr_cblocks :]
    _expect_count("mappings beyond the cache", 0, len(beyond) - beyond.count(0))
    del values[superblock.nr_cblocks :]
    return values


def _index_values(
    superblock: CacheSuperblock,
    values: Words,
    index: OblockIndex,
    begin: int,
    mapped: bitarray,
    logged: bitarray,
) -> None:
    nr_oblocks = superblock.nr_oblocks
    for cblock, value in enumerate(values[begin : begin + STEP_CBLOCKS], begin):
        if not value:
            continue
        oblock = value >> OBLOCK_SHIFT
        if oblock >= nr_oblocks:
            raise CorruptMetadata(
                f"origin block of cache block {cblock}", f"below {nr_oblocks}", oblock
            )
        other = index.add(cblock)
        if other is not None:
            raise CorruptMetadata(
                f"cache blocks of origin block {oblock}",
                "one at most",
                f"{other} and {cblock}",
            )
        mapped[cblock] = 1
        if value & LOGGED:
            logged[cblock] = 1


class Sync:
    """The record of a clean shutdown.

    Attributes: those of `Loaded`, once `read` has returned.
    """

    def __init__(self, superblock: CacheSuperblock) -> None:
        self._superblock = superblock
        self.dirty = zeros(superblock.nr_cblocks, "little")
        self.hints: Words | None = None
        self._discards: bitarray | None = None

    def read(self) -> Steps[None]:
        """Read and check it. Raises: CorruptMetadata, UnsupportedFormat."""
        superblock = self._superblock
        if superblock.policy_name:
            self.hints = yield from new_words("I", superblock.nr_cblocks)
        digest = yield from read_chain(
            kind="clean shutdown's",
            begin=superblock.sync_begin,
            end=superblock.sync_begin + superblock.sync_blocks,
            digest=superblock.uuid,
            generation_max=superblock.generation,
            decode=decode_sync_record,
            apply=self._apply,
        )
        _expect("digest of the clean shutdown", superblock.sync_digest, digest)

    def discarded(self) -> Discarded | None:
        """Return the discarded blocks, if any are recorded. Raises: CorruptMetadata."""
        superblock = self._superblock
        if self._discards is None:
            _expect_count("discard blocks recorded", 0, superblock.nr_dblocks)
            return None
        return Discarded(superblock.discard_block_size, self._discards)

    def _apply(self, record: SyncRecord, where: str) -> None:
        nr_cblocks = self._superblock.nr_cblocks
        if isinstance(record, DirtyBits):
            end = record.begin + 8 * len(record.bits)
            _check_bounds(where, record.begin, end - 7, nr_cblocks)
            bits = bits_of(record.bits, nr_cblocks - record.begin)
            self.dirty[record.begin : record.begin + len(bits)] |= bits
        elif isinstance(record, Hints):
            if len(record.hints) % 4:
                raise CorruptMetadata(
                    f"length of {where}", "whole hints", len(record.hints)
                )
            end = record.begin + len(record.hints) // 4
            _check_bounds(where, record.begin, end, nr_cblocks)
            if self.hints is None:
                raise CorruptMetadata(where, "no hints without a policy", "hints")
            self.hints[record.begin : end] = unpack_hints(record.hints)
        else:
            nr_dblocks = self._superblock.nr_dblocks
            if len(record.bits) != -(-nr_dblocks // 8) or not nr_dblocks:
                raise CorruptMetadata(
                    f"discard blocks of {where}", nr_dblocks, 8 * len(record.bits)
                )
            self._discards = bits_of(record.bits, nr_dblocks)


def _check_bounds(where: str, begin: int, end: int, nr_cblocks: int) -> None:
    if not 0 <= begin < end <= nr_cblocks:
        raise CorruptMetadata(
            f"cache blocks of {where}", f"within {nr_cblocks}", f"{begin} to {end}"
        )


def _refuse_any(bits: bitarray, state: str) -> None:
    first = bits.find(1)
    if first >= 0:
        raise CorruptMetadata(
            f"dirty bit of cache block {first}, which is {state}", 0, 1
        )


def _expect(where: str, expected: bytes, found: bytes) -> None:
    if expected != found:
        raise CorruptMetadata(where, expected.hex(), found.hex())


def _expect_count(what: str, expected: int, found: int) -> None:
    if expected != found:
        raise CorruptMetadata(f"number of {what}", expected, found)
