# SPDX-License-Identifier: Apache-2.0
"""Rounds of `make fuzz-fast` in which peer and plane talk in TLS: compiled code carries the records of the plane, and Python those of the peer."""

import socket
from pathlib import Path

from nbdtarget.common.tls_socket import TlsSocket
from scripts.fuzz_fast_plane import Round
from tests.support.tls_ends import encrypted

__all__ = ["TlsRound"]


class TlsRound(Round):
    """A `Round` in TLS. A record that is sealed has to be sent, so no reply is forgotten here."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.queue: list[bytes] = []  # replies of reads in the ring that wait
        super().__init__(seed, folder)

    def _sockets(self) -> tuple[TlsSocket, TlsSocket]:
        self.tls, peer = encrypted(*socket.socketpair(), client=False)
        return self.tls, peer

    def may_send(self) -> bool:
        is_empty = not self.queue and self.plane.base == self.plane.out
        return is_empty and not self.tls.sealed and super().may_send()

    def push(self, data: bytes, charge: int) -> None:
        super().push(data, charge)
        self.queue.append(data)

    def _send_left(self, base: int, out: int) -> None:
        """Send as `Output` would: what the plane has packed and not sent, and then the queue."""
        left = [memoryview(self.arena)[base:out]]
        left += [memoryview(data) for data in self.queue]
        self.queue = []
        while left:
            try:
                sent = self.tls.sendmsg(left)
            except BlockingIOError:
                self._take()
                continue
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if left:
                left[0] = left[0][sent:]

    def _drop(self) -> None:
        self._send_left(self.plane.base, self.plane.out)
        super()._drop()
