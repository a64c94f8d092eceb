# SPDX-License-Identifier: Apache-2.0
"""One client connection to an NBD server: a non-blocking socket under `protocol.client`.

Theory of operation. `connect` resolves, connects and shakes hands, within named timeouts. Then
the socket belongs to a `NbdConnection`:

    out    requests gather in a list, which leaves by one `sendmsg` at the end of the loop's
           turn, or at once if nothing is in flight; what the socket does not take waits for it
    in     each wake-up receives until the socket is empty, at most RECEIVES_MAX times;
           READ data goes straight into the caller's buffer

The connection ends when the server hangs up or breaks the protocol: `lost` is called once,
with a sentence, and after it `fail_all` answers what was in flight. Nothing reconnects, and no
request times out: a server may take as long as it likes, and TCP's keepalive finds a dead one.
"""

import asyncio
import contextlib
import errno as errnos
import os
import socket
from collections.abc import Callable
from typing import Final

from nbdtarget.clock import timeout
from nbdtarget.devices.base import EXTENTS_MAX
from nbdtarget.devices.nbd_uri import NbdUri
from nbdtarget.errors import ResolveError
from protocol.client import (
    ClientHandshake,
    ClientNegotiated,
    ClientTransmission,
    Completion,
)
from protocol.consts import CMD_DISC, EIO
from protocol.errors import ReplyError

__all__ = ["NbdConnection", "connect"]

CONNECT_TIMEOUT_S: Final = 10.0  # each address
HANDSHAKE_TIMEOUT_S: Final = 10.0
RECEIVES_MAX: Final = 32  # in one wake-up, so that the loop gets to others
BUFFERS_MAX: Final = 512  # of one sendmsg; Linux takes 1024
SOCKET_BUFFER: Final = 4 << 20  # bytes; the kernel may grant less
# A server that vanished without a word is noticed after about a minute and a half.
KEEPALIVE_IDLE_S: Final = 30
KEEPALIVE_INTERVAL_S: Final = 10
KEEPALIVE_PROBES: Final = 6

_HANDSHAKE_RECEIVE: Final = 16 << 10

_Address = str | tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]


class NbdConnection:
    """A connection in transmission. See the module head.

    Attributes:
        negotiated: what the handshake led to.
        in_flight: requests that have no answer yet.
    """

    def __init__(self, sock: socket.socket, handshake: ClientHandshake) -> None:
        assert handshake.negotiated is not None
        self.negotiated: ClientNegotiated = handshake.negotiated
        self.in_flight = 0
        self._sock = sock
        self._fd = sock.fileno()
        self._loop = asyncio.get_running_loop()
        self._transmission = ClientTransmission(
            handshake.negotiated, extents_max=EXTENTS_MAX
        )
        self._trailing = handshake.trailing_data()
        self._out: list[bytes | memoryview] = []
        self._send_is_due = False
        self._writer_is_set = False
        self._cookie = 0
        self._completed: Callable[[Completion], None] = _nobody
        self._lost: Callable[[str], None] = _nobody
        self._is_open = True

    def start(
        self, completed: Callable[[Completion], None], lost: Callable[[str], None]
    ) -> None:
        """Begin to receive. `completed` is called for each answer, `lost` at most once."""
        self._completed = completed
        self._lost = lost
        self._loop.add_reader(self._fd, self._readable)
        if self._trailing:
            self._fail("server sent a reply before any request")

    def send(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        payload: memoryview | None,
        buffer: memoryview | None,
        private: object,
    ) -> None:
        """Send a request; `payload` must not change before the answer has come."""
        self._cookie += 1
        header = self._transmission.request(
            command, flags, self._cookie, offset, length, buffer, private
        )
        self._out.append(header)
        if payload is not None:
            self._out.append(payload)
        self.in_flight += 1
        if self._send_is_due or self._writer_is_set:
            return
        if self.in_flight == 1:
            self._send_out()
        else:
            self._send_is_due = True
            self._loop.call_soon(self._send_out)

    def fail_all(self) -> list[Completion]:
        """The requests that have no answer, as if answered with EIO."""
        self.in_flight = 0
        return self._transmission.fail_all(EIO)

    def close(self) -> None:
        """Say goodbye if the server still listens, and close. Idempotent."""
        if not self._is_open:
            return
        if self._transmission.error is None and not self._out:
            goodbye = self._transmission.request(CMD_DISC, 0, 0, 0, 0)
            # The server may be gone or its socket full: it learns by the close.
            with contextlib.suppress(OSError):
                self._sock.send(goodbye)
        self._shut()

    def _shut(self) -> None:
        self._is_open = False
        self._loop.remove_reader(self._fd)
        if self._writer_is_set:
            self._loop.remove_writer(self._fd)
            self._writer_is_set = False
        self._out.clear()
        self._sock.close()

    def _fail(self, reason: str) -> None:
        if self._is_open:
            self._shut()
            self._lost(reason)

    def _send_out(self) -> None:
        self._send_is_due = False
        out = self._out
        try:
            while out:
                batch = out[:BUFFERS_MAX]
                sent = self._sock.sendmsg(batch)
                if not self._take_off(batch, sent):
                    break
        except BlockingIOError:
            pass  # the rest waits for `_writable`
        except OSError as error:
            self._fail(_sentence(error))
            return
        if bool(out) is not self._writer_is_set:
            self._writer_is_set = bool(out)
            if out:
                self._loop.add_writer(self._fd, self._send_out)
            else:
                self._loop.remove_writer(self._fd)

    def _take_off(self, batch: list[bytes | memoryview], sent: int) -> bool:
        """Drop `sent` bytes from the front of what is to go; whether the batch went whole."""
        out = self._out
        for nr, piece in enumerate(batch):
            if sent < len(piece):
                del out[:nr]
                out[0] = memoryview(piece)[sent:]
                return False
            sent -= len(piece)
        del out[: len(batch)]
        return True

    # hot: 0.15 CPU seconds a GiB in 256 KiB reads (scripts/bench_devices.py)
    def _readable(self) -> None:
        transmission = self._transmission
        receive = self._sock.recv_into
        try:
            for _ in range(RECEIVES_MAX):
                got = receive(transmission.get_buffer())
                if not got:
                    self._fail("server hung up")
                    return
                for completion in transmission.buffer_updated(got):
                    self.in_flight -= 1
                    self._completed(completion)
                if not self._is_open:
                    return  # an endio has closed us
        except BlockingIOError:
            return
        except ReplyError as error:
            self._fail(str(error))
        except OSError as error:
            self._fail(_sentence(error))


