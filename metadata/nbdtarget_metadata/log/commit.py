# SPDX-License-Identifier: Apache-2.0
"""What the metadata of a clone and of a cache have in common: how changes get to the disk.

Theory of operation
===================

Space. An arena is filled by a snapshot and the journal behind it (records.py). When the journal is
half full, `needs_compaction`: `compact` writes a snapshot into the other arena, over time, while
commits go on in this one; then it journals behind the new snapshot what these have committed since
the compaction began, until little is left. The commit after that switches: it journals the rest
and its own changes there, and its superblock names the new arena. So it costs what others cost.
Why such a snapshot, which is fuzzy, is sound: each kind tells in its own head.

A transaction that fits neither journal (a compaction that is never run, or too slow) writes
a snapshot itself, which always fits: exactly the state as of its pre_commit. If a background
compaction may still have a write under way in that arena, the snapshot goes behind the
place of that one (an arena holds two, and a compaction catches up only as far as leaves
room), so the two cannot meet; the compaction ends without effect.

    arena:  | snapshot of `compact`, <= S | journal ...                                |
       or:  | abandoned, S or more        | snapshot of a commit, <= S | journal, >= 16 |

Opening. What was read may be in a page cache and nowhere else (superblock.py, "Opening begins with a
flush"). So an opening takes both superblock slots for unhealed, and the first resume makes two commits,
one for each, before anything is acknowledged. A commit that only heals writes no record: each of its
two writes can be lost or torn, and what was there before can be opened. Loading alone writes nothing.

A kind brings its `Compaction` and its `JournaledTransaction`: what a change is, and how it is written.
"""

from typing import Any, Final, Generic, TypeVar

import msgspec

from nbdtarget_metadata.errors import FailedMetadata, ReadOnlyMetadata
from nbdtarget_metadata.log.chain import Chain
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.layout import JOURNAL_BLOCKS_MIN, NR_ARENAS, new_chain
from nbdtarget_metadata.log.superblock import (
    CLEAN_SHUTDOWN,
    NR_SLOTS,
    RO_COMPAT_KNOWN,
    Superblock,
    write_superblock,
)
from nbdtarget_metadata.mode import Mode
from nbdtarget_metadata.operations import Flush, Steps

__all__ = ["Compaction", "JournaledMetadata", "JournaledTransaction"]

_RW: Final = Mode.RW
_FAIL: Final = Mode.FAIL

C = TypeVar("C")  # changes: runs of a clone's regions, a bitmap of cache blocks


class Compaction(Generic[C]):
    """A snapshot under way in the other arena, and what has changed since it was begun.

    Attributes:
        arena: where it goes.
        chain: at the end of what has been written.
        begin, snapshot_blocks, snapshot_digest: the snapshot, once it is written.
        since: changes of each transaction that was pre-committed since, and that are not in
            the new journal yet.
        ready: it is complete; the next commit may switch to it.
    """

    def __init__(self, superblock: Superblock, *, longest: int, nothing: C) -> None:
        self.arena = (superblock.arena + 1) % NR_ARENAS
        self.chain = new_chain(superblock, self.arena, 0)
        self.begin = self.chain.block
        self.snapshot_blocks = 0
        self.snapshot_digest = self.chain.digest
        # Behind it, a commit that overtakes us must find room for a snapshot of its own.
        self.catch_up_end = self.chain.end - longest - JOURNAL_BLOCKS_MIN
        self.since = nothing
        self.ready = False

    def note(self, changes: C) -> None:
        """A transaction takes these changes: add them to `since`."""
        raise NotImplementedError

    def snapshot(self) -> Steps[None]:
        """Write the snapshot, each chunk as it is when its turn comes."""
        raise NotImplementedError

    def end_snapshot(self) -> None:
        """What is written from here on is the journal behind the snapshot."""
        self.snapshot_blocks = self.chain.block - self.begin
        self.snapshot_digest = self.chain.digest

    def catch_up(self) -> Steps[None]:
        """Journal what has been pre-committed meanwhile, until little is left of it.

        Ends early when there is no room; the next commit decides what to do then.
        """
        raise NotImplementedError


