# SPDX-License-Identifier: Apache-2.0
"""One commit of a clone's metadata, and the compaction that it may switch to.

Theory of operation stands at the head of clone.py: the order of a commit, why a fuzzy snapshot
is sound, and what happens when neither journal has room. This module is its planning and
writing half: `CloneMetadata` holds the state between commits, a `Transaction` what one of them
is about to write, and becomes the new state in `done`.
"""

from typing import TYPE_CHECKING, Final

import msgspec

from metadata.arena import JOURNAL_BLOCKS_MIN, NR_ARENAS, new_chain
from metadata.mode import Mode
from metadata.operations import Flush, Steps
from metadata.records import (
    RUNS_PER_RECORD_MAX,
    Chain,
    Runs,
    blocks_for_runs,
    new_runs,
    snapshot_blocks_max,
)
from metadata.superblock import (
    CLEAN_SHUTDOWN,
    NR_SLOTS,
    CloneSuperblock,
    superblock_writes,
)

if TYPE_CHECKING:
    from metadata.clone import CloneMetadata

__all__ = ["Compaction", "Transaction"]

_RW: Final = Mode.RW

# What a commit that switches arenas may have to journal besides its own changes: 32 KiB.
CATCH_UP_RUNS_MAX: Final = 4096
# Then it takes what is left all the same: commits outrun the compaction.
CATCH_UP_ROUNDS_MAX: Final = 16


