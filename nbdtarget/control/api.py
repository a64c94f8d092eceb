# SPDX-License-Identifier: Apache-2.0
"""`ControlServer`: the control socket, from the start of the server on. The answers are in `http.py`.

Theory of operation. `start` takes the socket at once, so that two servers never both have
it, and clients may connect from then on. The HTTP library takes longer to import than everything else in
a server, and most clones never see a control client. So the first client that connects causes the import,
in a thread, so that the clients of the disks do not wait for it. If that fails (another version may have been installed meanwhile), the
clients that wait are disconnected, and a client that comes RETRY_S later causes it again.

Access. Every process that may open a unix socket may use it. Its mode is 0600 from the moment it exists, or as
configured (`nbdtarget.common.unix_socket`). On TCP a client needs a token, and one of two kinds may only look (`tokens.py`); without a
token there is no control on TCP.
"""

import asyncio
import contextlib
import importlib
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdtarget.common.clock import Clock, LoopClock, Timer
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.passed_socket import passed_socket
from nbdtarget.common.unix_socket import PRIVATE, SocketAccess, UnixSocket
from nbdtarget.control.paths import (
    LOOK_TOKEN_VARIABLE,
    TOKEN_VARIABLE,
    ControlAddress,
    forget_directory,
)
from nbdtarget.control.sockets import (
    BACKLOG_MAX,
    NoSocketError,
    SocketInUseError,
    address_of,
    take_path,
    take_tcp_socket,
)
from nbdtarget.control.tokens import NO_TOKENS, ControlTokens
from nbdtarget.control.verbs import Verbs

if TYPE_CHECKING:
    from nbdtarget.control.http import HttpServer

__all__ = ["ControlServer", "NoSocketError", "SocketInUseError"]

log = logging.getLogger(__name__)

HTTP_MODULE: Final = "nbdtarget.control.http"
CLOSING_TURNS: Final = 5
RETRY_S: Final = 1.0


