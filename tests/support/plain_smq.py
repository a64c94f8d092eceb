# SPDX-License-Identifier: Apache-2.0
"""A plain model of smq: lists of lists, everything moved one by one, no bounds. Slow and obvious.

The policy must decide what the model decides. They share no line of code.
"""

from dataclasses import dataclass, field

__all__ = ["PlainQueue", "PlainSmq"]

LEVELS = 64
S = 1_000_000_000


class PlainQueue:
    """64 lists, oldest first. Sentinels are strings, entries are numbers."""

    def __init__(
        self, *, sentinels: bool = False, top: tuple[int, int] = (0, 0)
    ) -> None:
        self.levels: list[list[int | str]] = [[] for _ in range(LEVELS)]
        self.old, self.young = "a", "b"
        self.has_sentinels = sentinels
        self.nr_top, self.nr_in_top = top
        self.targets = [0] * LEVELS
        self.targets_are_for = 0
        if sentinels:
            for level in self.levels:
                level += ["a", "b"]

    def entries(self, level: int) -> list[int]:
        return [entry for entry in self.levels[level] if isinstance(entry, int)]

    def all_entries(self) -> list[int]:
        return [entry for level in range(LEVELS) for entry in self.entries(level)]

    def level_of(self, entry: int) -> int:
        return next(n for n, level in enumerate(self.levels) if entry in level)

    def push(self, entry: int, level: int) -> None:
        self.levels[level].append(entry)

    def push_front(self, entry: int, level: int) -> None:
        self.levels[level].insert(0, entry)

    def remove(self, entry: int) -> None:
        self.levels[self.level_of(entry)].remove(entry)

    def requeue(self, entry: int, extra: int) -> None:
        level = self.level_of(entry)
        new_level = min(63, level + extra)
        if extra and level < 63 and self.entries(new_level):
            other = self.entries(new_level)[0]
            passed = self.levels[new_level].index(other)
            self.levels[new_level].remove(other)
            there = self.levels[level]
            if self.has_sentinels and passed < 2:
                there.insert(there.index((self.old, self.young)[passed]), other)
            else:
                there.append(other)
        self.remove(entry)
        self.push(entry, new_level)

    def peek(self, level_end: int = LEVELS, *, past_sentinels: bool = True) -> int:
        for level in range(level_end):
            for entry in self.levels[level]:
                if isinstance(entry, int):
                    return entry
                if not past_sentinels:
                    break
        return -1

    def end_period(self) -> None:
        self.old, self.young = self.young, self.old
        for level in self.levels:
            level.remove(self.young)
            level.append(self.young)

    def redistribute(self) -> None:
        self.set_targets()
        for level in range(63):
            while len(self.entries(level)) < self.targets[level]:
                above = [n for n in range(level + 1, 64) if self.entries(n)]
                if not above:
                    break
                entry = self.entries(above[0])[0]
                self.levels[above[0]].remove(entry)
                self.levels[level].append(entry)
            while len(self.entries(level)) > self.targets[level]:
                entry = self.entries(level)[-1]
                self.levels[level].remove(entry)
                self.levels[level + 1].append(entry)

    def set_targets(self) -> None:
        nr = len(self.all_entries())
        if nr == self.targets_are_for:
            return
        self.targets_are_for = nr
        begin = LEVELS - self.nr_top
        low = max(nr - self.nr_in_top, 0)
        for level in range(begin):
            self.targets[level] = low // begin + (level < low % begin)
        for level in range(begin, LEVELS):
            extra = level - begin < self.nr_in_top % self.nr_top
            self.targets[level] = self.nr_in_top // self.nr_top + extra


@dataclass
class Block:
    oblock: int
    level: int
    dirty: bool = False
    pending: bool = False
    hit: bool = False
    mapped: bool = True
    pinned: bool = False

    @property
    def is_apart(self) -> bool:
        """Whether the entry is in no queue, so that only the table has it."""
        return self.pinned and not self.dirty


@dataclass
class PlainWork:
    op: str
    oblock: int
    cblock: int


