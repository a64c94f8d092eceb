# SPDX-License-Identifier: Apache-2.0
"""One client connection to an NBD server: a non-blocking socket under `nbdtarget_protocol.client`.

Theory of operation. `connect` resolves, connects and shakes hands, within named timeouts. Then
the socket belongs to a `NbdConnection`:

    out    requests gather in a list, which leaves by one `sendmsg` at the end of the loop's
           turn, or at once if nothing is in flight; what the socket does not take waits for it
    in     each wake-up receives until the socket is empty, because uvloop does not call a reader again
           after an error; others have a turn after each RECEIVES_MAX times;
           READ data goes straight into the caller's buffer

The connection is lost when the server hangs up, breaks the protocol, or does not answer a request
in time (*Timeouts*). `lost` is then called once, with a sentence. After it, or at any other time,
`give_up` takes back what was in flight.

*TLS.* With it the socket is a `TlsSocket`, from the acknowledgement of STARTTLS on. What it has encrypted cannot be taken
back, as if it lay in the kernel's socket buffer: a request there counts as sent, and leaves also after `give_up`. A connection with TLS is not lent to bulk copies.

*The end.* A write that was given up may still be under way at the server, or on its way there. It
must not overtake writes over a new connection. So a connection that was given up sends nothing
more, but is not closed while the server owes an answer to a write. It has `ended` when no write of it can
be carried out any more:

    every write that was sent has been answered                  that is certain, with any server
    the server has closed the connection (EOF, reset)            see below
    the kernel has given up the peer (keepalive, no route)       nothing is known

A server whose process dies ends its connections when its last system call is done, so the second holds for
every server that crashes or is stopped. nbdkit and nbd-server, when they close a connection of their
own accord, do so after the requests under way have ended, and so do we. qemu-nbd shuts the socket first
when a client breaks the protocol or leaves, which we do neither of while a write is owed. After the
third, a server beyond a cut network may still carry out a write that it had received, when
the network is whole again: nothing in NBD could tell. What began to be sent, but not all of it, is
never carried out: it is no request.

`wait_until_ended` waits for all connections to one export that were given up, whichever device they belonged to.

*Timeouts.* A request is too late when it has waited for the time that its URI gives it (see `uri.py`) and
nothing at all has come on the connection lately; or, while other data comes, when it has waited
TALKING_FACTOR times as long: a slow link with much in flight is not a server that hangs. It is looked
at TICKS times in that time. TCP's keepalive finds a server that has vanished.
"""

import asyncio
import contextlib
import errno as errnos
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Final

from nbdtarget.common.clock import LoopClock, Timer, timeout
from nbdtarget.common.errors import NbdTargetError, ResolveError
from nbdtarget.common.tls_context import client_context
from nbdtarget.common.tls_socket import TlsError, TlsSocket
from nbdtarget.common.turns import Soon
from nbdtarget.devices.base import EXTENTS_MAX
from nbdtarget.devices.nbd.uri import NbdUri
from nbdtarget_protocol.client import (
    ClientHandshake,
    ClientNegotiated,
    ClientTransmission,
    Completion,
)
from nbdtarget_protocol.consts import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_NAMES,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EIO,
)
from nbdtarget_protocol.errors import ReplyError

__all__ = ["NbdConnection", "connect", "wait_until_ended"]

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 10.0  # to resolve the name; and each address
HANDSHAKE_TIMEOUT_S: Final = 10.0
END_TIMEOUT_S: Final = 10.0  # for a connection that was given up, before the next one
TICKS: Final = 4
TALKING_FACTOR: Final = 4
RECEIVES_MAX: Final = 32  # in one wake-up, so that the loop gets to others
BUFFERS_MAX: Final = 512  # of one sendmsg; Linux takes 1024
SOCKET_BUFFER: Final = 4 << 20  # bytes; the kernel may grant less
# A server that vanished without a word is noticed after about a minute and a half.
KEEPALIVE_IDLE_S: Final = 30
KEEPALIVE_INTERVAL_S: Final = 10
KEEPALIVE_PROBES: Final = 6

_HANDSHAKE_RECEIVE: Final = 16 << 10

