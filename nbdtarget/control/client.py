# SPDX-License-Identifier: Apache-2.0
"""`ControlClient`: asks a control socket. One connection carries one request and one answer.

It uses plain blocking sockets and writes HTTP/1.0 itself. A command that prints one status line spends its
time on starting Python, so nothing here imports aiohttp, asyncio or http.client (25 ms).
"""

import errno as errnos
import socket
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.control.messages import VERBS, Answer, Failure, Request
from nbdtarget.control.paths import ControlAddress

__all__ = ["ControlClient", "NoServerError", "SilentServerError", "no_server"]

HEAD_BYTES_MAX: Final = 65536
A = TypeVar("A", bound=Answer)


class NoServerError(NbdTargetError):
    """There is no server on the control socket, or it is not one of ours."""


class SilentServerError(NoServerError):
    """A server has the control socket, and does not answer in time."""


class ControlClient:
    """Asks the server at one control socket, with a token if it wants one."""

    def __init__(self, address: ControlAddress, token: str | None = None) -> None:
        self.address = address
        self._token = token

    def ask(
        self,
        verb: str,
        request: Request,
        answer_type: type[A],
        *,
        timeout_s: float | None = None,
    ) -> A:
        """Carry out `verb`; blocks until it is done, however long that takes.

        Args: timeout_s: for each step of the conversation; None: no bound.
        Raises: NoServerError; TableError: the verb failed.
        """
        assert VERBS[verb] == (type(request), answer_type)
        status, body = self._post(
            f"/v1/{verb}", msgspec.json.encode(request), timeout_s
        )
        try:
            if status == 200:
                return msgspec.json.decode(body, type=answer_type)
            failure = msgspec.json.decode(body, type=Failure)
        except msgspec.MsgspecError:
            raise NoServerError(
                f"{self.address}: this is not a control socket of nbdtarget (HTTP status {status})"
            ) from None
        raise TableError(failure.reason, failure.errno)

    def _post(
        self, url: str, body: bytes, timeout_s: float | None
    ) -> tuple[int, bytes]:
        # HTTP/1.0: the answer ends where the connection does, no chunks to undo.
        head = (
            f"POST {url} HTTP/1.0\r\nHost: nbdtarget\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        )
        if self._token is not None:
            head += f"Authorization: Bearer {self._token}\r\n"
        try:
            with self._connected(timeout_s) as connection:
                connection.sendall(f"{head}\r\n".encode() + body)
                reply = _read_all(connection)
        except OSError as error:
            raise self._no_server(error) from None
        status_line, _, answer = reply.partition(b"\r\n\r\n")
        words = status_line.split(b"\r\n", 1)[0].split(b" ")
        if (
            len(words) < 2
            or not words[0].startswith(b"HTTP/")
            or not words[1].isdigit()
        ):
            raise NoServerError(f"{self.address}: the server went away")
        return int(words[1]), answer

    def _connected(self, timeout_s: float | None) -> socket.socket:
        if not isinstance(self.address, Path):
            return socket.create_connection(self.address, timeout_s)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(self.address))
        except BaseException:
            connection.close()
            raise
        return connection

    def _no_server(self, error: OSError) -> NoServerError:
        if isinstance(error, TimeoutError):
            return SilentServerError(f"{self.address}: the server does not answer")
        if error.errno in (errnos.ENOENT, errnos.ECONNREFUSED):
            return no_server(self.address)
        hint = ""
        if error.errno == errnos.EACCES:
            hint = " (the server belongs to another user, see `serve --control-group')"
        return NoServerError(f"{self.address}: {error.strerror or error}{hint}")


def no_server(address: ControlAddress) -> NoServerError:
    """Return the error that says what to do when there is no server."""
    return NoServerError(
        f"no server on {address}: start one with `nbdtarget serve', or serve a disk with `nbdtarget"
        " clone', `cache' or `export'; --control names the socket of another server"
    )


def _read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(HEAD_BYTES_MAX):
        parts.append(part)
    return b"".join(parts)
