# SPDX-License-Identifier: Apache-2.0
"""A second pair of eyes on the wire: a blocking NBD client that shares no code with ours.

It speaks the least that a server must understand (fixed newstyle, GO, simple replies), keeps
many requests in flight when asked to, and is as slow as it likes. The kill tests use it, and
so do tests of clients that misbehave, since its socket is there to be written to.
"""

import itertools
import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Final

from tests.support.patience import PATIENCE_S

__all__ = [
    "CMD_DISC",
    "CMD_FLUSH",
    "CMD_READ",
    "CMD_TRIM",
    "CMD_WRITE",
    "CMD_WRITE_ZEROES",
    "FLAG_FUA",
    "PlainClient",
    "PlainClientError",
]

GREETING: Final = b"NBDMAGICIHAVEOPT"
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPT_GO = 7
REP_ACK, REP_INFO = 1, 3
INFO_EXPORT = 0
REQUEST: Final = struct.Struct(">IHHQQI")
REPLY: Final = struct.Struct(">IIQ")
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM = 0, 1, 2, 3, 4
CMD_WRITE_ZEROES = 6
FLAG_FUA = 1


class PlainClientError(Exception):
    """The server refused, answered with an error, or broke the protocol."""


class PlainClient:
    """One connection.

    Attributes:
        sock: the socket, for tests that send something else.
        size, flags: what GO said of the export.
    """

    def __init__(
        self, path: Path, export: str = "", *, timeout_s: float = PATIENCE_S
    ) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(timeout_s)
        self.size = 0
        self.flags = 0
        self._cookies = itertools.count(1)
        self._reads: dict[int, int] = {}
        try:
            self.sock.connect(str(path))
            self._negotiate(export.encode())
        except BaseException:
            self.sock.close()
            raise

    def receive_exactly(self, length: int) -> bytes:
        """Raises: PlainClientError: the server closed the connection."""
        data = bytearray()
        while len(data) < length:
            part = self.sock.recv(length - len(data))
            if not part:
                raise PlainClientError(f"closed after {len(data)} of {length} bytes")
            data += part
        return bytes(data)

    def _negotiate(self, export: bytes) -> None:
        if self.receive_exactly(16) != GREETING:
            raise PlainClientError("not an NBD server")
        (offered,) = struct.unpack(">H", self.receive_exactly(2))
        self.sock.sendall(struct.pack(">I", offered & (FIXED_NEWSTYLE | NO_ZEROES)))
        data = struct.pack(">I", len(export)) + export + struct.pack(">H", 0)
        self.sock.sendall(b"IHAVEOPT" + struct.pack(">II", OPT_GO, len(data)) + data)
        while True:
            _, option, kind, length = struct.unpack(">QIII", self.receive_exactly(20))
            data = self.receive_exactly(length)
            if option != OPT_GO or kind not in (REP_ACK, REP_INFO):
                raise PlainClientError(f"GO: {kind:#x} {data!r}")
            if kind == REP_ACK:
                return
            if struct.unpack_from(">H", data)[0] == INFO_EXPORT:
                _, self.size, self.flags = struct.unpack(">HQH", data)

    def send(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        payload: bytes = b"",
        flags: int = 0,
    ) -> int:
        """Send a request; its answer is one of those to come. Returns the cookie."""
        cookie, request = self.request(
            command, offset, length, payload=payload, flags=flags
        )
        self.sock.sendall(request)
        return cookie

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        payload: bytes = b"",
        flags: int = 0,
    ) -> tuple[int, bytes]:
        """Make a request for the caller to send, for example together with others. Returns its cookie, and its bytes."""
        cookie = next(self._cookies)
        if command == CMD_READ:
            self._reads[cookie] = length
        header = REQUEST.pack(
            REQUEST_MAGIC, flags, command, cookie, offset, length or len(payload)
        )
        return cookie, header + payload

    def receive(self) -> tuple[int, int, bytes]:
        """Wait for any answer. Returns its cookie, its error, and what was read."""
        magic, error, cookie = REPLY.unpack(self.receive_exactly(REPLY.size))
        if magic != REPLY_MAGIC:
            raise PlainClientError(f"reply magic {magic:#x}")
        length = self._reads.pop(cookie, 0)
        return cookie, error, self.receive_exactly(length) if not error else b""

    def _one(self, cookie: int) -> bytes:
        answered, error, data = self.receive()
        if answered != cookie or error:
            raise PlainClientError(f"request {cookie}: {answered} answered {error}")
        return data

    def read(self, offset: int, length: int) -> bytes:
        return self._one(self.send(CMD_READ, offset, length))

    def write(self, offset: int, data: bytes, *, flags: int = 0) -> None:
        self._one(self.send(CMD_WRITE, offset, payload=data, flags=flags))

    def flush(self) -> None:
        self._one(self.send(CMD_FLUSH))

    def disconnect(self) -> None:
        self.send(CMD_DISC)
        self.sock.close()

    def __enter__(self) -> "PlainClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sock.close()