_READING: Final = frozenset({CMD_READ, CMD_CACHE, CMD_BLOCK_STATUS})
_WRITING: Final = frozenset({CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES})
_clock: Final = LoopClock()
# Connections that were given up, and have not ended.
_given_up: list["NbdConnection"] = []

_Address = (
    str
    | tuple[str, int]
    | tuple[str, int, int, int]
    | tuple[int, bytes]
    | tuple[int, int]  # vsock
)


class NbdConnection:
    """A connection in transmission. See the module head.

    Attributes:
        negotiated: what the handshake led to.
        in_flight: requests that have no answer yet.
        ended: see *The end* in the module head.
    """

    def __init__(
        self,
        sock: socket.socket | TlsSocket,
        handshake: ClientHandshake,
        uri: NbdUri,
    ) -> None:
        assert handshake.negotiated is not None
        self.uri = uri
        self.ended = asyncio.Event()
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
        self._send_soon = Soon(self._send_out)
        self._read_on_soon = Soon(self._read_on)
        self._writer_is_set = False
        self._cookie = 0
        self._completed: Callable[[Completion], None] = _not_started
        self._lost: Callable[[str], None] = _not_started
        self._is_open = True
        self._is_given_up = False
        self._is_garbled = (
            False  # what comes is no protocol: nothing is parsed any more
        )
        self._ticker: Timer | None = None
        self._tick_s = _tick_s(uri)
        self._seen: dict[int, float] = {}  # cookie: how long it has been seen waiting
        self._has_heard = False

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
        if self._ticker is None and self._tick_s:
            self._ticker = _clock.call_later(self._tick_s, self._tick)
        if self._send_soon.is_due or self._writer_is_set:
            return
        if self.in_flight == 1:
            self._send_out()
        else:
            # Others may follow in this turn of the loop: they leave in one system call.
            self._send_soon.ask()

    def maybe_lend(self) -> tuple[socket.socket, ClientTransmission] | None:
        """Hand the idle connection to a thread, which may block on it; None: it cannot be had now.

        The socket is blocking, and a receive fails with EAGAIN after the time that a read has. Until
        `take_back`, only `close` may be called here.
        """
        if not self._is_open or self._is_given_up or self._transmission.in_flight:
            return None
        if isinstance(self._sock, TlsSocket):
            return None  # a thread could not block on it
        if self.uri.cid is not None:
            return None  # Python sets no SO_RCVTIMEO on a socket of vsock
        if self._out or self._is_garbled:
            return None
        self._loop.remove_reader(self._fd)
        self._read_on_soon.cancel()
        if self._ticker is not None:
            self._ticker.cancel()  # it would look at what the thread has in flight
            self._ticker = None
        self._seen = {}
        _set_blocking(self._sock, self.uri.read_timeout_s)
        return self._sock, self._transmission

    def take_back(self) -> None:
        """The thread has ended, and left nothing in flight."""
        assert not self._transmission.in_flight
        assert isinstance(self._sock, socket.socket)
        self._sock.setblocking(False)
        self._loop.add_reader(self._fd, self._readable)

    def give_up(self) -> list[Completion]:
        """Take back everything that is in flight, as if answered with EIO. Nothing more is sent."""
        transmission = self._transmission
        self.in_flight = 0
        self._is_given_up = True
        self._lost = _ignore
        if not self._is_open or self._is_garbled:
            given_up = list(filter(_is_awaited, transmission.fail_all(EIO)))
        else:
            given_up = transmission.abandon(EIO, _is_awaited)
            sealed = self._take_sealed()
            unsent = sum(type(piece) is bytes for piece in self._out)
            if self._out and type(self._out[0]) is not bytes:
                unsent += 1  # it was sent in part
            cookies = list(transmission.in_flight)
            transmission.forget(cookies[len(cookies) - unsent :])
            self._out[:] = sealed
            self._end_if_answered()
        if not self.ended.is_set():
            _given_up.append(self)
        return given_up

    def _take_sealed(self) -> list[bytes | memoryview]:
        """Take from the front of `_out` what is encrypted already and has not left."""
        out, taken = self._out, list[bytes | memoryview]()
        left = self._sock.sealed if isinstance(self._sock, TlsSocket) else 0
        while left:
            piece = memoryview(out.pop(0))
            if len(piece) > left:
                out.insert(0, piece[left:])
                piece = piece[:left]
            taken.append(piece)
            left -= len(piece)
        return taken

    def give_up_reads(self) -> list[Completion]:
        """Take back the reads that are in flight, as if answered with EIO; the rest goes on."""
        if not self._is_open or self._is_given_up:
            return []
        given_up = self._transmission.abandon(EIO, _is_awaited_read)
        self.in_flight -= len(given_up)
        return given_up

    def _end_if_answered(self) -> None:
        """Say goodbye and close, if the connection is given up and no write is owed an answer."""
        in_flight = self._transmission.in_flight.values()
        if self._is_given_up and not any(
            each.command in _WRITING for each in in_flight
        ):
            self._say_goodbye()
            self._shut()

    def close(self) -> None:
        """Say goodbye if the server still listens, and close. Idempotent."""
        if not self._is_open:
            return
        if self._is_given_up:
            return  # it closes by itself, when the server has ended
        self._say_goodbye()
        self._shut()

    def _say_goodbye(self) -> None:
        """Send DISC, unless that cannot be: a client that leaves without it breaks a rule, above all after ESHUTDOWN."""
        if self._is_open and self._transmission.error is None and not self._out:
            goodbye = self._transmission.request(CMD_DISC, 0, 0, 0, 0)
            # The server may be gone or its socket full: it learns by the close.
            with contextlib.suppress(OSError):
                self._sock.send(goodbye)

    def _shut(self) -> None:
        self._is_open = False
        self._loop.remove_reader(self._fd)
        if self._writer_is_set:
            self._loop.remove_writer(self._fd)
            self._writer_is_set = False
        self._send_soon.cancel()
        self._read_on_soon.cancel()
        if self._ticker is not None:
            self._ticker.cancel()
        self._out.clear()
        self._sock.close()
        self.ended.set()
        if self in _given_up:
            _given_up.remove(self)

    def _fail(self, reason: str) -> None:
        if self._is_open:
            self._shut()
            self._lost(reason)

    def _garbled(self, reason: str) -> None:
        """The server breaks the protocol: read nothing more but the end."""
        if not any(
            each.command in _WRITING for each in self._transmission.in_flight.values()
        ):
            self._fail(reason)
            return
        self._is_garbled = True
        self._out.clear()
        if self._writer_is_set:
            self._loop.remove_writer(self._fd)
            self._writer_is_set = False
        with contextlib.suppress(OSError):  # it has gone: the reader will see
            self._sock.shutdown(socket.SHUT_WR)
        self._lost(reason)

    def _tick(self) -> None:
        """Look whether a request has waited for too long."""
        self._ticker = None
        seen, heard = self._seen, self._has_heard
        self._seen, self._has_heard = {}, False
        for cookie, request in self._transmission.in_flight.items():
            if request.private is None:
                continue  # given up already
            waited = self._seen[cookie] = seen.get(cookie, -self._tick_s) + self._tick_s
            is_read = request.command in _READING
            limit = self.uri.read_timeout_s if is_read else self.uri.write_timeout_s
            if limit and waited >= limit * (TALKING_FACTOR if heard else 1):
                name = CMD_NAMES[request.command]
                self._lost(f"no answer to {name} within {limit:g} s")
                return
        if self._seen:
            self._ticker = _clock.call_later(self._tick_s, self._tick)

    def _send_out(self) -> None:
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
        if not self._is_open:
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
        if self._is_garbled:
            self._read_to_the_end()
            return
        transmission = self._transmission
        receive = self._sock.recv_into
        completed = self._completed
        self._has_heard = True
        try:
            for _ in range(RECEIVES_MAX):
                got = receive(transmission.get_buffer())
                if not got:
                    self._fail("server hung up")
                    return
                for completion in transmission.buffer_updated(got):
                    if completion.private is not None:
                        self.in_flight -= 1
                        completed(completion)
                if self._is_given_up:
                    self._end_if_answered()
                if not self._is_open:
                    return  # an endio has closed us, or nothing more is owed
            self._read_on_soon.ask()
        except BlockingIOError:
            return
        except ReplyError as error:
            self._garbled(str(error))
            self._read_on_soon.ask()
        except OSError as error:
            self._fail(_sentence(error))

    def _read_on(self) -> None:
        """Others had their turn: receive what is left. uvloop does not call again after an error."""
        if self._is_open:
            self._readable()

    def _read_to_the_end(self) -> None:
        try:
            for _ in range(RECEIVES_MAX):
                if not self._sock.recv(_HANDSHAKE_RECEIVE):
                    break
            else:
                self._read_on_soon.ask()
                return
        except BlockingIOError:
            return
        except OSError as error:
            log.debug("%s: %s", self.uri, error)
        self._shut()


