# SPDX-License-Identifier: Apache-2.0
"""The clone's metadata: which regions of the destination are valid, and how that survives.

Theory of operation
===================

One bit a region: 1 means that the destination holds the region's data, 0 that the source does.
Bits go from 0 to 1 and never back, except for those that a failed commit did not make durable.

The commit. It has two phases, because another disk must act between them:

    transaction = metadata.pre_commit()     # takes the changes; later ones belong to the next commit
    flush the destination   AND   run transaction.journal()      # together, in any order
    run transaction.superblock()            # only if both succeeded
    transaction.done()                      # only now may FLUSH and FUA be acknowledged

Once a superblock says that a region is hydrated, the destination will be read for it, so its data
must be there first: that is the destination's flush. The superblock vouches for the journal, so
the journal must be there first too. If any of these steps fails, call `metadata.abort()`.

States of one bit:

    unhydrated --set_hydrated--> active --pre_commit--> in transaction --done--> committed
         ^                         |                          |
         +------------------- abort (and mode RO) ------------+

What a crash leaves: exactly the bits of the newest superblock that is on disk: of the
last acknowledged transaction, or of the one under way if its superblock got there.

Space and compaction: see commit.py. The snapshot is **fuzzy**: each chunk is copied when its
turn comes, bits that no transaction holds yet included. That is sound. (1) Each bit in it was set before the
switching commit's pre_commit, as the snapshot was finished then; so that commit's destination flush
covers its data. (2) A bit that was set after its chunk was copied is in a transaction after
the compaction began, and these are all journaled again. (3) Setting a bit twice does no harm.
A snapshot that a transaction writes itself is exact: chunks that change meanwhile are saved first.

Flags. `clean_shutdown` on disk says: an orderly suspend was the last thing that this metadata
has recorded. It is set by `pre_commit(clean_shutdown=True)` and cleared by every other commit that
records a change, so never by opening alone. The bits of a clone are right after any crash, so the flag
only informs people. If a changed bit is lost in a crash, the flag stays set, over bits that are
exactly those of the clean shutdown. (A cache believes dirty bits because of its flag, so it must clear
that by a commit of its own before the first block becomes dirty.)

Modes go RW -> RO -> FAIL. In RO bits may be looked up, and nothing changes; after an abort `changed`
stays true, so flushes that depend on metadata fail for as long as the object lives. In FAIL
every function raises (attributes may still be read, and needs_compaction is false).

Not handled: sharing. There is one object for each metadata device, and all its users share that.

Context: nothing here blocks, waits or does I/O. Steps between two yields take milliseconds at
most. One thread.
"""

from collections.abc import Iterator
from typing import Final, TypeAlias

from bitarray import bitarray

from nbdtarget_metadata.clone.encoding import CloneEncoding, SavedChunks
from nbdtarget_metadata.clone.load import load_bitmap, new_bitmap
from nbdtarget_metadata.clone.records import (
    Runs,
    append_runs,
    new_runs,
)
from nbdtarget_metadata.clone.superblock import (
    CLONE,
    NR_REGIONS_MAX,
    CloneSuperblock,
    arena_blocks_for,
    device_size_with,
    first_superblock,
)
from nbdtarget_metadata.errors import FailedMetadata, GeometryMismatch, ReadOnlyMetadata
from nbdtarget_metadata.log.commit import (
    JournaledMetadata,
    Taken,
    Transaction,
    nothing_more,
)
from nbdtarget_metadata.log.envelope import DIGEST_SIZE
from nbdtarget_metadata.log.layout import (
    JOURNAL_BLOCKS_MIN,
    JOURNAL_BLOCKS_PREFERRED,
    refuse_content,
)
from nbdtarget_metadata.log.superblock import (
    ALL_SLOTS,
    CLEAN_SHUTDOWN,
    SUPERBLOCK_BLOCKS,
    format_superblocks,
    read_superblock,
)
from nbdtarget_metadata.mode import Mode
from nbdtarget_metadata.operations import Steps

__all__ = ["NR_REGIONS_MAX", "CloneMetadata", "CloneTransaction", "Mode"]

_RW: Final = Mode.RW
_FAIL: Final = Mode.FAIL


CloneTransaction: TypeAlias = Transaction[CloneSuperblock, Taken[Runs]]