class JournaledMetadata:
    """Between two commits. See the module head.

    Attributes:
        mode: only downwards.
        uuid: 16 bytes.
        total_blocks: 4 KiB blocks of the metadata device.
        notes: what opening found that was not as it should be, and did without; for logs.
        beside: another object of the same disk that was open when this one was read, and its
            generation then. If it has gone on, this one is old.
    """

    beside: "tuple[JournaledMetadata, int] | None" = None

    def __init__(
        self,
        superblock: Superblock,
        *,
        device_size: int,
        unhealed: frozenset[int],
        notes: tuple[str, ...],
    ) -> None:
        self.mode = _RW
        if superblock.ro_compat & ~RO_COMPAT_KNOWN:
            self.mode = Mode.RO
        self.uuid = superblock.uuid
        self.total_blocks = device_size // BLOCK_SIZE
        self.notes = notes
        self._disks = superblock.disks
        self._superblock = superblock
        self._unhealed = unhealed
        self._aborted = False
        self._has_new_disks = False
        self._transaction: JournaledTransaction[Any] | None = None
        self._is_stop_begun = (
            False  # the newest transaction was that of a clean shutdown
        )
        # The compaction that a commit may still use, and the one whose generator is alive: it
        # may have a write under way long after it was dropped.
        self._compaction: Compaction[Any] | None = None
        self._compacting: Compaction[Any] | None = None

    @property
    def generation(self) -> int:
        """The generation of the last commit that is done."""
        return self._superblock.generation

    def record_disks(self, record: bytes) -> None:
        """Have the next commit record which disks belong to it.

        Raises: ReadOnlyMetadata, FailedMetadata.
        Durable: nothing, until a transaction that was pre-committed later is done.
        """
        if self.mode is not _RW:
            self._refuse_change()
        self._has_new_disks |= record != self._disks
        self._disks = record

    @property
    def disks(self) -> bytes:
        """The record of which disks belong to it (disks.py), as the next commit writes it."""
        return self._disks

    @property
    def recorded_disks(self) -> bytes:
        """The record that is durable."""
        return self._superblock.disks

    @property
    def is_sealed(self) -> bool:
        """Whether the disk may say for good that an orderly stop was the last that happened.

        In mode RO that cannot be taken back. Whatever is written to the other disks from here on, the
        next opening would find them changed behind its back.
        """
        is_stopped = bool(self._superblock.flags & CLEAN_SHUTDOWN)
        return self.mode is Mode.RO and (is_stopped or self._is_stop_begun)

    @property
    def needs_rewrite(self) -> bool:
        """Whether a superblock slot has yet to be rewritten: by the next commit, or the one after."""
        return bool(self._unhealed) and self.mode is _RW

    def fail(self) -> None:
        """Go to mode FAIL: everything raises FailedMetadata until it is opened again."""
        self.mode = _FAIL
        self._compaction = None

    # Compaction

    @property
    def needs_compaction(self) -> bool:
        """Whether it is time to run `compact`: the journal is half full."""
        live = self._superblock
        room = live.arena_end - live.journal_block
        return 2 * live.journal_blocks > room and self._may_compact()

    def compact(self) -> Steps[None]:
        """Write a snapshot into the other arena, beside commits; the next commit switches.

        Does nothing unless it may: in mode RW, one at a time, and not while a commit is
        itself moving to the other arena.

        Raises: FailedMetadata.
        Durable: nothing changes until that commit is done.
        """
        if self.mode is _FAIL:
            raise FailedMetadata
        if not self._may_compact():
            return
        compaction = self._new_compaction()
        self._compaction = self._compacting = compaction
        try:
            for operation in compaction.snapshot():
                yield operation
                if self._compaction is not compaction:
                    return  # a commit overtook us, or the mode changed
            compaction.end_snapshot()
            # The switching commit flushes in any case; this keeps that flush short.
            yield Flush()
            for operation in compaction.catch_up():
                if self._compaction is not compaction:
                    return
                yield operation
            compaction.ready = self._compaction is compaction
        finally:
            self._compacting = None
            if not compaction.ready and self._compaction is compaction:
                self._compaction = None

    # Inside

    def _new_compaction(self) -> Compaction[Any]:
        raise NotImplementedError

    def _snapshot_blocks_max(self) -> int:
        """Return the most blocks that a snapshot takes: S."""
        raise NotImplementedError

    def _may_compact(self) -> bool:
        return (
            self.mode is _RW
            and self._compaction is None
            and self._compacting is None
            and not (self._transaction is not None and self._transaction.moves)
            # While a slot has one good copy, the arena that its sibling names is kept.
            and not self._unhealed
        )

    def _refuse_change(self) -> None:
        raise FailedMetadata if self.mode is _FAIL else ReadOnlyMetadata


