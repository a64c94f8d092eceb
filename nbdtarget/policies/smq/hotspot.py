# SPDX-License-Identifier: Apache-2.0
"""`Hotspot`: which parts of the origin are missed most often.

Theory of operation. The queue looks at *hotspot blocks*, which are up to 16 cache blocks long, so that few
entries cover much of the origin. It counts only misses. The level of a hotspot block, 0 ... 63, says how hot
it is. Blocks at the `promote_level` or above are worth caching.

The queue rates itself. An access to a hotspot block at level 48 or higher was foreseen, any other access was
not. The share of foreseen accesses decides two things: how high the promote level is (again at each
tick), and how many levels an access moves its block up (again for each period of a second):

    foreseen       performance   promote_level   level_jump
    < 1/16         POOR          48              4
    < 1/8          FAIR          32              2
    more           WELL          0               1

(The kernel also computes a promote level from the hit ratio of the cache. It then takes the larger one of that
and 64, and 64 is always the larger one.)

A block moves up at most once between two ticks. Later accesses only make it the newest block of its level. If
all entries are in use, a block that has none takes the entry of the oldest block of the lowest level, and
its level, too.
"""

from typing import Final

from nbdtarget.policies.smq.block_table import BlockTable
from nbdtarget.policies.smq.multi_level_queue import NR_LEVELS, Links, MultiLevelQueue

__all__ = ["NR_TOP_LEVELS", "NS", "Hotspot", "hotspot_geometry"]

NS: Final = 1_000_000_000
PERIOD_NS: Final = 1 * NS
NR_BLOCKS_MIN: Final = 1024
BLOCK_CBLOCKS_MAX: Final = 16
NR_TOP_LEVELS: Final = 8
FORESEEN_LEVEL: Final = NR_LEVELS * 3 // 4

POOR: Final = 0
FAIR: Final = 1
WELL: Final = 2
PROMOTE_LEVELS: Final = (48, 32, 0)
LEVEL_JUMPS: Final = (4, 2, 1)


def hotspot_geometry(
    nr_cblocks: int, *, origin_size: int, block_size: int
) -> tuple[int, int]:
    """Return how many hotspot blocks there are, and how many cache blocks long each of them is."""
    nr_blocks = max(nr_cblocks // 4, NR_BLOCKS_MIN)
    cblocks_each = BLOCK_CBLOCKS_MAX
    while cblocks_each > 1 and nr_blocks * cblocks_each * block_size > origin_size:
        cblocks_each //= 2
    return nr_blocks, cblocks_each


class Hotspot:
    """The hotspot queue of one cache. See the module head.

    Attributes:
        queue: the levels. The owner makes them equally long, in steps.
        promote_level: blocks at this level or above are promoted. It is 64 before the first tick, so nothing is.
        promote_level_min: the promote level is never below this, which the owner sets.
        level_jump: how many levels one access moves a block up.
    """

    def __init__(self, nr_cblocks: int, *, origin_size: int, block_size: int) -> None:
        self.nr_blocks, self.cblocks_each = hotspot_geometry(
            nr_cblocks, origin_size=origin_size, block_size=block_size
        )
        self.promote_level = NR_LEVELS
        self.promote_level_min = 0
        self.level_jump = 1
        self.queue = MultiLevelQueue(
            Links(self.nr_blocks, MultiLevelQueue.NR_MARKS),
            nr_top_levels=NR_TOP_LEVELS,
            nr_in_top_levels=min(
                self.nr_blocks // NR_LEVELS, nr_cblocks // self.cblocks_each
            ),
        )
        self._table = BlockTable(self.nr_blocks)
        self._nr_used = 0
        # The tick, modulo 255, in which an entry last moved up. That is cheaper than one bit for each entry,
        # all of which would have to be cleared at each tick.
        self._risen_in = bytearray(self.nr_blocks)
        self._tick = 1
        self._hits = 0
        self._misses = 0
        self._nr_noted_before = 0  # before this period
        self._period_end_ns: int | None = None  # due now

    @property
    def nr_noted(self) -> int:
        """How many accesses were noted since the beginning."""
        return self._nr_noted_before + self._hits + self._misses

    def note_miss(self, oblock: int) -> int:
        """Note one access to `oblock`. Returns the level that its hotspot block has now."""
        block = oblock // self.cblocks_each
        queue = self.queue
        entry = self._table.find(block)
        if entry < 0:
            self._misses += 1
            return self._add(block)
        if queue.level_of(entry) >= FORESEEN_LEVEL:
            self._hits += 1
        else:
            self._misses += 1
        if self._risen_in[entry] == self._tick:
            queue.requeue(entry, 0)
        else:
            self._risen_in[entry] = self._tick
            queue.requeue(entry, self.level_jump)
        return queue.level_of(entry)

    def tick(self, now_ns: int) -> None:
        """Set the promote level. Once in a period, also start to make the levels equally long."""
        if self._tick == 255:
            self._risen_in = bytearray(self.nr_blocks)
            self._tick = 0
        self._tick += 1
        performance = self._performance()
        self.promote_level = max(PROMOTE_LEVELS[performance], self.promote_level_min)
        if self._period_end_ns is None or now_ns > self._period_end_ns:
            self._period_end_ns = now_ns + PERIOD_NS
            self.level_jump = LEVEL_JUMPS[performance]
            self.queue.start_redistribution()
            self._nr_noted_before = self.nr_noted
            self._hits = self._misses = 0

    def _add(self, block: int) -> int:
        if self._nr_used < self.nr_blocks:
            entry, level = self._nr_used, 0
            self._nr_used += 1
        else:
            entry = self.queue.peek()
            level = self.queue.level_of(entry)
            self.queue.remove(entry)
            self._table.remove(entry)
            self._risen_in[entry] = 0
        self._table.insert(entry, block)
        self.queue.push(entry, level)
        return level

    def _performance(self) -> int:
        accesses = self._hits + self._misses
        confidence = self._hits * 256 // accesses if accesses else 0
        return POOR if confidence < 16 else FAIR if confidence < 32 else WELL