class CloneMetadata(JournaledMetadata[CloneSuperblock, Taken[Runs]]):
    """The metadata of one clone. Made by `format` or `open`, which see.

    Attributes: those of `JournaledMetadata`, and
        nr_regions: regions of `region_size` bytes; the last may be short.
        region_size, target_size: bytes; fixed for the life of the metadata.
        nr_hydrated: bits in `hydrated`, in O(1).
        hydrated: the bitmap in core, with changes that are not committed yet. Only methods of this
            class change it.
        clean_shutdown: what the flag said when this was opened (true when just formatted).
    """

    def __init__(
        self,
        *,
        superblock: CloneSuperblock,
        hydrated: bitarray,
        device_size: int,
        unhealed: frozenset[int],
        notes: tuple[str, ...],
    ) -> None:
        super().__init__(
            superblock,
            CloneEncoding(hydrated),
            device_size=device_size,
            unhealed=unhealed,
            notes=notes,
        )
        self.nr_regions = superblock.nr_regions
        self.region_size = superblock.region_size
        self.target_size = superblock.target_size
        self.hydrated = hydrated
        self.nr_hydrated = superblock.nr_hydrated
        self.clean_shutdown = bool(superblock.flags & CLEAN_SHUTDOWN)
        self._active = new_runs()
        # While a commit under way writes the whole bitmap: keeps what changes before its turn.
        self._saved: SavedChunks | None = None

    # ---- making and opening ----

    @staticmethod
    def device_size_for(nr_regions: int) -> int:
        """Return the bytes of a metadata device that is right for `nr_regions`.

        Larger ones are not used in full; down to `device_size_min` smaller ones work, and
        compact more often.
        """
        return device_size_with(nr_regions, JOURNAL_BLOCKS_PREFERRED)

    @staticmethod
    def device_size_min(nr_regions: int) -> int:
        """Return the bytes of the smallest metadata device for `nr_regions`."""
        return device_size_with(nr_regions, JOURNAL_BLOCKS_MIN)

    @classmethod
    def format(
        cls, *, device_size: int, region_size: int, target_size: int, uuid: bytes
    ) -> Steps["CloneMetadata"]:
        """Make new metadata, in which no region is hydrated, on an all-zero device.

        Also finishes a format that was interrupted. It writes four blocks, for any size.

        Raises:
            NotOurs: the device holds anything else, be it metadata. Nothing was written.
            MetadataTooSmall: see `device_size_min`. Nothing was written.
        Durable: the metadata, formatted and empty, when this returns. A crash before that
            leaves it formatted or `NotFormatted`.
        """
        nr_regions = _nr_regions(region_size, target_size)
        assert len(uuid) == DIGEST_SIZE, "it stands where a digest does"
        arena_blocks = arena_blocks_for(nr_regions, device_size)
        yield from refuse_content(CLONE, device_size, arena_blocks)
        superblock = first_superblock(
            bytes(uuid),
            region_size=region_size,
            target_size=target_size,
            arena_blocks=arena_blocks,
        )
        hydrated = yield from new_bitmap(nr_regions)
        superblock = yield from format_superblocks(superblock)
        return cls(
            superblock=superblock,
            hydrated=hydrated,
            device_size=device_size,
            unhealed=frozenset(),
            notes=(),
        )

    @classmethod
    def open(
        cls, *, device_size: int, region_size: int, target_size: int
    ) -> Steps["CloneMetadata"]:
        """Open existing metadata. Reads and flushes; writes nothing.

        Raises:
            NotFormatted: `format` may follow.
            NotOurs, CorruptMetadata, UnsupportedFormat: a person must decide what to do.
            GeometryMismatch: it belongs to another table line.
            MetadataTooSmall: the device has shrunk.
        Durable: everything that this returns.
        """
        _nr_regions(region_size, target_size)
        found = yield from read_superblock(CLONE, device_size)
        superblock = found.superblock
        if superblock.region_size != region_size:
            raise GeometryMismatch(
                "region_size", stored=superblock.region_size, given=region_size
            )
        if superblock.target_size != target_size:
            raise GeometryMismatch(
                "target_size", stored=superblock.target_size, given=target_size
            )
        hydrated = yield from load_bitmap(superblock, device_size)
        return cls(
            superblock=superblock,
            hydrated=hydrated,
            device_size=device_size,
            unhealed=ALL_SLOTS,
            notes=found.notes,
        )

    # ---- looking up ----

    def all_hydrated(self, begin: int, end: int) -> bool:
        """Tell whether each region of [begin, end) is hydrated."""
        # hot: one call for each request; 0.2 us.
        if self.mode is _FAIL:
            raise FailedMetadata
        return self.hydrated.find(0, begin, end) < 0

    def none_hydrated(self, begin: int, end: int) -> bool:
        """Tell whether no region of [begin, end) is hydrated."""
        if self.mode is _FAIL:
            raise FailedMetadata
        return self.hydrated.find(1, begin, end) < 0

    def runs(self, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Cut [begin, end) into runs (begin, end, hydrated) of equal state, in order.

        A run is found when it is asked for: changes in front of it show.
        """
        while begin < end:
            if self.mode is _FAIL:
                raise FailedMetadata
            state = self.hydrated[begin]
            stop = self.hydrated.find(not state, begin, end)
            if stop < 0:
                stop = end
            yield begin, stop, bool(state)
            begin = stop

    def maybe_next_unhydrated(self, begin: int, end: int) -> int | None:
        """Return the first region in [begin, end) that is not hydrated, if there is one."""
        if self.mode is _FAIL:
            raise FailedMetadata
        region_nr = self.hydrated.find(0, begin, end)
        return None if region_nr < 0 else region_nr

    @property
    def used_blocks(self) -> int:
        """4 KiB blocks in use: superblocks, the live snapshot and its journal."""
        live = self._superblock.journal_end - self._superblock.snapshot_block
        return SUPERBLOCK_BLOCKS + live

    @property
    def hydration_done(self) -> bool:
        """Whether all regions are hydrated, durably: uncommitted bits do not count."""
        return self._superblock.nr_hydrated == self.nr_regions

    @property
    def changed(self) -> bool:
        """Whether anything is not durably committed, the transaction under way included.

        It stays true after `abort`. It is also true after opening, until both superblock slots are rewritten.
        """
        return (
            bool(self._active)
            or self._transaction is not None
            or self._aborted
            or self._has_new_disks
            or self.needs_rewrite
        )

    # ---- changing ----

    def set_hydrated(self, begin: int, end: int) -> None:
        """Mark the regions [begin, end) hydrated. Those that are so already stay so.

        The destination's copy of them must be complete, as far as reads through the
        destination are concerned; it need not be durable. A range costs a millisecond for
        each 2^25 regions: cut what is longer.

        Raises: ReadOnlyMetadata, FailedMetadata.
        Durable: nothing, until a transaction that was pre-committed later is done.
        """
        # hot: one call for each region that a write hydrates; 0.7 us.
        if self.mode is not _RW:
            self._refuse_change()
        assert 0 <= begin < end <= self.nr_regions
        bits = self.hydrated
        first = bits.find(0, begin, end)
        while first >= 0:
            last = bits.find(1, first, end)
            if last < 0:
                last = end
            if self._saved is not None:
                self._saved.save(first, last)
            bits[first:last] = True
            append_runs(self._active, first, last - first)
            self.nr_hydrated += last - first
            first = bits.find(0, last, end)

    def pre_commit(self, *, clean_shutdown: bool = False) -> CloneTransaction | None:
        """Take the changes made so far as one transaction; None if there is nothing to commit.

        Changes made from here on belong to the next. The caller then flushes the
        destination and runs `journal`, together; runs `superblock`; calls `done`. If
        anything fails in between, `abort`. One transaction at a time.

        Args:
            clean_shutdown: this commit ends an orderly suspend: record that.

        Raises: ReadOnlyMetadata if there is something to commit; FailedMetadata.
        """
        if self.mode is _FAIL:
            raise FailedMetadata
        assert self._transaction is None, "one transaction at a time"
        marked = bool(self._superblock.flags & CLEAN_SHUTDOWN)
        if not self.changed and (marked or not clean_shutdown or self.mode is not _RW):
            return None
        if self.mode is not _RW:
            raise ReadOnlyMetadata
        runs, self._active = self._active, new_runs()
        self._is_stop_begun = clean_shutdown
        # A commit that only heals superblock copies leaves standing what they say.
        has_changed = bool(runs) or self._has_new_disks
        flags = 0 if has_changed else self._superblock.flags & CLEAN_SHUTDOWN
        if clean_shutdown:
            flags = CLEAN_SHUTDOWN
        # Between transactions, what is in core is what is committed and what this one takes.
        fields = {"flags": flags, "nr_hydrated": self.nr_hydrated}
        saved = SavedChunks(self.hydrated)
        taken = Taken(runs, CloneEncoding(self.hydrated, saved.take))
        transaction = self._begin(taken, fields, nothing_more)
        self._saved = saved if transaction.writes_snapshot else None
        return transaction

    def committed(self, taken: Taken[Runs], superblock: CloneSuperblock) -> None:
        super().committed(taken, superblock)
        assert self.nr_hydrated >= superblock.nr_hydrated, "bits are only ever set"
        self._saved = None

    def abort(self) -> None:
        """Give up: a commit failed. Back to the last committed state, in mode RO.

        The regions that become unhydrated again were never durable: reads of them go to the
        source from here on. The failed transaction may still have reached the disk, if only its
        completion was lost. Opening the metadata again shows which state is there.

        Raises: FailedMetadata.
        """
        taken = self._give_up()
        runs = self._active
        if taken is not None:
            runs = taken.changes + runs
        for at in range(0, len(runs), 2):
            begin, count = runs[at], runs[at + 1]
            assert self.hydrated.find(0, begin, begin + count) < 0, "a run is set once"
            self.hydrated[begin : begin + count] = False
            self.nr_hydrated -= count
        assert self.nr_hydrated == self._superblock.nr_hydrated
        self._active = new_runs()
        self._saved = None


def _nr_regions(region_size: int, target_size: int) -> int:
    assert region_size > 0
    assert target_size > 0
    nr_regions = -(-target_size // region_size)
    assert nr_regions <= NR_REGIONS_MAX
    return nr_regions
