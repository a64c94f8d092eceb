# SPDX-License-Identifier: Apache-2.0
"""`Helper`: a program that serves one disk over NBD, as a child of this process, on a socket that is ours.

Theory of operation. We listen on a unix socket, and the program gets it as systemd would pass it (`launch.py`), so no port, no
name and no race is in play. The socket has no name either: it is bound in a directory that only we may enter, and both are removed at
once. We connect to it through a descriptor (`/proc/self/fd/N`), as nothing else can. So nothing is left over, however this process ends.

    start    the socket stays, a process is started
    ends     its last words are kept, the log has all of them, and `start` may be called again
    close    our connections are closed already; SIGTERM, and SIGKILL after END_S_MAX

A connection that is made while no process runs waits in the socket's queue for the next one.

The standard error of the program goes to our log, under the disk's name. Its standard output is no part of the protocol
and goes nowhere.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from nbdtarget.common.clock import LoopClock, wait_within
from nbdtarget.common.errors import ResolveError
from nbdtarget.common.say_rarely import SayRarely
from nbdtarget.common.turns import Tasks
from nbdtarget.common.words import printable
from nbdtarget.devices.helper.programs import missing

__all__ = [
    "END_S_MAX",
    "LINE_MAX",
    "Helper",
    "PrivateSocket",
    "kill_all",
    "launch",
]

END_S_MAX: Final = 5.0
LINE_MAX: Final = 500  # characters of a line of its standard error
LINES_MAX: Final = 50  # of them; then only some are logged
SAY_S_MIN: Final = 10.0
BACKLOG: Final = 64
_LAUNCH: Final = str(Path(__file__).with_name("launch.py"))

log = logging.getLogger(__name__)


async def launch(
    argv: Sequence[str],
    *,
    sock: socket.socket | None = None,
    stdout: int = DEVNULL,
    cpu_s: int = 0,
    memory: int = 0,
    fds: Sequence[int] = (),
) -> Process:
    """Start a program without a shell; it ends with this process. See `launch.py`.

    Args: fds: descriptors that it gets as well, under the same numbers; none of them is 3, which `sock` becomes.
    Raises: OSError.
    """
    fd = -1 if sock is None else sock.fileno()
    assert 3 not in fds
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", _LAUNCH),
        *map(str, (os.getpid(), fd, cpu_s, memory)),
        *argv,
        stdin=DEVNULL,
        stdout=stdout,
        stderr=PIPE,
        pass_fds=fds if sock is None else (fd, *fds),
        # Ctrl-C in a terminal is for us; and what it starts can be ended with it.
        start_new_session=True,
    )


def kill_all(process: Process) -> None:
    """Kill what `launch` has started, and what that has started."""
    with contextlib.suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(process.pid, signal.SIGKILL)


async def _until_ended(process: Process) -> None:
    """Return when the process itself has ended; what it has started may still have its pipes open."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


class PrivateSocket:
    """A listening unix socket without a name, that only this process and its children can reach.

    Attributes:
        path: to connect to it, in this process.
    """

    def __init__(self) -> None:
        """Raises: OSError."""
        self.listener = socket.socket(socket.AF_UNIX)
        try:
            directory = tempfile.mkdtemp(prefix="nbdtarget-")
            entry = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                # Through the descriptor, because a path of a socket is short.
                self.listener.bind(f"/proc/self/fd/{entry}/s")
                self.listener.listen(BACKLOG)
                flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
                self._fd = os.open("s", flags, dir_fd=entry)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink("s", dir_fd=entry)
                os.close(entry)
                os.rmdir(directory)
        except OSError:
            self.listener.close()
            raise
        self.path = f"/proc/self/fd/{self._fd}"

    def close(self) -> None:
        self.listener.close()
        os.close(self._fd)


