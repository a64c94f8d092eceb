# SPDX-License-Identifier: Apache-2.0
"""A compiled `Plane` over a socket pair and a file, where the compiled fast path is built."""

import os
import socket
import struct
from pathlib import Path

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


class Bench:
    """A plane over a socket pair and a file of random bytes."""

    def __init__(
        self,
        path: Path,
        *,
        structured: bool = True,
        extended: bool = False,
        can_write: bool = True,
        received: int = 1 << 16,
        arena: int = 1 << 18,
        poison: bool = False,
        turn_ns: int = 10**9,
        slow_ns: int = 10**9,
    ) -> None:
        self.content = bytearray(os.urandom(SIZE))
        path.write_bytes(self.content)
        self.fd = os.open(path, os.O_RDWR)
        self.told: list[str] = []
        self.file = FastFile(
            self.fd,
            slow_ns,
            lambda: self.told.append("slow"),
            lambda *how: self.told.append(f"unfinished {how}"),
        )
        self.file.size = self.file.read_max = self.file.write_max = SIZE
        self.ours, self.peer = socket.socketpair()
        self.ours.setblocking(False)
        self.peer.setblocking(False)
        self.received, self.arena = bytearray(received), bytearray(arena)
        self.plane = Plane(
            self.ours.fileno(),
            self.received,
            self.arena,
            structured=structured,
            can_write=can_write,
            size=SIZE,
            zero_min=32 << 10,
            length_max=200_000,
            turn_ns=turn_ns,
            flush_at=1 << 17,
            poison=poison,
            extended=extended,
        )
        self.route = Route.flat(self.file, 0, SIZE)
        self.route.can_read = self.route.can_write = True

    def turn(self, sent: bytes = b"", *, poll_ns: int = 0) -> int:
        if sent:
            self.peer.sendall(sent)
        plane = self.plane
        return plane.turn(
            self.route, poll_ns, False, plane.begin, plane.end, plane.base, plane.out
        )

    def replies(self) -> bytes:
        found = b""
        while True:
            try:
                found += self.peer.recv(1 << 20)
            except BlockingIOError:
                return found

    def on_disk(self) -> bytes:
        return os.pread(self.fd, SIZE, 0)

    def close(self) -> None:
        self.route.close()
        self.plane.release()
        self.ours.close()
        self.peer.close()
        os.close(self.fd)
