# SPDX-License-Identifier: Apache-2.0
"""`LruShadow`: whether a cache that only looks at recency would have more hits than this one.

Theory of operation. The shadow is the directory of an LRU cache of the same size: it holds no data. It sees what
the policy sees: each miss, and the first hit of each block in a period. Later hits of a block in the
same period are not seen, so that a hit stays cheap; they would only bring to the front what is near it.

Each event is a vote: a miss that the shadow has is one for LRU, and a hit that it has not is one
against it. The *lead* of LRU is the number of votes for it less those against it, and less one for
every `EVENTS_EACH_VOTE` events, so that neither chance nor a tiny advantage adds up. It never falls below zero:
what was long ago does not count. LRU *is ahead* from a lead of an eighth of the shadow, or `LEAD_MIN`, on.
It stays ahead for `STAY` times as many events as the shadow has blocks. If it takes the lead again soon
after that, it stays for twice as long, up to `STAY_MAX`.

A cache with more than `BLOCKS_MAX` blocks looks at a sample: at the blocks of the origin whose hash is
small. Their share is that of the shadow's size in the cache's size.
"""

from typing import Final

__all__ = ["BLOCKS_MAX", "LruShadow"]

BLOCKS_MAX: Final = 2048  # about 200 KiB
EVENTS_EACH_VOTE: Final = 64
LEAD_SHARE: Final = 8
LEAD_MIN: Final = 64
STAY: Final = 2
STAY_MAX: Final = 64
SOON: Final = 8  # times as long as LRU was ahead

_MULTIPLIER: Final = 0x9E3779B97F4A7C15
_HASH_MASK: Final = (1 << 64) - 1


class LruShadow:
    """The shadow of one cache.

    Attributes:
        is_ahead: whether the cache should do as LRU does.
    """

    def __init__(self, nr_cblocks: int) -> None:
        shift = 0
        while nr_cblocks >> shift > BLOCKS_MAX:
            shift += 1
        self.is_ahead = False
        self._hash_end = 1 << 64 - shift
        self._nr_blocks = max(nr_cblocks >> shift, 1)
        self._blocks: dict[int, None] = {}  # the one that was used last is the last one
        self._lead_needed = max(self._nr_blocks // LEAD_SHARE, LEAD_MIN)
        self._lead = 0.0
        self._stay = STAY * self._nr_blocks
        self._nr_events = 0  # since `is_ahead` changed

    def note(self, oblock: int, is_hit: bool) -> None:
        """Take note of an access to `oblock`, which the cache has (`is_hit`) or has not."""
        if oblock * _MULTIPLIER & _HASH_MASK >= self._hash_end:
            return
        blocks = self._blocks
        self._nr_events += 1
        vote = -is_hit
        if oblock in blocks:
            del blocks[oblock]
            vote += 1
        elif len(blocks) == self._nr_blocks:
            del blocks[next(iter(blocks))]
        blocks[oblock] = None
        self._lead = max(self._lead + vote - 1 / EVENTS_EACH_VOTE, 0.0)

    def decide(self, *, may_lead: bool) -> None:
        """Set `is_ahead`. `may_lead`: it can be True at all."""
        if not may_lead:
            self.is_ahead, self._lead = False, 0.0
        elif self.is_ahead:
            if self._nr_events >= self._stay:
                self.is_ahead = False
                self._lead, self._nr_events = 0.0, 0
        elif self._lead >= self._lead_needed:
            is_soon = self._nr_events < SOON * self._stay
            longest = STAY_MAX * self._nr_blocks
            self._stay = (
                min(4 * self._stay, longest) if is_soon else STAY * self._nr_blocks
            )
            self.is_ahead = True
            self._nr_events = 0
