# SPDX-License-Identifier: Apache-2.0
"""The cache's metadata: which cache block holds which origin block, and how that survives.

Theory of operation
===================

Each cache block (cblock) is unmapped, or holds one origin block (oblock). No oblock is held twice.
Mappings survive any crash. Whether a mapped block is **dirty** (newer than the origin), the
policy's hints and the discarded blocks are kept in core only, and recorded by a clean shutdown.

The commit. It has two phases, as a clone's, because two other disks must act between them:

    transaction = metadata.pre_commit()     # takes the changes; later ones belong to the next commit
    flush what transaction.taken.flushes names   AND   run transaction.journal()      # together
    run transaction.superblock()            # only if all of them succeeded
    transaction.done()                      # only now may FLUSH and FUA be acknowledged

If any of these steps fails, call `abort`. The devices that must be flushed first, and why:

    after `insert`       FLUSH_CACHE: a committed mapping is read from the cache device, so its data must
                         be there. If the block is clean, FLUSH_ORIGIN, too: the origin must have the same
                         data, and may have been written just before they were copied
    after `remove`       FLUSH_ORIGIN: once the removal is committed the origin is read instead, so what was
                         written back must be there
    recorded clean       both: what was written back may have been written to the cache just before that

A FLUSH bio needs both devices flushed, whatever `flushes` says: dirtying a block changes no metadata.

Reuse. Until a removal is committed a crash brings the mapping back. So its cblock must not be used
for another oblock (`may_insert`), and no write to its oblock may be sent to the origin: the old
mapping would come back as dirty, and hide or overwrite it.

The life of `clean_shutdown`:

    on disk   in core                          what a crash leaves
    set       opened, or suspended             exact dirty bits, hints, discards
    set       `start`ed, commit under way      the same, and nothing has changed
    clear     `may_change`                     mappings; dirty: see below; no hints, no discards
    clear     full sync under way              the same, and nothing changes any more
    set       full sync done                   exact dirty bits, hints, discards

Before `may_change`, which the commit after `start` sets, only `resize_*` and `drop_clean` may be called. A
full sync is `prepare_shutdown` and pre_commit(clean_shutdown=True), when nothing is under way.

**Origin complete.** A cache that does not write back (writethrough, passthrough) records that the origin has
everything: when it starts, if no block is dirty; else with the commit after the last dirty block was written
back. After a crash nothing is dirty then, and the origin has all that was promised. The cached copies may
differ from it: a write through that was not flushed may be on one device only, and users are told that they
may use the origin alone in the meantime. So `gives_up_mappings`, and `drop_clean` comes before `start`.

    start            on disk             dirty in core              a crash leaves
    writes_back      -                   any                        dirty: see below
    not writes_back  -                   some, of a writeback past  dirty: see below
    not writes_back  ORIGIN_COMPLETE     none                       the origin alone
    not writes_back  ORIGIN_COMPLETE     the origin refused a       the origin alone. That write was not promised to
                                         write through              anyone: `mapping_survives` is false. The next
                                                                    commit, which `changed` asks for, takes the
                                                                    flag back, and then FLUSH and FUA may end

In all other cases every mapped block counts as dirty after an unclean shutdown. With **dirty_log** only those
count that may be: the value of a block on disk says LOGGED before the block first turns dirty.

    clean --log_dirty--> logged --commit done--> admitted --set_dirty--> dirty
      ^                                              ^                     |
      +------ commit (both flushed) ----- cleaned <--+---- set_clean ------+

`may_dirty` tells whether a write may be sent to the cache device. If not: call `log_dirty`, and wait
for a commit; many such waiters share one. That goes for a write through to both devices, too: the block is
dirty until both have ended. A block that was inserted dirty is LOGGED with its
mapping and need not wait: a crash forgets both. Cleaned blocks stay LOGGED, and may be dirtied
again at no cost, until a commit that flushes the origin anyway (or `clear_log`) takes that back.
So LOGGED on disk is a superset of the dirty blocks at any time, and mostly a small one.

Space and compaction: see commit.py. A snapshot is fuzzy here, too, and sound for three reasons. (1) If it
caught a state that is not committed, that block is in a transaction that was pre-committed later, at the
latest in the one that switches. (2) So is each block that changed after its chunk was copied. (3) A
record says what a block is, and the last one counts. So the new journal ends with each such block as it
was at the pre_commit of the commit that switches.

Abort. The mode becomes RO, and what is in core stays as it is: it tells where the data are, and an
inserted dirty block has its data nowhere else. On disk is the last commit or the one that failed. Each of
them is complete, so opening it again is safe. `blame` notes in core that the metadata device is to blame.
`record_needs_check` is called if there is reason to doubt what is on the disk: it forbids to open it. It skips
a generation, because copies of the failed one may be on the disk.

Not handled: sharing. There is one object for each metadata device, and all its users share that.

Context: nothing here blocks, waits or does I/O. Steps between two yields take milliseconds at
most for a million cache blocks. One thread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgspec
from bitarray.util import zeros

from nbdtarget_metadata.cache.blocks import CacheBlocks, Mapping
from nbdtarget_metadata.cache.encoding import (
    FLUSH_CACHE,
    FLUSH_ORIGIN,
    CacheEncoding,
    CacheTaken,
)
from nbdtarget_metadata.cache.index import OblockIndex
from nbdtarget_metadata.cache.load import Discarded, Loaded, load, new_words
from nbdtarget_metadata.cache.records import (
    NR_CBLOCKS_MAX,
    NR_OBLOCKS_MAX,
    Words,
)
from nbdtarget_metadata.cache.shutdown import (
    NOTHING_RECORDED,
    Shutdown,
    other_area,
    shutdown_fields,
    write_shutdown,
)
from nbdtarget_metadata.cache.superblock import (
    CACHE,
    DIRTY_LOG,
    HINT_SIZE,
    NO_POLICY,
    NR_DBLOCKS_MAX,
    ORIGIN_COMPLETE,
    POLICY_NAME_MAX,
    CacheSuperblock,
    PolicyIdentity,
    device_size_with,
    first_superblock,
    journal_blocks_preferred,
    layout_for,
)
from nbdtarget_metadata.errors import (
    BlockSizeMismatch,
    FailedMetadata,
    ReadOnlyMetadata,
)
from nbdtarget_metadata.log.commit import Transaction, nothing_more
from nbdtarget_metadata.log.envelope import DIGEST_SIZE
from nbdtarget_metadata.log.layout import JOURNAL_BLOCKS_MIN, refuse_content
from nbdtarget_metadata.log.superblock import (
    ALL_SLOTS,
    CLEAN_SHUTDOWN,
    NEEDS_CHECK,
    SUPERBLOCK_BLOCKS,
    format_superblocks,
    read_superblock,
    write_superblock,
)
from nbdtarget_metadata.mode import Mode
from nbdtarget_metadata.operations import Flush, Steps
from nbdtarget_metadata.units import BLOCK_SIZE_MAX, BLOCK_SIZE_MIN

__all__ = [
    "FLUSH_CACHE",
    "FLUSH_ORIGIN",
    "CacheMetadata",
    "CacheTransaction",
    "Mapping",
    "Mode",
    "Statistics",
]

_RW: Final = Mode.RW
_FAIL: Final = Mode.FAIL


CacheTransaction: TypeAlias = Transaction[CacheSuperblock, CacheTaken]


@dataclass(slots=True)
class Statistics:
    """Counts of bios since formatting. Each commit writes what stands here."""

    read_hits: int = 0
    read_misses: int = 0
    write_hits: int = 0
    write_misses: int = 0


class CacheMetadata(CacheBlocks):
    """The metadata of one cache. Made by `format` or `open`, which see.

    Attributes: those of `CacheBlocks`, and
        clean_when_opened: a fact of this opening (true when just formatted).
        statistics: the owner counts here.
        total_blocks: 4 KiB blocks of the metadata device.
        notes: what opening found that was not as it should be, and did without; for logs.
    """

    def __init__(
        self,
        *,
        superblock: CacheSuperblock,
        loaded: Loaded,
        device_size: int,
        unhealed: frozenset[int],
        notes: tuple[str, ...],
    ) -> None:
        super().__init__(
            superblock,
            loaded,
            device_size=device_size,
            unhealed=unhealed,
            notes=notes,
        )
        self.clean_when_opened = bool(superblock.flags & CLEAN_SHUTDOWN)
        self._is_blamed = False
        self.statistics = Statistics(
            superblock.read_hits,
            superblock.read_misses,
            superblock.write_hits,
            superblock.write_misses,
        )

    # ---- making and opening ----

    @staticmethod
    def device_size_for(nr_cblocks: int) -> int:
        """Return the bytes of a metadata device that is right for `nr_cblocks`.

        Down to `device_size_min` smaller ones work, and compact more often. On larger ones
        the cache may grow.
        """
        return device_size_with(nr_cblocks, journal_blocks_preferred(nr_cblocks))

    @staticmethod
    def device_size_min(nr_cblocks: int) -> int:
        """Return the bytes of the smallest metadata device for `nr_cblocks`."""
        return device_size_with(nr_cblocks, JOURNAL_BLOCKS_MIN)

    @classmethod
    def format(
        cls,
        *,
        device_size: int,
        block_size: int,
        origin_size: int,
        nr_cblocks: int,
        uuid: bytes,
    ) -> Steps["CacheMetadata"]:
        """Make new metadata, in which nothing is mapped, on an all-zero device.

        Also finishes a format that was interrupted. It writes four blocks, for any size.

        Raises:
            NotOurs: the device holds anything else, be it metadata. Nothing was written.
            MetadataTooSmall: see `device_size_min`. Nothing was written.
        Durable: the metadata, formatted and empty, when this returns. A crash before that
            leaves it formatted or `NotFormatted`.
        """
        assert block_size % BLOCK_SIZE_MIN == 0
        assert BLOCK_SIZE_MIN <= block_size <= BLOCK_SIZE_MAX
        assert 0 < origin_size // block_size + 1 <= NR_OBLOCKS_MAX
        assert origin_size > 0
        assert 0 < nr_cblocks <= NR_CBLOCKS_MAX
        assert len(uuid) == DIGEST_SIZE, "it stands where a digest does"
        layout = layout_for(nr_cblocks, device_size)
        yield from refuse_content(CACHE, device_size, layout.arena_blocks)
        superblock = first_superblock(
            bytes(uuid),
            block_size=block_size,
            origin_size=origin_size,
            nr_cblocks=nr_cblocks,
            nr_cblocks_max=layout.nr_cblocks_max,
            arena_blocks=layout.arena_blocks,
        )
        values = yield from new_words("Q", nr_cblocks)
        by_oblock = yield from OblockIndex.new(values)
        superblock = yield from format_superblocks(superblock)
        dirty, logged = zeros(nr_cblocks, "little"), zeros(nr_cblocks, "little")
        return cls(
            superblock=superblock,
            loaded=Loaded(values, by_oblock, dirty, logged, None, None),
            device_size=device_size,
            unhealed=frozenset(),
            notes=(),
        )

    @classmethod
    def open(cls, *, device_size: int, block_size: int) -> Steps["CacheMetadata"]:
        """Open existing metadata, of any cache and origin size. Writes nothing.

        Raises:
            NotFormatted: `format` may follow.
            NotOurs, CorruptMetadata, UnsupportedFormat: a person must decide what to do. NeedsCheck is
                a CorruptMetadata.
            BlockSizeMismatch: it belongs to another table line.
            MetadataTooSmall: the device has shrunk.
        Durable: everything that this returns.
        """
        found = yield from read_superblock(CACHE, device_size)
        superblock = found.superblock
        if superblock.block_size != block_size:
            raise BlockSizeMismatch(stored=superblock.block_size, given=block_size)
        loaded = yield from load(superblock, device_size)
        return cls(
            superblock=superblock,
            loaded=loaded,
            device_size=device_size,
            unhealed=ALL_SLOTS,
            notes=found.notes,
        )

    # ---- what there is ----

    @property
    def used_blocks(self) -> int:
        """4 KiB blocks in use: superblocks, live snapshot, journal, clean shutdown."""
        live = self._superblock
        arena = live.journal_end - live.snapshot_block
        return SUPERBLOCK_BLOCKS + arena + live.sync_blocks

    @property
    def discarded(self) -> Discarded | None:
        """Return the record of the last full sync; None once `start` is committed: it may be out of date."""
        return self._discarded if self.is_recorded_clean else None

    @property
    def needs_check(self) -> bool:
        """Whether the metadata device should be looked at: it failed, or says so of itself."""
        return self._is_blamed or bool(self._superblock.flags & NEEDS_CHECK)

    @property
    def changed(self) -> bool:
        """Whether anything is not durably committed, the transaction under way included.

        It stays true after `abort`. It is also true after opening, until both superblock slots are rewritten.
        Dirty bits and cleaned blocks do not count.
        """
        return (
            self._has_changed
            or self._transaction is not None
            or self._aborted
            or self._has_new_disks
            or self._resized
            or self._starting
            or (self._clearing and self._cleaned.any())
            or (self.may_change and self.is_complete != self.is_recorded_complete)
            or self.needs_rewrite
        )

    # ---- committing ----

    def prepare_shutdown(
        self,
        *,
        policy: PolicyIdentity = NO_POLICY,
        hints: Words | None = None,
        discarded: Discarded | None = None,
    ) -> None:
        """Give what the next pre_commit(clean_shutdown=True) records beside the dirty bits.

        Once that is done, `mappings` and `discarded` return it, too.

        Args:
            hints: array of u32, one for each cache block. The caller must not change it any more.

        Raises: FailedMetadata.
        """
        if self.mode is _FAIL:
            raise FailedMetadata
        assert hints is None or len(hints) == self.nr_cblocks
        assert hints is None or (
            hints.typecode == "I" and policy.hint_size == HINT_SIZE
        )
        assert hints is None or 0 < len(policy.name.encode()) <= POLICY_NAME_MAX
        assert discarded is None or 0 < len(discarded.bits) <= NR_DBLOCKS_MAX
        self._shutdown = Shutdown(policy, hints, discarded)

    def pre_commit(self, *, clean_shutdown: bool = False) -> CacheTransaction | None:
        """Take the changes made so far as one transaction; None if there is nothing to commit.

        Changes made from here on belong to the next. A commit before `start` that only rewrites
        superblock copies keeps what the last full sync has recorded. The caller then flushes what
        `transaction.taken.flushes` names and runs `journal`, together; runs `superblock`; calls
        `done`. If anything fails in between, `abort`. One transaction at a time.

        Args:
            clean_shutdown: a full sync: nothing is under way, and nothing may change before
                `start`. See `prepare_shutdown`.

        Raises: ReadOnlyMetadata if there is something to commit; FailedMetadata.
        """
        if self.mode is _FAIL:
            raise FailedMetadata
        assert self._transaction is None, "one transaction at a time"
        shutdown = None
        if clean_shutdown:
            shutdown, self._shutdown = self._shutdown, Shutdown()
        marked = self.is_recorded_clean
        if not self.changed and (marked or not clean_shutdown or self.mode is not _RW):
            return None
        if self.mode is not _RW:
            raise ReadOnlyMetadata
        # This commit flushes the origin anyway, so it can record cleaned blocks as clean.
        if self._clearing or self._flushes & FLUSH_ORIGIN:
            self._take_back_log()
        self._is_stop_begun = clean_shutdown
        if clean_shutdown:
            self.may_change = False
            self._clearing = False
        # Then the disk keeps what the last full sync recorded: nothing has changed since.
        only_rewrites = marked and not (
            clean_shutdown or self._starting or self._resized or self._has_changed
        )
        starts = self._starting and not clean_shutdown
        self._resized = self._starting = False
        taken = self._take(shutdown, starts=starts, only_rewrites=only_rewrites)
        fields: dict[str, Any] = {}
        if not taken.only_rewrites:
            fields = self._fields_after(taken)
        return self._begin(taken, fields, self._writing_of(shutdown))

    def committed(self, taken: CacheTaken, superblock: CacheSuperblock) -> None:
        super().committed(taken, superblock)
        assert self.is_recorded_clean == (
            taken.shutdown is not None or taken.only_rewrites
        )
        self._before = None
        # A block whose LOGGED was taken back since is not admitted: the next commit says so.
        self._admitted |= taken.logged & self._logged
        if taken.starts:
            self.may_change = True
        if taken.shutdown is not None:
            self._hints = taken.shutdown.hints
            self._hints_policy = taken.shutdown.policy
            self._discarded = taken.shutdown.discarded

    def abort(self) -> None:
        """Give up: a commit failed. Mode RO; see "Abort" in the module head.

        Raises: FailedMetadata.
        """
        taken = self._give_up()
        self.may_change = False
        self._before = None
        if taken is not None:
            # As if they had never been taken: no commit that is done vouches for them.
            self._changed |= taken.changes
            self._removed |= taken.removed

    def blame(self) -> None:
        """Note, after `abort`, that the metadata device failed. Nothing is written."""
        self._is_blamed = True

    def record_needs_check(self) -> Steps[None]:
        """Forbid, durably, to open this again before a tool has looked at it.

        Only after `abort`, and once the operations under way have ended. That a commit failed is not
        reason enough for it.

        Raises: FailedMetadata.
        Durable: `needs_check`, over the last committed state, when this returns.
        """
        if self.mode is _FAIL:
            raise FailedMetadata
        assert self._aborted
        superblock = msgspec.structs.replace(
            self._superblock,
            # Copies of the failed generation may be on disk, in the other slot.
            generation=self._superblock.generation + 2,
            flags=self._superblock.flags | NEEDS_CHECK,
            nr_commits=self._superblock.nr_commits + 1,
        )
        yield from write_superblock(superblock)
        yield Flush()
        self._superblock = superblock

    def fail(self) -> None:
        """Go to mode FAIL: everything raises FailedMetadata until it is opened again."""
        super().fail()
        self.may_change = False

    # ---- inside ----

    def _take(
        self, shutdown: Shutdown | None, *, starts: bool, only_rewrites: bool
    ) -> CacheTaken:
        """Take the changes made so far: later ones belong to the next commit."""
        changes, self._changed = self._changed, zeros(len(self._changed), "little")
        self._has_changed = False
        removed, self._removed = self._removed, set()
        flushes, self._flushes = self._flushes, 0
        if shutdown is not None:
            flushes = FLUSH_CACHE | FLUSH_ORIGIN
        says_complete = shutdown is None and not only_rewrites and self.is_complete
        if says_complete and not self.is_recorded_complete:
            flushes |= FLUSH_ORIGIN  # what was written back
        assert not (only_rewrites and changes.any())
        self._before = {}
        encoding = CacheEncoding(self._values, self.nr_cblocks_max, self._before)
        return CacheTaken(
            changes,
            encoding,
            logged=changes & self._logged,
            removed=removed,
            flushes=flushes,
            starts=starts,
            only_rewrites=only_rewrites,
            says_complete=says_complete,
            shutdown=shutdown,
        )

    def _fields_after(self, taken: CacheTaken) -> dict[str, Any]:
        """Return the fields of the superblock that `taken` and the state in core change."""
        live, shutdown = self._superblock, taken.shutdown
        flags = CLEAN_SHUTDOWN if shutdown is not None else 0
        flags |= ORIGIN_COMPLETE if taken.says_complete else 0
        # Never the sync area that an older superblock may vouch for.
        area = live.sync_area if shutdown is None else other_area(live.sync_area)
        statistics = self.statistics
        return {
            "flags": flags,
            "incompat": DIRTY_LOG if self.dirty_log else 0,
            "origin_size": self.origin_size,
            "nr_cblocks": self.nr_cblocks,
            "nr_mapped": self.nr_mapped,
            "nr_logged": self.nr_logged,
            "sync_area": area,
            "read_hits": statistics.read_hits,
            "read_misses": statistics.read_misses,
            "write_hits": statistics.write_hits,
            "write_misses": statistics.write_misses,
            # The record of a clean shutdown does not hold any more. A new one is written,
            # and vouched for, when the changes have been.
            **shutdown_fields(NOTHING_RECORDED, nr_dirty=0),
            "sync_blocks": 0,
            "sync_digest": live.uuid,
        }

    def _writing_of(
        self, shutdown: Shutdown | None
    ) -> Callable[[CacheSuperblock], Steps[CacheSuperblock]]:
        """Return what writes the records of a clean shutdown, if it is one."""
        if shutdown is None:
            return nothing_more
        dirty = self.dirty[: self.nr_cblocks]
        return lambda superblock: write_shutdown(superblock, shutdown, dirty)
