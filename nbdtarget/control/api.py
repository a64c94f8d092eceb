# SPDX-License-Identifier: Apache-2.0
"""The control socket: who has it, and since when it answers. What it answers is in `http.py`.

Theory of operation. `start` takes the socket at once, so that two servers never think they have
it, and clients may connect from then on. The HTTP library takes longer to import than all else of
a server, and most clones never see a control client: the first one to connect has it imported,
in a thread, so that the disk's clients do not wait for it.

Who may ask: whoever may open the socket, which has mode 0600 from the moment it exists.

One server for one path. Looking at the path and taking it are done under a lock on its
directory, so that two servers that start together cannot both think the other's socket stale.
A socket that nobody answers on was left behind by a killed server and is replaced; anything
else that lies there is not ours to remove.
"""

import asyncio
import fcntl
import importlib
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from nbdtarget.control.verbs import Verbs
from nbdtarget.errors import NbdTargetError

__all__ = ["ControlServer", "SocketInUseError"]

_log = logging.getLogger(__name__)

HTTP_MODULE: Final = "nbdtarget.control.http"
BACKLOG_MAX: Final = 64
LOCK_TRIES_MAX: Final = 20
CLOSING_TURNS: Final = 5


class SocketInUseError(NbdTargetError):
    """A live server has the socket, or something that is not ours lies there."""


class ControlServer:
    """Serves `verbs` on the unix socket `path`."""

    def __init__(self, verbs: Verbs, path: Path) -> None:
        self.path = path
        self._verbs = verbs
        self._listener: socket.socket | None = None
        self._answering: asyncio.Task[Callable[[], Awaitable[None]]] | None = None
        self._inode: tuple[int, int] | None = None

    async def start(self) -> None:
        """Take the socket and listen. Raises: SocketInUseError."""
        listener = await take_socket(self.path)
        status = os.stat(self.path)
        self._inode = (status.st_dev, status.st_ino)
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._first_client)
        _log.info("control socket: %s", self.path)

    def _first_client(self) -> None:
        assert self._listener is not None
        asyncio.get_running_loop().remove_reader(self._listener)
        self._answering = asyncio.create_task(self._answer(self._listener))

    async def _answer(self, listener: socket.socket) -> Callable[[], Awaitable[None]]:
        http = await asyncio.to_thread(importlib.import_module, HTTP_MODULE)
        end: Callable[[], Awaitable[None]] = await http.serve_http(
            listener, self._verbs, backlog_max=BACKLOG_MAX
        )
        return end

    async def close(self) -> None:
        """Stop answering; the socket's name goes away with us, if it still is ours."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        with suppress(OSError):
            status = os.stat(self.path)
            if (status.st_dev, status.st_ino) == self._inode:
                os.unlink(self.path)
        if self._answering is None:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        else:
            end = await self._answering
            # Whoever has connected a moment ago is accepted in the loop's next turns, and would
            # be forgotten, open, if answering ended in the midst of that.
            for _ in range(CLOSING_TURNS):
                await asyncio.sleep(0)
            await end()


async def take_socket(path: Path) -> socket.socket:
    """Listen on `path` with mode 0600, in place of a dead server's socket if need be.

    Raises: SocketInUseError.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            await _lock(directory)
            _clear_stale(path)
            return _bind(path)
        finally:
            os.close(directory)
    except OSError as error:
        raise SocketInUseError(f"{path}: {error.strerror or error}") from None


def _bind(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_mask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG_MAX)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(old_mask)
    listener.setblocking(False)
    return listener


async def _lock(directory: int) -> None:
    for _ in range(LOCK_TRIES_MAX):
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            await asyncio.sleep(0.05)
        else:
            return
    # Somebody sits on the lock of a directory that others may open: go on without.


def _clear_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketInUseError(f"{path}: exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise SocketInUseError(f"{path}: {error.strerror or error}") from None
    raise SocketInUseError(f"{path}: a server is running on this control socket")
