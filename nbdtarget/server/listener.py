# SPDX-License-Identifier: Apache-2.0
"""`Listener`: sockets that accept connections, and the connections themselves.

Theory of operation. `start` may be called for any number of addresses. All connections share one budget.

    unix:PATH        a socket that a dead server left behind is replaced; a socket of a living server is refused. Its mode is
                     as configured, independently of the umask (`nbdtarget.common.unix_socket`)
    tcp:HOST:PORT    every address of HOST; port 0 takes a free one; [::1] in brackets
    vsock:CID:PORT   from virtual machines of this host, or from their host, without a network

How many connections there may be, and from where: `admission.py`. A connection above a bound is closed at once. When the
process is out of file descriptors, it accepts nothing for ACCEPT_PAUSE_S, and clients wait in the kernel's backlog.

A connection is kept in `_connections` until its last bio has ended, even when its socket is
long closed: it counts as long as it holds something.

Clients that stall in the middle of something are disconnected: `stalls.py`.

Close. Accepting ends, each connection is told (`Connection.shutdown`), and connections that are left after `grace_s`
are aborted. Bios that are in flight even then end into closed connections.
"""

import asyncio
import errno as errnos
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import quote

from nbdtarget.common.access import AccessRules, Identity
from nbdtarget.common.clock import Clock, LoopClock, Timer
from nbdtarget.common.errors import ListenError
from nbdtarget.common.heap import LEFT_ALONE, Heap
from nbdtarget.common.passed_socket import passed_socket
from nbdtarget.common.say_rarely import SayRarely
from nbdtarget.common.tls_socket import TlsSocket
from nbdtarget.common.turns import Turns
from nbdtarget.common.unix_socket import (
    PRIVATE,
    SocketAccess,
    SocketInUseError,
    UnixSocket,
    take_unix_socket,
)
from nbdtarget.devices.base import Device
from nbdtarget.devices.file.buffers import ALIGNED_BUFFERS
from nbdtarget.server.address import (
    UnixAddress,
    VsockAddress,
    parse_address,
    public_address,
)
from nbdtarget.server.admission import Admission, origin_of
from nbdtarget.server.buffers import BufferPool
from nbdtarget.server.connection import Connection
from nbdtarget.server.export import ExportDirectory
from nbdtarget.server.gate import Gates
from nbdtarget.server.limits import Budget, Limits
from nbdtarget.server.moving import ListenerState, MovedConnection, SocketState
from nbdtarget.server.peer import hang_up_events, identity_of
from nbdtarget.server.poller import Polling
from nbdtarget.server.refusals import Refusals
from nbdtarget.server.rest import come_to_rest
from nbdtarget.server.shared import Shared
from nbdtarget.server.shares import Share, Shares
from nbdtarget.server.spare_memory import SpareMemory
from nbdtarget.server.stalls import Stalls
from nbdtarget.server.states import HANDSHAKE
from nbdtarget.server.tls import NO_TLS, ListenerTls, TlsOptions
from nbdtarget.server.traffic import Accounts, Client
from nbdtarget_protocol.handshake import TlsMode

__all__ = ["Listener", "export_uri"]

log = logging.getLogger(__name__)

ACCEPTS_MAX: Final = 16  # in one turn of the loop
ACCEPT_PAUSE_S: Final = 1.0
_OUT_OF_FILES: Final = (errnos.EMFILE, errnos.ENFILE, errnos.ENOBUFS, errnos.ENOMEM)


def export_uri(pattern: str, name: str = "") -> str:
    """Return the NBD URI of the export `name`; `pattern` is one that `start` returned."""
    return pattern.replace("{name}", quote(name, safe=""))


