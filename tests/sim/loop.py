# SPDX-License-Identifier: Apache-2.0
"""`SimLoop`: an asyncio event loop in which nothing is left to chance.

Theory of operation. There is no selector, no descriptor, no thread and no real clock. One turn:

    1  each watched socket that is readable or writable adds its callback; when there are
       several, in an order drawn from the seed, as a kernel gives no promise about it. A socket
       that has an error adds its callbacks once, and then none before it is watched anew, as on uvloop
    2  if nothing is ready, time jumps to the next timer
    3  timers that have come due add their callbacks
    4  what is ready is run, in the order in which it became so (`call_soon` is a queue, and
       stays one)

Each callback that is run is a *step*, and each step is a place to cut the power: `cut_at`
names the step before which `PowerCut` is raised out of `run_until_complete`.

Nothing ready and no timer: `Stuck`, as when time passes `deadline_s` or the steps pass
STEPS_MAX. It names every task and what it waits for.
"""

import asyncio
import contextlib
import heapq
import random
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from nbdtarget.common.clock import LoopClock

__all__ = ["PowerCut", "SimLoop", "SimLoopClock", "Stuck", "Watchable"]

STEPS_MAX: Final = 1_000_000
WAITING_SHOWN_MAX: Final = 20


class PowerCut(BaseException):
    """The machine is off. This is no Exception, so that no code on the machine catches it."""


class Stuck(AssertionError):
    """A task waits for an event that will never come."""


class Watchable(Protocol):
    """What `add_reader` and `add_writer` can watch."""

    def fileno(self) -> int: ...

    @property
    def is_readable(self) -> bool: ...

    @property
    def is_writable(self) -> bool: ...

    @property
    def has_error(self) -> bool: ...


