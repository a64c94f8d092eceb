# SPDX-License-Identifier: Apache-2.0
"""SimLoop keeps asyncio's promises, takes no real time, and says what it waits for."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.sim.loop import PowerCut, SimLoop, SimLoopClock, Stuck


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    loop = SimLoop(1)
    yield loop
    loop.close()


def test_call_soon_is_a_queue(loop: SimLoop) -> None:
    log: list[int] = []
    for nr in range(5):
        loop.call_soon(log.append, nr)
    loop.run_until_complete(asyncio.sleep(0))
    assert log == [0, 1, 2, 3, 4]


def test_time_jumps_to_the_next_timer(loop: SimLoop) -> None:
    clock = SimLoopClock(loop)
    log: list[tuple[str, int]] = []
    loop.call_later(7200, lambda: log.append(("late", clock.now_ns())))
    loop.call_later(3600, lambda: log.append(("early", clock.now_ns())))
    loop.run_until_complete(asyncio.sleep(10_000))
    assert log == [("early", 3600 * 10**9), ("late", 7200 * 10**9)]
    assert loop.time() == 10_000


def test_cancelled_timer_does_not_move_time(loop: SimLoop) -> None:
    loop.call_later(5, lambda: None).cancel()
    loop.run_until_complete(asyncio.sleep(9))
    assert loop.time() == 9


def test_timeout_is_simulated_too(loop: SimLoop) -> None:
    async def wait() -> None:
        async with asyncio.timeout(60):
            await loop.create_future()

    with pytest.raises(TimeoutError):
        loop.run_until_complete(wait())
    assert loop.time() == 60


def test_power_cut_comes_before_its_step(loop: SimLoop) -> None:
    log: list[int] = []
    loop.cut_at = 3
    for nr in range(5):
        loop.call_soon(log.append, nr)
    with pytest.raises(PowerCut):
        loop.run_forever()
    assert log == [0, 1]
    assert loop.steps == 3


def test_what_was_ready_at_the_cut_still_is(loop: SimLoop) -> None:
    log: list[int] = []
    loop.cut_at = 1
    loop.call_soon(log.append, 0)
    with pytest.raises(PowerCut):
        loop.run_forever()
    loop.cut_at = None
    loop.run_until_complete(asyncio.sleep(0))
    assert log == [0]


def test_deadlock_names_who_waits(loop: SimLoop) -> None:
    async def wait_for_nobody() -> None:
        await loop.create_future()

    task = loop.create_task(wait_for_nobody())
    with pytest.raises(Stuck, match="wait_for_nobody"):
        loop.run_until_complete(task)
    loop.call_soon(task.cancel)
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)


def test_deadline_ends_what_goes_on_for_ever(loop: SimLoop) -> None:
    async def wait_for_nobody() -> None:
        await loop.create_future()

    def tick() -> None:
        loop.call_later(1, tick)

    loop.deadline_s = 100
    tick()
    task = loop.create_task(wait_for_nobody())
    with pytest.raises(Stuck, match="wait_for_nobody"):
        loop.run_until_complete(task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)


def test_livelock_ends(loop: SimLoop) -> None:
    def again() -> None:
        loop.call_soon(again)

    loop.steps_max = 1000
    again()
    with pytest.raises(Stuck, match="no end"):
        loop.run_forever()


def test_threads_are_refused(loop: SimLoop) -> None:
    with pytest.raises(AssertionError, match="threads"):
        loop.run_in_executor(None, print)
