# SPDX-License-Identifier: Apache-2.0
"""Helpers for code on an event loop: its turns, its tasks, its loops.

- `Soon`: a callback that runs once in the next turn of the loop, however often it is asked for.
- `Turns`: work that takes long is done in slices, one slice in each turn of the loop.
- `Pump`: work that its own consequences ask for again; a loop does it, and not a recursion.
- `Tasks`: tasks that run on the side; their exceptions are reported, and their owner can wait for their end.
- `log_failure`: the exception of a task that its owner does not look at soon is logged at once.
- `to_the_end`: a step that must not be left half done, also if its caller is cancelled.

All of them belong to the loop that is running when they are used, and none is safe for threads. They may be made before
a loop runs.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

__all__ = ["Pump", "Soon", "Tasks", "Turns", "log_failure", "to_the_end"]

log = logging.getLogger(__name__)

T = TypeVar("T")


class Soon:
    """Calls `call` in the next turn of the loop, once, however often `ask` was called before.

    For example, a connection sends its replies once a turn, although many requests end in that turn.
    `call` may ask again: it then runs once more in the turn after that. If it raises, the exception goes to
    the loop's exception handler, and the next `ask` works as before.
    """

    __slots__ = ("_call", "_handle")

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._handle: asyncio.Handle | None = None

    @property
    def is_due(self) -> bool:
        """Whether the callback is going to run."""
        return self._handle is not None

    # hot: 40 ns, if it is due already. Keep the bound method where this matters: `self.flush_soon = soon.ask`.
    def ask(self) -> None:
        """Have the callback run in the next turn of the loop."""
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_soon(self._run)

    def cancel(self) -> None:
        """Do not run the callback, if it is due. Idempotent; `ask` works again afterwards."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _run(self) -> None:
        # Cleared first, so that `_call` may ask again, and so that nothing is stuck if it raises.
        self._handle = None
        self._call()


class Turns:
    """Lets several pieces of work go on, one of them in each turn of the loop, in the order of asking.

    Between two of them the loop serves all its other sockets, timers and signals. A server uses it
    for connections that have received more than one slice (`Limits.turn_us`, `Limits.turn_bytes_max`),
    and a device for work that is done inline, some at a time.
    """

    __slots__ = ("_asked",)

    def __init__(self) -> None:
        self._asked: deque[Callable[[], None]] = deque()

    def ask(self, go_on: Callable[[], None]) -> None:
        """Call `go_on` when it is its turn. It must not raise."""
        self._asked.append(go_on)
        if len(self._asked) == 1:
            asyncio.get_running_loop().call_soon(self._next)

    async def wait(self) -> None:
        """Return when it is the caller's turn."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def begin() -> None:
            if not turn.done():  # it is, if the caller was cancelled
                turn.set_result(None)

        self.ask(begin)
        await turn

    def _next(self) -> None:
        # It stays in the queue until it has ended, so that nothing is scheduled twice.
        self._asked[0]()
        self._asked.popleft()
        if self._asked:
            asyncio.get_running_loop().call_soon(self._next)


class Pump:
    """Runs `work`, but never inside itself.

    `work` is a loop that starts things as long as there is something to start. A thing that ends at once asks for
    more work while the loop is still running: this call returns, and the loop finds the work by
    itself. So `work` must look again at what there is to do after each thing that it has started.

    Attributes:
        is_running: `work` is running.
    """

    __slots__ = ("_work", "is_running")

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self.is_running = False

    def run(self) -> None:
        """Run `work`, unless it is running. Raises: what `work` raises; the next `run` works as before."""
        if self.is_running:
            return
        self.is_running = True
        try:
            self._work()
        finally:
            self.is_running = False


class Tasks:
    """Tasks that one owner has running on the side.

    A task is counted until its callback has run, which is a turn of the loop after its coroutine has ended. So code
    that starts a task only if none is running has to look again in `ended`: otherwise what comes in between
    waits for ever.

    Args:
        failed: called with the exception that a task has ended with. Without it the exception goes to
            the loop's exception handler. A cancelled task has not failed.
        ended: called after each task that was not cancelled, when the task is no longer counted. It may start the
            next one. It is not called after a cancelled task, so that a loop that ends sees no new ones.
    """

    __slots__ = ("_ended", "_failed", "_running")

    def __init__(
        self,
        failed: Callable[[BaseException], object] | None = None,
        ended: Callable[[], object] | None = None,
    ) -> None:
        self._failed = failed
        self._ended = ended
        self._running: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator["asyncio.Task[Any]"]:
        """Iterate over the tasks that are running now."""
        return iter(tuple(self._running))

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run `coroutine` in a task."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._running.add(task)
        task.add_done_callback(self._done)
        return task

    async def wait(self) -> None:
        """Return when no task is left, nor one that was started meanwhile."""
        while self._running:
            await asyncio.wait(self._running)

    async def cancel(self) -> None:
        """Cancel all tasks and wait until they have ended, with all those that they start meanwhile."""
        while self._running:
            for task in self._running:
                task.cancel()
            await asyncio.wait(self._running)

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._running.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        try:
            if error is not None:
                self._report(error, task)
        finally:
            if self._ended is not None:
                self._ended()

    def _report(self, error: BaseException, task: "asyncio.Task[Any]") -> None:
        if self._failed is not None:
            self._failed(error)
            return
        asyncio.get_running_loop().call_exception_handler(
            {"message": "a task failed", "exception": error, "task": task}
        )


def log_failure(task: "asyncio.Task[Any]", what: str) -> None:
    """Log it as soon as `task` ends with an exception.

    Without this, the loop logs it when nothing refers to the task any more. That is at the end of the process, if an owner keeps the
    task and does not await it.

    Args: what: the task does, for the log.
    """

    def ended(task: "asyncio.Task[Any]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: failed: %r", what, error, exc_info=error)

    task.add_done_callback(ended)


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end, and return what it returns.

    If the caller is cancelled, `work` is not: the cancellation is raised when `work` has ended, and what
    `work` returns or raises is lost then.
    Raises: what `work` raises.
    """
    task = asyncio.get_running_loop().create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # it is looked at, so the loop does not report it
        raise cancelled
    return task.result()
