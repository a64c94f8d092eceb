# SPDX-License-Identifier: Apache-2.0
"""smq, the stochastic multi-queue policy: device-mapper's own, and the default.

Theory of operation. smq has three multi-level queues (`multi_level_queue`). A cached block is in the
*clean* or in the *dirty* queue. The *hotspot* queue (`hotspot`) counts misses. Every cache block is in
exactly one of these states:

    state       table  queue         how it leaves the state
    free        -      -             a promotion is queued; a mapping is loaded
    reserved    -      -             the promotion ends: cached, or free again
    cached      yes    clean, dirty  a migration of it is queued; `invalidate`
    pending     yes    -             a demotion ends: free, or cached again; a writeback ends: cached
    pinned      yes    -, dirty      `unpin`; `invalidate`. While it is clean it is in no queue

lookup       The first hit of a block in each period of 60 s moves it up by one level. Other hits cost a
             table look-up and nothing more. A miss is counted by the hotspot queue. The block is promoted
             if its hotspot block is hot enough, or if the bio is a write that needs no copy and a cache
             block is free. A full cache promotes less, and one that LRU would beat promotes all: see the
             departures below.
promotion    Takes a free cache block. If there is none, a demotion is queued, unless a quarter of the cache
             is free or about to be; this miss is not promoted. A promoted block starts at the top level.
demotion     Takes the oldest clean block of the lower half of the levels. If there is none, a dirty block
             is written back instead.
writeback    Takes the oldest dirty block. While the cache is not idle, it takes only one that is not young.
pin          A pinned block that is clean is taken out of its queue, so that no search has to skip it. It
             keeps its level for the time after `unpin`. Pinned blocks that are dirty stay in the dirty queue.
             A pin is bit 6 of the hint, which the kernel reads as the highest level.
clean target An idle cache should have no dirty block. A busy cache may have any number.

Periods, which are checked at each tick: 1 s for the hotspot queue, 10 s for the age of dirty blocks, and 60 s
for hits and levels of cached blocks. The first and the last are due at the first tick.

Departures from the kernel. The first three matter; docs/benchmarks.md measures them:

- A cache that has been full promotes only what is in the top levels of the hotspot queue, until a quarter of
  it is free again. The kernel promotes every miss
  as long as the hotspot queue does well, so almost any block may push out another one. (The kernel
  has a table of stricter levels for a full cache, but a `max` makes it ineffective.)
- While an LRU cache would have more hits than this one (`lru_shadow`), as after other blocks became hot, the policy
  does as LRU does. It promotes every miss, moves what is hit to the top level, leaves the levels as long as they
  are, and demotes the oldest block of the lowest level. One that is dirty is written back for that, even while
  it is young. The kernel's queues learn of a change over some periods.
- The period of 60 s ends early in a busy cache: when the misses and the blocks that were hit are together as
  many as half of the cache's blocks, or 64, and misses are not very rare. In the kernel's full minute, every
  block of a small cache may have been hit, and then the policy cannot tell them apart. This does not hold for
  a cleaner.
- In a large cache the levels are made equally long in several steps: see `multi_level_queue`.
- A hit is forgotten when its block is freed. In the kernel the next block in that place inherits it.
- A promoted block starts clean. The kernel marks it dirty, and its target corrects that.
- The kernel also counts hits of cached blocks by level, and ages the clean queue. Nothing reads either, so
  both are left out here.
- If a migration is only queued, invalidating its block drops the migration. In the kernel the queue keeps a
  reference to a block that is gone.

Cost, measured with a million cache blocks on CPython 3.11: 35 bytes for each cache block, nothing for a block
of the origin; 0.25 us for a hit (0.6 us if its block is in no CPU cache), 2 us for a miss, 0.6 ms for the
longest tick, 2 us for each mapping that is loaded.
"""

import math
from typing import ClassVar, Final

