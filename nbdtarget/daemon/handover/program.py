# SPDX-License-Identifier: Apache-2.0
"""`Program`: the new process of a hand-over, as the old one sees it: how it was started, what it says on stderr, how it has ended.

Until it has taken over, its stderr is a pipe (`nbdtarget.common.passed_stderr`). What it says there is passed on at once to the stderr of
this process, and the end of it is kept, because it says why a program has failed that could not say so itself.
"""

import asyncio
import os
import select
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.passed_stderr import STDERR_VARIABLE
from nbdtarget.common.redaction import redacted
from nbdtarget.common.words import printable
from nbdtarget.daemon.handover.channel import ChannelError, EndedError
from nbdtarget.daemon.notify import WATCHDOG_PID

__all__ = ["VARIABLE", "Program"]

VARIABLE: Final = "NBDTARGET_HANDOVER"  # the new process's end of the channel
LAST_BYTES_MAX: Final = 2000
LAST_LINES_MAX: Final = 4
ENDED_S_MAX: Final = 2.0  # for a process that has closed its end
_READ: Final = 4096  # a pipe that is writable takes as much


class Program:
    """See the module head.

    Attributes:
        process: the new process.
    """

    def __init__(self, process: subprocess.Popen[bytes], said: int) -> None:
        self.process = process
        self._said = said
        self._last = b""
        self._is_cut = False
        os.set_blocking(said, False)
        asyncio.get_running_loop().add_reader(said, self._listen)

    @classmethod
    async def start(cls, argv: Sequence[str], theirs: socket.socket) -> "Program":
        """Start `argv` with the other end of the channel. Raises: NbdTargetError."""
        said, its_stderr = os.pipe()
        stderr = _copy_of_stderr()
        environment = {
            **os.environ,
            VARIABLE: str(theirs.fileno()),
            STDERR_VARIABLE: str(stderr),
        }
        # It names this process. Without it the new process is meant.
        environment.pop(WATCHDOG_PID, None)
        try:
            # Not asyncio's: that kills the process when it is forgotten.
            process = await asyncio.to_thread(
                subprocess.Popen,
                argv,
                env=environment,
                stderr=its_stderr,
                pass_fds=(theirs.fileno(), stderr),
            )
        except BaseException as error:
            # Also when this task is cancelled: the pipe has no other owner yet.
            os.close(said)
            if not isinstance(error, OSError):
                raise
            raise NbdTargetError(f"{argv[0]}: {error.strerror or error}") from None
        finally:
            os.close(its_stderr)
            os.close(stderr)
        return cls(process, said)

    def let_go(self) -> None:
        """The new process goes on alone."""
        if self._said >= 0:
            self._listen()
        if self._said >= 0:
            self._stop_listening()

    async def end(self, error: BaseException) -> BaseException:
        """End the process: the hand-over has failed. Returns the error to tell, which says how it ended if that is why."""
        process = self.process
        status = process.poll()
        if status is None and isinstance(error, EndedError):
            # Else it has closed its end, and goes on.
            with suppress(subprocess.TimeoutExpired):
                status = await asyncio.to_thread(process.wait, ENDED_S_MAX)
        process.kill()
        await asyncio.to_thread(process.wait)
        self.let_go()
        if not isinstance(error, EndedError):
            return error
        how = "closed its end" if status is None else f"ended {_how(status)}"
        words = self._last_words()
        why = f"its last lines: {words}" if words else "it said nothing"
        return ChannelError(f"the new program {how} before it was ready; {why}")

    def _listen(self) -> None:
        """Take all that it has said."""
        while True:
            try:
                data = os.read(self._said, _READ)
            except BlockingIOError:
                return
            if not data:
                self._stop_listening()
                return
            said = self._last + data
            self._last = said[-LAST_BYTES_MAX:]
            self._is_cut = self._is_cut or len(said) > LAST_BYTES_MAX
            _pass_on(data)

    def _stop_listening(self) -> None:
        asyncio.get_running_loop().remove_reader(self._said)
        os.close(self._said)
        self._said = -1

    def _last_words(self) -> str:
        text = self._last.decode("utf-8", "replace")
        if self._is_cut:
            # The first word may be half a URL, whose secrets would not be known.
            text = "".join(text.split(None, 1)[1:])
        text = redacted(text)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        last = lines[-LAST_LINES_MAX:]
        return " / ".join(printable(line, LAST_BYTES_MAX) for line in last)


def _how(status: int) -> str:
    if status >= 0:
        return f"with status {status}"
    try:
        return f"by {signal.Signals(-status).name}"
    except ValueError:
        return f"by signal {-status}"


def _copy_of_stderr() -> int:
    try:
        return os.dup(2)
    except OSError:  # it is closed
        return os.open(os.devnull, os.O_WRONLY)


def _pass_on(data: bytes) -> None:
    """Write to our stderr, unless its reader does not keep up: nothing waits for that."""
    looker = select.poll()
    looker.register(2, select.POLLOUT)
    if any(events & select.POLLOUT for _, events in looker.poll(0)):
        with suppress(OSError):  # its reader has gone
            os.write(2, data)
