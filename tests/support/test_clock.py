# SPDX-License-Identifier: Apache-2.0
"""SimClock runs what is due, in order, and nothing else."""

import asyncio

from tests.support.clock import SimClock


def test_advance_runs_due_timers_in_order() -> None:
    clock = SimClock()
    log: list[tuple[str, int]] = []
    clock.call_later(2, lambda: log.append(("b", clock.now_ns())))
    clock.call_later(1, lambda: log.append(("a", clock.now_ns())))
    clock.call_later(3, lambda: log.append(("c", clock.now_ns())))
    clock.advance(2.5)
    assert log == [("a", 1_000_000_000), ("b", 2_000_000_000)]
    assert clock.now_ns() == 2_500_000_000


def test_cancelled_timer_does_not_run() -> None:
    clock = SimClock()
    log: list[int] = []
    clock.call_later(1, lambda: log.append(1)).cancel()
    clock.advance(2)
    assert log == []


async def test_sleep_wakes_when_its_time_has_come() -> None:
    clock = SimClock()
    task = asyncio.create_task(clock.sleep(1))
    await asyncio.sleep(0)
    clock.advance(0.5)
    await asyncio.sleep(0)
    assert not task.done()
    clock.advance(0.5)
    await task