class JournaledTransaction(Generic[C]):
    """One commit: what it is about to write; it becomes the new state in `done`.

    Attributes:
        generation: what the metadata's generation will be.
        moves: it continues in the other arena.
    """

    def __init__(
        self, metadata: JournaledMetadata, changes: C, superblock: Superblock
    ) -> None:
        """Take `changes`; `superblock` is the next one, but for what is common to all kinds."""
        live = metadata._superblock
        self._metadata = metadata
        self.generation = live.generation + 1
        # What `journal` appends, where, and behind which snapshot; `_whole`: that is its own.
        self._to_journal = changes
        self._whole = False
        self._arena = live.arena
        self._snapshot_block = live.snapshot_block
        self._snapshot_blocks = live.snapshot_blocks
        self._snapshot_digest = live.snapshot_digest
        self._chain = Chain(
            block=live.journal_end, end=live.arena_end, digest=live.journal_digest
        )
        self._next = msgspec.structs.replace(superblock, disks=metadata._disks)
        metadata._has_new_disks = False
        self._plan()
        self._journaled = False
        self._written = False

    @property
    def moves(self) -> bool:
        """Whether it continues in the other arena."""
        return self._arena != self._metadata._superblock.arena

    def journal(self) -> Steps[None]:
        """Append the changes and flush. May run beside the flushes of the data.

        Raises: ReadOnlyMetadata, FailedMetadata: the mode has changed meanwhile.
        Durable: the records; but nobody vouches for them before `superblock` is done.
        """
        self._check_current()
        assert not self._journaled
        has_written = False
        if self._whole:
            for operation in self._snapshot():
                yield operation
                self._check_current()
            self._snapshot_blocks = self._chain.block - self._snapshot_block
            self._snapshot_digest = self._chain.digest
        for operation in self._records():
            has_written = True
            yield operation
            self._check_current()
        if has_written or self.moves:
            yield Flush()
        self._journaled = True

    def superblock(self) -> Steps[None]:
        """Write both copies of the superblock with FUA, one after the other.

        Only after `journal` **and** the flushes of the data have succeeded.

        Raises: ReadOnlyMetadata, FailedMetadata: the mode has changed meanwhile.
        Durable: the transaction, when this returns.
        """
        self._check_current()
        assert self._journaled, "the superblock vouches for the journal"
        live = self._metadata._superblock
        journal_block = self._snapshot_block + self._snapshot_blocks
        self._next = msgspec.structs.replace(
            self._next,
            generation=self.generation,
            nr_commits=live.nr_commits + 1,
            nr_compactions=live.nr_compactions + self.moves,
            arena=self._arena,
            snapshot_block=self._snapshot_block,
            snapshot_blocks=self._snapshot_blocks,
            snapshot_digest=self._snapshot_digest,
            journal_blocks=self._chain.block - journal_block,
            journal_digest=self._chain.digest,
        )
        yield from write_superblock(self._next)
        self._written = True

    def done(self) -> None:
        """Take note that the transaction is durable. Acknowledge only after this.

        Raises: ReadOnlyMetadata, FailedMetadata: the mode has changed meanwhile.
        """
        self._check_current()
        assert self._written
        metadata = self._metadata
        slot = self.generation % NR_SLOTS
        metadata._superblock = self._next
        metadata._unhealed -= {slot}
        metadata._transaction = None

    # Inside

    def _fits(self, chain: Chain, changes: C) -> bool:
        """Tell whether the records of `changes` fit behind `chain`."""
        raise NotImplementedError

    def _take_all(self) -> None:
        """It will write everything: leave nothing in `_to_journal`, and keep what changes."""
        raise NotImplementedError

    def _snapshot(self) -> Steps[None]:
        """Append everything as it was at pre_commit."""
        raise NotImplementedError

    def _records(self) -> Steps[None]:
        """Append what is in `_to_journal`, and what else the superblock will vouch for."""
        raise NotImplementedError

    def _plan(self) -> None:
        """Decide where the changes go; see "Space" in the module head."""
        metadata = self._metadata
        compaction = metadata._compaction
        if compaction is not None:
            compaction.note(self._to_journal)
            if compaction.ready:
                metadata._compaction = None
                if self._fits(compaction.chain, compaction.since):
                    self._switch_to(compaction)
                    return
                # Too late: more has changed than fits there.
        if self._fits(self._chain, self._to_journal):
            return
        # Neither journal has room: write everything.
        live = metadata._superblock
        self._arena = (live.arena + 1) % NR_ARENAS
        late = metadata._compacting
        skip = 0
        if late is not None and late.arena == self._arena:
            # Behind whatever it may still be writing.
            longest = metadata._snapshot_blocks_max()
            skip = max(longest, late.chain.block - late.begin)
        self._chain = new_chain(live, self._arena, skip)
        self._snapshot_block = self._chain.block
        self._whole = True
        self._take_all()
        metadata._compaction = None

    def _switch_to(self, compaction: Compaction[C]) -> None:
        self._arena = compaction.arena
        self._chain = compaction.chain
        self._snapshot_block = compaction.begin
        self._snapshot_blocks = compaction.snapshot_blocks
        self._snapshot_digest = compaction.snapshot_digest
        self._to_journal = compaction.since

    def _check_current(self) -> None:
        metadata = self._metadata
        if metadata.mode is not _RW:
            metadata._refuse_change()
        assert metadata._transaction is self
