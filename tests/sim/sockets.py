# SPDX-License-Identifier: Apache-2.0
"""Sockets in memory, which do all that a real one may do to a server, by seed.

Theory of operation. A `SimNetwork` makes them for one `SimLoop`. A connected pair is two
*pipes*, each of a bounded number of bytes. By seed a receive brings only part of what is
there, a send takes only part of what it is given, and either may say EAGAIN though the
socket was ready, as a kernel may (but not a receive from a socket that has an error: a loop need not call again).

    close         the peer reads what is left, then the end; if the closed side had not read
                  all that it got, then ECONNRESET instead. What the peer sends gets EPIPE
    reset         as close, but what was on its way to the peer may be lost too
    shutdown      of the sending half: the peer reads what is left, then the end

Descriptor numbers are the lowest that are free, so that they are used again at once.
"""

import errno as errnos
import os
import random
import select
import socket
from collections import deque
from collections.abc import Sequence
from typing import Final

from tests.sim.loop import SimLoop

__all__ = ["SimNetwork", "SimSocket"]

FD_MIN: Final = 3
Buffer = bytes | bytearray | memoryview


class _Pipe:
    """One direction of a connection."""

    __slots__ = ("broken", "capacity", "data", "ended", "reset")

    def __init__(self, capacity: int) -> None:
        self.data = bytearray()
        self.capacity = capacity
        self.ended = False  # nothing more will come
        self.reset = False  # the end is ECONNRESET
        self.broken = False  # the reading end is closed


class SimSocket:
    """One end; what of `socket.socket` the server uses. Non-blocking always."""

    type = socket.SOCK_STREAM

    def __init__(
        self,
        network: "SimNetwork",
        incoming: _Pipe | None = None,
        outgoing: _Pipe | None = None,
    ) -> None:
        self.family = network.family
        self.peer: SimSocket | None = None
        self._network = network
        self._in = incoming or _Pipe(0)
        self._out = outgoing or _Pipe(0)
        self._backlog: deque[SimSocket] | None = None
        self._fd = network.take_fd(self)

    def fileno(self) -> int:
        return self._fd

    def setblocking(self, flag: bool) -> None:
        assert not flag

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self._check_open()

    def getsockopt(self, level: int, option: int, length: int) -> bytes:
        """Return the only option that the server asks for: the user at the other end, which is root without further groups."""
        self._check_open()
        return bytes(length) if option == socket.SO_PEERCRED else b""

    def getpeername(self) -> tuple[str, int]:
        self._check_open()
        return "192.0.2.1", self._fd

    def getsockname(self) -> str | tuple[str, int]:
        return "/sim" if self.family == socket.AF_UNIX else ("192.0.2.2", 10809)

    # ---- listening ----

    def listen(self, backlog: int) -> None:
        self._backlog = deque(maxlen=backlog)
        self._network.listening = self

    def accept(self) -> tuple["SimSocket", object]:
        assert self._backlog is not None
        if not self._backlog:
            raise BlockingIOError
        return self._backlog.popleft(), self.getpeername()

    def put_in_backlog(self, client: "SimSocket") -> None:
        assert self._backlog is not None
        assert len(self._backlog) < (self._backlog.maxlen or 0)
        self._backlog.append(client)

    # ---- what the loop asks ----

    @property
    def is_readable(self) -> bool:
        if self._backlog is not None:
            return bool(self._backlog)
        return bool(self._in.data) or self._in.ended

    @property
    def is_writable(self) -> bool:
        out = self._out
        return len(out.data) < out.capacity or out.broken

    @property
    def has_error(self) -> bool:
        return self._in.reset

    # ---- data ----

    def recv(self, length: int, flags: int = 0) -> bytes:
        assert flags in (0, socket.MSG_PEEK)
        data = self._in.data
        taken = self._may_take(length)
        piece = bytes(data[:taken])
        if not flags:
            del data[:taken]
        return piece

    def recv_into(self, buffer: memoryview | bytearray) -> int:
        data = self._in.data
        taken = self._may_take(len(buffer))
        if taken:
            buffer[:taken] = data[:taken]
            del data[:taken]
        return taken

    def recvmsg_into(
        self, buffers: Sequence[memoryview]
    ) -> tuple[int, list[object], int, object]:
        taken = self._may_take(sum(map(len, buffers)))
        left = taken
        for buffer in buffers:
            part = min(left, len(buffer))
            buffer[:part] = self._in.data[:part]
            del self._in.data[:part]
            left -= part
        return taken, [], 0, None

    def send(self, data: Buffer) -> int:
        out = self._out
        self._check_open()
        if out.broken:
            raise BrokenPipeError(errnos.EPIPE, os.strerror(errnos.EPIPE))
        assert not out.ended, "sent after shutdown"
        room = min(out.capacity - len(out.data), len(data))
        if not room or self._network.says_again():
            raise BlockingIOError
        sent = self._network.part_of(room)
        out.data += data[:sent]
        return sent

    def sendmsg(self, buffers: Sequence[Buffer]) -> int:
        return self.send(b"".join(buffers))

    def _may_take(self, length: int) -> int:
        """How many bytes a receive brings. Raises as a socket does."""
        self._check_open()
        pipe = self._in
        assert length, "a receive into nothing looks like the end"
        if not pipe.data:
            if pipe.reset:
                raise ConnectionResetError(
                    errnos.ECONNRESET, os.strerror(errnos.ECONNRESET)
                )
            if pipe.ended:
                return 0
            raise BlockingIOError
        if not pipe.reset and self._network.says_again():
            raise BlockingIOError
        return self._network.part_of(min(length, len(pipe.data)))

    # ---- ends ----

    def shutdown(self, how: int) -> None:
        assert how in (socket.SHUT_RD, socket.SHUT_WR)
        self._check_open()
        if self._out.broken and self._in.reset:
            raise OSError(errnos.ENOTCONN, os.strerror(errnos.ENOTCONN))
        if how == socket.SHUT_WR:
            self._out.ended = True
        elif self.family == socket.AF_UNIX:
            self._in.broken = True  # over TCP the peer notices nothing

    def hang_up_events(self) -> int:
        """As `nbdtarget.server.peer.hang_up_events`."""
        self._check_open()
        events = select.POLLRDHUP if self._in.ended else 0
        if self._in.ended and (self._out.ended or self._out.broken):
            events |= select.POLLHUP
        return events | (select.POLLERR if self._in.reset else 0)

    def close(self) -> None:
        if self._fd < 0:
            return
        self._out.ended = True
        self._out.reset |= bool(self._in.data)
        self._in.broken = True
        self._in.data.clear()
        if self._backlog is not None:
            self._network.listening = None
            for client in self._backlog:
                client.close()
        self._network.give_back_fd(self._fd)
        self._fd = -1

    def reset(self) -> None:
        """Reset the connection, without an orderly end."""
        self._out.reset = True
        if self._network.random.random() < 0.5:
            self._out.data.clear()
        self.close()

    def left(self) -> bytes:
        """Return the bytes that have arrived and were not received. They stay here when the peer dies."""
        return bytes(self._in.data)

    def _check_open(self) -> None:
        if self._fd < 0:
            raise OSError(errnos.EBADF, os.strerror(errnos.EBADF))


