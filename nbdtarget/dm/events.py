# SPDX-License-Identifier: Apache-2.0
"""The event counter of a mapped device, which `wait` waits for."""

import asyncio

__all__ = ["EventCounter"]


class EventCounter:
    """Counts events.

    Attributes:
        nr: events so far.
        is_closed: the device was removed, so `wait` returns at once: a loop around it must end.
    """

    def __init__(self) -> None:
        self.nr = 0
        self.is_closed = False
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def nr_waiters(self) -> int:
        return len(self._waiters)

    def count(self) -> None:
        """Count one event and wake those that wait for it."""
        self.nr += 1
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def close(self) -> None:
        """Count the last event: there is nothing to wait for from now on."""
        self.is_closed = True
        self.count()

    async def wait(self, nr: int | None = None) -> int:
        """Wait until the counter is not `nr` (default: what it is now), and return it.

        Returns at once if it is another number already, or if no event will come any more.
        """
        if nr is None:
            nr = self.nr
        while self.nr == nr and not self.is_closed:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
        return self.nr
