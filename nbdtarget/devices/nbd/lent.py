# SPDX-License-Identifier: Apache-2.0
"""`LentConnection`: a connection of an `NbdDevice` on which a thread blocks, to read for a bulk copy.

Theory of operation. A device that is only read, from a server that says CAN_MULTI_CONN, has several connections, and
may lend all of them but one. That one serves clients meanwhile. No further connection is made, because a server may
have a bound for them (qemu-nbd --shared), and would let us wait.

    lent       nothing was in flight. The loop does not look at the socket any more
    thread     requests of several chunks in one send, and then blocking receives: the data goes
               straight into the chunk's buffer, and one system call waits for all of it
    given back with nothing in flight: the loop goes on with it. Otherwise it is closed

The protocol is the one that the loop uses (`nbdtarget_protocol.client`), with all its checks: structured replies in
pieces, zeroes, errors. Where compiled code is at hand it does all of this (`nbdtarget/fast/nbdtarget_copy.pyx`), and the thread needs
no lock of the interpreter meanwhile.

*Loss.* When this connection breaks, or is silent for longer than a read may take, the device is lost. When the device
is lost, closed, or gives its reads up, it calls `shut`, which ends a receive that blocks.
"""

import contextlib
import errno as errnos
import os
import socket
from collections.abc import Iterable
from typing import Protocol

from nbdtarget.devices.bulk import CHUNK_BYTES
from nbdtarget.devices.bulk_streams import Chunk, StreamLostError
from nbdtarget.devices.nbd.connection import NbdConnection
from nbdtarget.fast.compiled import IS_COMPILED, CopyStream
from nbdtarget_protocol.client import ClientTransmission
from nbdtarget_protocol.consts import CMD_DISC, CMD_READ
from nbdtarget_protocol.errors import ReplyError

__all__ = ["LentConnection"]


class _Lender(Protocol):
    """The device that the connection belongs to."""

    def lent_read_failed(self, status: int) -> int: ...

    def lent_came_back(self, lent: "LentConnection", reason: str) -> None: ...


class LentConnection:
    """A `BulkStream`. See the module head.

    Attributes:
        connection: what is lent.
        is_broken: see `BulkStream`.
    """

    def __init__(
        self,
        device: _Lender,
        connection: NbdConnection,
        sock: socket.socket,
        transmission: ClientTransmission,
        block: int,
    ) -> None:
        self.connection = connection
        self._device = device
        self._sock = sock
        self._transmission = transmission
        self._block = block
        self._cookie = 0
        self._compiled: CopyStream | None = None
        self.is_broken = False

    @classmethod
    def borrow_all(
        cls, device: _Lender, connections: Iterable[NbdConnection], block: int
    ) -> "list[LentConnection]":
        """Take those that are idle, and can be had. Args: block: the smallest that the server reads, in bytes."""
        borrowed = []
        for connection in connections:
            if connection.negotiated.payload_max < CHUNK_BYTES:
                break
            lent = connection.maybe_lend()
            if lent is not None:
                borrowed.append(cls(device, connection, *lent, block))
        return borrowed

    @property
    def is_near(self) -> bool:
        return self._sock.family == socket.AF_UNIX or _is_this_host(self._sock)

    @property
    def nr_in_flight(self) -> int:
        if self._compiled is not None:
            return self._compiled.nr_in_flight
        return len(self._transmission.in_flight)

    def maybe_compiled(self) -> CopyStream | None:
        if IS_COMPILED:
            negotiated = self._transmission.negotiated
            self._compiled = CopyStream(
                self._sock.fileno(), negotiated.structured, negotiated.extended
            )
        return self._compiled

    def lost_reason(self, sentence: str, error: int) -> str:
        if error == errnos.EAGAIN:
            return self._silence()
        if error < 0:
            return "server hung up"
        return sentence or _sentence(OSError(error, ""))

    def can_read(self, offset: int, length: int) -> bool:
        return (offset | length) % self._block == 0

    def start(self, chunks: list[Chunk]) -> None:
        requests = []
        for chunk in chunks:
            self._cookie += 1
            requests.append(
                self._transmission.request(
                    CMD_READ,
                    0,
                    self._cookie,
                    chunk.offset,
                    chunk.length,
                    chunk.buffer,
                    chunk,
                )
            )
        try:
            self._sock.sendall(b"".join(requests))
        except OSError as error:
            raise StreamLostError(_sentence(error)) from error

    # hot: a chunk takes three of these receives: 0.1 ms of CPU, most of it the kernel's copy
    def wait(self) -> list[Chunk]:
        transmission = self._transmission
        while True:
            buffer = transmission.get_buffer()
            flags = socket.MSG_WAITALL if transmission.wants_all else 0
            try:
                got = self._sock.recv_into(buffer, 0, flags)
                if not got:
                    raise StreamLostError("server hung up")
                completions = transmission.buffer_updated(got)
            except BlockingIOError:
                raise StreamLostError(self._silence()) from None
            except OSError as error:
                raise StreamLostError(_sentence(error)) from error
            except ReplyError as error:
                raise StreamLostError(str(error)) from error
            if completions:
                return [_chunk(each.private, each.error) for each in completions]

    def _silence(self) -> str:
        return f"no answer to READ within {self.connection.uri.read_timeout_s:g} s"

    def read_failed(self, status: int) -> int:
        return self._device.lent_read_failed(status)

    def give_back(self, reason: str) -> None:
        self._device.lent_came_back(self, reason)

    def shut(self) -> None:
        """Say goodbye, and end what blocks on it. Context: the loop."""
        self.is_broken = True
        goodbye = b""
        if self._transmission.error is None:
            goodbye = self._transmission.request(CMD_DISC, 0, 0, 0, 0)
        # The server has gone already (then nothing blocks), or its socket is full.
        with contextlib.suppress(OSError):
            self._sock.send(goodbye, socket.MSG_DONTWAIT)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


def _is_this_host(sock: socket.socket) -> bool:
    """Whether the other end has our own address. Otherwise, or if it has hung up, it may be anywhere."""
    try:
        return bool(sock.getsockname()[0] == sock.getpeername()[0])
    except OSError:
        return False


def _chunk(private: object, error: int) -> Chunk:
    assert isinstance(private, Chunk)
    private.status = error
    return private


def _sentence(error: OSError) -> str:
    text = os.strerror(error.errno) if error.errno else str(error)
    return text[:1].lower() + text[1:]
