# SPDX-License-Identifier: Apache-2.0
import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from nbdtarget.common.turns import Pump, Soon, Tasks, Turns, log_failure
from tests.support.patience import PATIENCE_S


async def turns(nr: int = 1) -> None:
    for _ in range(nr):
        await asyncio.sleep(0)


@contextmanager
def loop_errors() -> Iterator[list[BaseException]]:
    """Collect the exceptions that the loop's exception handler is called with."""
    loop = asyncio.get_running_loop()
    errors: list[BaseException] = []

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        errors.append(context["exception"])

    loop.set_exception_handler(handle)
    try:
        yield errors
    finally:
        loop.set_exception_handler(None)


# ---- Soon ----


async def test_callback_runs_once_a_turn() -> None:
    calls: list[int] = []
    soon = Soon(lambda: calls.append(1))
    soon.ask()
    soon.ask()
    at_once = list(calls)
    await turns(3)
    assert (at_once, calls) == ([], [1])


async def test_callback_that_asks_again_runs_again_in_the_turn_after() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        soon.ask()

    soon = Soon(call)
    soon.ask()
    await turns(1)
    after_one = len(calls)
    await turns(1)
    soon.cancel()
    assert (after_one, len(calls)) == (1, 2)


async def test_cancelled_callback_does_not_run() -> None:
    calls: list[int] = []
    soon = Soon(lambda: calls.append(1))
    soon.ask()
    soon.cancel()
    soon.cancel()
    await turns(2)
    assert calls == []


async def test_cancelled_callback_can_be_asked_for_again() -> None:
    calls: list[int] = []
    soon = Soon(lambda: calls.append(1))
    soon.ask()
    soon.cancel()
    soon.ask()
    await turns(2)
    assert calls == [1]


async def test_callback_is_due_from_asking_until_it_runs() -> None:
    seen: list[bool] = []
    soon = Soon(lambda: seen.append(soon.is_due))
    seen.append(soon.is_due)
    soon.ask()
    seen.append(soon.is_due)
    await turns(1)
    assert seen == [False, True, False]


async def test_callback_that_raises_is_reported_and_can_run_again() -> None:
    error = ValueError("a callback's own")

    def call() -> None:
        raise error

    soon = Soon(call)
    with loop_errors() as errors:
        soon.ask()
        await turns(2)
        soon.ask()
        await turns(2)
    assert errors == [error, error]


# ---- Turns ----


async def test_one_piece_of_work_has_its_turn_at_a_time_in_the_order_of_asking() -> (
    None
):
    order: list[str] = []
    queue = Turns()
    for name in ("a", "b", "c"):
        queue.ask(partial(order.append, name))
    seen = []
    for _ in range(4):
        await turns(1)
        seen.append("".join(order))
    assert seen == ["a", "ab", "abc", "abc"]


async def test_cancelled_waiter_takes_no_turn_from_the_next() -> None:
    queue = Turns()
    first = asyncio.create_task(queue.wait())
    second = asyncio.create_task(queue.wait())
    await turns(1)
    first.cancel()
    await asyncio.wait_for(second, PATIENCE_S)
    assert first.cancelled()


# ---- Pump ----


def test_work_that_is_asked_for_inside_itself_goes_on_in_its_own_loop() -> None:
    depth = 0
    deepest = 0
    left = 1000

    def work() -> None:
        nonlocal depth, deepest, left
        depth += 1
        deepest = max(deepest, depth)
        while left:
            left -= 1
            pump.run()  # the thing just started has ended at once
        depth -= 1

    pump = Pump(work)
    pump.run()
    assert (left, deepest) == (0, 1)


def test_pump_is_running_only_while_its_work_is() -> None:
    seen: list[bool] = []
    pump = Pump(lambda: seen.append(pump.is_running))
    seen.append(pump.is_running)
    pump.run()
    assert [*seen, pump.is_running] == [False, True, False]