from nbdtarget.policies.base import (
    DEMOTE,
    MISS,
    MISS_WAKE,
    PROMOTE,
    WRITEBACK,
    HitTables,
    MappingError,
    Policy,
    Work,
)
from nbdtarget.policies.smq.allocator import Allocator
from nbdtarget.policies.smq.block_table import (
    HASH_MASK,
    HASH_MULTIPLIER,
    NO_ENTRY,
    BlockTable,
)
from nbdtarget.policies.smq.hotspot import NR_TOP_LEVELS, NS, Hotspot
from nbdtarget.policies.smq.lru_shadow import LruShadow
from nbdtarget.policies.smq.multi_level_queue import (
    NR_LEVELS,
    TOP_LEVEL,
    AgedQueue,
    Links,
    MultiLevelQueue,
)
from nbdtarget.policies.smq.tracker import BackgroundTracker

__all__ = ["CBLOCKS_MAX", "MOVES_MAX", "Smq"]

WRITEBACK_PERIOD_NS: Final = 10 * NS
CACHE_PERIOD_NS: Final = 60 * NS
# If more blocks are hit for each miss than this, nothing needs room, and the period is not cut short.
HIT_BLOCKS_PER_MISS: Final = 64
FREE_TARGET_PERCENT: Final = 25
DEMOTE_LEVEL_END: Final = NR_LEVELS // 2
FULL_PROMOTE_LEVEL: Final = NR_LEVELS - NR_TOP_LEVELS
EVENTS_MIN: Final = 64  # in a period that ends by use

# While the policy does as LRU does: a period has one event for so many cache blocks, so the order is known well
# enough; and one is kept free for so many cache blocks, so that the next misses need not wait for a demotion.
LRU_CBLOCKS_EACH_EVENT: Final = 8
LRU_CBLOCKS_EACH_FREE: Final = 256

# How many entries one tick or one `catch_up` moves at most. It takes about 0.2 ms, or four times that if
# none of the memory is in a CPU cache.
MOVES_MAX: Final = 256

CBLOCKS_MAX: Final = 1 << 31  # entries and marks have numbers of 32 bits

_MAPPED: Final = 1
_DIRTY: Final = 2
_PENDING: Final = 4
_PINNED: Final = 8

# Indexed by the flags of an entry: whether it is in the clean or the dirty queue.
_IS_QUEUED: Final = bytes(
    flags & (_MAPPED | _PENDING) == _MAPPED and flags & (_DIRTY | _PINNED) != _PINNED
    for flags in range(16)
)

_ZEROES: Final = bytes(1 << 16)

PINNED_HINT: Final = NR_LEVELS  # added to the level in the hint of a pinned block