class Compaction:
    """A snapshot under way in the other arena, and what has changed since it was begun.

    Attributes:
        arena: where it goes.
        chain: at the end of what has been written.
        begin, snapshot_blocks, snapshot_digest: the snapshot, once it is written.
        since: the runs of each transaction that was pre-committed since and that are not in
            the new journal yet.
        ready: it is complete; the next commit may switch to it.
    """

    def __init__(self, superblock: CloneSuperblock) -> None:
        self.arena = (superblock.arena + 1) % NR_ARENAS
        self.chain = new_chain(superblock, self.arena, 0)
        self.begin = self.chain.block
        self.snapshot_blocks = 0
        self.snapshot_digest = self.chain.digest
        # Behind it, a commit that overtakes us must find room for a snapshot of its own.
        longest = snapshot_blocks_max(superblock.nr_regions)
        self.catch_up_end = self.chain.end - longest - JOURNAL_BLOCKS_MIN
        self.since = new_runs()
        self.ready = False

    def end_snapshot(self) -> None:
        """What is written from here on is the journal behind the snapshot."""
        self.snapshot_blocks = self.chain.block - self.begin
        self.snapshot_digest = self.chain.digest

    def catch_up(self, metadata: "CloneMetadata") -> Steps[None]:
        """Journal what has been pre-committed meanwhile, until little is left of it.

        The transaction under way may be among it: the one that switches comes after that, or
        never. Ends early when there is no room; the next commit decides what to do then.
        """
        for _ in range(CATCH_UP_ROUNDS_MAX):
            if len(self.since) <= 2 * CATCH_UP_RUNS_MAX:
                return
            runs, self.since = self.since, new_runs()
            step = 2 * RUNS_PER_RECORD_MAX
            for at in range(0, len(runs), step):
                piece = runs[at : at + step]
                blocks = blocks_for_runs(len(piece) // 2)
                if self.chain.block + blocks > self.catch_up_end:
                    self.since = runs[at:] + self.since
                    return
                yield self.chain.append(metadata.generation, piece)


class Transaction:
    """One commit. Made by `CloneMetadata.pre_commit`, whose docstring gives the order.

    Attributes:
        runs: the regions that it makes durable.
        generation: what the metadata's generation will be.
        moves: it continues in the other arena.
    """

    def __init__(
        self, metadata: "CloneMetadata", runs: Runs, *, clean_shutdown: bool
    ) -> None:
        superblock = metadata._superblock
        self._metadata = metadata
        self.runs = runs
        self.generation = superblock.generation + 1
        # Between transactions, what is in core is what is committed and what this one takes.
        self._nr_hydrated = metadata.nr_hydrated
        self._flags = CLEAN_SHUTDOWN if clean_shutdown else 0
        # What `journal` appends, where, and behind which snapshot.
        self._to_journal = runs
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
        self._journaled = False
        self._written = False

    @property
    def moves(self) -> bool:
        """Whether it continues in the other arena."""
        return self._arena != self._metadata._superblock.arena

    def _plan(self) -> None:
        """Decide where the changes go; see "Space" in the module head."""
        metadata = self._metadata
        compaction = metadata._compaction
        if compaction is not None:
            compaction.since.extend(self.runs)
            chain = compaction.chain
            if compaction.ready and _fits(chain, compaction.since):
                self._to_journal = compaction.since
                self._arena = compaction.arena
                self._chain = chain
                self._snapshot_block = compaction.begin
                self._snapshot_blocks = compaction.snapshot_blocks
                self._snapshot_digest = compaction.snapshot_digest
                metadata._compaction = None
                return
            if compaction.ready:
                metadata._compaction = (
                    None  # too late: more has changed than fits there
                )
        if _fits(self._chain, self.runs):
            return
        # Neither journal has room: write everything.
        superblock = metadata._superblock
        self._arena = (superblock.arena + 1) % NR_ARENAS
        late = metadata._compacting
        skip = 0
        if late is not None and late.arena == self._arena:
            # Behind whatever it may still be writing.
            skip = max(
                snapshot_blocks_max(metadata.nr_regions),
                late.chain.block - late.begin,
            )
        self._chain = new_chain(superblock, self._arena, skip)
        self._snapshot_block = self._chain.block
        self._to_journal = new_runs()
        self._whole = True
        metadata._compaction = None
        metadata._saved = {}
        metadata._save_from = 0

    def journal(self) -> Steps[None]:
        """Append the changes and flush. May run beside the destination's flush.

        Raises: ReadOnlyMetadata, FailedMetadata: the mode has changed meanwhile.
        Durable: the records; but nobody vouches for them before `superblock` is done.
        """
        self._check_current()
        assert not self._journaled
        metadata, chain = self._metadata, self._chain
        if self._whole:
            snapshot = metadata._write_snapshot(
                chain, self.generation, metadata._saved_chunk
            )
            for operation in snapshot:
                yield operation
                self._check_current()
            metadata._saved = None
            self._snapshot_blocks = chain.block - self._snapshot_block
            self._snapshot_digest = chain.digest
        step = 2 * RUNS_PER_RECORD_MAX
        for at in range(0, len(self._to_journal), step):
            yield chain.append(self.generation, self._to_journal[at : at + step])
            self._check_current()
        if self._to_journal or self.moves:
            yield Flush()
        self._journaled = True

    def superblock(self) -> Steps[None]:
        """Write both copies of the superblock, with FUA.

        Only after `journal` **and** the destination's flush have succeeded.

        Raises: ReadOnlyMetadata, FailedMetadata: the mode has changed meanwhile.
        Durable: the transaction, when this returns.
        """
        self._check_current()
        assert self._journaled, "the superblock vouches for the journal"
        yield superblock_writes(self._next())
        self._written = True

    def done(self) -> None:
        """Take note that the transaction is durable. Acknowledge only after this.

        Raises: ReadOnlyMetadata, FailedMetadata: the mode has changed meanwhile.
        """
        self._check_current()
        assert self._written
        metadata = self._metadata
        slot = self.generation % NR_SLOTS
        metadata._superblock = self._next()
        metadata._unhealed -= {slot}
        metadata._transaction = None

    def _check_current(self) -> None:
        metadata = self._metadata
        if metadata.mode is not _RW:
            metadata._refuse_change()
        assert metadata._transaction is self

    def _next(self) -> CloneSuperblock:
        superblock = self._metadata._superblock
        chain = self._chain
        journal_block = self._snapshot_block + self._snapshot_blocks
        return msgspec.structs.replace(
            superblock,
            generation=self.generation,
            flags=self._flags,
            nr_commits=superblock.nr_commits + 1,
            nr_compactions=superblock.nr_compactions + self.moves,
            arena=self._arena,
            snapshot_block=self._snapshot_block,
            snapshot_blocks=self._snapshot_blocks,
            snapshot_digest=self._snapshot_digest,
            journal_blocks=chain.block - journal_block,
            journal_digest=chain.digest,
            nr_hydrated=self._nr_hydrated,
        )


def _fits(chain: Chain, runs: Runs) -> bool:
    return chain.block + blocks_for_runs(len(runs) // 2) <= chain.end
