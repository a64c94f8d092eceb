# SPDX-License-Identifier: Apache-2.0
"""`ClientCommand`: a shell command that runs while the server serves, and whose end is the server's end (`--run`).

The command finds in its environment how to attach:

    $uri           NBD URI of the export, on the first address that is listened on
    $unixsocket    path of the unix socket; else empty
    $port          port of TCP or vsock; empty on a unix socket
    $exportname    name of the export

It has our standard input, output and error, and stays in our process group, so that Ctrl-C in a terminal reaches both. When
the server has to stop first, the command gets SIGTERM, and SIGKILL if it still runs after END_S_MAX. Only then are
the connections closed: a client that ends in time sees no error.

The names of the variables are nbdkit's, so that a command can be used with either program.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from typing import Final

from nbdtarget.common.clock import wait_within
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.turns import Tasks
from nbdtarget.devices.nbd.uri import parse_nbd_uri

__all__ = ["ClientCommand", "attach_variables"]

SHELL: Final = "/bin/sh"
END_S_MAX: Final = 5.0
KILLED: Final = 128  # what a shell adds to the number of a signal
# They are about this process, and not about its children.
_OUR_VARIABLES: Final = (
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
)


def attach_variables(uri: str, name: str) -> dict[str, str]:
    """Return the variables of the module head. `uri`: that of the export `name`."""
    where = parse_nbd_uri(uri)
    return {
        "uri": uri,
        "unixsocket": where.socket_path,
        "port": "" if where.socket_path else str(where.port),
        "exportname": name,
    }


class ClientCommand:
    """See the module head.

    Args: ended: called when the command has ended.
    """

    def __init__(self, line: str, ended: Callable[[], None]) -> None:
        self._line = line
        self._ended = ended
        self._process: asyncio.subprocess.Process | None = None
        self._tasks = Tasks()
        self._waiter: asyncio.Task[None] | None = None

    async def start(self, uri: str, name: str) -> None:
        """Start the command. Raises: NbdTargetError: there is no shell, or no process can be made."""
        environment = {
            key: value for key, value in os.environ.items() if key not in _OUR_VARIABLES
        }
        try:
            self._process = await asyncio.create_subprocess_exec(
                SHELL,
                "-c",
                self._line,
                env=environment | attach_variables(uri, name),
            )
        except OSError as error:
            reason = error.strerror or error
            raise NbdTargetError(f"--run: {SHELL}: {reason}") from None
        self._waiter = self._tasks.start(self._wait(self._process))

    @property
    def status(self) -> int | None:
        """The exit status of the command, as a shell tells it; None: the command has not ended."""
        code = None if self._process is None else self._process.returncode
        if code is None:
            return None
        return code if code >= 0 else KILLED - code

    async def end(self) -> None:
        """End the command, if it still runs, and wait for it. Idempotent."""
        if self._process is None or self._waiter is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._waiter.done():
                return
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            await wait_within([self._waiter], END_S_MAX)

    async def _wait(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        self._ended()
