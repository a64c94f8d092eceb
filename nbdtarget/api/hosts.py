# SPDX-License-Identifier: Apache-2.0
"""Which server carries out what the Python API asks for: one in this process, or one that is running elsewhere.

`OwnHost` starts a `Daemon` in a `LoopThread`, with a directory of its own for its sockets, so that any number of servers
and of test processes run side by side. Verbs are called without a socket, but the control socket is there, too: the
command line finds the server by it (`--control`).

`RunningHost` asks the control socket of a running server, which goes on when the host is closed. Each request is made
by a thread of its own, because the answer to `wait` may take any time and must not keep the program from ending.

Both raise TableError if a verb fails, with the reason and the errno that a client of the control socket gets.
"""

import asyncio
import errno as errnos
import os
import shutil
import tempfile
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from nbdtarget.api.loop_thread import LoopThread
from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.control.calls import Calls, errno_of
from nbdtarget.control.client import ControlClient
from nbdtarget.control.messages import VERBS, Answer, Request
from nbdtarget.control.paths import ControlAddress
from nbdtarget.daemon.daemon import Daemon
from nbdtarget.daemon.notify import Notifier
from nbdtarget.daemon.stop_bounds import StopBounds
from nbdtarget.server.address import UNIX_PATH_MAX
from nbdtarget.server.limits import Limits

__all__ = ["Host", "OwnHost", "RunningHost"]

THREAD_NAME: Final = "nbdtarget-server"
LONGEST_NAME: Final = "control.sock"
SHORT_DIRECTORY: Final = "/tmp"
NO_ENVIRONMENT: Final[Mapping[str, str]] = {}

A = TypeVar("A", bound=Answer)
T = TypeVar("T")


class Host(Protocol):
    """A server, as the API sees it.

    Attributes:
        control: address of its control socket.
        is_local: its paths are those of this machine.
    """

    control: ControlAddress

    @property
    def is_local(self) -> bool: ...

    async def open(self) -> None:
        """Start it, or see that it is there. Raises: NbdTargetError."""
        ...

    async def close(self) -> None:
        """Stop it, if it was started here. Idempotent. Raises: NbdTargetError: not everything could be committed."""
        ...

    async def ask(self, verb: str, request: Request, answer_type: type[A]) -> A:
        """Carry out a verb. Raises: TableError; NoServerError."""
        ...

    async def look(self, work: Coroutine[Any, Any, T]) -> T:
        """Run work that opens disks of this machine, where it does not disturb the caller's loop."""
        ...


class OwnHost:
    """A server in a thread of this process. See the module head."""

    is_local = True

    def __init__(
        self,
        *,
        listen: Sequence[str] = (),
        limits: Mapping[str, Any] | None = None,
        stop_timeout: float | None = None,
        thread: LoopThread | None = None,
    ) -> None:
        """Args: thread: None: one of its own, which is ended with it."""
        self._listen = tuple(listen)
        self._limits = dict(limits or {})
        self._bounds = StopBounds.of(stop_timeout)
        self._owns_thread = thread is None
        self._thread = LoopThread(THREAD_NAME) if thread is None else thread
        self._directory: Path | None = None
        self._daemon: Daemon | None = None
        self._calls: Calls | None = None
        self.control: ControlAddress = Path()

    async def open(self) -> None:
        if self._daemon is not None:
            raise NbdTargetError("this server has been started already")
        self._directory = _make_directory()
        self.control = self._directory / "control.sock"
        if not self._thread.is_running:
            self._thread.start()
        try:
            await self._thread.wait(self._start())
        except (
            BaseException
        ):  # the start may be cancelled, and then nothing is left open
            await self.close()
            raise

    async def _start(self) -> None:
        assert self._directory is not None
        try:
            limits = replace(Limits(), **self._limits)
        except (TypeError, ValueError) as error:
            raise NbdTargetError(f"limits: {error}") from None
        # The service manager of this process is not told: it did not start an NBD server.
        notifier = Notifier(NO_ENVIRONMENT)
        daemon = self._daemon = Daemon(limits, self._bounds, notifier=notifier)
        # A hand-over would start this program once more.
        daemon.verbs.hand_over = None
        await daemon.open_control(self.control)
        listen = self._listen or (f"unix:{self._directory / 'nbd.sock'}",)
        await daemon.listen(listen)
        self._calls = Calls(daemon.verbs)

    async def close(self) -> None:
        daemon, self._daemon, self._calls = self._daemon, None, None
        try:
            if daemon is not None:
                await self._thread.wait(daemon.close())
        finally:
            if self._owns_thread:
                self._thread.close()
            directory, self._directory = self._directory, None
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)
        if daemon is not None and not daemon.is_committed:
            raise NbdTargetError(
                "not everything could be committed: writes that no FLUSH has covered may be lost;"
                " the log names the devices"
            )

    async def ask(self, verb: str, request: Request, answer_type: type[A]) -> A:
        assert VERBS[verb] == (type(request), answer_type)
        calls = self._calls
        if calls is None:
            raise NbdTargetError(
                "the server is not running: use it inside of its with block"
            )
        try:
            answer = await self._thread.wait(calls.carry_out(verb, request))
        except NbdTargetError as error:
            raise TableError(str(error), errno_of(error)) from error
        assert isinstance(answer, answer_type)
        return answer

    async def look(self, work: Coroutine[Any, Any, T]) -> T:
        return await self._thread.wait(work)


def _make_directory() -> Path:
    """Make a directory for this user alone, with a path that leaves room for a socket's name."""
    sample = Path(tempfile.gettempdir(), "nbdtarget-12345678", LONGEST_NAME)
    fits = len(os.fsencode(sample)) <= UNIX_PATH_MAX
    where = None if fits else SHORT_DIRECTORY
    return Path(tempfile.mkdtemp(prefix="nbdtarget-", dir=where))


class RunningHost:
    """A server that another process has started. See the module head."""

    def __init__(self, control: ControlAddress, token: str | None = None) -> None:
        self.control = control
        self._client = ControlClient(control, token)

    @property
    def is_local(self) -> bool:
        return isinstance(self.control, Path)

    async def open(self) -> None:
        """Do nothing: the server runs already. The first request finds out whether it is there."""

    async def close(self) -> None:
        """Do nothing: the server continues."""

    async def ask(self, verb: str, request: Request, answer_type: type[A]) -> A:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[A] = loop.create_future()

        def tell(answer: A | None, error: BaseException | None) -> None:
            if answered.done():  # the caller was cancelled
                return
            if error is not None:
                answered.set_exception(error)
            else:
                assert answer is not None
                answered.set_result(answer)

        def work() -> None:
            answer: A | None = None
            failure: BaseException | None = None
            try:
                answer = self._client.ask(verb, request, answer_type)
            except BaseException as error:  # it is raised where it is awaited
                failure = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(tell, answer, failure)

        threading.Thread(target=work, name=f"nbdtarget-{verb}", daemon=True).start()
        return await answered

    async def look(self, work: Coroutine[Any, Any, T]) -> T:
        if not self.is_local:
            work.close()
            raise TableError(
                f"{self.control}: its disks may be on another machine, where they cannot be looked at from"
                " here: use `create` with a whole table",
                errnos.EOPNOTSUPP,
            )
        return await work
