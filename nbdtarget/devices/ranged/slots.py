# SPDX-License-Identifier: Apache-2.0
"""`Slots`: how many requests may be under way, as many as the source bears.

The width grows by one after as many successes as it is wide, and is halved when the source is overloaded: at most once for
all requests that were under way together, because they tell of one overload.
"""

import asyncio
from collections import deque

from nbdtarget.common.clock import loop_time_s

__all__ = ["Slots"]


class Slots:
    """First come, first served.

    Attributes:
        width: how many may be under way now.
        nr_used: how many are.
    """

    def __init__(self, width: int, *, width_max: int, width_min: int = 1) -> None:
        assert 0 < width_min <= width <= width_max
        self.width = width
        self.width_min = width_min
        self.width_max = width_max
        self.nr_used = 0
        self._nr_good = 0
        self._halved_s = float("-inf")
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def has_room(self) -> bool:
        return self.nr_used < self.width and not self._waiting

    async def acquire(self) -> None:
        """Wait for a slot and take it."""
        if self.has_room:
            self.nr_used += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()  # it was given to us, and we do not take it
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def release(self) -> None:
        """Give a slot back."""
        self.nr_used -= 1
        assert self.nr_used >= 0
        self._give()

    def note_success(self) -> None:
        """A request has succeeded."""
        self._nr_good += 1
        if self._nr_good >= self.width:
            self._nr_good = 0
            self.width = min(self.width + 1, self.width_max)
            self._give()

    def note_overload(self, began_s: float) -> None:
        """A request that began at `began_s` (the loop's time) found the source overloaded."""
        if began_s >= self._halved_s:
            self._halved_s = loop_time_s()
            self.width = max(self.width // 2, self.width_min)
            self._nr_good = 0

    def _give(self) -> None:
        while self._waiting and self.nr_used < self.width:
            turn = self._waiting.popleft()
            if not turn.done():
                self.nr_used += 1
                turn.set_result(None)
