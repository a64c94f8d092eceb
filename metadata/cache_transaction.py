# SPDX-License-Identifier: Apache-2.0
"""One commit of a cache's metadata, and the compaction that it may switch to.

Theory of operation stands at the head of cache.py. The order of a commit and the two arenas are the
clone's (clone.py, transaction.py). What differs: a record says what blocks **are**, so a transaction
must write its changed blocks as they were at its pre_commit, not as they are by now. So until its
journal is written, whoever changes a block puts aside what it was (`_set_value` in cache_blocks.py).
"""

from collections.abc import Mapping
from itertools import chain as chain_of
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
from bitarray import bitarray
from bitarray.util import zeros

from metadata.arena import JOURNAL_BLOCKS_MIN, NR_ARENAS, new_chain
from metadata.cache_load import Discarded
from metadata.cache_records import (
    CHUNK_BYTES,
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
    snapshot_blocks_max,
    sync_blocks_max,
)
from metadata.cache_superblock import (
    DIRTY_LOG,
    NO_POLICY,
    NR_SYNC_AREAS,
    CacheSuperblock,
    Policy,
)
from metadata.mode import Mode
from metadata.operations import Flush, Operation, Steps
from metadata.records import Chain
from metadata.superblock import CLEAN_SHUTDOWN, NR_SLOTS, superblock_writes

if TYPE_CHECKING:
    from metadata.cache import CacheMetadata

__all__ = [
    "FLUSH_CACHE",
    "FLUSH_ORIGIN",
    "CacheTransaction",
    "Compaction",
    "Shutdown",
    "sync_chain",
    "write_snapshot",
    "write_sync",
]

_RW: Final = Mode.RW

# What must be flushed before the superblock is written.
FLUSH_CACHE: Final = 1  # mappings were inserted, or blocks recorded clean
FLUSH_ORIGIN: Final = 2  # removed, inserted clean, or recorded clean

# What a commit that switches arenas may have to journal besides its own changes.
CATCH_UP_MAX: Final = 4096
CATCH_UP_ROUNDS_MAX: Final = 16


class Shutdown(NamedTuple):
    """What a clean shutdown records besides the dirty bits."""

    policy: Policy = NO_POLICY
    hints: Words | None = None
    discarded: Discarded | None = None


class Compaction:
    """A snapshot under way in the other arena, and what has changed since it was begun.

    Attributes:
        arena: where it goes.
        chain: at the end of what has been written.
        begin, snapshot_blocks, snapshot_digest: the snapshot, once it is written.
        since: cache blocks of each transaction that was pre-committed since, and that are not
            in the new journal yet.
        ready: it is complete; the next commit may switch to it.
    """

    def __init__(self, superblock: CacheSuperblock) -> None:
        self.arena = (superblock.arena + 1) % NR_ARENAS
        self.chain = new_chain(superblock, self.arena, 0)
        self.begin = self.chain.block
        self.snapshot_blocks = 0
        self.snapshot_digest = self.chain.digest
        # Behind it, a commit that overtakes us must find room for a snapshot of its own.
        longest = snapshot_blocks_max(superblock.nr_cblocks_max)
        self.catch_up_end = self.chain.end - longest - JOURNAL_BLOCKS_MIN
        self.since = bitarray(endian="little")
        self.ready = False

    def note(self, taken: bitarray) -> None:
        """A transaction takes these cache blocks."""
        self.since = _union(self.since, taken)

    def end_snapshot(self) -> None:
        """What is written from here on is the journal behind the snapshot."""
        self.snapshot_blocks = self.chain.block - self.begin
        self.snapshot_digest = self.chain.digest

    def catch_up(self, metadata: "CacheMetadata") -> Steps[None]:
        """Journal what has been pre-committed meanwhile, until little is left of it.

        As it is by now: what no transaction holds yet, a later one will journal again. Ends
        early when there is no room; the next commit decides what to do then.
        """
        for _ in range(CATCH_UP_ROUNDS_MAX):
            nr_since = self.since.count()
            if nr_since <= CATCH_UP_MAX:
                return
            if self.chain.block + blocks_for_entries(nr_since) > self.catch_up_end:
                return
            since, self.since = self.since, bitarray(endian="little")
            for entries in entry_records(since.search(1), metadata._values):
                yield _append_entries(self.chain, metadata.generation, entries)


