# SPDX-License-Identifier: Apache-2.0
"""The cache blocks in core: what they hold, which are dirty, and what has changed.

The head of metadata.py explains why. Here stand all changes to blocks; how they are committed stands in
metadata.py. For each cache block this takes 8 bytes of value, 5 to 10 of index, 4 of hint, and five bits.

Bitmaps
=======

One bit for each cache block, in `dirty` and four more. `_logged` says the same as the flag LOGGED in the
block's value. With `dirty_log` these combinations are legal, and no others:

    state       value  _logged  _admitted  _cleaned  dirty
    unmapped      0       0         0          0       0
    clean       mapped    0         0          0       0
    logged      mapped    1         0       0 or 1     0    `log_dirty` was called, its commit is not done
    admitted    mapped    1         1          0       0    a write may be sent, or one through to both
                                                            devices is under way
    cleaned     mapped    1         1          1       0    the next commit that flushes the origin takes
                                                            LOGGED back: the block is clean again
    dirty       mapped    1         1          0       1
    starting    mapped    1         0          0       1    between `start`, which switches the dirty log
                                                            on, and the commit of that

Without `dirty_log` a dirty block need not be logged. Blocks may still be LOGGED from a time with it.

The fifth bitmap, `_changed`, holds the blocks whose change no transaction has taken yet, in whichever
state they are. `_has_changed` tells, without a search, whether there is one.

Flags
=====

    may_change  _starting  _clearing
        0           0          0       opened or suspended; after `abort`, and in mode FAIL
        0           1          0       `start` was called; the commit that it asks for is not taken
        0           0          0       that commit is under way
        1           0       0 or 1     blocks may change. `_clearing`: the next commits flush the origin
                                       until no block is cleaned any more

`_resized` is set by `resize_cache` and `resize_origin` until the next commit takes that. `_flushes` and
`_removed` belong to the changes in `_changed`: they are taken with them, too.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Final, NamedTuple

from bitarray.util import zeros

from nbdtarget_metadata.cache.encoding import (
    FLUSH_CACHE,
    FLUSH_ORIGIN,
    CacheEncoding,
    CacheTaken,
)
from nbdtarget_metadata.cache.index import OblockIndex
from nbdtarget_metadata.cache.load import Loaded, new_words
from nbdtarget_metadata.cache.records import (
    LOGGED,
    NR_OBLOCKS_MAX,
    OBLOCK_SHIFT,
    VALID,
    Words,
)
from nbdtarget_metadata.cache.shutdown import Shutdown
from nbdtarget_metadata.cache.superblock import (
    DIRTY_LOG,
    ORIGIN_COMPLETE,
    CacheSuperblock,
    PolicyIdentity,
    device_size_with,
)
from nbdtarget_metadata.errors import CannotShrink, FailedMetadata, MetadataTooSmall
from nbdtarget_metadata.log.commit import JournaledMetadata
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.layout import JOURNAL_BLOCKS_MIN
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN
from nbdtarget_metadata.mode import Mode
from nbdtarget_metadata.operations import Steps

__all__ = ["CacheBlocks", "Mapping"]

_RW: Final = Mode.RW
_FAIL: Final = Mode.FAIL

STEP_CBLOCKS: Final = 2048
# Taking one back costs 0.15 us, and is part of a pre_commit.
TAKEN_BACK_MAX: Final = 8192


class Mapping(NamedTuple):
    """One mapped cache block, as a policy loads it; `hint` only if the policy may believe it."""

    cblock: int
    oblock: int
    dirty: bool
    hint: int | None


class CacheBlocks(JournaledMetadata[CacheSuperblock, CacheTaken]):
    """The state of a cache's blocks in its metadata, and each change to it.

    `CacheMetadata` adds how it is made, opened and committed.

    Attributes: those of `JournaledMetadata`, and
        block_size: bytes; fixed. origin_size: bytes.
        nr_cblocks, nr_cblocks_max: cache blocks, and to how many it may grow on this device.
        nr_mapped, nr_dirty, nr_logged: in core, in O(1).
        dirty: the bitmap in core, at least `nr_cblocks` long. Only methods of this class change it.
        dirty_log: whether LOGGED is kept; changed by `start` only.
        writes_back: whether clients' writes may make blocks dirty; changed by `start` only.
        gives_up_mappings: it was opened after a crash, and only the origin counts: the owner must
            call `drop_clean` before `start`.
        is_distrusted: set by the owner: the copies of clean blocks may be old. A table that takes this
            object over must begin with `drop_clean`.
        may_change: blocks may change: the disk does not say `clean_shutdown` any more, durably, and
            no full sync has begun.
    """

    def __init__(
        self,
        superblock: CacheSuperblock,
        loaded: Loaded,
        *,
        device_size: int,
        unhealed: frozenset[int],
        notes: tuple[str, ...],
    ) -> None:
        super().__init__(
            superblock,
            CacheEncoding(loaded.values, superblock.nr_cblocks_max),
            device_size=device_size,
            unhealed=unhealed,
            notes=notes,
        )
        self.block_size = superblock.block_size
        self.origin_size = superblock.origin_size
        self.nr_cblocks = superblock.nr_cblocks
        self.nr_cblocks_max = superblock.nr_cblocks_max
        self.nr_mapped = superblock.nr_mapped
        self.nr_logged = superblock.nr_logged
        self.nr_dirty = loaded.dirty.count()
        self.dirty = loaded.dirty
        self.dirty_log = bool(superblock.incompat & DIRTY_LOG)
        self.writes_back = True
        self.gives_up_mappings = superblock.gives_up_mappings
        self.is_distrusted = False
        self.may_change = False
        self._values = loaded.values
        self._by_oblock = loaded.by_oblock
        self._hints = loaded.hints
        self._discarded = loaded.discarded
        self._hints_policy = superblock.policy
        # Bitmaps of cache blocks, all of one length: see the table in the module head.
        self._logged = loaded.logged
        self._admitted = loaded.logged.copy()
        self._cleaned = zeros(superblock.nr_cblocks, "little")
        self._changed = zeros(superblock.nr_cblocks, "little")
        self._has_changed = False  # each FLUSH asks for it
        self._removed: set[int] = (
            set()
        )  # oblocks whose removal no transaction has taken yet
        # While a transaction is under way: what the blocks that have changed since its
        # pre_commit were then.
        self._before: dict[int, int] | None = None
        self._flushes = 0
        self._resized = False
        self._starting = False
        self._clearing = False
        self._shutdown = Shutdown()

    # ---- looking up ----

    @property
    def nr_oblocks(self) -> int:
        """Whole blocks of the origin: a short tail is never cached."""
        return self.origin_size // self.block_size

    @property
    def is_recorded_clean(self) -> bool:
        """Whether CLEAN_SHUTDOWN is set on disk: nothing may have changed since a full sync."""
        return bool(self._superblock.flags & CLEAN_SHUTDOWN)

    @property
    def is_complete(self) -> bool:
        """Whether the next commit may say that the origin has everything.

        Before `drop_clean` it must say so: else the old mappings would count again, and as dirty.
        """
        return self.gives_up_mappings or not (self.writes_back or self.nr_dirty)

    @property
    def is_recorded_complete(self) -> bool:
        """Whether the disk says that the origin has everything: a crash now gives up all mappings."""
        return bool(self._superblock.flags & ORIGIN_COMPLETE)

    @property
    def nr_cleaned(self) -> int:
        """How many clean blocks are still LOGGED: `clear_log` would take that back."""
        return self._cleaned.count()

    def mappings(
        self, policy: PolicyIdentity, begin: int = 0, end: int | None = None
    ) -> Iterator[Mapping]:
        """Yield each mapped block, in order of cblocks, for `policy` to load.

        Args: begin, end: of those cblocks only, half-open.
        Raises: FailedMetadata, at any step.
        """
        hints = self._hints if policy.understands(self._hints_policy) else None
        end = self.nr_cblocks if end is None else min(end, self.nr_cblocks)
        for cblock in range(begin, end):
            if self.mode is _FAIL:
                raise FailedMetadata
            value = self._values[cblock]
            if value:
                hint = None if hints is None else hints[cblock]
                dirty = bool(self.dirty[cblock])
                yield Mapping(cblock, value >> OBLOCK_SHIFT, dirty, hint)

    def maybe_oblock(self, cblock: int) -> int | None:
        """Return what `cblock` holds."""
        if self.mode is _FAIL:
            raise FailedMetadata
        value = self._values[cblock]
        return value >> OBLOCK_SHIFT if value else None

    def maybe_cblock(self, oblock: int) -> int | None:
        """Return which cache block holds `oblock`."""
        if self.mode is _FAIL:
            raise FailedMetadata
        return self._by_oblock.maybe_find(oblock)

    def is_dirty(self, cblock: int) -> bool:
        """Tell whether `cblock` is newer than the origin, or may be."""
        if self.mode is _FAIL:
            raise FailedMetadata
        return bool(self.dirty[cblock])

    def mapping_survives(self, cblock: int) -> bool:
        """Tell whether `cblock` is mapped, and would still be mapped after a crash.

        Then what is written to it is found again, if it is dirty: also after `abort`, when nothing
        can be recorded any more. The answer may be false although the last commit has the same
        mapping: if LOGGED was set or taken back since; or if the disk says, or is about to say, that the
        origin has everything.

        Raises: FailedMetadata.
        """
        if self.mode is _FAIL:
            raise FailedMetadata
        return (
            bool(self._values[cblock])
            and not self._is_uncommitted(cblock)
            and not self.is_recorded_complete
            and not (
                self._transaction is not None and self._transaction.taken.says_complete
            )
        )

    def may_come_back(self, oblock: int) -> bool:
        """Tell, after `abort`, whether the disk may still map `oblock`, which is unmapped in core.

        If so, a write that went to the origin would be hidden by the old copy at the next start.
        """
        return oblock in self._removed

    def may_insert(self, cblock: int) -> bool:
        """Tell whether `cblock` is unmapped, durably.

        Otherwise a crash would bring back the old mapping over another block's data.
        """
        if self.mode is _FAIL:
            raise FailedMetadata
        return cblock < self.nr_cblocks and not (
            self._values[cblock] or self._is_uncommitted(cblock)
        )

    def may_dirty(self, cblock: int) -> bool:
        """Tell whether a write to `cblock` may be sent, after `set_dirty`; see `log_dirty`."""
        # hot: one call for each write to a clean block.
        if self.mode is _FAIL:
            raise FailedMetadata
        return not self.dirty_log or bool(self._admitted[cblock])

    # ---- changing ----

    def start(self, *, dirty_log: bool, writes_back: bool = True) -> Steps[None]:
        """Ask for what must be durable before the first change; then commit.

        `may_change` tells when it is. Nothing else may be under way.

        Args: writes_back: see the attribute.

        Raises: ReadOnlyMetadata, FailedMetadata.
        Durable: nothing, until a transaction that was pre-committed later is done.
        """
        self._check_change()
        assert self._transaction is None
        assert not self.gives_up_mappings, "the origin counts: drop_clean comes first"
        self._shutdown = Shutdown()
        self.writes_back = writes_back
        was_logged = bool(self._superblock.incompat & DIRTY_LOG)
        # A commit is needed if the disk says anything that will not be true any more. If a slot
        # has one good copy only, too: were that copy to rot, the superblock before it would
        # count again, and it may say `clean_shutdown`.
        self._starting = (
            self.is_recorded_clean
            or dirty_log != was_logged
            or self.is_recorded_complete != self.is_complete
            or bool(self._unhealed)
        )
        self.may_change = not self._starting
        self.dirty_log = dirty_log
        if not dirty_log:
            return
        # Blocks that are dirty already must be LOGGED by the commit that switches the dirty log on.
        missing = self.dirty & ~self._logged
        for nr, cblock in enumerate(missing.search(1)):
            self._log(cblock)
            if nr % STEP_CBLOCKS == 0:
                yield from self._pause()
        self._cleaned = self._logged & ~self.dirty

    def insert(self, cblock: int, oblock: int, *, dirty: bool) -> None:
        """Map `cblock` to `oblock`.

        The cache device's copy must be complete as far as reads are concerned; it need not be
        durable. With `dirty` it may be newer than the origin.

        Raises: ReadOnlyMetadata, FailedMetadata.
        Durable: nothing, until a transaction that was pre-committed later is done.
        """
        self._check_admitted()
        assert 0 <= cblock < self.nr_cblocks
        assert 0 <= oblock < self.nr_oblocks
        assert self.may_insert(cblock), "its removal is not committed"
        self._set_value(cblock, oblock << OBLOCK_SHIFT | VALID)
        other = self._by_oblock.add(cblock)
        if other is not None:
            self._values[cblock] = 0
            raise AssertionError(f"cache block {other} holds origin block {oblock}")
        if self._hints is not None:
            self._hints[cblock] = 0  # it was another block's
        self.nr_mapped += 1
        # The copied data may not be durable in the origin: a crash would leave a clean block
        # that differs from it.
        self._flushes |= FLUSH_CACHE if dirty else FLUSH_CACHE | FLUSH_ORIGIN
        if dirty:
            if self.dirty_log:
                # It need not wait for a commit: a crash before that forgets the mapping, too.
                self._log(cblock)
                self._admitted[cblock] = 1
            self.set_dirty(cblock)

    def remove(self, cblock: int) -> None:
        """Unmap `cblock`, which must be clean. See "Reuse" in the head of `metadata.py`.

        Raises: ReadOnlyMetadata, FailedMetadata.
        Durable: nothing, until a transaction that was pre-committed later is done.
        """
        self._check_admitted()
        assert 0 <= cblock < self.nr_cblocks
        self._remove(cblock)

    def log_dirty(self, cblock: int) -> None:
        """Ask for `may_dirty`: it is true after the next commit, or already.

        Raises: ReadOnlyMetadata, FailedMetadata.
        """
        self._check_admitted()
        assert self._values[cblock]
        if self.dirty_log and not self._logged[cblock]:
            self._log(cblock)

    def set_dirty(self, cblock: int) -> None:
        """Note, before a write to `cblock` is sent, that it will be newer than the origin.

        Raises: ReadOnlyMetadata, FailedMetadata.
        Durable: no need: see the module head.
        """
        # hot: one call for each write that dirties a block.
        self._check_admitted()
        assert self._values[cblock]
        if not self.dirty[cblock]:
            assert self.may_dirty(cblock), "it must be logged first"
            self.dirty[cblock] = 1
            self.nr_dirty += 1
            self._cleaned[cblock] = 0

    def set_clean(self, cblock: int) -> None:
        """Note that the origin has the block's data, durable or not, or that they are not needed any more.

        Call it also after a block was logged, but the write was not sent.

        Raises: ReadOnlyMetadata, FailedMetadata.
        """
        self._check_admitted()
        assert self._values[cblock]
        if self.dirty[cblock]:
            self.dirty[cblock] = 0
            self.nr_dirty -= 1
        if self._logged[cblock]:
            self._cleaned[cblock] = 1

    def begin_write_through(self, cblock: int) -> None:
        """Note, before a write to a clean block is sent to both devices, that they may differ.

        Until `end_write_through`, a LOGGED block stays LOGGED.

        Raises: ReadOnlyMetadata, FailedMetadata.
        """
        self._check_admitted()
        assert self.may_dirty(cblock), "it must be logged first"
        self._cleaned[cblock] = 0

    def end_write_through(self, cblock: int) -> None:
        """The last such write has ended on both. Raises: ReadOnlyMetadata, FailedMetadata."""
        self._check_admitted()
        if self._logged[cblock] and not self.dirty[cblock]:
            self._cleaned[cblock] = 1

    def clear_log(self) -> None:
        """Have the next commit record all cleaned blocks clean, though it flushes the origin.

        Raises: ReadOnlyMetadata, FailedMetadata.
        """
        self._check_admitted()
        self._clearing = self._cleaned.any()

    def resize_cache(self, nr_cblocks: int) -> Steps[None]:
        """Grow, or shrink to a prefix: mappings behind it are removed.

        Nothing else may change meanwhile, and no commit be under way.

        Raises:
            CannotShrink: one of these is dirty. MetadataTooSmall: it cannot grow so far on
                this device. Nothing has changed.
            ReadOnlyMetadata, FailedMetadata.
        Durable: nothing, until a transaction that was pre-committed later is done.
        """
        self._check_change()
        assert nr_cblocks > 0
        assert self._transaction is None
        if nr_cblocks == self.nr_cblocks:
            return
        if nr_cblocks > self.nr_cblocks_max:
            needed = device_size_with(nr_cblocks, JOURNAL_BLOCKS_MIN)
            given = self._superblock.device_blocks * BLOCK_SIZE
            raise MetadataTooSmall(needed=needed, given=given)
        dirty = self.dirty.find(1, min(nr_cblocks, self.nr_cblocks))
        if dirty >= 0:
            raise CannotShrink("cache", dirty)
        for cblock in range(nr_cblocks, self.nr_cblocks):
            if self._values[cblock]:
                self._remove(cblock)
            if cblock % STEP_CBLOCKS == 0:
                yield from self._pause()
        yield from self._grow(nr_cblocks)
        assert len(self._values) == len(self.dirty) >= nr_cblocks
        self.nr_cblocks = nr_cblocks
        self._resized = True

    def resize_origin(self, origin_size: int) -> Steps[None]:
        """Grow or shrink the origin: mappings behind its end are removed.

        Nothing else may change meanwhile, and no commit be under way.

        Raises:
            CannotShrink: one of these is dirty. Nothing has changed.
            ReadOnlyMetadata, FailedMetadata.
        Durable: nothing, until a transaction that was pre-committed later is done.
        """
        self._check_change()
        assert origin_size > 0
        nr_oblocks = origin_size // self.block_size
        assert nr_oblocks <= NR_OBLOCKS_MAX
        assert self._transaction is None
        if origin_size == self.origin_size:
            return
        beyond = zeros(len(self._values), "little")
        end = nr_oblocks << OBLOCK_SHIFT
        for begin in range(0, self.nr_cblocks, STEP_CBLOCKS):
            piece = self._values[begin : begin + STEP_CBLOCKS]
            if max(piece) >= end:
                for cblock, value in enumerate(piece, begin):
                    if value >= end:
                        beyond[cblock] = bool(value)
            yield from self._pause()
        dirty = (beyond & self.dirty).find(1)
        if dirty >= 0:
            raise CannotShrink("origin", dirty)
        for nr, cblock in enumerate(beyond.search(1)):
            self._remove(cblock)
            if nr % STEP_CBLOCKS == 0:
                yield from self._pause()
        self.origin_size = origin_size
        self._resized = True

    def drop_clean(self) -> Steps[None]:
        """Unmap all blocks that are not dirty: what they hold may be another disk's, or old.

        What is recorded as discarded is forgotten, too.

        Nothing else may change meanwhile, and no commit be under way.

        Raises: ReadOnlyMetadata, FailedMetadata.
        Durable: nothing, until a transaction that was pre-committed later is done.
        """
        self._check_change()
        assert self._transaction is None
        for cblock in range(self.nr_cblocks):
            if self._values[cblock] and not self.dirty[cblock]:
                # The reason for dropping it is on disk, too: the next start drops it again.
                self._remove(cblock, is_kept=False)
            if cblock % STEP_CBLOCKS == 0:
                yield from self._pause()
        # Blocks that were discarded then may have been written since, when the origin was changed.
        self._discarded = None
        self.gives_up_mappings = False
        self.is_distrusted = False

    # ---- inside ----

    def _pause(self) -> Steps[None]:
        """Let other tasks run: one of them may be a commit that fails, and changes the mode."""
        yield ()
        self._check_change()

    def _new_words(self, typecode: str, nr_words: int) -> Steps[Words]:
        words = yield from new_words(typecode, nr_words)
        self._check_change()
        return words

    def _set_value(self, cblock: int, value: int) -> None:
        before = self._before
        if before is not None and cblock not in before:
            # The transaction under way writes what the block was at its pre_commit.
            before[cblock] = self._values[cblock]
        self._values[cblock] = value
        self._changed[cblock] = 1
        self._has_changed = True

    def _is_uncommitted(self, cblock: int) -> bool:
        transaction = self._transaction
        return bool(
            self._changed[cblock]
            or (transaction is not None and transaction.taken.changes[cblock])
        )

    def _check_change(self) -> None:
        if self.mode is not _RW:
            self._refuse_change()

    def _check_admitted(self) -> None:
        if self.mode is not _RW:
            self._refuse_change()
        assert self.may_change, "clean_shutdown must be cleared, durably, first"

    def _remove(self, cblock: int, *, is_kept: bool = True) -> None:
        """Unmap a block. Args: is_kept: remember its oblock for `may_come_back`."""
        assert self._values[cblock], "only a mapped block can be unmapped"
        assert not self.dirty[cblock], "the data of a dirty block would be lost"
        self._by_oblock.remove(cblock)  # while its value is still set
        if is_kept:
            self._removed.add(self._values[cblock] >> OBLOCK_SHIFT)
        self._set_value(cblock, 0)
        self.nr_mapped -= 1
        self.nr_logged -= self._logged[cblock]
        self._logged[cblock] = 0
        self._admitted[cblock] = 0
        self._cleaned[cblock] = 0
        # Data that was written back to the origin must be durable before the mapping is gone.
        self._flushes |= FLUSH_ORIGIN
        assert self.nr_mapped >= self.nr_dirty

    def _log(self, cblock: int) -> None:
        assert self._values[cblock], "only a mapped block can be logged"
        assert not self._logged[cblock]
        self._set_value(cblock, self._values[cblock] | LOGGED)
        self._logged[cblock] = 1
        self.nr_logged += 1

    def _take_back_log(self) -> None:
        """Have cleaned blocks recorded clean: the commit flushes both devices before that.

        Part of a pre_commit. It takes back at most TAKEN_BACK_MAX blocks, in order of cblocks.
        """
        assert self._before is None, (
            "no transaction is under way that needs the old values"
        )
        values = self._values
        end = 0  # behind the last block that is taken back
        for cblock in islice(self._cleaned.search(1), TAKEN_BACK_MAX):
            values[cblock] &= ~LOGGED
            end = cblock + 1
        if end:
            taken_back = self._cleaned.copy()
            taken_back[end:] = 0
            nr_taken_back = taken_back.count()
            assert not (taken_back & self.dirty).any(), "a crash would make it clean"
            keep = ~taken_back
            self._logged &= keep
            self._admitted &= keep
            self._cleaned &= keep
            self._changed |= taken_back
            self._has_changed = True
            self.nr_logged -= nr_taken_back
            # Neither copy may turn out older than the other. The block was written back to the
            # origin, but the cache's copy may have been written just before that.
            self._flushes |= FLUSH_CACHE | FLUSH_ORIGIN
        if not self._cleaned.any():
            self._clearing = False

    def _grow(self, nr_cblocks: int) -> Steps[None]:
        """Make everything long enough for `nr_cblocks`; nothing ever gets shorter."""
        if self._hints is not None and (missing := nr_cblocks - len(self._hints)) > 0:
            self._hints = self._hints + (yield from self._new_words("I", missing))
        if (missing := nr_cblocks - len(self._values)) > 0:
            self._values.extend((yield from self._new_words("Q", missing)))
            for bits in (
                self.dirty,
                self._logged,
                self._admitted,
                self._cleaned,
                self._changed,
            ):
                bits.extend(zeros(missing, "little"))
        if self._by_oblock.has_room_for(nr_cblocks):
            return
        by_oblock = yield from OblockIndex.new(self._values)
        for cblock, value in enumerate(self._values):
            if value:
                by_oblock.add(cblock)
            if cblock % STEP_CBLOCKS == 0:
                yield from self._pause()
        self._by_oblock = by_oblock