def test_work_that_raises_can_be_run_again() -> None:
    nr_calls = 0

    def work() -> None:
        nonlocal nr_calls
        nr_calls += 1
        if nr_calls == 1:
            raise ValueError("once")

    pump = Pump(work)
    with pytest.raises(ValueError, match="once"):
        pump.run()
    pump.run()
    assert nr_calls == 2


# ---- Tasks ----


async def fail(error: BaseException) -> None:
    raise error


async def test_tasks_are_counted_until_they_have_ended() -> None:
    may_end = asyncio.Event()
    tasks = Tasks()
    task = tasks.start(may_end.wait())
    running = (len(tasks), list(tasks))
    may_end.set()
    await tasks.wait()
    assert (running, len(tasks), task.done()) == ((1, [task]), 0, True)


async def test_exception_of_a_task_is_reported_to_its_owner() -> None:
    error = ValueError("a task's own")
    errors: list[BaseException] = []
    tasks = Tasks(failed=errors.append)
    tasks.start(fail(error))
    await tasks.wait()
    assert errors == [error]


async def test_exception_goes_to_the_loop_when_the_owner_takes_none() -> None:
    error = ValueError("a task's own")
    tasks = Tasks()
    with loop_errors() as errors:
        tasks.start(fail(error))
        await tasks.wait()
    assert errors == [error]


async def test_owner_hears_of_each_end_and_may_start_the_next_task() -> None:
    left = 3
    counted: list[int] = []

    def ended() -> None:
        nonlocal left
        counted.append(len(tasks))
        if left:
            left -= 1
            tasks.start(turns(1))

    tasks = Tasks(ended=ended)
    tasks.start(turns(1))
    await tasks.wait()
    assert counted == [0, 0, 0, 0]


async def test_owner_hears_of_the_end_of_a_task_whose_failure_it_cannot_take() -> None:
    ends: list[int] = []

    def failed(error: BaseException) -> None:
        raise error

    tasks = Tasks(failed=failed, ended=lambda: ends.append(1))
    with loop_errors() as errors:
        tasks.start(fail(ValueError("a task's own")))
        await tasks.wait()
    assert (ends, len(errors)) == ([1], 1)


async def test_cancelled_task_is_neither_a_failure_nor_followed_by_another() -> None:
    seen: list[object] = []
    tasks = Tasks(failed=seen.append, ended=lambda: seen.append("ended"))
    tasks.start(asyncio.Event().wait())
    await tasks.cancel()
    assert (seen, len(tasks)) == ([], 0)


async def test_cancel_waits_for_a_task_that_takes_its_time() -> None:
    steps: list[str] = []

    async def tidy_up() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await turns(3)
            steps.append("tidy")

    tasks = Tasks()
    tasks.start(tidy_up())
    await turns(1)
    await tasks.cancel()
    assert steps == ["tidy"]


async def test_cancel_ends_what_a_cancelled_task_starts_last() -> None:
    tasks = Tasks()

    async def start_another() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            tasks.start(asyncio.Event().wait())

    tasks.start(start_another())
    await turns(1)
    await tasks.cancel()
    assert len(tasks) == 0


async def test_cancel_and_wait_of_no_tasks_return_at_once() -> None:
    tasks = Tasks()
    await tasks.wait()
    await tasks.cancel()
    assert len(tasks) == 0


async def test_failure_of_a_task_that_is_kept_is_logged_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        raise RuntimeError("a bug")

    async def end() -> None:
        pass

    tasks = [asyncio.create_task(work) for work in (fail(), end(), asyncio.sleep(180))]
    for task in tasks:
        log_failure(task, "a look")
    tasks[-1].cancel()
    await asyncio.wait(tasks)
    await asyncio.sleep(0)
    (record,) = caplog.records
    assert record.getMessage() == "a look: failed: RuntimeError('a bug')"
    assert record.exc_info