class Smq(Policy):
    """The policy. See the module head.

    Attributes:
        tracker: the migrations that are queued or under way.
        is_cleaner: it never migrates, and writes back even while the cache is busy.
        full_promote_level: a full cache promotes what is at this level of the hotspot queue or above. 0: as the
            kernel, and never as LRU does.
    """

    name: ClassVar[str] = "smq"
    version: ClassVar[tuple[int, int, int]] = (2, 0, 0)
    hint_size: ClassVar[int] = 4
    is_cleaner: ClassVar[bool] = False
    full_promote_level: ClassVar[int] = FULL_PROMOTE_LEVEL

    def __init__(
        self, nr_cblocks: int, *, origin_size: int, block_size: int, now_ns: int
    ) -> None:
        assert 0 < nr_cblocks <= CBLOCKS_MAX
        self.nr_cblocks = nr_cblocks
        self.tracker = BackgroundTracker()
        nr_marks = MultiLevelQueue.NR_MARKS + AgedQueue.NR_MARKS + Allocator.NR_MARKS
        self._links = Links(nr_cblocks, nr_marks)
        self._clean = MultiLevelQueue(self._links)
        self._dirty = AgedQueue(self._links)
        self._allocator = Allocator(self._links)
        self._flags = bytearray(nr_cblocks)
        # Counters of this cache period.
        self._is_hit = bytearray(nr_cblocks)
        self._nr_hit = 0
        self._nr_noted_before = 0
        self._nr_events_max: float = max(nr_cblocks // 2, EVENTS_MIN)
        if self.is_cleaner:
            # The period is never cut short. Otherwise no dirty block of a busy cache would grow old.
            self._nr_events_max = math.inf
        self._table = BlockTable(nr_cblocks)
        self._hotspot = Hotspot(
            nr_cblocks, origin_size=origin_size, block_size=block_size
        )
        self._nr_pinned = 0
        # It has been full, and not a quarter of it has become free since.
        self._is_full = False
        self._lru = LruShadow(nr_cblocks)
        self._nr_free_target = nr_cblocks * FREE_TARGET_PERCENT // 100
        self._may_migrate = not self.is_cleaner
        self._writeback_period_end_ns = now_ns + WRITEBACK_PERIOD_NS
        self._cache_period_end_ns: int | None = None  # due now

    @property
    def residency(self) -> int:
        return self._allocator.nr_allocated

    # ---- for each bio ----

    # hot: a hit that is not the first of its period takes 0.3 us.
    def lookup(self, oblock: int, is_write: bool) -> int:
        # This is `BlockTable.find`, written out, because a call takes too long here.
        table = self._table
        blocks = table.blocks
        entry = table.buckets[(oblock * HASH_MULTIPLIER & HASH_MASK) >> table.shift]
        while entry != NO_ENTRY:
            if blocks[entry] == oblock:
                if not self._is_hit[entry]:
                    self._rise(entry)
                return entry
            entry = table.chain[entry]
        self._lru.note(oblock, False)
        if self._hotspot.note_miss(oblock) < self._hotspot.promote_level:
            return MISS
        # Without a free block this queues a demotion at most. The target is woken all the same, as the kernel's is.
        work = self._reserve(oblock)
        if work is not None and not self.tracker.queue(work):
            self._unreserve(work)
        return MISS_WAKE

    def hit_tables(self) -> HitTables | None:
        if type(self).lookup is not Smq.lookup:
            return None  # a policy made from this one wants to see each hit
        table = self._table
        return HitTables(
            table.blocks, table.buckets, table.chain, table.shift, self._is_hit
        )

    def lookup_with_work(self, oblock: int, is_write: bool) -> tuple[int, Work | None]:
        entry = self._table.find(oblock)
        if entry >= 0:
            if not self._is_hit[entry]:
                self._rise(entry)
            return entry, None
        self._lru.note(oblock, False)
        is_hot = self._hotspot.note_miss(oblock) >= self._hotspot.promote_level
        # A write that needs no copy costs nothing to promote, as long as no other block has to go for it.
        if not is_hot and not (is_write and self._allocator.nr_free):
            return MISS, None
        work = self._reserve(oblock)
        if work is not None and not self.tracker.start(work):
            self._unreserve(work)
            return MISS, None
        return MISS, work

    def set_dirty(self, cblock: int) -> None:
        self._set_dirty(cblock, _DIRTY)

    def clear_dirty(self, cblock: int) -> None:
        self._set_dirty(cblock, 0)

    def _set_dirty(self, cblock: int, dirty: int) -> None:
        flags = self._flags[cblock]
        assert flags & _MAPPED, f"cache block {cblock} has no mapping"
        self._set_flags(cblock, flags & ~_DIRTY | dirty)

    def _rise(self, entry: int) -> None:
        """Move the entry up by one level, for its first hit in this period."""
        flags = self._flags[entry]
        # A pending block is in no queue. Its hit bit stays clear, so that a hit after the migration counts.
        if not flags & _PENDING:
            self._is_hit[entry] = 1
            self._nr_hit += 1
            self._lru.note(self._table.blocks[entry], True)
            if not _IS_QUEUED[flags]:
                return
            queue = self._queue_for(flags)
            if self._lru.is_ahead:
                # Nothing goes down in exchange: levels stay in the order of the last use.
                queue.remove(entry)
                queue.push(entry, TOP_LEVEL)
            else:
                queue.requeue(entry, 1)

    # ---- queues ----

    def _queue_for(self, flags: int) -> MultiLevelQueue:
        return self._dirty if flags & _DIRTY else self._clean

    def _set_flags(self, entry: int, flags: int) -> None:
        """Set the flags of an entry that is not free, and move it to the queue where it belongs now."""
        self._take(entry)
        self._flags[entry] = flags
        self._push(entry)

    def _push(self, entry: int) -> None:
        """Put the entry at the tail of its level in its queue, if it belongs in one."""
        flags = self._flags[entry]
        if _IS_QUEUED[flags]:
            self._queue_for(flags).push(entry, self._links.levels[entry])

    def _push_front(self, entry: int) -> None:
        """As `_push`, but at the head of the level: it is the next one to be demoted or cleaned."""
        flags = self._flags[entry]
        if _IS_QUEUED[flags]:
            self._queue_for(flags).push_front(entry, self._links.levels[entry])

    def _take(self, entry: int) -> None:
        """Take the entry out of its queue, if it is in one. It keeps its level."""
        flags = self._flags[entry]
        if _IS_QUEUED[flags]:
            queue = self._queue_for(flags)
            level = queue.level_of(entry)
            queue.remove(entry)
            self._links.levels[entry] = level

    # ---- migrations ----

    def get_background_work(self, idle: bool) -> Work | None:
        work = self.tracker.issue()
        if work is None and not self._is_clean_target_met(idle):
            self._queue_writeback(idle)
            work = self.tracker.issue()
        return work

    def complete_background_work(self, work: Work, success: bool) -> None:
        self.tracker.complete(work)
        entry = work.cblock
        # A failed demotion or writeback, and a good writeback, leave the block cached: back into its queue.
        if work.op == PROMOTE and success:
            self._map(entry, work.oblock, dirty=False, level=TOP_LEVEL)
            self._push(entry)
        elif work.op == PROMOTE:
            self._unreserve(work)
        elif work.op == DEMOTE and success:
            self._unmap(entry)
        else:
            self._set_flags(entry, self._flags[entry] & ~_PENDING)

    def allow_migrations(self, allow: bool) -> None:
        self._may_migrate = allow and not self.is_cleaner

    def _reserve(self, oblock: int) -> Work | None:
        """Take a free cblock for a promotion of `oblock`. If none is free, queue work that will free one."""
        if not self._may_migrate:
            return None
        if not self._allocator.nr_free:
            # Enough demotions may be under way already. This miss is not promoted in any case: the block
            # is promoted by a later miss, if it is still hot by then.
            if self._lru.is_ahead:
                self._make_room()
            elif not self._is_free_target_met():
                self._queue_demotion()
            return None
        if oblock in self.tracker:
            return None
        work = Work(PROMOTE, oblock, self._allocator.allocate())
        if self._lru.is_ahead:
            self._make_room()
        return work

    def _make_room(self) -> None:
        """Queue a demotion, so that the next miss finds a free block, and a writeback of what is as old."""
        clean, dirty = self._clean.peek(), self._dirty.peek()
        if dirty >= 0 and (
            clean < 0 or self._dirty.level_of(dirty) <= self._clean.level_of(clean)
        ):
            self._queue_pending(dirty, WRITEBACK)
        nr_free = self._allocator.nr_free + self.tracker.nr_demotions
        if clean >= 0 and nr_free < max(self.nr_cblocks // LRU_CBLOCKS_EACH_FREE, 1):
            self._queue_pending(clean, DEMOTE)

    def _unreserve(self, work: Work) -> None:
        self._free(work.cblock)

    def _queue_demotion(self, *, forced: bool = False) -> None:
        """Queue a demotion, or a writeback that makes one possible. `forced`: of any block, hot or young."""
        entry = self._clean.peek(NR_LEVELS if forced else DEMOTE_LEVEL_END)
        if entry >= 0:
            self._queue_pending(entry, DEMOTE)
        elif not self._is_clean_target_met(idle=True):
            self._queue_writeback(idle=forced)

    def _queue_writeback(self, idle: bool) -> None:
        # Entries ahead of the sentinels are old. An idle cache writes back the young ones, too.
        entry = self._dirty.peek(past_sentinels=idle)
        if entry >= 0:
            self._queue_pending(entry, WRITEBACK)

    def _queue_pending(self, entry: int, op: int) -> None:
        self._take(entry)
        if self.tracker.queue(Work(op, self._table.blocks[entry], entry)):
            self._flags[entry] |= _PENDING
        else:
            # The tracker has as many migrations as it takes.
            self._push_front(entry)

    def _is_free_target_met(self) -> bool:
        nr_free = self._allocator.nr_free + self.tracker.nr_demotions
        return nr_free >= self._nr_free_target

    def _is_clean_target_met(self, idle: bool) -> bool:
        return not (idle or self.is_cleaner) or not len(self._dirty)

    # ---- what the user wants cached ----

    @property
    def nr_pinned(self) -> int:
        return self._nr_pinned

    def maybe_promote(self, oblock: int) -> Work | None:
        if (
            not self._may_migrate
            or oblock in self.tracker
            or self._table.find(oblock) >= 0
        ):
            return None
        if not self._allocator.nr_free:
            self._queue_demotion(forced=True)
            return None
        work = Work(PROMOTE, oblock, self._allocator.allocate())
        if not self.tracker.start(work):
            self._unreserve(work)
            return None
        return work

    def pin(self, cblock: int) -> None:
        assert self._allocator.is_allocated(cblock), f"cache block {cblock} is free"
        flags = self._flags[cblock]
        if flags & _PINNED:
            return
        self._nr_pinned += 1
        # A demotion that the target has been given goes on, and takes the pin with it. A queued one is dropped.
        if flags & _PENDING and self.tracker.cancel_demotion(
            self._table.blocks[cblock]
        ):
            flags &= ~_PENDING
        self._set_flags(cblock, flags | _PINNED)

    def unpin(self, cblock: int) -> None:
        flags = self._flags[cblock]
        if flags & _PINNED:
            self._nr_pinned -= 1
            self._set_flags(cblock, flags & ~_PINNED)

    def is_pinned(self, cblock: int) -> bool:
        return bool(self._flags[cblock] & _PINNED)

    # ---- mappings ----

    def load_mapping(
        self, cblock: int, oblock: int, dirty: bool, hint: int | None
    ) -> None:
        if not 0 <= cblock < self.nr_cblocks:
            reason = f"the cache has {self.nr_cblocks} blocks"
            raise MappingError(cblock, oblock, reason)
        if self._allocator.is_allocated(cblock):
            raise MappingError(cblock, oblock, "the cache block is in use")
        other = self._table.find(oblock)
        if other >= 0:
            raise MappingError(cblock, oblock, f"also in cache block {other}")
        self._allocator.allocate_particular(cblock)
        if hint is None:
            level = _level_without_hint(cblock)
        elif PINNED_HINT <= hint <= PINNED_HINT + TOP_LEVEL:
            level = hint - PINNED_HINT
            self.pin(cblock)
        else:
            level = min(hint, TOP_LEVEL)
        self._map(cblock, oblock, dirty=dirty, level=level)
        # Ahead of the sentinels, as the kernel does: it may be cleaned or demoted at once.
        self._push_front(cblock)

    def invalidate(self, cblock: int) -> bool:
        assert 0 <= cblock < self.nr_cblocks
        flags = self._flags[cblock]
        if not flags & _MAPPED:
            return False
        if flags & _PENDING:
            work = self.tracker.cancel(self._table.blocks[cblock])
            assert work is not None, f"cache block {cblock} is being migrated"
        self._take(cblock)
        self._unmap(cblock)
        return True

    def get_hint(self, cblock: int) -> int:
        flags = self._flags[cblock]
        if not flags & _MAPPED:
            return 0
        if _IS_QUEUED[flags]:
            level = self._queue_for(flags).level_of(cblock)
        else:
            level = self._links.levels[cblock]
        return level | PINNED_HINT if flags & _PINNED else level

    def _map(self, entry: int, oblock: int, *, dirty: bool, level: int) -> None:
        assert not self._flags[entry] & _MAPPED, f"cache block {entry} is mapped"
        self._table.insert(entry, oblock)
        self._flags[entry] |= _MAPPED | (_DIRTY if dirty else 0)
        self._is_hit[entry] = 0
        self._links.levels[entry] = level

    def _unmap(self, entry: int) -> None:
        """Remove the mapping of an entry that is in no queue, and free it."""
        assert self._flags[entry] & _MAPPED, f"cache block {entry} has no mapping"
        self._table.remove(entry)
        self._free(entry)

    def _free(self, entry: int) -> None:
        if self._flags[entry] & _PINNED:
            self._nr_pinned -= 1
        self._flags[entry] = 0
        self._allocator.free(entry)

    # ---- time ----

    def tick(self, now_ns: int) -> bool:
        if now_ns > self._writeback_period_end_ns:
            self._writeback_period_end_ns = now_ns + WRITEBACK_PERIOD_NS
            self._dirty.end_period()
        # The cache period ends by time, or early by use: see the departures in the module head.
        end_ns = self._cache_period_end_ns
        nr_misses = self._hotspot.nr_noted - self._nr_noted_before
        nr_events_max = self._nr_events_max
        if self._lru.is_ahead:
            nr_events_max = self.nr_cblocks // LRU_CBLOCKS_EACH_EVENT
        if (
            end_ns is None
            or now_ns > end_ns
            or (
                nr_misses * HIT_BLOCKS_PER_MISS > self._nr_hit
                and nr_misses + self._nr_hit >= nr_events_max
            )
        ):
            self._cache_period_end_ns = now_ns + CACHE_PERIOD_NS
            self._end_cache_period(nr_misses)
        self._hotspot.promote_level_min = self._promote_level_min()
        self._hotspot.tick(now_ns)
        self._lru.decide(may_lead=self._may_migrate and self.full_promote_level > 0)
        if self._lru.is_ahead:
            self._hotspot.promote_level = 0
        return self.catch_up()

    def _end_cache_period(self, nr_misses: int) -> None:
        self._nr_noted_before += nr_misses
        self._nr_hit = 0
        # In place: a new array of this size would cost ten times as much, because of page faults.
        for begin in range(0, self.nr_cblocks, len(_ZEROES)):
            nr = min(self.nr_cblocks - begin, len(_ZEROES))
            self._is_hit[begin : begin + nr] = _ZEROES[:nr]
        if (
            not self._lru.is_ahead
        ):  # what counts then is their order, and not how long they are
            self._dirty.start_redistribution()
            self._clean.start_redistribution()

    def _promote_level_min(self) -> int:
        # A cache counts as full until a quarter of it is free. Otherwise it would change its mind with each demotion.
        nr_free = self._allocator.nr_free
        if not nr_free:
            self._is_full = True
        elif nr_free >= self._nr_free_target:
            self._is_full = False
        return self.full_promote_level if self._is_full else 0

    def catch_up(self) -> bool:
        moves = MOVES_MAX
        is_behind = False
        for queue in (self._hotspot.queue, self._dirty, self._clean):
            if queue.is_redistributing:
                moves -= queue.redistribute(moves)
                is_behind |= queue.is_redistributing
        return is_behind


def _level_without_hint(cblock: int) -> int:
    """Spread blocks whose use is unknown over the levels, by the kernel's hash of 9 bits."""
    return (cblock * 0x61C88647 & 0xFFFFFFFF) >> 23 & TOP_LEVEL
