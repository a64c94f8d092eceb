# SPDX-License-Identifier: Apache-2.0
"""A store in memory for tests of `nbdtarget.devices.ranged`, and simulated time for them."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from nbdtarget.devices.ranged.pin import Pin
from nbdtarget.devices.ranged.store import Store, Take
from tests.sim.loop import SimLoop

__all__ = ["MemoryStore", "in_simulated_time"]

T = TypeVar("T")


def in_simulated_time(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on a loop whose time jumps from timer to timer."""
    loop = SimLoop()
    try:
        return loop.run_until_complete(_and_nothing_more(work))
    finally:
        loop.close()


async def _and_nothing_more(work: Coroutine[Any, Any, T]) -> T:
    """Cancel what `work` has left running."""
    try:
        return await work
    finally:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


class MemoryStore:
    """An image that is read without a network.

    Attributes:
        latency_s: before the first byte; bytes_per_s: of each request; 0: at once.
        trouble: called before each answer with the number of the request; may raise.
        noted: begin, end, is_urgent and time of each request.
        renew_answers: what `renew` returns, one after the other; False when there are no more.
    """

    def __init__(self, image: bytes, etag: str = '"one"') -> None:
        self.image = image
        self.pin = Pin(len(image), etag)
        self.latency_s = 0.0
        self.bytes_per_s = 0.0
        self.trouble: Callable[[int], None] | None = None
        self.renew_answers: list[bool] = []
        self.noted: list[tuple[int, int, bool, float]] = []
        self.nr_open = self.nr_open_max = 0
        self.is_closed = False
        self.others: dict[str, MemoryStore] = {}

    async def open(self, take: Take) -> Pin:
        await self._send(0, min(256 << 10, len(self.image)), take)
        return self.pin

    async def get(
        self, begin: int, end: int, pin: Pin, take: Take, *, is_urgent: bool
    ) -> None:
        now_s = asyncio.get_running_loop().time()
        self.noted.append((begin, end, is_urgent, now_s))
        nr = len(self.noted)
        self.nr_open += 1
        self.nr_open_max = max(self.nr_open, self.nr_open_max)
        try:
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            if self.trouble is not None:
                self.trouble(nr)
            await self._send(begin, end, take)
        finally:
            self.nr_open -= 1

    async def _send(self, begin: int, end: int, take: Take) -> None:
        step = 64 << 10
        for at in range(begin, end, step):
            data = self.image[at : min(at + step, end)]
            if self.bytes_per_s:
                await asyncio.sleep(len(data) / self.bytes_per_s)
            take(data)

    async def renew(self) -> bool:
        return self.renew_answers.pop(0) if self.renew_answers else False

    def elsewhere(self, name: str) -> "tuple[Store, str]":
        return self.others[name], name

    async def close(self) -> None:
        self.is_closed = True
