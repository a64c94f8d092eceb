# SPDX-License-Identifier: Apache-2.0
"""Whether a full cache still has what is asked of it: a share of misses, against its mean.

Theory of operation. What counts is misses, and of the hits the first of each block in a period:
a hit that is not the first costs the policy nothing, so nobody counts it. Their share is no miss
ratio, but rises and falls with it. A share counts once it is of `EVENTS_MIN` or more; it has
*risen* when it is above the mean of those before it by a seventh. The mean follows, so a load that
is worse for good counts as the usual one after some time.
"""

from typing import Final

__all__ = ["EVENTS_MIN", "MissShare"]

EVENTS_MIN: Final = 1024  # at which chance makes for 5 %
RISEN: Final = 1.15
MEAN_OF: Final = 32  # shares, about


class MissShare:
    """The shares of one cache.

    Attributes:
        has_risen: whether the last share was well above the mean.
    """

    def __init__(self) -> None:
        self.has_risen = False
        self._misses = 0
        self._events = 0
        self._mean: float | None = None

    def note(self, misses: int, hit_blocks: int) -> None:
        """A period has ended, in which there were so many misses and so many blocks were hit."""
        self._misses += misses
        self._events += misses + hit_blocks
        if self._events < EVENTS_MIN:
            return
        share = self._misses / self._events
        self._misses = self._events = 0
        mean = share if self._mean is None else self._mean
        self.has_risen = share > RISEN * mean
        self._mean = mean + (share - mean) / MEAN_OF
