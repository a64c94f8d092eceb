# SPDX-License-Identifier: Apache-2.0
"""Threads for I/O that blocks, one small pool a device.

Theory of operation. Each file device has a pool of its own, so that a disk that takes minutes
over a request holds up its own few threads and no others. A thread is started when a job
finds none idle, until there are `threads_max`.

    submit(fn, done)     loop thread; `fn()` runs in a worker and answers 0 or an errno
    fn                   worker thread; an OSError that it raises is its errno
    done(errno)          loop thread, once

Jobs reach the threads through one queue of at most `handed_max`. Further jobs wait in a
deque of the loop and are handed on as jobs complete. That deque has no bound of its own, because a device
cannot refuse a bio; the submitters bound it (the server bounds the bytes in flight, for example).

Completions come back through a deque. Waking the loop is a system call, so a worker does it
only if no wake-up is on its way: under load many completions share one.

An exception that is not an OSError is our own bug. The job ends with EIO, so that no bio is
lost, and the exception goes to the loop's exception handler.
"""

import asyncio
import errno as errnos
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final, TypeVar

__all__ = ["HANDED_MAX", "THREADS_MAX", "WorkerPool"]

THREADS_MAX: Final = 4
HANDED_MAX: Final = 64  # jobs that the threads hold; the rest waits on the loop's side

T = TypeVar("T")

_Job = tuple[Callable[[], int], Callable[[int], None]]


class WorkerPool:
    """A bounded pool of threads that is started when first used.

    Context: everything but the jobs themselves runs on the loop's thread.
    """

    def __init__(
        self, name: str, *, threads_max: int = THREADS_MAX, handed_max: int = HANDED_MAX
    ) -> None:
        assert threads_max > 0
        assert handed_max >= threads_max
        self.name = name
        self._threads_max = threads_max
        self._handed_max = handed_max
        self._threads: list[threading.Thread] = []
        self._handed: SimpleQueue[_Job | None] = SimpleQueue()
        self._nr_handed = 0
        self._waiting: deque[_Job] = deque()
        self._completed: deque[tuple[Callable[[int], None], int]] = deque()
        self._wakeup_is_due = False
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def nr_jobs(self) -> int:
        """Jobs submitted whose `done` has not been called yet."""
        return self._nr_handed + len(self._waiting)

    def submit(self, fn: Callable[[], int], done: Callable[[int], None]) -> None:
        """Run `fn` in a worker, then `done` with its answer on the loop."""
        assert not self._is_closed, "a job for a closed pool"
        if self._nr_handed >= self._handed_max:
            self._waiting.append((fn, done))
            return
        self._hand((fn, done))

    async def run(self, fn: Callable[[], int]) -> int:
        """Run `fn` in a worker; its answer. For set-up, not for bios."""
        return await self.start(fn)

    def start(self, fn: Callable[[], int]) -> "asyncio.Future[int]":
        """As `run`: the future of the answer."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def done(status: int) -> None:
            if not future.cancelled():
                future.set_result(status)

        self.submit(fn, done)
        return future

    async def ask(self, fn: Callable[[], T], otherwise: T) -> T:
        """Run `fn` in a worker; what it returns, or `otherwise` if it raises OSError."""
        answers: list[T] = []

        def run() -> int:
            answers.append(fn())
            return 0

        await self.run(run)
        return answers[0] if answers else otherwise

    async def number(self, fn: Callable[[], int]) -> int:
        """As `run`, for an answer that is no errno. Raises: OSError: `fn` did."""
        answers: list[int] = []

        def answer() -> int:
            answers.append(fn())
            return 0

        if status := await self.run(answer):
            raise OSError(status, os.strerror(status))
        return answers[0]

    async def close(self) -> None:
        """End the threads. The caller has waited for all jobs; idempotent.

        Also when it is cancelled it returns only when they have ended: a thread that ends later
        would tell a loop that is closed.
        """
        if self._is_closed:
            return
        assert not self._waiting
        self._is_closed = True
        if not self._threads:
            return
        # A thread that is past its last job ends at once, so join does not block the loop;
        # one that still runs a forgotten job is waited for without blocking.
        left = len(self._threads)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def thread_ended(_: int) -> None:
            nonlocal left
            left -= 1
            if left == 0 and not ended.cancelled():
                ended.set_result(None)

        self._thread_ended = thread_ended
        for _ in self._threads:
            self._handed.put(None)
        cancelled: asyncio.CancelledError | None = None
        while not ended.done():
            try:
                await asyncio.shield(ended)
            except asyncio.CancelledError as error:
                cancelled = error
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        if cancelled is not None:
            raise cancelled

    def _hand(self, job: _Job) -> None:
        self._nr_handed += 1
        if len(self._threads) < min(self._nr_handed, self._threads_max):
            self._start_thread()
        self._handed.put(job)

    def _start_thread(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        # A daemon: a disk that never answers must not keep the process from ending.
        thread = threading.Thread(
            target=self._work, name=f"{self.name}-{len(self._threads)}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while True:
            job = self._handed.get()
            if job is None:
                self._complete(self._thread_ended, 0)
                return
            fn, done = job
            try:
                status = fn()
            except OSError as error:
                status = error.errno or errnos.EIO
            except Exception as error:  # our bug: see the module head
                status = errnos.EIO
                self._report(error)
            self._complete(done, status)
            # Not kept until the next job comes: it may hold a payload, or the device.
            del job, fn, done

    def _report(self, error: Exception) -> None:
        assert self._loop is not None
        context = {"message": f"{self.name}: a job raised", "exception": error}
        self._loop.call_soon_threadsafe(self._loop.call_exception_handler, context)

    def _complete(self, done: Callable[[int], None], status: int) -> None:
        # In a worker thread, so this is no `Soon`. The order matters: first the entry, then the flag. `_drain`
        # clears the flag before it looks, so either it finds the entry or we find the flag cleared.
        self._completed.append((done, status))
        if not self._wakeup_is_due:
            self._wakeup_is_due = True
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._wakeup_is_due = False
        completed = self._completed
        try:
            for _ in range(len(completed)):
                done, status = completed.popleft()
                if not self._is_closed:
                    self._nr_handed -= 1
                    if self._waiting:
                        self._hand(self._waiting.popleft())
                done(status)
        finally:
            # Something is left only if a `done` raised: the others must not wait for the next job.
            if completed and not self._wakeup_is_due:
                self._wakeup_is_due = True
                assert self._loop is not None
                self._loop.call_soon(self._drain)