class SimNetwork:
    """Makes the sockets of one loop.

    Args:
        partial: how often a send or receive is cut short.
        again: how often one says EAGAIN for nothing.
        capacity: bytes on the way in each direction of a connection.
    """

    def __init__(
        self,
        loop: SimLoop,
        rng: random.Random,
        *,
        partial: float = 0.0,
        again: float = 0.0,
        capacity: int = 64 << 10,
        family: int = socket.AF_UNIX,
    ) -> None:
        self.random = rng
        self.family = family
        self.listening: SimSocket | None = None
        self._loop = loop
        self._partial = partial
        self._again = again
        self._capacity = capacity

    def listener(self) -> SimSocket:
        """A bound socket: `listen` makes it the one that `connect` finds."""
        return SimSocket(self)

    def connect(self) -> SimSocket:
        """Connect a new client. Raises: ConnectionRefusedError: no socket listens."""
        if self.listening is None:
            raise ConnectionRefusedError
        client, server = self.pair()
        self.listening.put_in_backlog(server)
        return client

    def pair(self) -> tuple[SimSocket, SimSocket]:
        """Two connected ends."""
        there, back = _Pipe(self._capacity), _Pipe(self._capacity)
        one, other = SimSocket(self, back, there), SimSocket(self, there, back)
        one.peer, other.peer = other, one
        return one, other

    def take_fd(self, sock: SimSocket) -> int:
        fd = FD_MIN
        while fd in self._loop.sockets:
            fd += 1
        self._loop.sockets[fd] = sock
        return fd

    def give_back_fd(self, fd: int) -> None:
        self._loop.closed(fd)

    def says_again(self) -> bool:
        return bool(self._again) and self.random.random() < self._again

    def part_of(self, length: int) -> int:
        """How much of `length` is done: at least 1."""
        if length > 1 and self._partial and self.random.random() < self._partial:
            return self.random.randrange(1, length)
        return length