class Helper:
    """See the module head.

    Args:
        name: the disk's, for the log.
        argv: the program and its arguments.
        fds: descriptors that it gets, see `launch`.
    """

    def __init__(self, name: str, argv: Sequence[str], fds: Sequence[int] = ()) -> None:
        self._name = name
        self._argv = tuple(argv)
        self._fds = tuple(fds)
        self._socket = PrivateSocket()
        self._process: Process | None = None
        self._tasks = Tasks()
        self._watch: asyncio.Task[None] | None = None
        self._rarely = SayRarely(LoopClock(), SAY_S_MIN)
        self._nr_lines = 0
        self._turn = asyncio.Lock()
        self._is_closing = False
        self.last_words = ""

    @property
    def socket_path(self) -> str:
        return self._socket.path

    @property
    def program(self) -> str:
        return os.path.basename(self._argv[0])

    @property
    def pid(self) -> int | None:
        """The process id, while a process runs."""
        return self._process.pid if self.runs and self._process is not None else None

    @property
    def runs(self) -> bool:
        return self._watch is not None and not self._watch.done()

    async def start(self) -> None:
        """Start the program, unless it runs. Raises: ResolveError: it cannot be started."""
        # Two may ask at the same time, and `end` may, while a process is being made: there is never a second one.
        async with self._turn:
            await self._start()

    async def _start(self) -> None:
        if self.runs:
            return
        if self._is_closing:
            raise ResolveError(self._name, "is closed")
        reason = missing(self._argv[0])
        if reason:
            raise ResolveError(self._name, reason)
        self.last_words = ""
        self._nr_lines = 0
        try:
            self._process = await launch(
                self._argv, sock=self._socket.listener, fds=self._fds
            )
        except OSError as error:
            raise ResolveError(
                self._name, f"{self.program} cannot be started: {error.strerror}"
            ) from None
        log.info("%s: %s runs as %d", self._name, self.program, self._process.pid)
        self._watch = self._tasks.start(self._wait(self._process))

    async def ended(self) -> None:
        """Return when the process that runs now has ended."""
        if self._watch is not None:
            await asyncio.wait([self._watch])

    def why_it_ended(self) -> str:
        """Say in a sentence why there is no process."""
        code = None if self._process is None else self._process.returncode
        how = (
            "did not start"
            if code is None
            else f"ended with status {code}"
            if code >= 0
            else f"was ended by {_signal(-code)}"
        )
        return f"{self.program} {how}" + (
            f": {self.last_words}" if self.last_words else ""
        )

    async def end(self) -> None:
        """End the process, if one runs. `start` starts another one."""
        async with self._turn:
            await self._end()

    async def _end(self) -> None:
        process, watch = self._process, self._watch
        if process is None or watch is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            if watch.done():
                return
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            await wait_within([watch], END_S_MAX)

    async def close(self) -> None:
        """End the process, and the socket with it. The caller has closed its connections."""
        self._is_closing = True
        await self.end()
        self._socket.close()

    async def _wait(self, process: Process) -> None:
        assert process.stderr is not None
        listening = self._tasks.start(self._listen(process.stderr))
        await _until_ended(process)
        kill_all(process)
        await process.wait()
        await asyncio.wait([listening])
        if not self._is_closing:
            log.warning("%s: %s", self._name, self.why_it_ended())

    async def _listen(self, stderr: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await _line(stderr):
                self._note(line)

    def _note(self, line: bytes) -> None:
        text = printable(line.decode("utf-8", "replace").strip(), LINE_MAX)
        if not text:
            return
        self.last_words = text.removeprefix(f"{self.program}: ")
        self._nr_lines += 1
        if self._nr_lines <= LINES_MAX:
            log.warning("%s: %s: %s", self._name, self.program, self.last_words)
        elif nr := self._rarely.count():
            log.warning(
                "%s: %s: %s (and %d lines more)",
                self._name,
                self.program,
                self.last_words,
                nr - 1,
            )


async def _line(stream: asyncio.StreamReader) -> bytes:
    """The next line; of one that is very long, a piece."""
    try:
        return await stream.readline()
    except ValueError:  # longer than the buffer, which is empty now
        return b"(a very long line)\n"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
