# SPDX-License-Identifier: Apache-2.0
"""A compiled `Plane` over a socket pair and a file, where the compiled fast path is built."""

import os
import socket
import struct
from pathlib import Path
from typing import Any

from nbdtarget.fast import compiled

if compiled.IS_COMPILED:
    from nbdtarget_fast import FastFile, Plane, Route

__all__ = ["COOKIE", "SIZE", "Bench", "data_chunk", "request", "simple"]

SIZE = 1 << 20
COOKIE = 0x1122334455667788


def request(
    command: int,
    offset: int,
    length: int,
    payload: bytes = b"",
    *,
    flags: int = 0,
    cookie: int = COOKIE,
    magic: int = 0x25609513,
) -> bytes:
    head = struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length)
    return head + payload


def data_chunk(offset: int, data: bytes | bytearray, cookie: int = COOKIE) -> bytes:
    head = struct.pack(">IHHQI", 0x668E33EF, 1, 1, cookie, len(data) + 8)
    return head + struct.pack(">Q", offset) + bytes(data)


def simple(cookie: int = COOKIE) -> bytes:
    return struct.pack(">IIQ", 0x67446698, 0, cookie)


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    peer.setblocking(False)
    return ours, peer


class Bench:
    """A plane over a socket pair and a file of random bytes.

    Attributes:
        ours, peer: the sockets of the plane and of its client.
        file, route: what the plane reads and writes.
        told: what the file has reported.

    Args:
        sockets: the plane's and the client's, neither of which blocks; None: a new pair.
        options: further ones of `Plane`.
    """

    def __init__(
        self,
        path: Path,
        *,
        size: int = SIZE,
        sockets: Any = None,
        received: int = 1 << 16,
        arena: int = 1 << 18,
        slow_ns: int = 10**9,
        **options: Any,
    ) -> None:
        self.content = bytearray(os.urandom(size))
        path.write_bytes(self.content)
        self.fd = os.open(path, os.O_RDWR)
        self.told: list[str] = []
        self.file = FastFile(
            self.fd,
            slow_ns,
            lambda: self.told.append("slow"),
            lambda *how: self.told.append(f"unfinished {how}"),
            None,
            lambda: self.told.append("sync left"),
            lambda status: self.told.append(f"kick: {status}"),
        )
        self.file.size = self.file.read_max = self.file.write_max = size
        pair: tuple[Any, Any] = sockets or _socket_pair()
        self.ours, self.peer = pair
        self.received, self.arena = bytearray(received), bytearray(arena)
        defaults = {
            "structured": True,
            "can_write": True,
            "zero_min": 32 << 10,
            "length_max": 200_000,
            "turn_ns": 10**9,
            "flush_at": 1 << 17,
            "poison": False,
        }
        self.plane = Plane(
            self.ours.fileno(),
            self.received,
            self.arena,
            size=size,
            **{**defaults, **options},
        )
        self.route = self.new_route()

    def new_route(self) -> "Route":
        route = Route.flat(self.file, 0, len(self.content))
        route.can_read = route.can_write = True
        return route

    def turn(self, sent: bytes = b"", *, poll_ns: int = 0, lone: int = 0) -> int:
        if sent:
            self.peer.sendall(sent)
        plane = self.plane
        places = (plane.begin, plane.end, plane.base, plane.out)
        return plane.turn(self.route, poll_ns, False, *places, lone)

    def replies(self) -> bytes:
        found = b""
        while True:
            try:
                found += self.peer.recv(1 << 20)
            except BlockingIOError:
                return found

    def on_disk(self) -> bytes:
        return os.pread(self.fd, len(self.content), 0)

    def close(self) -> None:
        self.route.close()
        self.plane.release()
        self.ours.close()
        self.peer.close()
        os.close(self.fd)
