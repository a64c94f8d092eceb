# SPDX-License-Identifier: Apache-2.0
"""How changes get to the disk, for any kind of metadata: transactions, compactions, what lies between.

Theory of operation
===================

Parts. A **metadata object** (`JournaledMetadata`, of which each kind makes a subclass) holds the state
in core. Its `pre_commit` hands out what one commit makes durable, a `Taken`, in a `Transaction`, which does
the I/O. When the transaction is durable, it gives the new superblock back through `committed`; when
anything fails, the owner calls `abort`. Only the metadata object changes its own state. How changes
are written is the kind's `Encoding`, which reads the state in core and changes nothing.

Space. An arena is filled by a snapshot and the journal behind it (chain.py). When the journal is
half full, `needs_compaction`: `compact` writes a snapshot into the other arena, over time, while
commits go on in this one; then it journals behind the new snapshot what these have committed since
the compaction began, until little is left. The commit after that switches: it journals the rest
and its own changes there, and its superblock names the new arena. So it costs what others cost.
Such a snapshot is fuzzy: it holds each chunk as it was when its turn came. The head of each kind's
metadata.py explains why that is sound.

A transaction that fits neither journal (a compaction that is never run, or too slow) writes
a snapshot itself, which always fits: exactly the state as of its pre_commit. If a background
compaction may still have a write under way in that arena, the snapshot goes behind the
place of that one (an arena holds two, and a compaction catches up only as far as leaves
room), so the two cannot meet; the compaction ends without effect.

    arena:  | snapshot of `compact`, <= S | journal ...                                |
       or:  | abandoned, S or more        | snapshot of a commit, <= S | journal, >= 16 |

Opening. The data that was read may be in a page cache and nowhere else (superblock.py, "Opening begins with a
flush"). So an opening takes both superblock slots for unhealed, and the first resume makes two commits,
one for each, before anything is acknowledged. A commit that only heals writes no record: each of its
two writes can be lost or torn, and what was there before can be opened. Loading alone writes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import msgspec

from nbdtarget_metadata.errors import FailedMetadata, ReadOnlyMetadata
from nbdtarget_metadata.log.chain import Chain
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.layout import JOURNAL_BLOCKS_MIN, NR_ARENAS, new_chain
from nbdtarget_metadata.log.superblock import (
    CLEAN_SHUTDOWN,
    NR_SLOTS,
    RO_COMPAT_KNOWN,
    S,
    Superblock,
    write_superblock,
)
from nbdtarget_metadata.mode import Mode
from nbdtarget_metadata.operations import Flush, Steps

__all__ = [
    "Compaction",
    "Encoding",
    "JournaledMetadata",
    "Taken",
    "Transaction",
    "nothing_more",
]

# The records that a commit may have to journal besides its own changes when it switches arenas: for example
# 4096 runs of regions, which are 32 KiB.
CATCH_UP_MAX: Final = 4096
# Then it takes what is left all the same: commits outrun the compaction.
CATCH_UP_ROUNDS_MAX: Final = 16

_RW: Final = Mode.RW
_FAIL: Final = Mode.FAIL

C = TypeVar("C")  # changes: runs of a clone's regions, a bitmap of cache blocks
T = TypeVar("T", bound="Taken[Any]")


class Encoding(Protocol[C]):
    """How one kind writes its state and its changes. It reads the state in core, and changes nothing."""

    @property
    def snapshot_blocks_max(self) -> int:
        """The most blocks that a snapshot takes: S."""

    def nothing(self) -> C:
        """Return no changes."""

    def union(self, first: C, second: C) -> C:
        """Return both, of which `second` came later. May change and return `first`."""

    def count(self, changes: C) -> int:
        """Return how many changes there are."""

    def blocks_for(self, changes: C) -> int:
        """Return the most blocks that the records of `changes` take."""

    def snapshot(self, chain: Chain, generation: int) -> Steps[None]:
        """Append the whole state, each chunk as it is when its turn comes."""

    def records(self, chain: Chain, generation: int, changes: C) -> Steps[None]:
        """Append `changes`, for which there is room."""

    def records_before(
        self, end: int, chain: Chain, generation: int, changes: C
    ) -> Steps[C]:
        """Append those of `changes` that fit before block `end`; return the others."""


@dataclass(slots=True)
class Taken(Generic[C]):
    """The changes that one commit makes durable. A kind may add to them what it wants to know afterwards.

    It is not changed once it is made. (It is not frozen: to make a frozen one takes a microsecond more.)

    Attributes:
        changes: those that were made before its pre_commit, and that no other commit has taken.
        encoding: writes the state as it was at the pre_commit, although it may have changed since.
    """

    changes: C
    encoding: Encoding[C]


@dataclass(slots=True)
class _Place(Generic[C]):
    """Where a transaction writes, and behind which snapshot; see "Space" in the module head.

    Attributes:
        to_journal: the changes that it appends behind the snapshot.
        writes_snapshot: it writes this snapshot itself, in full.
    """

    arena: int
    chain: Chain
    snapshot_block: int
    snapshot_blocks: int
    snapshot_digest: bytes
    to_journal: C
    writes_snapshot: bool = False


class Compaction(Generic[C]):
    """A snapshot under way in the other arena, and what has changed since it was begun.

    Attributes:
        arena: where it goes.
        chain: at the end of what has been written.
        begin, snapshot_blocks, snapshot_digest: the snapshot, once it is written.
        since: changes of each transaction that was pre-committed since, and that are not in
            the new journal yet.
        is_ready: it is complete; the next commit may switch to it.
    """

    def __init__(self, superblock: Superblock, encoding: Encoding[C]) -> None:
        self._encoding = encoding
        self.arena = (superblock.arena + 1) % NR_ARENAS
        self.chain = new_chain(superblock, self.arena, 0)
        self.begin = self.chain.block
        self.snapshot_blocks = 0
        self.snapshot_digest = self.chain.digest
        # Behind it, a commit that overtakes us must find room for a snapshot of its own.
        self.catch_up_end = (
            self.chain.end - encoding.snapshot_blocks_max - JOURNAL_BLOCKS_MIN
        )
        self.since = encoding.nothing()
        self.is_ready = False

    def note(self, changes: C) -> None:
        """A transaction takes these changes: add them to `since`."""
        self.since = self._encoding.union(self.since, changes)

    def snapshot(self, generation: int) -> Steps[None]:
        """Write the snapshot, each chunk as it is when its turn comes."""
        yield from self._encoding.snapshot(self.chain, generation)
        # The records from here on are the journal behind the snapshot.
        self.snapshot_blocks = self.chain.block - self.begin
        self.snapshot_digest = self.chain.digest

    def catch_up(self, generation: Callable[[], int]) -> Steps[None]:
        """Journal what has been pre-committed meanwhile, until little is left of it.

        Ends early when there is no room; the next commit decides what to do then.

        The transaction under way may be among what is journaled: the commit that switches to
        this arena comes after that one, or never.
        """
        encoding = self._encoding
        for _ in range(CATCH_UP_ROUNDS_MAX):
            if encoding.count(self.since) <= CATCH_UP_MAX:
                return
            # Commits go on while this is written: what they take is noted anew.
            changes, self.since = self.since, encoding.nothing()
            left = yield from encoding.records_before(
                self.catch_up_end, self.chain, generation(), changes
            )
            if encoding.count(left):
                self.since = encoding.union(left, self.since)
                return


class JournaledMetadata(Generic[S, T]):
    """The state in core of any kind, between two commits. See the module head.

    Attributes:
        mode: only downwards.
        uuid: 16 bytes.
        total_blocks: 4 KiB blocks of the metadata device.
        notes: what opening found that was not as it should be, and did without; for logs.
        beside: another object of the same disk that was open when this one was read, and its
            generation then. If it has gone on, this one is old.
    """

    beside: "tuple[JournaledMetadata[Any, Any], int] | None" = None

    def __init__(
        self,
        superblock: S,
        encoding: Encoding[Any],
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
        self._encoding = encoding
        self._disks = superblock.disks
        self._superblock = superblock
        self._unhealed = unhealed
        self._aborted = False
        self._has_new_disks = False
        self._transaction: Transaction[S, T] | None = None
        # Whether the newest transaction was that of a clean shutdown.
        self._is_stop_begun = False
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

        In mode RO that cannot be taken back. If the other disks were written to from here on, the next
        opening would find disks that have changed since the stop that the metadata records.
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

    # ---- what a transaction calls ----

    def check_current(self, transaction: "Transaction[S, T]") -> None:
        """Raise unless `transaction` may go on.

        Raises: ReadOnlyMetadata, FailedMetadata: the mode has changed meanwhile.
        """
        if self.mode is not _RW:
            self._refuse_change()
        assert self._transaction is transaction

    def committed(self, taken: T, superblock: S) -> None:
        """The transaction under way is durable, and `superblock` vouches for it."""
        assert self._transaction is not None
        assert self._transaction.taken is taken
        assert superblock.generation == self._superblock.generation + 1
        self._superblock = superblock
        # Both copies of this slot have been written. The other slot waits for the next commit.
        self._unhealed -= {superblock.generation % NR_SLOTS}
        self._transaction = None

    # ---- compaction ----

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
        compaction = Compaction(self._superblock, self._encoding)
        self._compaction = self._compacting = compaction
        try:
            for operation in compaction.snapshot(self.generation):
                yield operation
                if self._compaction is not compaction:
                    return  # a commit overtook us, or the mode changed
            # The switching commit flushes in any case; this keeps that flush short.
            yield Flush()
            for operation in compaction.catch_up(lambda: self.generation):
                if self._compaction is not compaction:
                    return
                yield operation
            compaction.is_ready = self._compaction is compaction
        finally:
            self._compacting = None
            if not compaction.is_ready and self._compaction is compaction:
                self._compaction = None

    # ---- inside ----

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

    def _begin(
        self,
        taken: T,
        fields: dict[str, Any],
        write_more: Callable[[S], Steps[S]],
    ) -> "Transaction[S, T]":
        """Return the transaction of `taken`: it is under way from here on.

        Args:
            fields: of the superblock, which this kind changes.
            write_more: as of `Transaction`.
        """
        assert self.mode is _RW
        assert self._transaction is None, "one transaction at a time"
        live = self._superblock
        superblock = msgspec.structs.replace(
            live,
            generation=live.generation + 1,
            nr_commits=live.nr_commits + 1,
            disks=self._disks,
            **fields,
        )
        place = self._place_for(taken.changes)
        self._has_new_disks = False
        self._transaction = Transaction(
            self,
            taken,
            superblock,
            place=place,
            moves=place.arena != live.arena,
            write_more=write_more,
        )
        return self._transaction

    def _place_for(self, changes: Any) -> _Place[Any]:
        """Decide where `changes` go; see "Space" in the module head."""
        encoding, live = self._encoding, self._superblock
        compaction = self._compaction
        if compaction is not None:
            compaction.note(changes)
            if compaction.is_ready:
                self._compaction = None
                if _fits(encoding, compaction.chain, compaction.since):
                    return _Place(
                        compaction.arena,
                        compaction.chain,
                        compaction.begin,
                        compaction.snapshot_blocks,
                        compaction.snapshot_digest,
                        to_journal=compaction.since,
                    )
                # Too late: more has changed than fits there.
        journal = Chain(
            block=live.journal_end, end=live.arena_end, digest=live.journal_digest
        )
        if _fits(encoding, journal, changes):
            return _Place(
                live.arena,
                journal,
                live.snapshot_block,
                live.snapshot_blocks,
                live.snapshot_digest,
                to_journal=changes,
            )
        # Neither journal has room: write everything.
        self._compaction = None
        arena = (live.arena + 1) % NR_ARENAS
        late = self._compacting
        skip = 0
        if late is not None and late.arena == arena:
            # The snapshot of the compaction that was dropped may still be written: go behind it.
            skip = max(encoding.snapshot_blocks_max, late.chain.block - late.begin)
        chain = new_chain(live, arena, skip)
        return _Place(
            arena,
            chain,
            chain.block,
            0,
            chain.digest,
            to_journal=encoding.nothing(),
            writes_snapshot=True,
        )

    def _give_up(self) -> T | None:
        """Go to mode RO, as a commit failed. Returns what the transaction under way had taken.

        Raises: FailedMetadata.
        """
        if self.mode is _FAIL:
            raise FailedMetadata
        taken = self._transaction.taken if self._transaction is not None else None
        self.mode = Mode.RO
        self._aborted = True
        self._transaction = None
        self._compaction = None
        return taken


class Transaction(Generic[S, T]):
    """One commit: what it is about to write; it becomes the new state in `done`.

    Made by `pre_commit` of a metadata object, whose docstring gives the order.

    Args:
        superblock: the next one, except for the fields that are known only after writing.
        write_more: writes what the superblock vouches for besides the changes, and returns it
            with that.

    Attributes:
        taken: what it makes durable.
        generation: what the metadata's generation will be.
        moves: it continues in the other arena.
        writes_snapshot: it writes the whole state.
    """

    def __init__(
        self,
        metadata: JournaledMetadata[S, T],
        taken: T,
        superblock: S,
        *,
        place: _Place[Any],
        moves: bool,
        write_more: Callable[[S], Steps[S]],
    ) -> None:
        self.taken = taken
        self.generation = superblock.generation
        self.moves = moves
        self.writes_snapshot = place.writes_snapshot
        self._metadata = metadata
        self._superblock = superblock
        self._place = place
        self._write_more = write_more
        self._is_journaled = False
        self._is_written = False

    def journal(self) -> Steps[None]:
        """Append the changes and flush. May run beside the flushes of the data.

        Raises: ReadOnlyMetadata, FailedMetadata: the mode has changed meanwhile.
        Durable: the records; but no superblock vouches for them before `superblock` is done.
        """
        metadata, place = self._metadata, self._place
        metadata.check_current(self)
        assert not self._is_journaled
        has_written = False
        if place.writes_snapshot:
            encoding = self.taken.encoding
            for operation in encoding.snapshot(place.chain, self.generation):
                yield operation
                metadata.check_current(self)
            place.snapshot_blocks = place.chain.block - place.snapshot_block
            place.snapshot_digest = place.chain.digest
        for operation in self._records():
            has_written = True
            yield operation
            metadata.check_current(self)
        # All that the superblock refers to must be durable before it is written. Nothing was
        # written if this commit only heals superblock copies.
        if has_written or self.moves:
            yield Flush()
        self._is_journaled = True

    def superblock(self) -> Steps[None]:
        """Write both copies of the superblock with FUA, one after the other.

        Only after `journal` **and** the flushes of the data have succeeded.

        Raises: ReadOnlyMetadata, FailedMetadata: the mode has changed meanwhile.
        Durable: the transaction, when this returns.
        """
        self._metadata.check_current(self)
        assert self._is_journaled, "the superblock vouches for the journal"
        place = self._place
        journal_block = place.snapshot_block + place.snapshot_blocks
        self._superblock = msgspec.structs.replace(
            self._superblock,
            nr_compactions=self._superblock.nr_compactions + self.moves,
            arena=place.arena,
            snapshot_block=place.snapshot_block,
            snapshot_blocks=place.snapshot_blocks,
            snapshot_digest=place.snapshot_digest,
            journal_blocks=place.chain.block - journal_block,
            journal_digest=place.chain.digest,
        )
        yield from write_superblock(self._superblock)
        self._is_written = True

    def done(self) -> None:
        """Take note that the transaction is durable. Acknowledge only after this.

        Raises: ReadOnlyMetadata, FailedMetadata: the mode has changed meanwhile.
        """
        self._metadata.check_current(self)
        assert self._is_written
        self._metadata.committed(self.taken, self._superblock)

    def _records(self) -> Steps[None]:
        """Append the changes, and what else the superblock will vouch for."""
        place = self._place
        yield from self.taken.encoding.records(
            place.chain, self.generation, place.to_journal
        )
        self._superblock = yield from self._write_more(self._superblock)


def nothing_more(superblock: S) -> Steps[S]:
    """Write nothing, and return `superblock` as it is: a `write_more` of `Transaction`."""
    return superblock
    yield ()


def _fits(encoding: Encoding[C], chain: Chain, changes: C) -> bool:
    """Tell whether the records of `changes` fit behind `chain`."""
    return chain.block + encoding.blocks_for(changes) <= chain.end