class CacheTransaction:
    """One commit. Made by `CacheMetadata.pre_commit`, whose docstring gives the order.

    Attributes:
        taken: the cache blocks that it makes durable; `logged` those that become LOGGED.
        flushes: FLUSH_CACHE and FLUSH_ORIGIN: which devices must be flushed before `superblock`.
        generation: what the metadata's generation will be.
        starts: `admits_changes` afterwards. heals: nothing is new but the superblock copies.
        moves: it continues in the other arena.
    """

    def __init__(
        self,
        metadata: "CacheMetadata",
        *,
        shutdown: Shutdown | None,
        starts: bool,
        heals: bool,
    ) -> None:
        superblock = metadata._superblock
        self._metadata = metadata
        self.taken = metadata._changed
        metadata._changed = zeros(len(self.taken), "little")
        metadata._has_changed = False
        self._before: Mapping[int, int] = {}
        metadata._before = self._before
        self.logged = self.taken & metadata._logged
        self.flushes = metadata._flushes
        metadata._flushes = 0
        if shutdown is not None:
            self.flushes = FLUSH_CACHE | FLUSH_ORIGIN
        self.generation = superblock.generation + 1
        self.starts = starts
        self.heals = heals
        self._shutdown = shutdown
        self._dirty: bitarray | None = None
        if shutdown is not None:
            self._dirty = metadata.dirty[: metadata.nr_cblocks]
        self._sync_area = superblock.sync_area
        if shutdown is not None and superblock.flags & CLEAN_SHUTDOWN:
            self._sync_area = (superblock.sync_area + 1) % NR_SYNC_AREAS
        # What `journal` appends, where, and behind which snapshot.
        self._to_journal = self.taken
        self._whole = False
        self._arena = superblock.arena
        self._snapshot_block = superblock.snapshot_block
        self._snapshot_blocks = superblock.snapshot_blocks
        self._snapshot_digest = superblock.snapshot_digest
        self._chain = Chain(
            block=superblock.journal_end,
            end=superblock.arena_end,
            digest=superblock.journal_digest,
        )
        self._plan()
        self._next = self._changed_superblock(superblock)
        self._journaled = False
        self._written = False

    @property
    def moves(self) -> bool:
        """Whether it continues in the other arena."""
        return self._arena != self._metadata._superblock.arena

    def _plan(self) -> None:
        """Decide where the changes go; see "Space" in the head of clone.py."""
        metadata = self._metadata
        compaction = metadata._compaction
        if compaction is not None:
            compaction.note(self.taken)
            if compaction.ready:
                metadata._compaction = None
                if _fits(compaction.chain, compaction.since.count()):
                    self._arena = compaction.arena
                    self._chain = compaction.chain
                    self._snapshot_block = compaction.begin
                    self._snapshot_blocks = compaction.snapshot_blocks
                    self._snapshot_digest = compaction.snapshot_digest
                    self._to_journal = compaction.since
                    return
                # Too late: more has changed than fits there.
        if _fits(self._chain, self.taken.count()):
            return
        # Neither journal has room: write everything.
        superblock = metadata._superblock
        self._arena = (superblock.arena + 1) % NR_ARENAS
        late = metadata._compacting
        skip = 0
        if late is not None and late.arena == self._arena:
            # Behind whatever it may still be writing.
            longest = snapshot_blocks_max(superblock.nr_cblocks_max)
            skip = max(longest, late.chain.block - late.begin)
        self._chain = new_chain(superblock, self._arena, skip)
        self._snapshot_block = self._chain.block
        self._to_journal = bitarray(endian="little")
        self._whole = True
        metadata._compaction = None

    def journal(self) -> Steps[None]:
        """Append the changes and flush. May run beside the flushes of `flushes`.

        Raises: ReadOnlyMetadata, FailedMetadata: the mode has changed meanwhile.
        Durable: the records; but nobody vouches for them before `superblock` is done.
        """
        self._check_current()
        assert not self._journaled
        chain = self._chain
        for operation in chain_of(
            self._journal_snapshot(), self._journal_entries(), self._journal_sync()
        ):
            yield operation
            self._check_current()
        self._metadata._before = None
        if self._to_journal.any() or self.moves or self._next.sync_blocks:
            yield Flush()
        self._next = msgspec.structs.replace(
            self._next,
            snapshot_blocks=self._snapshot_blocks,
            snapshot_digest=self._snapshot_digest,
            journal_blocks=chain.block - self._snapshot_block - self._snapshot_blocks,
            journal_digest=chain.digest,
        )
        self._journaled = True

    def _journal_snapshot(self) -> Steps[None]:
        if not self._whole:
            return
        values = self._metadata._values
        yield from write_snapshot(self._chain, self.generation, values, self._before)
        self._snapshot_blocks = self._chain.block - self._snapshot_block
        self._snapshot_digest = self._chain.digest

    def _journal_entries(self) -> Steps[None]:
        cblocks, values = self._to_journal.search(1), self._metadata._values
        for entries in entry_records(cblocks, values, self._before):
            yield _append_entries(self._chain, self.generation, entries)

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

    def superblock(self) -> Steps[None]:
        """Write both copies of the superblock, with FUA.

        Only after `journal` **and** the flushes of `flushes` have succeeded.

        Raises: ReadOnlyMetadata, FailedMetadata: the mode has changed meanwhile.
        Durable: the transaction, when this returns.
        """
        self._check_current()
        assert self._journaled, "the superblock vouches for the journal"
        yield superblock_writes(self._next)
        self._written = True

    def done(self) -> None:
        """Take note that the transaction is durable. Acknowledge only after this.

        Raises: ReadOnlyMetadata, FailedMetadata: the mode has changed meanwhile.
        """
        self._check_current()
        assert self._written
        metadata = self._metadata
        metadata._superblock = self._next
        metadata._unhealed -= {self.generation % NR_SLOTS}
        metadata._transaction = None
        # What has been taken back since is none: the next transaction may say so.
        metadata._admitted |= self.logged & metadata._logged
        if self.starts:
            metadata.admits_changes = True
        if self._shutdown is not None:
            metadata._hints = self._shutdown.hints
            metadata._hints_policy = self._shutdown.policy
            metadata._discarded = self._shutdown.discarded

    def _check_current(self) -> None:
        metadata = self._metadata
        if metadata.mode is not _RW:
            metadata._refuse_change()
        assert metadata._transaction is self

    def _changed_superblock(self, superblock: CacheSuperblock) -> CacheSuperblock:
        """Return the next superblock but for what only `journal` knows: lengths and digests."""
        if self.heals:
            assert not self.taken.any()
            return msgspec.structs.replace(
                superblock,
                generation=self.generation,
                nr_commits=superblock.nr_commits + 1,
                nr_compactions=superblock.nr_compactions + self.moves,
                arena=self._arena,
                snapshot_block=self._snapshot_block,
            )
        metadata = self._metadata
        shutdown = self._shutdown
        discarded = shutdown.discarded if shutdown is not None else None
        # A policy without hints left none to be believed.
        policy = NO_POLICY
        if shutdown is not None and shutdown.hints is not None:
            policy = shutdown.policy
        statistics = metadata.statistics
        return msgspec.structs.replace(
            superblock,
            generation=self.generation,
            flags=CLEAN_SHUTDOWN if shutdown is not None else 0,
            incompat=DIRTY_LOG if metadata.dirty_log else 0,
            nr_commits=superblock.nr_commits + 1,
            nr_compactions=superblock.nr_compactions + self.moves,
            arena=self._arena,
            snapshot_block=self._snapshot_block,
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
            yield chain.append_record(
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
            yield chain.append_record(
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
        yield chain.append_record(
            Hints(
                generation=generation,
                previous=chain.digest,
                begin=at,
                hints=pack_words(hints[at : at + step]),
            )
        )
    if shutdown.discarded is not None:
        yield chain.append_record(
            Discards(
                generation=generation,
                previous=chain.digest,
                bits=shutdown.discarded.bits.tobytes(),
            )
        )


def _append_entries(chain: Chain, generation: int, entries: bytes) -> Operation:
    return chain.append_record(
        SetEntries(generation=generation, previous=chain.digest, entries=entries)
    )


def _fits(chain: Chain, nr_entries: int) -> bool:
    return chain.block + blocks_for_entries(nr_entries) <= chain.end


def _union(first: bitarray, second: bitarray) -> bitarray:
    """Return the blocks that are in either; the cache may have grown between them."""
    if len(first) < len(second):
        first, second = second, first
    union = first.copy()
    union[: len(second)] |= second
    return union
