# SPDX-License-Identifier: Apache-2.0
"""`LoopThread`: an event loop in a thread of its own, for servers inside of programs that do something else.

Theory of operation. A server must answer while the program that started it waits: for a child process that uses
the disk, for example. So it never runs on the program's own loop. A request of the program becomes a task of the thread's
loop, and the program waits for the task's result, with `await` or without.

The thread is a daemon thread. A program that ends without `close` is not kept from ending; for the disks that is
what a power cut would be.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["LoopThread"]

T = TypeVar("T")


class LoopThread:
    """See the module head. Every method may be called from any other thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_running(self) -> bool:
        return self._loop is not None

    def start(self) -> None:
        """Start the thread and its loop."""
        import uvloop  # here: programs that only ask a running server need no loop of ours

        assert self._thread is None, "it is running"
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(
            target=self._run, args=(self._loop,), name=self._name, daemon=True
        )
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        """Begin `work` on the thread's loop. To cancel the future cancels the work."""
        if self._loop is None:
            work.close()
            raise RuntimeError(f"{self._name} is not running")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the thread's loop, and wait for it on the caller's."""
        return await asyncio.wrap_future(self.submit(work))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the thread's loop, and block until it has ended. If that is interrupted, `work` is cancelled."""
        assert threading.current_thread() is not self._thread
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:  # when the caller is cancelled, so is the work
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what still runs, and end the thread. Idempotent."""
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            loop.close()
