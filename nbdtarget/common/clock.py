# SPDX-License-Identifier: Apache-2.0
"""Time. Everything in nbdtarget that waits or measures asks a `Clock`, so that a test can
run a whole server on a simulated one and replay it from a seed.

Code without a `Clock` takes its time from the functions here, and from nowhere else:

    sleep, timeout, wait_within, loop_time_s
                       on the loop's time, which a simulated loop simulates
    monotonic_ns       how long a system call took, when to print the next line
    perf_counter_ns    how long a connection has polled its socket
    blocking_sleep     for commands, which have no loop
    wall_clock_s       Unix time, for what people read; nothing is decided by it
"""

import asyncio
from asyncio import sleep, timeout
from collections.abc import Callable, Iterable
from time import monotonic_ns, perf_counter_ns
from time import sleep as blocking_sleep
from time import time as wall_clock_s
from typing import Any, Protocol

__all__ = [
    "Clock",
    "LoopClock",
    "Timer",
    "blocking_sleep",
    "loop_time_s",
    "monotonic_ns",
    "perf_counter_ns",
    "sleep",
    "timeout",
    "wait_within",
    "wall_clock_s",
]


def loop_time_s() -> float:
    """Return the time of the running loop: monotonic, and simulated if the loop is."""
    return asyncio.get_running_loop().time()


async def wait_within(
    tasks: Iterable["asyncio.Task[Any]"], within_s: float | None
) -> set["asyncio.Task[Any]"]:
    """Wait until all `tasks` have ended, or for so many seconds (None: for ever); return those that have.

    Nothing is cancelled, and what they raise stays in them.
    """
    done, _ = await asyncio.wait(tasks, timeout=within_s)
    return done


class Timer(Protocol):
    """The handle that `call_later` returns."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Monotonic time and timers, in seconds and nanoseconds."""

    def now_ns(self) -> int: ...

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer: ...

    async def sleep(self, delay_s: float) -> None: ...


class LoopClock:
    """Real time, on the running event loop."""

    now_ns = staticmethod(monotonic_ns)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        return asyncio.get_running_loop().call_later(delay_s, callback)

    async def sleep(self, delay_s: float) -> None:
        await sleep(delay_s)
