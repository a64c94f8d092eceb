# SPDX-License-Identifier: Apache-2.0
"""A loop in a thread: work of other threads runs there, and nothing of it is left behind."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from nbdtarget.api.loop_thread import LoopThread


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    thread = LoopThread("under-test")
    thread.start()
    yield thread
    thread.close()


async def name_of_thread() -> str:
    await asyncio.sleep(0)
    return threading.current_thread().name


def test_work_runs_in_the_thread_and_the_caller_blocks(thread: LoopThread) -> None:
    assert thread.run(name_of_thread()) == "under-test"


async def test_work_runs_in_the_thread_and_the_caller_awaits(
    thread: LoopThread,
) -> None:
    assert await thread.wait(name_of_thread()) == "under-test"
    assert threading.current_thread().name != "under-test"


def test_exception_of_the_work_is_raised_to_the_caller(thread: LoopThread) -> None:
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        thread.run(fail())


async def test_cancelled_caller_cancels_its_work(thread: LoopThread) -> None:
    has_begun, is_cancelled = threading.Event(), threading.Event()

    async def work() -> None:
        has_begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            is_cancelled.set()
            raise

    task = asyncio.create_task(thread.wait(work()))
    await asyncio.to_thread(has_begun.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(is_cancelled.wait, 30)


def test_close_cancels_what_still_runs(thread: LoopThread) -> None:
    async def work() -> None:
        await asyncio.Event().wait()

    future = thread.submit(work())
    thread.run(name_of_thread())
    thread.close()
    assert future.cancelled()
    assert not thread.is_running
    thread.close()


def test_work_for_a_thread_that_has_ended_is_refused(thread: LoopThread) -> None:
    thread.close()
    with pytest.raises(RuntimeError, match="under-test is not running"):
        thread.run(name_of_thread())