class Listener:
    """Serves a directory's exports; see the module head.

    Args:
        directory: the exports.
        limits: every bound.
        access: which users may connect to unix sockets.
        tls: of addresses that are started without one of their own.
        rules: who may attach to what; they may change while it serves.
        heap: is trimmed when clients have ended; LEFT_ALONE if the process belongs to a program that uses the API, or to tests.
    """

    def __init__(
        self,
        directory: ExportDirectory,
        *,
        limits: Limits | None = None,
        clock: Clock | None = None,
        hang_up_events: Callable[[socket.socket | TlsSocket], int] = hang_up_events,
        access: SocketAccess = PRIVATE,
        tls: ListenerTls = NO_TLS,
        rules: AccessRules | None = None,
        heap: Heap = LEFT_ALONE,
    ) -> None:
        self._hang_up_events = hang_up_events
        self._directory = directory
        self._clock = clock or LoopClock()
        self._heap = heap
        self._shared: Shared | None = None
        self._tls = tls
        self._rules = rules or AccessRules()
        self.accounts = Accounts()
        self._sockets: dict[int, socket.socket] = {}
        self._tls_of: dict[int, ListenerTls] = {}  # by descriptor
        self._addresses: dict[int, str] = {}  # what was asked for, by descriptor
        self._unix_sockets: list[UnixSocket] = []
        self._access = access
        # The connections, and the origin of each, in the order of accepting, in which a shutdown tells them.
        self._connections: dict[Connection, str] = {}
        self._shaking: dict[Connection, None] = {}  # may hold some that are attached
        self._refused = SayRarely(self._clock)
        self.nr_refused = 0
        self.refusals = Refusals(self._clock)
        self._moved: list[tuple[socket.socket, MovedConnection]] = []
        self._is_accepting = False
        self._is_closed = False
        self._all_gone: asyncio.Future[None] | None = None
        self._accept_timer: Timer | None = None
        self._use(limits or Limits())

    def _use(self, limits: Limits) -> None:
        """Take these bounds: nothing is served yet."""
        assert self._shared is None
        self._limits = limits
        self._pool = BufferPool(limits.pool_bytes_max)
        self._spare_memory = SpareMemory(
            self._clock, self._pool, self._heap, (ALIGNED_BUFFERS,)
        )
        self._admission = Admission(limits)
        self._stalls = Stalls(
            self._limits,
            self._clock,
            lambda: self._connections,
            self._nr_waiters,
            self._met,
        )

    @property
    def nr_connections(self) -> int:
        return len(self._connections)

    def _nr_waiters(self) -> int:
        return 0 if self._shared is None else self._shared.budget.nr_waiters

    def _met(self, bound: str) -> None:
        if self._shared is not None:
            self._shared.budget.bounds_met.met(bound)

    @property
    def limits(self) -> Limits:
        return self._limits

    def used(self) -> dict[str, int]:
        """How much of each bound is used now; of one for each connection, address or export: by the one that uses most of it.

        Bounds of time, and of a single request or handshake, are missing.
        """
        loads = [each.load for each in self._connections]
        requests, sizes, waiting = zip(*loads, strict=True) if loads else ((0,),) * 3
        used = {
            "handshakes_max": sum(not each.was_attached for each in self._shaking),
            "requests_in_flight_max": max(requests),
            "bytes_in_flight_max": max(sizes),
            "send_buffer_max": max(waiting),
            "requests_total_max": 0,
            "bytes_total_max": 0,
            **self._admission.used(),
        }
        if self._shared is not None:
            budget = self._shared.budget
            used["requests_total_max"] = budget.nr_requests
            used["bytes_total_max"] = budget.nr_bytes
            used |= self._shared.shares.used()
        return used

    def clients(self) -> list[Client]:
        """Return what is known of each connection, in the order of connecting."""
        return [each.client for each in self._connections]

    def share_of(self, device: Device) -> Share | None:
        """Return what the clients of `device` have in flight; None: it has none."""
        return None if self._shared is None else self._shared.shares.maybe_of(device)

    @property
    def budget(self) -> Budget | None:
        """Return the requests in flight of all connections; None before the first `start`."""
        return None if self._shared is None else self._shared.budget

    async def start(self, address: str, tls: ListenerTls | None = None) -> list[str]:
        """Listen on `address`: "unix:PATH", "tcp:HOST:PORT" or "vsock:CID:PORT".

        Returns: NBD URIs with "{name}" for the export's name; see `export_uri`.
        Raises: ListenError.
        """
        where = parse_address(address)
        if isinstance(where, UnixAddress):
            return [self._start_unix(where.path, address, tls)]
        if isinstance(where, VsockAddress):
            return [self._start_vsock(where, address, tls)]
        return await self._start_tcp(where.host, where.port, address, tls)

    async def start_fd(self, fd: int) -> list[str]:
        """Listen on a socket that was passed to this process, and own it from now on.

        Raises: ListenError: it is not a listening stream socket.
        """
        return [self.start_socket(passed_socket(fd))]

    def public_addresses(self) -> dict[str, ListenerTls]:
        """Return the addresses that other machines can reach, as they are, and what is asked of their clients."""
        found = {}
        for fd, sock in self._sockets.items():
            if address := public_address(sock):
                found[address] = self._tls_of[fd]
        return found

    async def close(self, grace_s: float = 5.0) -> None:
        """Stop accepting, finish what is in flight, close; abort after `grace_s`."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stop_accepting()
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()
        for taken in self._unix_sockets:
            taken.release()
        if self._accept_timer is not None:
            self._accept_timer.cancel()
        self._stalls.close()
        for connection in list(self._connections):
            connection.shutdown()
        if self._connections:
            all_gone = asyncio.get_running_loop().create_future()
            self._all_gone = all_gone
            timer = self._clock.call_later(grace_s, self._abort_all)
            await all_gone
            timer.cancel()
        self.refusals.close()
        self._spare_memory.close()

    def _abort_all(self) -> None:
        for connection in list(self._connections):
            connection.abort()
        if self._connections:
            log.warning(
                "%d connections closed with I/O in flight", len(self._connections)
            )
        self._set_all_gone()

    def _set_all_gone(self) -> None:
        if self._all_gone is not None and not self._all_gone.done():
            self._all_gone.set_result(None)

    # ---- from one process to another ----

    async def freeze(
        self, within_s: float, is_hopeless: Callable[[], bool] = lambda: False
    ) -> list[str]:
        """Accept no connection and begin no request, until `thaw`; wait for those that have begun.

        A client that is in its handshake, or does not send the rest of a payload, is not waited for so long, and left out
        of what is moved (`rest.py`).
        Args: is_hopeless: whether it is known that some requests will not end.
        Returns: the clients whose requests have not ended in time, with what they have asked for.
        """
        self._stop_accepting()
        for connection in list(self._connections):
            connection.freeze()
        busy = await come_to_rest(
            lambda: list(self._connections), self._clock, within_s, is_hopeless
        )
        if not busy:
            return []
        return [each.asks for each in self._connections if each.is_busy]

    def thaw(self) -> None:
        """Undo `freeze`."""
        if not self._is_closed:
            self._start_accepting()
        for connection in list(self._connections):
            connection.thaw()

    def moved_state(self) -> tuple[ListenerState, list[int]]:
        """After `freeze`: what another process needs to go on, and the descriptors that belong to it.

        Clients that are encrypted, and so cannot be moved, are left out, and so are those that have not come to rest. They notice
        nothing before `forget`.
        """
        sockets, fds = [], []
        for fd in self._sockets:
            taken = next(
                (u for u in self._unix_sockets if u.socket.fileno() == fd), None
            )
            fds.append(fd)
            if taken is not None:
                fds.append(taken.lock)
            path = None if taken is None else taken.path
            tls = self._tls_of[fd].options
            sockets.append(SocketState(path, self._addresses[fd], tls))
        connections = []
        for connection, origin in list(self._connections.items()):
            moved = connection.moved_state()
            if moved is not None:
                connections.append(MovedConnection(origin, moved))
                fds.append(connection.fileno)
        state = ListenerState(tuple(sockets), tuple(connections), self._limits)
        return state, fds

    def forget(self) -> None:
        """Close all descriptors: they are another process's now. No client that was moved is told anything, and no file removed.

        Clients that could not be moved are disconnected.
        """
        self._is_closed = True
        self.refusals.close()
        self._spare_memory.close()
        for connection in list(self._connections):
            connection.leave()
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()

    def take_over(
        self,
        moved: ListenerState,
        fds: Sequence[int],
        tls_of: Callable[[TlsOptions], ListenerTls] = ListenerTls,
    ) -> list[str]:
        """Own the sockets of another process; nothing is accepted or served before `go_on`.

        TLS of each socket and the bounds stay as they were there.

        Args: tls_of: returns TLS with these options.
        Returns: the NBD URIs, as of `start`.
        Raises: NbdTargetError: certificates cannot be read.
        """
        self._use(moved.limits)
        self._share()
        left = list(fds)
        uris = []
        for each in moved.sockets:
            sock = socket.socket(fileno=left.pop(0))
            sock.setblocking(False)
            tls = tls_of(each.tls)
            self._own(sock, tls, each.address)
            if each.path is not None:
                taken = UnixSocket(sock, each.path, left.pop(0))
                self._unix_sockets.append(taken)
            uris.append(_uri_pattern(sock, tls))
        for connection in moved.connections:
            client = socket.socket(fileno=left.pop(0))
            self._moved.append((client, connection))
        assert not left
        return uris

    def go_on(self) -> None:
        """Accept, and serve the connections that were taken over."""
        assert self._shared is not None
        moved, self._moved = self._moved, []
        begun = []
        for client, each in moved:
            client.setblocking(False)
            try:
                identity = identity_of(client)
            except OSError:
                identity = Identity()  # it has gone, which the connection will notice
            connection = Connection(
                client, each.state.peer, self._shared, client=identity
            )
            self._connections[connection] = each.origin
            self._admission.enter(each.origin)
            self._stalls.connected()
            connection.take_over(each.state)
            begun.append((connection, each.state.begun))
        for connection, ranges in begun:
            connection.go_on_with(ranges)
        self._start_accepting()

    # ---- sockets ----

    def _start_unix(self, path: str, address: str, tls: ListenerTls | None) -> str:
        try:
            taken = take_unix_socket(path, self._access)
        except SocketInUseError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise ListenError(address, reason) from error
        except OSError as error:
            raise ListenError(address, str(error.strerror or error)) from error
        self._unix_sockets.append(taken)
        return self.start_socket(taken.socket, tls, address)

    def _start_vsock(
        self, where: VsockAddress, address: str, tls: ListenerTls | None
    ) -> str:
        try:
            sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        except OSError as error:
            raise ListenError(address, f"no vsock here: {error.strerror}") from error
        try:
            sock.bind((where.cid, where.port))
        except OSError as error:
            sock.close()
            raise ListenError(address, str(error.strerror)) from error
        return self.start_socket(sock, tls, address)

    async def _start_tcp(
        self, host: str, port: int, address: str, tls: ListenerTls | None
    ) -> list[str]:
        loop = asyncio.get_running_loop()
        try:
            infos = await loop.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            raise ListenError(address, str(error.strerror)) from error
        except UnicodeError as error:
            raise ListenError(address, f"not a host name: {error}") from error
        patterns: list[str] = []
        bound: list[socket.socket] = []
        try:
            for family, kind, proto, _, sockaddr in dict.fromkeys(infos):
                sock = socket.socket(family, kind, proto)
                bound.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                # The first socket's free port, if 0 was asked for, serves the others too.
                sock.bind((sockaddr[0], port, *sockaddr[2:]))
                port = sock.getsockname()[1]
        except OSError as error:
            for sock in bound:
                sock.close()
            raise ListenError(address, str(error.strerror)) from error
        patterns.extend(self.start_socket(sock, tls, address) for sock in bound)
        return patterns

    def start_socket(
        self, sock: socket.socket, tls: ListenerTls | None = None, address: str = ""
    ) -> str:
        """Listen on a bound stream socket, and own it from now on; its NBD URI.

        Args: address: what was asked for; "": the socket was passed.
        """
        self._share()
        assert self._shared is not None
        sock.setblocking(False)
        sock.listen(self._limits.backlog_max)
        tls = tls or self._tls
        self._own(sock, tls, address)
        if self._is_accepting:
            self._shared.loop.add_reader(sock.fileno(), self._accept, sock)
        else:
            self._start_accepting()
        return _uri_pattern(sock, tls)

    def _own(self, sock: socket.socket, tls: ListenerTls, address: str) -> None:
        fd = sock.fileno()
        self._sockets[fd], self._tls_of[fd], self._addresses[fd] = sock, tls, address

    def _share(self) -> None:
        if self._shared is None:
            budget = Budget(self._limits)
            self._shared = Shared(
                loop=asyncio.get_running_loop(),
                clock=self._clock,
                limits=self._limits,
                budget=budget,
                shares=Shares(budget, self._limits),
                pool=self._pool,
                directory=self._directory,
                gates=Gates(self._clock),
                turns=Turns(),
                polling=Polling(),
                starved=self._stalls.starved,
                closed=self._connection_closed,
                hang_up_events=self._hang_up_events,
                rules=self._rules,
                accounts=self.accounts,
                refusals=self.refusals,
            )

    # ---- connections ----

    def _start_accepting(self) -> None:
        assert self._shared is not None
        self._accept_timer = None
        self._is_accepting = True
        for fd, sock in self._sockets.items():
            self._shared.loop.add_reader(fd, self._accept, sock)

    def _stop_accepting(self) -> None:
        if self._is_accepting:
            assert self._shared is not None
            self._is_accepting = False
            for fd in self._sockets:
                self._shared.loop.remove_reader(fd)

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(ACCEPTS_MAX):
            try:
                client, address = sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OUT_OF_FILES:
                    log.warning("cannot accept: %s", error.strerror)
                    self._stop_accepting()
                    self._accept_timer = self._clock.call_later(
                        ACCEPT_PAUSE_S, self._start_accepting
                    )
                # Any other error is about that one client, which is gone already.
                return
            origin = origin_of(client, address)
            refusal = self._admission.maybe_refusal(origin, client.fileno())
            if refusal is not None:
                client.close()
                if refusal.bound:
                    self._met(refusal.bound)
                self.nr_refused += 1
                if nr := self._refused.count():
                    log.warning("clients refused: %d: %s", nr, refusal)
            else:
                self._connect(client, origin, self._tls_of[sock.fileno()])

    def _connect(self, client: socket.socket, origin: str, tls: ListenerTls) -> None:
        assert self._shared is not None
        client.setblocking(False)
        try:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                client.setsockopt(socket.SOL_SOCKET, option, self._limits.socket_buffer)
            if client.family in (socket.AF_INET, socket.AF_INET6):
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            peer = _peer_name(client)
            identity = identity_of(client)
        except OSError:
            client.close()  # gone between accept and here
            return
        self._make_room_for_handshake()
        connection = Connection(client, peer, self._shared, tls, identity)
        self._connections[connection] = origin
        self._shaking[connection] = None
        self._admission.enter(origin)
        self._stalls.connected()
        connection.start()

    def _make_room_for_handshake(self) -> None:
        """Close the oldest connection that is in its handshake, if there are too many: clients that say nothing
        must not keep others out. One whose client was refused, and has not gone yet, counts, too, and goes first."""
        if len(self._shaking) < self._limits.handshakes_max:
            return
        # Those that are attached meanwhile are forgotten here, and not one by one.
        shaking = [each for each in self._shaking if not each.was_attached]
        self._shaking = dict.fromkeys(shaking)
        if len(shaking) >= self._limits.handshakes_max:
            if nr := self._refused.count():
                log.warning(
                    "handshakes given up: %d: %d clients are in theirs (handshakes_max)",
                    nr,
                    len(shaking),
                )
            self._met("handshakes_max")
            min(shaking, key=lambda each: each.state == HANDSHAKE).abort()

    def _connection_closed(self, connection: Connection) -> None:
        self._shaking.pop(connection, None)
        origin = self._connections.pop(connection, None)
        if origin is not None:
            self._admission.leave(origin)
        if not self._is_closed:
            self._spare_memory.connection_ended()
        if self._is_closed and not self._connections:
            self._set_all_gone()


def _uri_pattern(sock: socket.socket, tls: ListenerTls) -> str:
    name = sock.getsockname()
    scheme = "nbds" if tls.mode is TlsMode.REQUIRE else "nbd"
    if sock.family == socket.AF_UNIX:
        path = os.path.abspath(os.fsdecode(name))
        return f"{scheme}+unix:///{{name}}?socket={quote(path)}"
    if sock.family == socket.AF_VSOCK:
        return f"{scheme}+vsock://{_reachable_cid(name[0])}:{name[1]}/{{name}}"
    host = f"[{name[0]}]" if sock.family == socket.AF_INET6 else name[0]
    return f"{scheme}://{host}:{name[1]}/{{name}}"


def _reachable_cid(cid: int) -> int:
    """The number by which this machine is known to the other side, if it listens on all of them."""
    if cid != socket.VMADDR_CID_ANY:
        return cid
    return socket.VMADDR_CID_HOST


def _peer_name(client: socket.socket) -> str:
    if client.family == socket.AF_UNIX:
        return f"client {client.fileno()}"
    name = client.getpeername()
    if client.family == socket.AF_VSOCK:
        return f"vsock:{name[0]}:{name[1]}"
    return f"{name[0]}:{name[1]}"
