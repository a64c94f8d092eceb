# SPDX-License-Identifier: Apache-2.0
"""`NbdClient`: a small blocking NBD client, so that a test can use a disk without root and without other programs.

One request at a time, over one connection without TLS. The bytes of the protocol are those of
`nbdtarget_protocol.client`; this module has only the socket.
"""

import contextlib
import errno as errnos
import itertools
import os
import socket
from types import TracebackType
from typing import Final

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.devices.nbd.uri import parse_nbd_uri
from nbdtarget_protocol.client import (
    ClientHandshake,
    ClientNegotiated,
    ClientTransmission,
    Completion,
)
from nbdtarget_protocol.consts import (
    CMD_DISC,
    CMD_FLAG_FUA,
    CMD_FLUSH,
    CMD_NAMES,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
)
from nbdtarget_protocol.errors import HandshakeError, ReplyError, RequestError

__all__ = ["NbdClient", "NbdError"]

RECEIVE_BYTES: Final = 64 << 10


class NbdError(NbdTargetError):
    """A request has failed, or the connection has. `errno`: what the server said of a request; EIO for the connection."""

    def __init__(self, text: str, errno: int) -> None:
        super().__init__(text, errno)
        self.text = text
        self.errno = errno

    def __str__(self) -> str:
        return self.text


class NbdClient:
    """One connection to one export.

    Args: timeout_s: for each step; a server that takes longer makes the connection lost.
    Attributes: size: of the export, in bytes.
    Raises: ResolveError: it is no NBD URI; NbdError: there is no server, or no such export.
    """

    def __init__(self, uri: str, *, timeout_s: float = 30.0) -> None:
        where = parse_nbd_uri(uri)
        if where.tls is not None:
            raise NbdTargetError(f"{uri}: this client has no TLS")
        self.uri = uri
        self._cookies = itertools.count(1)
        try:
            if where.socket_path:
                self._sock = socket.socket(socket.AF_UNIX)
                self._sock.settimeout(timeout_s)
                self._sock.connect(where.socket_path)
            elif where.cid is not None:
                self._sock = socket.socket(socket.AF_VSOCK)
                self._sock.settimeout(timeout_s)
                self._sock.connect((where.cid, where.port))
            else:
                address = (where.host, where.port)
                self._sock = socket.create_connection(address, timeout_s)
        except OSError as error:
            self._close()
            raise self._lost(error) from None
        try:
            negotiated, rest = self._shake_hands(where.export_name)
            self._transmission = ClientTransmission(negotiated)
            self._transmission.receive_data(rest)
        except BaseException:  # it may be interrupted, and then no socket is left open
            self._close()
            raise
        self.size = negotiated.size
        self._payload_max = negotiated.payload_max

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes. Raises: NbdError."""
        if length < 0:
            raise self._refused(CMD_READ, offset, length, "less than nothing")
        data = bytearray(length)
        view = memoryview(data)
        for at in range(0, length, self._payload_max):
            part = view[at : at + self._payload_max]
            self._request(CMD_READ, offset + at, len(part), buffer=part)
        return bytes(data)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """Write. Raises: NbdError.

        Durable: with `fua`, the data; else nothing until `flush`.
        """
        for at in range(0, len(data), self._payload_max):
            part = data[at : at + self._payload_max]
            flags = CMD_FLAG_FUA if fua else 0
            self._request(CMD_WRITE, offset + at, len(part), flags, payload=part)

    def flush(self) -> None:
        """Flush. Raises: NbdError. Durable: everything that was written before."""
        self._request(CMD_FLUSH, 0, 0)

    def trim(self, offset: int, length: int) -> None:
        """Give a range up. Raises: NbdError."""
        self._request(CMD_TRIM, offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make a range read as zeroes. Raises: NbdError."""
        self._request(CMD_WRITE_ZEROES, offset, length)

    def close(self) -> None:
        """Disconnect. Idempotent. Nothing is flushed."""
        if self._sock.fileno() >= 0:
            transmission = self._transmission
            if transmission.error is None:
                # If the server has gone, that is what was wanted.
                with contextlib.suppress(OSError):
                    self._sock.sendall(transmission.request(CMD_DISC, 0, 0, 0, 0))
            self._close()

    def __enter__(self) -> "NbdClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _close(self) -> None:
        sock = getattr(self, "_sock", None)
        if sock is not None:
            sock.close()

    def _lost(self, error: OSError | None) -> NbdError:
        if isinstance(error, TimeoutError):
            reason = "the server does not answer"
        elif error is None:
            reason = "the server has closed the connection"
        else:
            reason = error.strerror or str(error)
        return NbdError(f"{self.uri}: {reason}", errnos.EIO)

    def _shake_hands(self, export_name: str) -> tuple[ClientNegotiated, bytes]:
        handshake = ClientHandshake(export_name)
        try:
            while True:
                for part in handshake.data_to_send():
                    self._sock.sendall(part)
                if handshake.error is not None:
                    raise NbdError(f"{self.uri}: {handshake.error}", errnos.EIO)
                if handshake.negotiated is not None:
                    return handshake.negotiated, handshake.trailing_data()
                data = self._sock.recv(RECEIVE_BYTES)
                if not data:
                    handshake.receive_eof()
                    raise self._lost(None)
                handshake.receive_data(data)
        except OSError as error:
            raise self._lost(error) from None
        except HandshakeError as error:
            raise NbdError(f"{self.uri}: {error}", errnos.EIO) from None

    def _request(
        self,
        command: int,
        offset: int,
        length: int,
        flags: int = 0,
        *,
        payload: bytes = b"",
        buffer: memoryview | None = None,
    ) -> None:
        transmission = self._transmission
        if transmission.error is not None or self._sock.fileno() < 0:
            raise NbdError(f"{self.uri}: the connection has ended", errnos.EIO)
        cookie = next(self._cookies)
        try:
            request = transmission.request(
                command, flags, cookie, offset, length, buffer
            )
        except RequestError as error:
            raise self._refused(command, offset, length, error.message) from None
        try:
            self._sock.sendall(request + payload)
            done = self._receive()
        except (OSError, ReplyError) as error:
            transmission.fail_all(errnos.EIO)
            self._close()
            if isinstance(error, OSError):
                raise self._lost(error) from None
            raise NbdError(f"{self.uri}: {error}", errnos.EIO) from None
        if done.error:
            reason = done.message or os.strerror(done.error)
            raise self._refused(command, offset, length, reason, done.error)

    def _refused(
        self,
        command: int,
        offset: int,
        length: int,
        reason: str,
        errno: int = errnos.EINVAL,
    ) -> NbdError:
        what = f"{CMD_NAMES[command]} of {length} bytes at {offset}"
        return NbdError(f"{self.uri}: {what}: {reason}", errno)

    def _receive(self) -> Completion:
        """Wait for the only answer."""
        while True:
            nr_bytes = self._sock.recv_into(self._transmission.get_buffer())
            if not nr_bytes:
                raise ConnectionResetError("the server has closed the connection")
            completed = self._transmission.buffer_updated(nr_bytes)
            if completed:
                return completed[0]
