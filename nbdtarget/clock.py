# SPDX-License-Identifier: Apache-2.0
"""Time. Everything in nbdtarget that waits or measures asks a `Clock`, so that a test can
run a whole server on a simulated one and replay it from a seed.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["Clock", "LoopClock", "Timer"]


class Timer(Protocol):
    """What `call_later` returns."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Monotonic time and timers, in seconds and nanoseconds."""

    def now_ns(self) -> int: ...

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer: ...

    async def sleep(self, delay_s: float) -> None: ...


class LoopClock:
    """Real time, on the running event loop."""

    now_ns = staticmethod(time.monotonic_ns)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        return asyncio.get_running_loop().call_later(delay_s, callback)

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
