# SPDX-License-Identifier: Apache-2.0
"""A compiled `Receiver` without a server, whose connection notes what it is asked and told."""

import os
import select
import socket
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Final

from nbdtarget.fast import compiled
from nbdtarget.server.poller import Lateness
from tests.support.patience import PATIENCE_S

if compiled.IS_COMPILED:
    from nbdtarget_fast import FastFile, Plane, Receiver, Route
    from nbdtarget_sync import Syncer

__all__ = [
    "ANSWER",
    "FLUSH",
    "FUA",
    "LONG_NS",
    "NEVER_NS",
    "READ",
    "REST",
    "SIZE",
    "SKIP_MAX",
    "SLOW_NS",
    "STREAK",
    "WRITE",
    "Durable",
    "Rig",
    "request",
    "write",
]

SIZE = 1 << 16
READ, WRITE, FLUSH = 0, 1, 3
FUA: Final = 1
STREAK, SKIP_MAX, REST = 4, 8, 2
NEVER_NS = 1 << 62


ANSWER = struct.pack(">IIQ", 0x67446698, 0, 7)
LONG_NS: Final = int(PATIENCE_S * 10**9)
SLOW_NS: Final = 20 * 10**6


class Rig:
    """A Receiver whose connection notes what it is asked and told."""

    late_ns = NEVER_NS
    loop_fd = -1

    def __init__(
        self,
        path: Path,
        *,
        poison: bool = False,
        is_durable: bool = False,
        kind: socket.SocketKind = socket.SOCK_STREAM,
    ) -> None:
        self.content = os.urandom(SIZE)
        path.write_bytes(self.content)
        self.fd = os.open(path, os.O_RDWR)
        file = FastFile(
            self.fd,
            10**9,
            lambda: None,
            lambda *_: None,
            None,
            lambda: self.told.append("sync left"),
            lambda status: self.told.append(f"kick: {status}"),
        )
        file.size = file.read_max = file.write_max = SIZE
        self.file = file
        self.route: Route | None = self.new_route()
        self.ours, self.peer = socket.socketpair(type=kind)
        self.ours.setblocking(False)
        self.peer.setblocking(False)
        self.told: list[str] = []
        self.late = Lateness(self.late_ns)
        self.plain = True
        self.received = SimpleNamespace(begin=0, end=0, served=self.served)
        self.output = SimpleNamespace(base=0, end=0, sent_to=self.sent_to)
        self.polling = SimpleNamespace(last=None)
        self.plane = Plane(
            self.ours.fileno(),
            bytearray(1 << 14),
            bytearray(1 << 16),
            structured=False,
            can_write=True,
            size=SIZE,
            zero_min=1 << 20,
            length_max=SIZE,
            turn_ns=10**9,
            flush_at=1 << 16,
            poison=poison,
            ring_reads=self if is_durable else None,  # type: ignore[arg-type]  # it is only asked for room
            flush_for=self.flush_for if is_durable else None,
        )
        self.flushed: list[tuple[list[int], list[int]]] = []
        self.may = True
        self.losses = False
        self.receiver = Receiver(
            self.plane,
            maybe_route=self.maybe_route,
            is_plain=self.is_plain,
            received=self.received,
            output=self.output,
            polling=self.polling,
            may_poll=self.may_poll,
            has_no_losses=lambda: not self.losses,
            find_loop_fd=self.find_loop_fd,
            poll_ns=1000,
            poll_streak=STREAK,
            poll_skip_max=SKIP_MAX,
            poll_rest=REST,
            late=self.late,
            readable=lambda: self.told.append("readable"),
            stopped=lambda stop: self.told.append(f"stopped {stop}"),
            ended=lambda: self.told.append("ended"),
            failed=lambda error: self.told.append(f"failed: {error}"),
        )

    def find_loop_fd(self) -> int:
        return self.loop_fd

    def room(self) -> tuple[int, int]:
        return 100, 0

    def flush_for(self, writes: list[int], flushes: list[int]) -> None:
        self.flushed.append((writes, flushes))

    def new_route(self) -> "Route":
        route = Route.flat(self.file, 0, SIZE)
        route.can_read = route.can_write = True
        return route

    def maybe_route(self) -> "Route | None":
        self.told.append("route?")
        return self.route

    def is_plain(self) -> bool:
        self.told.append("plain?")
        return self.plain

    def may_poll(self) -> bool:
        self.told.append("poll?")
        return self.may

    def served(self, begin: int, end: int) -> None:
        self.received.begin, self.received.end = begin, end
        self.told.append(f"served {begin} {end}")

    def sent_to(self, base: int, end: int) -> None:
        self.output.base, self.output.end = base, end
        self.told.append(f"sent {base} {end}")

    def call(self, *requests: bytes) -> list[str]:
        """Send, call the Receiver as the loop would, and return what it asked and told."""
        self.peer.sendall(b"".join(requests))
        self.told.clear()
        self.receiver()
        return self.told[:]

    def replies(self) -> bytes:
        try:
            return self.peer.recv(1 << 16)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.receiver.close()
        self.plane.release()
        self.ours.close()
        self.peer.close()
        os.close(self.fd)


class Durable(Rig):
    """A Rig whose file has lent its thread."""

    def __init__(
        self,
        path: Path,
        *,
        fd: int | None = None,
        stays: bool = False,
        kind: socket.SocketKind = socket.SOCK_STREAM,
    ) -> None:
        """
        Args:
            fd: what is synced instead of the file.
            stays: something tells what the loop has to do, so the client may stay with the thread.
        """
        super().__init__(path, poison=True, is_durable=True, kind=kind)
        self.loop = select.epoll()  # as the one of an event loop
        self.loop.register(self.ours, select.EPOLLIN)
        if stays:
            self.loop_fd = self.loop.fileno()
        self.syncer = Syncer(self.fd if fd is None else fd)
        self.syncer.begin()
        self.end_of_sync()
        self.file.syncer = self.syncer
        self.file.sync_wait_ns = LONG_NS
        assert self.route is not None
        self.route.may_sync = lambda: self.may

    def end_of_sync(self) -> int:
        """Wait for the end of a sync that runs."""
        assert select.select([self.syncer.event_fd], [], [], PATIENCE_S)[0]
        return self.syncer.take()

    def until_alone(self) -> None:
        """Send requests until the next durable request is expected, of a client that is alone."""
        for _ in range(STREAK):
            self.call(request(FLUSH, 0, 0))
        assert len(self.flushed) == STREAK
        self.flushed.clear()

    def close(self) -> None:
        self.file.syncer = None
        self.syncer.close()
        self.loop.close()
        super().close()


def request(
    command: int, offset: int, length: int = 512, payload: bytes = b"", flags: int = 0
) -> bytes:
    head = struct.pack(">IHHQQI", 0x25609513, flags, command, 7, offset, length)
    return head + payload


def write(nr: int, flags: int = 0) -> bytes:
    return request(WRITE, nr * 4096, 512, bytes([nr]) * 512, flags)