@dataclass
class PlainSmq:
    """The decisions of smq for blocks of 64 KiB, on an origin so large that a hotspot block is 16 blocks."""

    nr_cblocks: int
    now: int = 0
    is_cleaner: bool = False
    may_migrate: bool = True
    blocks: dict[int, Block] = field(default_factory=dict)
    pending: dict[int, PlainWork] = field(default_factory=dict)
    queued: list[PlainWork] = field(default_factory=list)
    hot: dict[int, int] = field(default_factory=dict)  # hotspot block -> entry
    risen: set[int] = field(default_factory=set)
    full_promote_level: int = 0
    promote_level_min: int = 0
    promote_level: int = 64
    level_jump: int = 1
    hits: int = 0
    misses: int = 0
    events_min: int = 64
    noted: int = 0
    nr_hit: int = 0
    is_full: bool = False
    # The blocks that an LRU cache would hold, and how many hits it is ahead of this one.
    lru: list[int] = field(default_factory=list)
    lru_lead: float = 0
    lru_lead_min: int = 64
    lru_events: int = 0
    lru_stay: int = 2
    is_lru_ahead: bool = False
    hotspot_end: int = -1
    cache_end: int = -1

    def __post_init__(self) -> None:
        self.clean = PlainQueue()
        self.dirty = PlainQueue(sentinels=True)
        self.hotspot = PlainQueue(top=(8, min(1024 // 64, self.nr_cblocks // 16)))
        self.free = list(range(self.nr_cblocks))
        self.writeback_end = self.now + 10 * S

    def queue_of(self, block: Block) -> PlainQueue:
        return self.dirty if block.dirty else self.clean

    def take(self, cblock: int) -> None:
        block = self.blocks[cblock]
        if not block.is_apart:
            block.level = self.queue_of(block).level_of(cblock)
            self.queue_of(block).remove(cblock)

    def push(self, cblock: int) -> None:
        block = self.blocks[cblock]
        if not block.is_apart:
            self.queue_of(block).push(cblock, block.level)

    def find(self, oblock: int) -> int | None:
        for cblock, block in self.blocks.items():
            if block.mapped and block.oblock == oblock:
                return cblock
        return None

    def lookup(
        self, oblock: int, is_write: bool, fast_copy: bool
    ) -> tuple[int | None, PlainWork | None, bool]:
        cblock = self.find(oblock)
        if cblock is not None:
            block = self.blocks[cblock]
            if not block.pending and not block.hit:
                block.hit = True
                self.nr_hit += 1
                self.vote(oblock, is_hit=True)
                if block.is_apart:
                    pass
                elif self.is_lru_ahead:
                    self.queue_of(block).remove(cblock)
                    self.queue_of(block).push(cblock, 63)
                else:
                    self.queue_of(block).requeue(cblock, 1)
            return cblock, None, False
        self.vote(oblock, is_hit=False)
        level = self.note_miss(oblock // 16)
        if level < self.promote_level and not (is_write and self.free and fast_copy):
            return None, None, False
        return None, self.queue_promotion(oblock, directly=fast_copy), True

    def vote(self, oblock: int, *, is_hit: bool) -> None:
        self.lru_events += 1
        self.lru_lead += (oblock in self.lru) - is_hit - 1 / 64
        self.lru_lead = max(self.lru_lead, 0)
        others = [other for other in self.lru if other != oblock]
        self.lru = [*others, oblock][-self.nr_cblocks :]

    def note_miss(self, block: int) -> int:
        self.noted += 1
        if block not in self.hot:
            self.misses += 1
            assert len(self.hot) < 1024, "this model never recycles"
            self.hot[block] = len(self.hot)
            self.hotspot.push(self.hot[block], 0)
            return 0
        entry = self.hot[block]
        if self.hotspot.level_of(entry) >= 48:
            self.hits += 1
        else:
            self.misses += 1
        self.hotspot.requeue(entry, 0 if entry in self.risen else self.level_jump)
        self.risen.add(entry)
        return self.hotspot.level_of(entry)

    def queue_promotion(self, oblock: int, *, directly: bool) -> PlainWork | None:
        if not self.may_migrate or self.is_cleaner:
            return None
        if not self.free:
            if self.is_lru_ahead:
                self.make_room(0)
            elif self.nr_demotions < self.nr_cblocks // 4:
                self.queue_demotion()
            return None
        if self.is_lru_ahead and oblock not in self.pending:
            self.make_room(len(self.free) - 1)
        return self.reserve(oblock, directly=directly)

    @property
    def nr_demotions(self) -> int:
        return sum(work.op == "demote" for work in self.pending.values())

    def make_room(self, nr_free: int) -> None:
        clean, dirty = self.clean.peek(), self.dirty.peek()
        if dirty >= 0 and (
            clean < 0 or self.dirty.level_of(dirty) <= self.clean.level_of(clean)
        ):
            self.queue_pending("writeback", dirty)
        if clean >= 0 and nr_free + self.nr_demotions < max(self.nr_cblocks // 256, 1):
            self.queue_pending("demote", clean)

    def maybe_promote(self, oblock: int) -> PlainWork | None:
        if not self.may_migrate or self.is_cleaner or self.find(oblock) is not None:
            return None
        if self.free:
            return self.reserve(oblock, directly=True)
        if oblock in self.pending:
            return None
        cblock = self.clean.peek()
        if cblock >= 0:
            self.queue_pending("demote", cblock)
        elif self.dirty.all_entries():
            self.queue_writeback(idle=True)
        return None

    def reserve(self, oblock: int, *, directly: bool) -> PlainWork | None:
        if oblock in self.pending or len(self.pending) == 4096:
            return None
        cblock = self.free.pop(0)
        self.blocks[cblock] = Block(oblock, 63, pending=True, mapped=False)
        work = PlainWork("promote", oblock, cblock)
        self.pending[oblock] = work
        if directly:
            return work
        self.queued.append(work)
        return None

    def queue_demotion(self) -> None:
        cblock = self.clean.peek(32)
        if cblock >= 0:
            self.queue_pending("demote", cblock)
        elif self.dirty.all_entries():
            self.queue_writeback(idle=False)

    def queue_writeback(self, *, idle: bool) -> None:
        cblock = self.dirty.peek(past_sentinels=idle)
        if cblock >= 0:
            self.queue_pending("writeback", cblock)

    def queue_pending(self, op: str, cblock: int) -> None:
        self.take(cblock)
        block = self.blocks[cblock]
        block.pending = True
        work = PlainWork(op, block.oblock, cblock)
        self.pending[block.oblock] = work
        self.queued.append(work)

    def get_background_work(self, idle: bool) -> PlainWork | None:
        cleans = idle or self.is_cleaner
        if not self.queued and cleans and self.dirty.all_entries():
            self.queue_writeback(idle=idle)
        return self.queued.pop() if self.queued else None

    def complete(self, work: PlainWork, success: bool) -> None:
        del self.pending[work.oblock]
        block = self.blocks[work.cblock]
        gone = {"promote": not success, "demote": success, "writeback": False}
        if gone[work.op]:
            del self.blocks[work.cblock]
            self.free.append(work.cblock)
        else:
            block.pending, block.mapped = False, True
            self.push(work.cblock)

    def set_dirty(self, cblock: int, dirty: bool) -> None:
        block = self.blocks[cblock]
        if not block.pending:
            self.take(cblock)
        block.dirty = dirty
        if not block.pending:
            self.push(cblock)

    def pin(self, cblock: int, pinned: bool) -> None:
        block = self.blocks[cblock]
        if block.pinned == pinned:
            return
        work = self.pending.get(block.oblock)
        if work in self.queued and work.op == "demote":
            self.queued.remove(self.pending.pop(block.oblock))
            block.pending = False
        elif not block.pending:
            self.take(cblock)
        block.pinned = pinned
        if not block.pending:
            self.push(cblock)

    def load_mapping(self, cblock: int, oblock: int, dirty: bool, hint: int) -> None:
        self.free.remove(cblock)
        pinned = 64 <= hint < 128
        level = hint - 64 if pinned else min(hint, 63)
        self.blocks[cblock] = block = Block(oblock, level, dirty, pinned=pinned)
        if not block.is_apart:
            self.queue_of(block).push_front(cblock, level)

    def invalidate(self, cblock: int) -> bool:
        block = self.blocks.get(cblock)
        if block is None or not block.mapped:
            return False
        if block.pending:
            self.queued.remove(self.pending.pop(block.oblock))
        else:
            self.take(cblock)
        del self.blocks[cblock]
        self.free.append(cblock)
        return True

    def hint(self, cblock: int) -> int:
        block = self.blocks.get(cblock)
        if block is None or not block.mapped:
            return 0
        if not block.pending and not block.is_apart:
            block.level = self.queue_of(block).level_of(cblock)
        return block.level + 64 if block.pinned else block.level

    def tick(self, now: int) -> None:
        if now > self.writeback_end:
            self.writeback_end = now + 10 * S
            self.dirty.end_period()
        self.risen.clear()
        accesses = self.hits + self.misses
        share = self.hits * 256 // accesses if accesses else 0
        performance = "POOR" if share < 16 else "FAIR" if share < 32 else "WELL"
        hit = self.nr_hit
        enough = max(self.nr_cblocks // 2, self.events_min)
        if self.is_lru_ahead:
            enough = self.nr_cblocks // 8
        is_enough = self.noted and self.noted + hit >= enough
        if now > self.cache_end or (is_enough and not self.is_cleaner):
            self.cache_end = now + 60 * S
            self.end_cache_period()
        if not self.free:
            self.is_full = True
        elif len(self.free) >= self.nr_cblocks // 4:
            self.is_full = False
        self.promote_level_min = self.full_promote_level if self.is_full else 0
        level = {"POOR": 48, "FAIR": 32, "WELL": 0}[performance]
        self.promote_level = max(level, self.promote_level_min)
        if now > self.hotspot_end:
            self.hotspot_end = now + S
            self.level_jump = {"POOR": 4, "FAIR": 2, "WELL": 1}[performance]
            self.hotspot.redistribute()
            self.hits = self.misses = 0
        self.decide_about_lru()
        if self.is_lru_ahead:
            self.promote_level = 0

    def decide_about_lru(self) -> None:
        nr = self.nr_cblocks
        if not self.may_migrate or self.is_cleaner or not self.full_promote_level:
            self.is_lru_ahead, self.lru_lead = False, 0
        elif self.is_lru_ahead and self.lru_events >= self.lru_stay * nr:
            self.is_lru_ahead, self.lru_lead, self.lru_events = False, 0, 0
        elif not self.is_lru_ahead and self.lru_lead >= max(nr // 8, self.lru_lead_min):
            is_soon = self.lru_events < 8 * self.lru_stay * nr
            self.lru_stay = min(4 * self.lru_stay, 64) if is_soon else 2
            self.is_lru_ahead, self.lru_events = True, 0

    def end_cache_period(self) -> None:
        self.noted = self.nr_hit = 0
        for block in self.blocks.values():
            block.hit = False
        if not self.is_lru_ahead:
            self.dirty.redistribute()
            self.clean.redistribute()
