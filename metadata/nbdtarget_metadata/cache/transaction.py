# SPDX-License-Identifier: Apache-2.0
"""One commit of a cache's metadata, and the compaction that it may switch to.

Theory of operation stands at the head of cache.py, and of journaled.py what is the same for all
kinds. This module is the cache's own. A change is a cache block. A record says what blocks **are**, so a transaction
must write its changed blocks as they were at its pre_commit, not as they are by now. So until its
journal is written, whoever changes a block puts aside what it was (`_set_value` in cache_blocks.py).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.cache.load import Discarded
from nbdtarget_metadata.cache.records import (
    CHUNK_CBLOCKS,
    NONE_BEFORE,
    DirtyBits,
    Discards,
    Hints,
    SetEntries,
    SetValues,
    Words,
    blocks_for_entries,
    chunk_record,
    entry_records,
    pack_words,
    sync_blocks_max,
)
from nbdtarget_metadata.cache.superblock import (
    DIRTY_LOG,
    NO_POLICY,
    NR_SYNC_AREAS,
    ORIGIN_COMPLETE,
    CacheSuperblock,
    PolicyIdentity,
)
from nbdtarget_metadata.log.chain import CHUNK_BYTES, Chain
from nbdtarget_metadata.log.commit import Compaction, JournaledTransaction
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN
from nbdtarget_metadata.operations import Operation, Steps

if TYPE_CHECKING:
    from nbdtarget_metadata.cache.metadata import CacheMetadata

__all__ = [
    "FLUSH_CACHE",
    "FLUSH_ORIGIN",
    "CacheCompaction",
    "CacheTransaction",
    "Shutdown",
    "sync_chain",
    "write_snapshot",
    "write_sync",
]

# What must be flushed before the superblock is written.
FLUSH_CACHE: Final = 1  # mappings were inserted, or blocks recorded clean
FLUSH_ORIGIN: Final = 2  # removed, inserted clean, or recorded clean

# What a commit that switches arenas may have to journal besides its own changes.
CATCH_UP_MAX: Final = 4096
CATCH_UP_ROUNDS_MAX: Final = 16


class Shutdown(NamedTuple):
    """What a clean shutdown records besides the dirty bits."""

    policy: PolicyIdentity = NO_POLICY
    hints: Words | None = None
    discarded: Discarded | None = None


class CacheCompaction(Compaction[bitarray]):
    """Its `since` is the cache blocks of all transactions."""

    def __init__(self, metadata: "CacheMetadata") -> None:
        super().__init__(
            metadata._superblock,
            longest=metadata._snapshot_blocks_max(),
            nothing=bitarray(endian="little"),
        )
        self._metadata = metadata

    def note(self, changes: bitarray) -> None:
        self.since = _union(self.since, changes)

    def snapshot(self) -> Steps[None]:
        metadata = self._metadata
        yield from write_snapshot(self.chain, metadata.generation, metadata._values)

    def catch_up(self) -> Steps[None]:
        # As it is by now: what no transaction holds yet, a later one will journal again.
        metadata = self._metadata
        for _ in range(CATCH_UP_ROUNDS_MAX):
            nr_since = self.since.count()
            if nr_since <= CATCH_UP_MAX:
                return
            if self.chain.block + blocks_for_entries(nr_since) > self.catch_up_end:
                return
            since, self.since = self.since, bitarray(endian="little")
            for entries in entry_records(since.search(1), metadata._values):
                yield _append_entries(self.chain, metadata.generation, entries)


class CacheTransaction(JournaledTransaction[bitarray]):
    """One commit. Made by `CacheMetadata.pre_commit`, whose docstring gives the order.

    Attributes: those of `JournaledTransaction`, and
        taken: the cache blocks that it makes durable; `logged` those that become LOGGED.
        removed: the origin blocks that were unmapped; some of them may be mapped again.
        flushes: FLUSH_CACHE and FLUSH_ORIGIN: which devices must be flushed before `superblock`.
        starts: `admits_changes` afterwards. heals: nothing is new but the superblock copies.
        completes: its superblock says that the origin has everything.
    """

    _metadata: "CacheMetadata"
    _next: CacheSuperblock

    def __init__(
        self,
        metadata: "CacheMetadata",
        *,
        shutdown: Shutdown | None,
        starts: bool,
        heals: bool,
    ) -> None:
        self.taken = metadata._changed
        metadata._changed = zeros(len(self.taken), "little")
        metadata._has_changed = False
        self.removed, metadata._removed = metadata._removed, set()
        self._before: Mapping[int, int] = {}
        metadata._before = self._before
        self.logged = self.taken & metadata._logged
        self.flushes = metadata._flushes
        metadata._flushes = 0
        if shutdown is not None:
            self.flushes = FLUSH_CACHE | FLUSH_ORIGIN
        self.completes = shutdown is None and not heals and metadata.is_complete
        if self.completes and not metadata.is_recorded_complete:
            self.flushes |= FLUSH_ORIGIN  # what was written back
        self.starts = starts
        self.heals = heals
        self._shutdown = shutdown
        self._dirty: bitarray | None = None
        if shutdown is not None:
            self._dirty = metadata.dirty[: metadata.nr_cblocks]
        # Never the one that an older superblock may vouch for.
        area = metadata._superblock.sync_area
        self._sync_area = (area + (shutdown is not None)) % NR_SYNC_AREAS
        super().__init__(metadata, self.taken, self._changed_superblock(metadata))

    def _fits(self, chain: Chain, changes: bitarray) -> bool:
        return chain.block + blocks_for_entries(changes.count()) <= chain.end

    def _take_all(self) -> None:
        self._to_journal = bitarray(endian="little")

    def _snapshot(self) -> Steps[None]:
        values = self._metadata._values
        yield from write_snapshot(self._chain, self.generation, values, self._before)

    def _records(self) -> Steps[None]:
        cblocks, values = self._to_journal.search(1), self._metadata._values
        for entries in entry_records(cblocks, values, self._before):
            yield _append_entries(self._chain, self.generation, entries)
        self._metadata._before = None
        yield from self._journal_sync()

    def _journal_sync(self) -> Steps[None]:
        """Write what a clean shutdown records into the sync area that is not vouched for."""
        shutdown, dirty = self._shutdown, self._dirty
        if shutdown is None or dirty is None:
            return
        superblock = self._metadata._superblock
        chain = sync_chain(superblock, self._sync_area)
        begin = chain.block
        yield from write_sync(chain, self.generation, dirty, shutdown)
        self._next = msgspec.structs.replace(
            self._next, sync_blocks=chain.block - begin, sync_digest=chain.digest
        )

    def done(self) -> None:
        super().done()
        metadata = self._metadata
        # What has been taken back since is none: the next transaction may say so.
        metadata._admitted |= self.logged & metadata._logged
        if self.starts:
            metadata.admits_changes = True
        if self._shutdown is not None:
            metadata._hints = self._shutdown.hints
            metadata._hints_policy = self._shutdown.policy
            metadata._discarded = self._shutdown.discarded

    def _changed_superblock(self, metadata: "CacheMetadata") -> CacheSuperblock:
        """Return the next superblock, but for what all kinds have and what `journal` writes."""
        superblock = metadata._superblock
        if self.heals:
            assert not self.taken.any()
            return superblock
        shutdown = self._shutdown
        discarded = shutdown.discarded if shutdown is not None else None
        # A policy without hints left none to be believed.
        policy = NO_POLICY
        if shutdown is not None and shutdown.hints is not None:
            policy = shutdown.policy
        flags = CLEAN_SHUTDOWN if shutdown is not None else 0
        flags |= ORIGIN_COMPLETE if self.completes else 0
        statistics = metadata.statistics
        return msgspec.structs.replace(
            superblock,
            flags=flags,
            incompat=DIRTY_LOG if metadata.dirty_log else 0,
            origin_size=metadata.origin_size,
            nr_cblocks=metadata.nr_cblocks,
            nr_mapped=metadata.nr_mapped,
            nr_logged=metadata.nr_logged,
            nr_dirty=metadata.nr_dirty if shutdown is not None else 0,
            sync_area=self._sync_area,
            sync_blocks=0,
            sync_digest=superblock.uuid,
            policy_name=policy.name,
            policy_version=policy.version,
            hint_size=policy.hint_size,
            discard_block_size=discarded.block_size if discarded else 0,
            nr_dblocks=len(discarded.bits) if discarded else 0,
            read_hits=statistics.read_hits,
            read_misses=statistics.read_misses,
            write_hits=statistics.write_hits,
            write_misses=statistics.write_misses,
        )


def write_snapshot(
    chain: Chain,
    generation: int,
    values: Words,
    before: Mapping[int, int] = NONE_BEFORE,
) -> Steps[None]:
    """Append a snapshot of `values`, each chunk as it is when its turn comes.

    Values in `before` stand for those in `values`.
    """
    # The range is not fixed: the values may become more meanwhile, and none less.
    begin = 0
    while begin < len(values):
        chunk = values[begin : begin + CHUNK_CBLOCKS]
        for cblock, value in before.items():
            if begin <= cblock < begin + CHUNK_CBLOCKS:
                chunk[cblock - begin] = value
        content = chunk_record(begin, chunk)
        if isinstance(content, tuple):
            yield chain.append(
                SetValues(
                    generation=generation,
                    previous=chain.digest,
                    begin=content[0],
                    values=content[1],
                )
            )
        elif content is not None:
            yield _append_entries(chain, generation, content)
        else:
            yield ()
        begin += CHUNK_CBLOCKS


def sync_chain(superblock: CacheSuperblock, area: int) -> Chain:
    """Return an empty chain in a sync area."""
    begin = superblock.sync_area_begin(area)
    end = begin + sync_blocks_max(superblock.nr_cblocks_max)
    return Chain(block=begin, end=end, digest=superblock.uuid)


def write_sync(
    chain: Chain, generation: int, dirty: bitarray, shutdown: Shutdown
) -> Steps[None]:
    """Append what a clean shutdown records."""
    step = 8 * CHUNK_BYTES
    for at in range(0, len(dirty), step):
        piece = dirty[at : at + step]
        if piece.any():
            yield chain.append(
                DirtyBits(
                    generation=generation,
                    previous=chain.digest,
                    begin=at,
                    bits=piece.tobytes(),
                )
            )
    hints = shutdown.hints
    step = CHUNK_BYTES // 4
    for at in range(0, len(hints) if hints is not None else 0, step):
        assert hints is not None
        yield chain.append(
            Hints(
                generation=generation,
                previous=chain.digest,
                begin=at,
                hints=pack_words(hints[at : at + step]),
            )
        )
    if shutdown.discarded is not None:
        yield chain.append(
            Discards(
                generation=generation,
                previous=chain.digest,
                bits=shutdown.discarded.bits.tobytes(),
            )
        )


def _append_entries(chain: Chain, generation: int, entries: bytes) -> Operation:
    return chain.append(
        SetEntries(generation=generation, previous=chain.digest, entries=entries)
    )


def _union(first: bitarray, second: bitarray) -> bitarray:
    """Return the blocks that are in either; the cache may have grown between them."""
    if len(first) < len(second):
        first, second = second, first
    union = first.copy()
    union[: len(second)] |= second
    return union