async def wait_until_ended(name: str, uri: NbdUri) -> None:
    """Wait for the end of all connections to this export that were given up.

    Raises: ResolveError: the server owes an answer to a write, and neither gives it nor closes.
    """
    loop = asyncio.get_running_loop()
    try:
        async with timeout(END_TIMEOUT_S):
            for connection in tuple(_given_up):
                if connection._loop is loop and connection.uri.identity == uri.identity:
                    await connection.ended.wait()
    except TimeoutError:
        raise ResolveError(
            name,
            "writes of the connection before may still be under way: the server has neither"
            " answered them nor closed the connection. If it hangs, restart it",
            errnos.EBUSY,
        ) from None


async def connect(name: str, uri: NbdUri) -> NbdConnection:
    """Connect to `uri` and shake hands. `name` is what the user wrote.

    Raises: ResolveError.
    """
    sock = await _connected(name, uri)
    try:
        async with timeout(HANDSHAKE_TIMEOUT_S):
            handshake, ready = await _shake_hands(name, sock, uri)
        if handshake.error is not None:
            ready.close()  # with the end of TLS, which has to follow ABORT
            errno = errnos.ECONNRESET if handshake.has_hung_up else errnos.EINVAL
            raise ResolveError(name, str(handshake.error), errno)
        return NbdConnection(ready, handshake, uri)
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


