# SPDX-License-Identifier: Apache-2.0
"""SimClock: time that passes only when a test says so."""

import asyncio
import heapq
from collections.abc import Callable

__all__ = ["SimClock", "SimTimer", "settle"]


class SimTimer:
    """A call to come; `cancel` before it is due."""

    __slots__ = ("callback", "cancelled")

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class SimClock:
    """A `Clock` whose `advance` runs what has come due, in order."""

    def __init__(self) -> None:
        self._now_ns = 0
        self._order = 0
        self._timers: list[tuple[int, int, SimTimer]] = []

    def now_ns(self) -> int:
        return self._now_ns

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> SimTimer:
        timer = SimTimer(callback)
        self._order += 1
        due_ns = self._now_ns + int(delay_s * 1e9)
        heapq.heappush(self._timers, (due_ns, self._order, timer))
        return timer

    async def sleep(self, delay_s: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        timer = self.call_later(delay_s, wake)
        try:
            await future
        finally:
            timer.cancel()

    def advance(self, seconds: float) -> None:
        """Let time pass; timers run inside, the tasks they wake run afterwards."""
        end_ns = self._now_ns + int(seconds * 1e9)
        while self._timers and self._timers[0][0] <= end_ns:
            due_ns, _, timer = heapq.heappop(self._timers)
            self._now_ns = due_ns
            if not timer.cancelled:
                timer.callback()
        self._now_ns = end_ns


async def settle(turns: int = 60) -> None:
    """Let everything run that needs no time to pass."""
    for _ in range(turns):
        await asyncio.sleep(0)