class SimLoop(asyncio.BaseEventLoop):
    """See the module head.

    Attributes:
        steps: callbacks run so far.
        cut_at: the step that is not taken any more, or None.
        deadline_s: when to call it stuck.
        sockets: by descriptor; `SimNetwork` adds each socket that it makes.
        backends: the servers that can be connected to, by host name.
    """

    # BaseEventLoop has these attributes, and the type stubs lack them.
    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]
    _stopping: bool

    def __init__(self, seed: int = 0, *, now_s: float = 0.0) -> None:
        super().__init__()
        self.set_debug(False)  # it would measure callbacks, in real time
        self.steps = 0
        self.steps_max = STEPS_MAX
        self.cut_at: int | None = None
        self.deadline_s = float("inf")
        self.sockets: dict[int, Watchable] = {}
        self.backends: dict[str, Any] = {}
        self._now_s = now_s
        self._random = random.Random(seed)
        self._readers: dict[int, asyncio.Handle] = {}
        self._writers: dict[int, asyncio.Handle] = {}
        self._silent: set[int] = set()  # the error has been told
        self._signals: dict[int, Callable[[], Any]] = {}

    # ---- time ----

    def time(self) -> float:
        return self._now_s

    def now_ns(self) -> int:
        return round(self._now_s * 1e9)

    # ---- sockets ----

    def add_reader(  # type: ignore[override]
        self, fd: Any, callback: Callable[..., Any], *args: Any
    ) -> None:
        self._watch(self._readers, fd, asyncio.Handle(callback, args, self))

    def add_writer(  # type: ignore[override]
        self, fd: Any, callback: Callable[..., Any], *args: Any
    ) -> None:
        self._watch(self._writers, fd, asyncio.Handle(callback, args, self))

    def remove_reader(self, fd: Any) -> bool:
        self._silent.discard(_number(fd))
        return _unwatch(self._readers, fd)

    def remove_writer(self, fd: Any) -> bool:
        self._silent.discard(_number(fd))
        return _unwatch(self._writers, fd)

    async def sock_recv(self, sock: Any, nbytes: int) -> bytes:
        """As asyncio's."""
        while True:
            try:
                data: bytes = sock.recv(nbytes)
                return data
            except BlockingIOError:
                await self._until(self.add_reader, self.remove_reader, sock)

    async def sock_sendall(self, sock: Any, data: Any) -> None:
        """As asyncio's."""
        left = memoryview(data)
        while left:
            try:
                left = left[sock.send(left) :]
            except BlockingIOError:
                await self._until(self.add_writer, self.remove_writer, sock)

    async def _until(
        self, add: Callable[..., None], remove: Callable[[Any], bool], sock: Any
    ) -> None:
        """Wait until a socket is ready."""
        ready: asyncio.Future[None] = self.create_future()
        fd = sock.fileno()

        def is_ready() -> None:
            if not ready.done():
                ready.set_result(None)

        add(fd, is_ready)
        try:
            await ready
        finally:
            remove(fd)

    def _watch(
        self, watched: dict[int, asyncio.Handle], fd: Any, handle: asyncio.Handle
    ) -> None:
        number = _number(fd)
        assert number in self.sockets, f"descriptor {number} is not of this loop"
        _unwatch(watched, number)
        watched[number] = handle
        self._silent.discard(number)

    def closed(self, fd: int) -> None:
        """A socket is closed: its number is free again, and no reader or writer may watch it any more."""
        assert fd not in self._readers, f"descriptor {fd} closed while it is read"
        assert fd not in self._writers, f"descriptor {fd} closed while it is written"
        del self.sockets[fd]

    def watch_nothing(self) -> None:
        """Forget all readers and writers."""
        self._readers.clear()
        self._writers.clear()
        self._silent.clear()

    # ---- signals: of the one process that catches them ----

    def add_signal_handler(  # type: ignore[override]
        self, sig: int, callback: Callable[[], Any]
    ) -> None:
        self._signals[sig] = callback

    def remove_signal_handler(self, sig: int) -> bool:
        return self._signals.pop(sig, None) is not None

    def press(self, sig: int) -> bool:
        """Deliver a signal. Returns False if no handler catches it, so that the process ends."""
        handler = self._signals.get(sig)
        if handler is None:
            return False
        self.call_soon(handler)
        return True

    # ---- what a simulation must not do ----

    def run_in_executor(self, *_: Any) -> Any:  # type: ignore[override]
        raise AssertionError("no threads here")

    def call_soon_threadsafe(  # type: ignore[override]
        self, *_: Any, **__: Any
    ) -> asyncio.Handle:
        raise AssertionError("no threads here")

    async def getaddrinfo(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("no network here")

    # ---- turning ----

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: a cancelled timer stays in the heap until it is due."""

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled
        self._poll()
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)
        if not ready and not self._stopping:
            if not scheduled:
                raise Stuck(f"nothing will ever happen again: {self.waiting()}")
            self._now_s = max(self._now_s, scheduled[0].when())
            if self._now_s > self.deadline_s:
                raise Stuck(f"still waiting at {self._now_s:.1f} s: {self.waiting()}")
        while scheduled and scheduled[0].when() <= self._now_s:
            ready.append(heapq.heappop(scheduled))
        if self.steps > self.steps_max:
            raise Stuck(f"{self.steps} steps and no end: {self.waiting()}")
        for _ in range(len(ready)):
            step = ready.popleft()
            if step._cancelled:
                continue
            self.steps += 1
            if self.steps == self.cut_at:
                ready.appendleft(step)
                raise PowerCut
            step._run()

    def _poll(self) -> None:
        sockets, silent = self.sockets, self._silent
        readers, writers = self._readers, self._writers
        if not readers and not writers:
            return
        found = [
            h
            for fd, h in readers.items()
            if sockets[fd].is_readable and fd not in silent
        ]
        found += [
            h
            for fd, h in writers.items()
            if sockets[fd].is_writable and fd not in silent
        ]
        silent.update(fd for fd in (*readers, *writers) if sockets[fd].has_error)
        if len(found) > 1:
            self._random.shuffle(found)
        self._ready.extend(found)

    def waiting(self) -> str:
        """Every task and the line where it waits."""
        lines = sorted(_place(task) for task in asyncio.all_tasks(self))
        shown = lines[:WAITING_SHOWN_MAX]
        return "; ".join(shown) + (" …" if len(lines) > len(shown) else "")

    def close_what_waits(self) -> None:
        """Close the coroutine of every task: none of them is to run any more."""
        with warnings.catch_warnings():
            # A coroutine that a handler makes while its own one is closed is never awaited.
            warnings.simplefilter("ignore", RuntimeWarning)
            for task in asyncio.all_tasks(self):
                with contextlib.suppress(Exception):
                    task.get_coro().close()


class SimLoopClock(LoopClock):
    """A `Clock` over a `SimLoop`: the loop's own timers, and its time."""

    def __init__(self, loop: SimLoop) -> None:
        self.now_ns = loop.now_ns


def _number(fd: Any) -> int:
    return fd if isinstance(fd, int) else int(fd.fileno())


def _unwatch(watched: dict[int, asyncio.Handle], fd: Any) -> bool:
    handle = watched.pop(_number(fd), None)
    if handle is None:
        return False
    handle.cancel()
    return True


def _place(task: "asyncio.Task[Any]") -> str:
    """The innermost coroutine that `task` is in, and its line."""
    coroutine: Any = task.get_coro()
    name = coroutine.__qualname__
    while getattr(coroutine.cr_await, "cr_frame", None) is not None:
        coroutine = coroutine.cr_await
    frame = coroutine.cr_frame
    if frame is None:
        return f"{name} (ended)"
    return f"{name} in {coroutine.__qualname__}:{frame.f_lineno}"