async def _shake_hands(
    name: str, sock: socket.socket, uri: NbdUri
) -> tuple[ClientHandshake, socket.socket | TlsSocket]:
    """Shake hands; what was negotiated, and what to go on with."""
    channel = _Channel(sock)
    handshake = ClientHandshake(uri.export_name, want_tls=uri.tls is not None)
    while handshake.negotiated is None and handshake.error is None:
        data = b""
        with contextlib.suppress(ConnectionResetError):
            data = await channel.receive()
        if data:
            handshake.receive_data(data)
        else:
            handshake.receive_eof()
        # A server that has hung up may have said why before: what it said is received next.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in handshake.data_to_send():
                await channel.send(piece)
        if handshake.starts_tls:
            await channel.start_tls(name, uri)
            handshake.tls_started()
            for piece in handshake.data_to_send():
                await channel.send(piece)
    return handshake, channel.sock


class _Channel:
    """A socket during the handshake, with TLS from some time on."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock: socket.socket | TlsSocket = sock

    async def start_tls(self, name: str, uri: NbdUri) -> None:
        """Raises: ResolveError: a file is missing or wrong. OSError."""
        assert isinstance(self.sock, socket.socket)
        wanted = uri.tls
        assert wanted is not None
        try:
            context = client_context(
                wanted.certificates,
                verify_peer=wanted.verify_peer,
                psk_file=wanted.psk_file,
                psk_name=wanted.username,
            )
        except NbdTargetError as error:
            raise ResolveError(name, str(error)) from None
        try:
            tls = TlsSocket(
                self.sock, context, server_side=False, server_hostname=wanted.hostname
            )
        except ValueError as error:  # also UnicodeError
            reason = f"{wanted.hostname!r} is not a name for TLS: {error}"
            raise ResolveError(name, reason) from None
        self.sock = tls
        while not tls.handshake():
            await _until_ready(tls.fileno(), for_writing=tls.has_unsent)

    async def receive(self) -> bytes:
        while True:
            try:
                return self.sock.recv(_HANDSHAKE_RECEIVE)
            except BlockingIOError:
                await _until_ready(self.sock.fileno(), for_writing=False)

    async def send(self, data: bytes) -> None:
        while data:
            try:
                data = data[self.sock.send(data) :]
            except BlockingIOError:
                await _until_ready(self.sock.fileno(), for_writing=True)


async def _until_ready(fd: int, *, for_writing: bool) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    # The loop may call again before this coroutine has had its turn.
    if for_writing:
        loop.add_writer(fd, _set_done, ready)
    else:
        loop.add_reader(fd, _set_done, ready)
    try:
        await ready
    finally:
        (loop.remove_writer if for_writing else loop.remove_reader)(fd)


def _set_done(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


async def _connected(name: str, uri: NbdUri) -> socket.socket:
    last: OSError = OSError(errnos.EHOSTUNREACH, os.strerror(errnos.EHOSTUNREACH))
    for family, address in await _addresses(name, uri):
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        except OSError as error:
            last = error  # this kernel lacks the family, or a container may not use it
            continue
        try:
            sock.setblocking(False)
            _set_options(sock, family)
            async with timeout(CONNECT_TIMEOUT_S):
                await _connect_socket(sock, family, address)
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


async def _connect_socket(sock: socket.socket, family: int, address: _Address) -> None:
    """Raises: OSError."""
    loop = asyncio.get_running_loop()
    if family != socket.AF_VSOCK:
        await loop.sock_connect(sock, address)
        return
    # uvloop would look the address up, as if a CID were the name of a host.
    with contextlib.suppress(BlockingIOError):
        sock.connect(address)
        return
    await _until_ready(sock.fileno(), for_writing=True)
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error == errnos.ECONNRESET:
        error = errnos.ECONNREFUSED  # so other families say that nothing listens there
    if error:
        raise OSError(error, os.strerror(error))


async def _addresses(name: str, uri: NbdUri) -> list[tuple[int, _Address]]:
    if uri.socket_path:
        return [(socket.AF_UNIX, uri.socket_path)]
    if uri.cid is not None:
        return [(socket.AF_VSOCK, (uri.cid, uri.port))]
    numeric = socket.AI_NUMERICHOST
    try:
        # A number needs no resolver, and so no thread of the loop's executor.
        found = socket.getaddrinfo(
            uri.host, uri.port, type=socket.SOCK_STREAM, flags=numeric
        )
    except (socket.gaierror, UnicodeError):
        try:
            async with timeout(CONNECT_TIMEOUT_S):
                found = await asyncio.get_running_loop().getaddrinfo(
                    uri.host, uri.port, type=socket.SOCK_STREAM
                )
        except (OSError, UnicodeError) as error:  # also TimeoutError
            reason = f"cannot resolve {uri.host}: {str(error) or 'timed out'}"
            raise ResolveError(name, reason, errnos.EHOSTUNREACH) from None
    return [(entry[0], entry[4]) for entry in found]


def _set_blocking(sock: socket.socket, timeout_s: float) -> None:
    # Not `settimeout`, with which each receive would cost a poll of its own.
    sock.setblocking(True)
    timeval = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)


def _set_options(sock: socket.socket, family: int) -> None:
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return
    tcp = socket.IPPROTO_TCP
    sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(tcp, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(tcp, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(tcp, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def _sentence(error: OSError) -> str:
    if isinstance(error, TlsError):
        return str(error)
    text = os.strerror(error.errno) if error.errno else str(error)
    return text[:1].lower() + text[1:]


def _tick_s(uri: NbdUri) -> float:
    limits = [each for each in (uri.read_timeout_s, uri.write_timeout_s) if each]
    return min(limits, default=0.0) / TICKS


def _is_awaited(request: Completion) -> bool:
    """Whether it has not been taken back already."""
    return request.private is not None


def _is_awaited_read(request: Completion) -> bool:
    return request.command in _READING and request.private is not None


def _ignore(_: str) -> None:
    """The connection was given up, so its loss is no news."""


def _not_started(_: object) -> None:
    raise AssertionError("a connection is started before it is used")
