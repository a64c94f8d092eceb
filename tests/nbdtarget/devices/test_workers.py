# SPDX-License-Identifier: Apache-2.0
"""WorkerPool: jobs off the loop, completions on it, nothing left behind."""

import asyncio
import errno
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from nbdtarget.devices.workers import WorkerPool
from tests.support.patience import PATIENCE_S


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    pool = WorkerPool("test", threads_max=2, handed_max=4)
    yield pool
    await pool.close()


async def test_done_runs_on_the_loop_thread(pool: WorkerPool) -> None:
    threads: list[threading.Thread] = []

    def job() -> int:
        threads.append(threading.current_thread())
        return 7

    assert await pool.run(job) == 7
    assert threads[0] is not threading.current_thread()


async def test_no_thread_before_the_first_job() -> None:
    before = threading.active_count()
    pool = WorkerPool("idle")
    assert threading.active_count() == before
    await pool.close()


async def test_close_leaves_no_thread() -> None:
    before = threading.active_count()
    pool = WorkerPool("busy")
    await asyncio.gather(*(pool.run(lambda: 0) for _ in range(20)))
    assert threading.active_count() <= before + 4
    await pool.close()
    await pool.close()
    assert threading.active_count() == before


async def test_a_close_that_is_cancelled_waits_for_the_threads_all_the_same() -> None:
    pool = WorkerPool("pool")
    begun, may_end = threading.Event(), threading.Event()

    def job() -> int:
        begun.set()
        may_end.wait(PATIENCE_S)
        return 0

    pool.submit(job, lambda _: None)
    await asyncio.to_thread(begun.wait)
    closing = asyncio.create_task(pool.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.sleep(0.01)
    assert not closing.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert not any(thread.name.startswith("pool-") for thread in threading.enumerate())


async def test_os_error_is_its_errno(pool: WorkerPool) -> None:
    def job() -> int:
        raise OSError(errno.ENOSPC, "full")

    assert await pool.run(job) == errno.ENOSPC


async def test_our_bug_ends_the_job_and_is_reported(pool: WorkerPool) -> None:
    reports: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reports.append(context["exception"]))

    def job() -> int:
        raise AssertionError("ours")

    assert await pool.run(job) == errno.EIO
    assert [str(report) for report in reports] == ["ours"]


async def test_jobs_beyond_the_bound_wait_and_run(pool: WorkerPool) -> None:
    gate = threading.Event()
    futures = [
        asyncio.ensure_future(pool.run(lambda: not gate.wait())) for _ in range(9)
    ]
    await asyncio.sleep(0)
    assert pool.nr_jobs == 9
    gate.set()
    assert await asyncio.gather(*futures) == [0] * 9
    assert pool.nr_jobs == 0


async def test_blocked_pool_holds_up_no_other(pool: WorkerPool) -> None:
    gate = threading.Event()
    blocked = [
        asyncio.ensure_future(pool.run(lambda: not gate.wait())) for _ in range(4)
    ]
    await asyncio.sleep(0)
    other = WorkerPool("other")
    assert await other.run(lambda: 5) == 5
    gate.set()
    await asyncio.gather(*blocked)
    await other.close()


async def test_many_completions_share_a_wakeup(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    wakeups = 0
    wake = loop.call_soon_threadsafe

    def counted(callback: Callable[..., object], *args: object) -> asyncio.Handle:
        nonlocal wakeups
        wakeups += 1
        return wake(callback, *args)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    completed: list[int] = []
    ran = threading.Semaphore(0)

    def job() -> int:
        ran.release()
        return 0

    for _ in range(4):
        pool.submit(job, completed.append)
    for _ in range(4):
        ran.acquire()  # the loop sleeps here: no completion can be delivered
    last = await pool.run(lambda: 0)
    assert last == 0
    assert completed == [0] * 4
    assert wakeups <= 3


async def test_done_that_raises_delays_nobody(pool: WorkerPool) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)

    def bad(_: int) -> None:
        raise ZeroDivisionError

    pool.submit(lambda: 0, bad)
    results = await asyncio.gather(*(pool.run(lambda: 3) for _ in range(4)))
    assert results == [3] * 4
