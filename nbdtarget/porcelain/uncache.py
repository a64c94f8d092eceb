# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget uncache` at a terminal: the job of `nbdtarget.control.uncache`, in a process of its own.

The server that serves the cache is asked over its control socket. Ctrl-C takes effect while the job waits for dirty blocks; a second one ends the
process at once.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

from nbdtarget.control import messages as m
from nbdtarget.control.uncache import UncacheJob, UncacheReporter

__all__ = ["Ask", "interrupts", "uncache"]

A = TypeVar("A", bound=m.Answer)


class Ask(Protocol):
    """Carries out a verb of the control socket. Blocks; called in a thread.

    Raises: NbdTargetError.
    """

    def __call__(self, verb: str, request: m.Request, answer_type: type[A]) -> A: ...


async def uncache(name: str, ask: Ask, reporter: UncacheReporter) -> int:
    """Uncache a device. Returns 0, or 130 if it was interrupted. Raises: NbdTargetError."""
    job = UncacheJob(name, _InThreads(ask), reporter)
    with interrupts(job.stop):
        return 0 if await job.run() else 130


class _InThreads:
    """Asks in daemon threads, so that a second Ctrl-C ends the process at once."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def __call__(self, verb: str, request: m.Request, answer_type: type[A]) -> A:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[A] = loop.create_future()

        def settle(answer: A | None, error: BaseException | None) -> None:
            if answered.done():
                return
            if error is not None:
                answered.set_exception(error)
            else:
                assert answer is not None
                answered.set_result(answer)

        def work() -> None:
            answer, failure = None, None
            try:
                answer = self._ask(verb, request, answer_type)
            except BaseException as error:
                failure = error
            with suppress(RuntimeError):  # the loop is closed: the answer is not wanted
                loop.call_soon_threadsafe(settle, answer, failure)

        threading.Thread(target=work, name=f"ask {verb}", daemon=True).start()
        return await answered


@contextmanager
def interrupts(stop: Callable[[], object]) -> Iterator[None]:
    """The first SIGINT or SIGTERM calls `stop`; the second has its usual effect."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def noted() -> None:
        stop()
        release()

    def release() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, noted)
    try:
        yield
    finally:
        release()
