# SPDX-License-Identifier: Apache-2.0
"""`InFlight`: the bios that a mapped device has sent on and that have not ended.

A bio that ends inside `submit` is never counted. One that does not gets a hook, and the hook counts it off. A
suspend waits until none is left (`drain`).
"""

import asyncio

from nbdtarget.bio import Bio
from nbdtarget.common.clock import Clock
from nbdtarget.dm.table import FAILED_DRAIN_S_MAX

__all__ = ["InFlight"]


class InFlight:
    """See the module head.

    Attributes:
        count: how many bios are in flight.
    """

    __slots__ = ("_clock", "_drained", "count")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._drained: asyncio.Future[None] | None = None
        self.count = 0

    def enter(self, bio: Bio) -> None:
        """Count a bio that was submitted, unless it has ended."""
        if bio.status < 0:
            self.count += 1
            bio.on_end(self._ended)

    def begin_reads(self, nr: int) -> None:
        """Count so many reads of the compiled fast path, which have no bios."""
        self.count += nr

    def end_reads(self, nr: int) -> None:
        self.count -= nr
        if not self.count:
            self._look_at_count()

    def holds(self, bio: Bio) -> bool:
        """Whether this bio itself is counted, and not only others that were made for it."""
        return bio.hooks is not None and self._ended in bio.hooks

    def forget(self, bio: Bio) -> None:
        """Count off a bio that has not ended: it goes back into the queue."""
        assert bio.hooks is not None
        bio.hooks.remove(self._ended)
        self._ended(bio)

    async def drain(self, *, is_failed: bool) -> None:
        """Wait until no bio is in flight.

        Args: is_failed: the table has failed, and may have lost bios: wait for a bounded time only.
        """
        if self.count == 0:
            return
        drained = self._drained = asyncio.get_running_loop().create_future()
        if not is_failed:
            try:
                await drained
            finally:
                self._drained = None
            return

        def give_up() -> None:
            if not drained.done():
                drained.set_result(None)

        timer = self._clock.call_later(FAILED_DRAIN_S_MAX, give_up)
        await drained
        timer.cancel()

    def _ended(self, _: Bio) -> None:
        self.count -= 1
        self._look_at_count()

    def _look_at_count(self) -> None:
        if self.count == 0 and self._drained is not None:
            if not self._drained.done():
                self._drained.set_result(None)
            self._drained = None