async def connect(name: str, uri: NbdUri) -> NbdConnection:
    """Connect to `uri` and shake hands. `name` is what the user wrote.

    Raises: ResolveError.
    """
    sock = await _connected(name, uri)
    try:
        async with timeout(HANDSHAKE_TIMEOUT_S):
            handshake = await _shake_hands(sock, uri.export_name)
        if handshake.error is not None:
            raise ResolveError(name, str(handshake.error))
        return NbdConnection(sock, handshake)
    except TimeoutError:
        sock.close()
        reason = f"no NBD handshake within {HANDSHAKE_TIMEOUT_S:g} s"
        raise ResolveError(name, reason, errnos.ETIMEDOUT) from None
    except OSError as error:
        sock.close()
        raise ResolveError(name, _sentence(error), error.errno or EIO) from None
    except BaseException:
        sock.close()
        raise


async def _shake_hands(sock: socket.socket, export_name: str) -> ClientHandshake:
    loop = asyncio.get_running_loop()
    handshake = ClientHandshake(export_name)
    while handshake.negotiated is None and handshake.error is None:
        data = b""
        with contextlib.suppress(ConnectionResetError):
            data = await loop.sock_recv(sock, _HANDSHAKE_RECEIVE)
        if data:
            handshake.receive_data(data)
        else:
            handshake.receive_eof()
        # A server that has hung up may have said why before: what it said is received next.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in handshake.data_to_send():
                await loop.sock_sendall(sock, piece)
    return handshake


async def _connected(name: str, uri: NbdUri) -> socket.socket:
    last: OSError = OSError(errnos.EHOSTUNREACH, os.strerror(errnos.EHOSTUNREACH))
    for family, address in await _addresses(name, uri):
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            _set_options(sock, family)
            async with timeout(CONNECT_TIMEOUT_S):
                await asyncio.get_running_loop().sock_connect(sock, address)
            return sock
        except TimeoutError:
            sock.close()
            last = OSError(errnos.ETIMEDOUT, os.strerror(errnos.ETIMEDOUT))
        except OSError as error:
            sock.close()
            last = error
        except BaseException:
            sock.close()
            raise
    reason = f"cannot connect: {_sentence(last)}"
    raise ResolveError(name, reason, last.errno or errnos.EIO)


async def _addresses(name: str, uri: NbdUri) -> list[tuple[int, _Address]]:
    if uri.socket_path:
        return [(socket.AF_UNIX, uri.socket_path)]
    numeric = socket.AI_NUMERICHOST
    try:
        # A number needs no resolver, and so no thread of the loop's executor.
        found = socket.getaddrinfo(
            uri.host, uri.port, type=socket.SOCK_STREAM, flags=numeric
        )
    except (socket.gaierror, UnicodeError):
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                uri.host, uri.port, type=socket.SOCK_STREAM
            )
        except (OSError, UnicodeError) as error:
            reason = f"cannot resolve {uri.host}: {error}"
            raise ResolveError(name, reason, errnos.EHOSTUNREACH) from None
    return [(entry[0], entry[4]) for entry in found]


def _set_options(sock: socket.socket, family: int) -> None:
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
    if family == socket.AF_UNIX:
        return
    tcp = socket.IPPROTO_TCP
    sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(tcp, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(tcp, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(tcp, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def _sentence(error: OSError) -> str:
    text = os.strerror(error.errno) if error.errno else str(error)
    return text[:1].lower() + text[1:]


def _nobody(_: object) -> None:
    raise AssertionError("a connection is started before it is used")
