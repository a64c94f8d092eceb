# SPDX-License-Identifier: Apache-2.0
"""`MissShare`: whether a full cache misses more often than it used to.

Theory of operation. The policy counts misses, and the first hit of each block in a period. It does not count
later hits of the same block, so that a hit stays cheap. The share of misses among these events is not the miss
ratio, but it rises and falls with it. A share is computed from at least `EVENTS_MIN` events. It *has risen* if it
is more than 15 % above the running mean of the shares before it. The mean follows slowly, so a load that has
become worse for good counts as the normal one after some time.
"""

from typing import Final

__all__ = ["EVENTS_MIN", "MissShare"]

EVENTS_MIN: Final = 1024  # with so many, chance changes the share by about 5 %
RISEN: Final = 1.15
MEAN_OF: Final = 32  # about how many shares the running mean covers


class MissShare:
    """The share of misses of one cache.

    Attributes:
        has_risen: whether the last share was well above the mean.
    """

    def __init__(self) -> None:
        self.has_risen = False
        self._misses = 0
        self._events = 0
        self._mean: float | None = None

    def note(self, misses: int, hit_blocks: int) -> None:
        """Take note of a period that has ended: of its misses, and of the number of blocks that were hit."""
        self._misses += misses
        self._events += misses + hit_blocks
        if self._events < EVENTS_MIN:
            return
        share = self._misses / self._events
        self._misses = self._events = 0
        mean = share if self._mean is None else self._mean
        self.has_risen = share > RISEN * mean
        self._mean = mean + (share - mean) / MEAN_OF