class ControlServer:
    """Serves `verbs` at `address`.

    Attributes:
        address: with the port that was taken, once it is started.
        tokens: what requests must carry; on TCP there must be one.
    Args:
        access: which users may connect to a unix socket.
        has_verbs: False: it serves metrics alone, and needs no token on TCP.
    """

    def __init__(
        self,
        verbs: Verbs,
        address: ControlAddress,
        *,
        tokens: ControlTokens = NO_TOKENS,
        access: SocketAccess = PRIVATE,
        has_verbs: bool = True,
        clock: Clock | None = None,
    ) -> None:
        self._has_verbs = has_verbs
        self._clock = clock or LoopClock()
        self.address = address
        self._verbs = verbs
        self.tokens = tokens
        self._listener: socket.socket | None = None
        self._answering: asyncio.Task[HttpServer] | None = None
        self._retry: Timer | None = None
        self._access = access
        self._taken: UnixSocket | None = None

    async def start(self) -> None:
        """Take the socket and listen. Raises: SocketInUseError, NoSocketError; NbdTargetError: no token."""
        if isinstance(self.address, Path):
            self._taken = take_path(self.address, self._access)
            self._listen(self._taken.socket)
        else:
            self._check_token()
            listener = await take_tcp_socket(self.address)
            # If port 0 was asked for, the log says which port it is.
            self.address = self.address._replace(port=listener.getsockname()[1])
            self._listen(listener)

    def start_passed(self, fd: int) -> None:
        """Listen on a socket that was passed to this process. A file that it has is not ours to remove.

        Raises: ListenError: it is no such socket; NbdTargetError: no token.
        """
        listener = passed_socket(fd)
        try:
            self.address = address_of(listener)
            if not isinstance(self.address, Path):
                self._check_token()
        except NbdTargetError:
            listener.close()
            raise
        self._listen(listener)

    def _check_token(self) -> None:
        if self._has_verbs and not self.tokens.are_needed(is_tcp=True):
            raise NbdTargetError(
                f"{self.address}: a control socket on TCP needs a token"
                f" (${TOKEN_VARIABLE} or --control-token-file; ${LOOK_TOKEN_VARIABLE} or"
                " --control-read-token-file for clients that only look)"
            )

    @staticmethod
    def take_descriptors(
        fds: list[int], *, has_lock: bool
    ) -> tuple[socket.socket, int | None]:
        """Take what `moved` has given from the front of `fds`: the socket, and the lock of its path."""
        return socket.socket(fileno=fds.pop(0)), fds.pop(0) if has_lock else None

    def take_over(
        self, listener: socket.socket, address: ControlAddress, lock: int | None
    ) -> None:
        """Own a socket of another process; nothing is accepted before `resume`.

        Args: lock: of the path, if the path is to be ours.
        Raises: NbdTargetError: no token.
        """
        self.address = address
        if not isinstance(address, Path):
            self._check_token()
        if lock is not None:
            self._taken = UnixSocket(listener, str(address), lock)
        self._listener = listener

    def _listen(self, listener: socket.socket) -> None:
        self._listener = listener
        self._await_first_client()
        what = "control socket" if self._has_verbs else "metrics"
        log.info("%s: %s", what, self.address)

    def _await_first_client(self) -> None:
        assert self._listener is not None
        asyncio.get_running_loop().add_reader(self._listener, self._first_client)

    async def pause(self) -> None:
        """Accept no more connections; those that are there are answered."""
        server = await self._maybe_server()
        if server is not None:
            server.pause()
        elif self._listener is not None:
            self._await_no_client(self._listener)

    async def resume(self) -> None:
        """Undo `pause`."""
        assert self._listener is not None
        server = await self._maybe_server()
        if server is None:
            self._await_first_client()
        else:
            await server.start(self._listener)

    def moved(self) -> tuple[str | None, list[int]]:
        """After `pause`: the path, if it is ours, and the descriptors of the socket and of the path's lock."""
        assert self._listener is not None
        taken = self._taken
        if taken is None:
            return None, [self._listener.fileno()]
        return taken.path, [self._listener.fileno(), taken.lock]

    @property
    def port(self) -> int | None:
        """The TCP port that was taken; None: not started, or a unix socket."""
        if self._listener is None or isinstance(self.address, Path):
            return None
        return self.address.port

    def _first_client(self) -> None:
        assert self._listener is not None
        asyncio.get_running_loop().remove_reader(self._listener)
        self._answering = asyncio.create_task(self._answer(self._listener))
        self._answering.add_done_callback(self._answered)

    def _answered(self, answering: "asyncio.Task[HttpServer]") -> None:
        if answering.cancelled() or (error := answering.exception()) is None:
            return
        log.error(
            "%s: clients cannot be answered: %r", self.address, error, exc_info=error
        )
        self._answering = None
        if self._listener is not None:
            _disconnect_all(self._listener)
            self._retry = self._clock.call_later(RETRY_S, self._await_first_client)

    def _await_no_client(self, listener: socket.socket) -> None:
        if self._retry is not None:
            self._retry.cancel()
        asyncio.get_running_loop().remove_reader(listener)

    async def _maybe_server(self) -> "HttpServer | None":
        """Return what answers; None: no client has come, or it could not be made."""
        answering = self._answering
        if answering is None:
            return None
        await asyncio.wait([answering])
        return None if answering.exception() is not None else answering.result()

    async def _answer(self, listener: socket.socket) -> "HttpServer":
        http = await asyncio.to_thread(importlib.import_module, HTTP_MODULE)
        server: HttpServer = http.HttpServer(
            self._verbs,
            tokens=self.tokens,
            backlog_max=BACKLOG_MAX,
            has_verbs=self._has_verbs,
            is_tcp=not isinstance(self.address, Path),
        )
        await server.start(listener)
        return server

    async def close(self) -> None:
        """Stop answering. The name of the socket is removed, if it still belongs to this server."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        if self._taken is not None:
            self._taken.release()
            forget_directory(Path(self._taken.path).parent)
        server = await self._maybe_server()
        if server is None:
            self._await_no_client(listener)
        else:
            # A client that has connected a moment ago is accepted in the next turns of the loop. Its connection
            # would be forgotten, and stay open, if answering ended before that.
            for _ in range(CLOSING_TURNS):
                await asyncio.sleep(0)
            await server.end()
        listener.close()


def _disconnect_all(listener: socket.socket) -> None:
    """Disconnect the clients that wait to be accepted."""
    # It does not block; an error means here that no more can be accepted.
    with contextlib.suppress(OSError):
        while True:
            listener.accept()[0].close()
