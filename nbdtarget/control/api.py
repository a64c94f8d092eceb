# SPDX-License-Identifier: Apache-2.0
"""The control socket's server: device-mapper's verbs over HTTP on a unix socket.

Theory of operation. One POST route for each verb of `messages.VERBS`. A handler decodes the
request, calls the registry and encodes the answer; the registry decides everything. What a user
did wrong comes back as a `Failure` with its reason and errno. What we did wrong is logged
with its traceback and comes back as EIO: the server goes on.

Who may ask: whoever may open the socket, which has mode 0600 from the moment it exists.

One server for one path. Looking at the path and taking it are done under a lock on its
directory, so that two servers that start together cannot both think the other's socket stale.
A socket that nobody answers on was left behind by a killed server and is replaced; anything
else that lies there is not ours to remove.
"""

import asyncio
import errno as errnos
import fcntl
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec
from aiohttp import web

from nbdtarget.control import messages as m
from nbdtarget.control.verbs import Verbs
from nbdtarget.errors import NbdTargetError

__all__ = ["ControlServer", "SocketInUseError"]

_log = logging.getLogger(__name__)

BODY_BYTES_MAX: Final = 16 << 20
BACKLOG_MAX: Final = 64
LOCK_TRIES_MAX: Final = 20
SHUTDOWN_S_MAX: Final = 2.0


class SocketInUseError(NbdTargetError):
    """A live server has the socket, or something that is not ours lies there."""


class ControlServer:
    """Serves `verbs` on the unix socket `path`."""

    def __init__(self, verbs: Verbs, path: Path) -> None:
        self.path = path
        self._verbs = verbs
        self._runner: web.AppRunner | None = None
        self._inode: tuple[int, int] | None = None

    async def start(self) -> None:
        """Take the socket and listen. Raises: SocketInUseError."""
        listener = await take_socket(self.path)
        status = os.stat(self.path)
        self._inode = (status.st_dev, status.st_ino)
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        for verb, (request_type, _) in m.VERBS.items():
            app.router.add_post(f"/v1/{verb}", self._handler(verb, request_type))
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_S_MAX
        )
        await self._runner.setup()
        await web.SockSite(self._runner, listener, backlog=BACKLOG_MAX).start()
        _log.info("control socket: %s", self.path)

    async def close(self) -> None:
        """Stop answering; the socket's name goes away with us, if it still is ours."""
        if self._runner is None:
            return
        with suppress(OSError):
            status = os.stat(self.path)
            if (status.st_dev, status.st_ino) == self._inode:
                os.unlink(self.path)
        await self._runner.cleanup()
        self._runner = None

    def _handler(
        self, verb: str, request_type: type[m.Request]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        # Any: each verb takes its own request; `decode` has just made one of that type.
        call: Callable[[Any], Awaitable[m.Answer]] = getattr(self._verbs, verb)
        decode = msgspec.json.Decoder(request_type).decode

        async def handle(http: web.Request) -> web.Response:
            body = await http.read()
            try:
                request = decode(body)
            except msgspec.MsgspecError as error:
                return _failure(400, f"bad request: {error}", errnos.EINVAL)
            try:
                return _response(200, await call(request))
            except NbdTargetError as error:
                # ResolveError, ConstructorError and TableError have one; the base has not.
                errno = getattr(error, "errno", errnos.EINVAL)
                return _failure(422, str(error), errno)
            except Exception:
                # The last line of defence: a bug in one verb must not end the server.
                _log.exception("%s %r failed", verb, request)
                return _failure(500, "internal error, see the server's log", errnos.EIO)

        return handle


def _response(status: int, answer: m.Answer) -> web.Response:
    return web.Response(
        status=status,
        body=msgspec.json.encode(answer),
        content_type="application/json",
    )


def _failure(status: int, reason: str, errno: int) -> web.Response:
    return _response(status, m.Failure(reason, errno))


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
