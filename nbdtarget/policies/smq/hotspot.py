# SPDX-License-Identifier: Apache-2.0
"""The hotspot queue: where on the origin the misses are, whether cached or not.

Theory of operation. The origin is seen in *hotspot blocks*, each some cache blocks long, so that
the memory of few entries reaches far. Only misses are noted. The level of a hotspot block,
0 ... 63, says how hot it is; what is above the `promote_level` is worth caching.

The queue judges itself: an access to a block that was at level 48 or higher was foreseen, any
other was not. The share of the foreseen decides how eagerly to promote, anew at each tick, and how
many levels an access is worth, anew for each period of a second:

    foreseen       performance   promote_level   level_jump
    < 1/16         POOR          48              4
    < 1/8          FAIR          32              2
    more           WELL          0               1

(The kernel computes the promote level from the hit ratio of the cache too, but takes the larger of
that and 64, which the other never exceeds.)

A block's level rises at most once between two ticks; later accesses only make it the newest of
its level. A block that is not known takes the entry of the oldest of the lowest level, and that
one's level too, when all entries are in use.
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
    """How many hotspot blocks there are, and how many cache blocks long each is."""
    nr_blocks = max(nr_cblocks // 4, NR_BLOCKS_MIN)
    cblocks_each = BLOCK_CBLOCKS_MAX
    while cblocks_each > 1 and nr_blocks * cblocks_each * block_size > origin_size:
        cblocks_each //= 2
    return nr_blocks, cblocks_each


class Hotspot:
    """The hotspot queue of one cache. See the module head.

    Attributes:
        queue: the levels; made equally long by its owner, in steps.
        promote_level: what to promote; 64, that is nothing, before the first tick.
        promote_level_min: what its owner allows at most, whatever the performance is.
        level_jump: how far one access lifts a block.
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
        # The tick, modulo 255, that an entry last rose in: cheaper than to clear bits at each tick.
        self._risen_in = bytearray(self.nr_blocks)
        self._tick = 1
        self._hits = 0
        self._misses = 0
        self._nr_noted_before = 0  # this period
        self._period_end_ns: int | None = None  # due now

    @property
    def nr_noted(self) -> int:
        """Accesses noted, since the beginning."""
        return self._nr_noted_before + self._hits + self._misses

    def note_miss(self, oblock: int) -> int:
        """Note one access to `oblock`; returns the level of its hotspot block now."""
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
        """Decide what is hot now; once in a period, start to redistribute."""
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
