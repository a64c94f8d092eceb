# SPDX-License-Identifier: Apache-2.0
"""`Reception`: a connection in transmission receives and serves, batch after batch, and its replies leave.

Theory of operation. The loop says that the socket can be read. This module does the rest of that turn of the loop:

    compiled   `FastTurn` receives and serves as far as it goes, and may leave a rest
    usual      `Input` receives once, `Requests` serve what came, and the connection sends the replies; again, if the poller
               looks at the socket once more, or TLS has more (see below)

A turn ends when nothing can be received, when a bound pauses the connection, when it is frozen, or after BATCHES_MAX receives. Then it
goes on by itself in the next turn.

TLS. The loop does not know of bytes that a `TlsSocket` has decrypted, or could decrypt. So a connection with TLS receives until there is
nothing; the compiled half does so, too.

Errors. uvloop calls a reader once after an error at the socket, and then never again, neither for bytes that lie there nor for
the error. Sending fails, too, when the peer is gone. So each call of a reader either sends something, or leaves something that
will be sent (a request in flight, a writer that is watched), or receives until there is nothing, the error, or the end.
"""

import socket
from collections.abc import Callable
from typing import Final, Protocol

from nbdtarget.common.tls_socket import TlsSocket
from nbdtarget.devices.base import Device
from nbdtarget.fast.compiled import IS_COMPILED
from nbdtarget.server.fast_turn import FastHost, FastTurn
from nbdtarget.server.flow import Flow
from nbdtarget.server.input import Input
from nbdtarget.server.output import Output
from nbdtarget.server.poller import Poller
from nbdtarget.server.requests import Requests
from nbdtarget.server.shared import Shared
from nbdtarget.server.states import DRAINING, TRANSMISSION
from nbdtarget.server.watch import Watch
from nbdtarget_protocol.consts import REQUEST

__all__ = ["BATCHES_MAX", "Reception", "ReceptionHost"]

BATCHES_MAX: Final = 16  # received and served in one turn of the loop


class ReceptionHost(FastHost, Protocol):
    """The methods of a connection that its reception calls."""

    state: int
    is_frozen: bool

    def maybe_finish(self) -> None:
        """Close if nothing else is left to do."""

    def read_on(self) -> None:
        """The loop had its turn: go on receiving."""


class Reception:
    """See the module head.

    Args:
        host: the connection.
        sock: of the connection. Its requests can take the compiled path if it does not encrypt, or if compiled code carries its records.
        device: what the requests go to.
    """

    __slots__ = (
        "_budget",
        "_fast",
        "_flow",
        "_host",
        "_input",
        "_loop",
        "_output",
        "_poller",
        "_requests",
        "_tls",
        "_watch",
    )

    def __init__(
        self,
        host: ReceptionHost,
        shared: Shared,
        sock: socket.socket | TlsSocket,
        watch: Watch,
        device: Device,
        requests: Requests,
        received: Input,
        output: Output,
        flow: Flow,
    ) -> None:
        self._host, self._loop, self._watch = host, shared.loop, watch
        self._requests, self._input = requests, received
        self._output, self._flow, self._budget = output, flow, shared.budget
        self._poller = Poller(shared.polling, shared.limits.poll_us)
        self._tls = sock if isinstance(sock, TlsSocket) else None
        self._fast: FastTurn | None = None
        is_carried = self._tls is not None and self._tls.records is not None
        if IS_COMPILED and (isinstance(sock, socket.socket) or is_carried):
            parts = requests, received, output, flow
            self._fast = FastTurn(host, sock, shared, device, *parts)

    @property
    def reader(self) -> Callable[[], object]:
        """Return the callback for the loop: there is something to receive."""
        # The compiled fast path calls `readable` for all that it does not do.
        return self._host.readable if self._fast is None else self._fast.receiver

    def python_ran(self) -> None:
        """Something of the connection may have changed: see `FastTurn.python_ran`."""
        if self._fast is not None:
            self._fast.python_ran()

    def stop(self) -> None:
        """The connection is closed: nothing is received any more."""
        if self._fast is not None:
            self._fast.release()
            self._fast = None

    def release(self) -> None:
        """Nothing is in flight any more."""
        self._poller.close()

    # hot: one system call and 0.6 us a batch, besides `Requests.serve`; on the compiled fast path seldom called
    def receive(self, stop: int | None = None) -> None:
        """Receive and serve batch after batch, as long as there is one, or soon will be.

        Args: stop: see `FastTurn.serve`.
        Raises: BlockingIOError: there is nothing. OSError, Violation: the connection has to end.
        """
        self.python_ran()
        if self._fast is None or not self._receive_fast(self._fast, stop):
            self._receive_usual(polls=stop is None and self._poller.begin())

    def serve_received(self) -> None:
        """Serve what was received before. Raises: as `receive`."""
        self.python_ran()
        if self._fast is not None and self._receive_fast(self._fast):
            return
        host = self._host
        if host.state == TRANSMISSION:
            self._requests.serve()
            self._flow.end_turn()
            host.flush()

    def _receive_usual(self, *, polls: bool) -> None:
        """As `receive_requests`, without compiled code."""
        requests, received, poller = self._requests, self._input, self._poller
        output, flow = self._output, self._flow
        batches_left = BATCHES_MAX
        while True:
            try:
                nr_bytes = received.receive()
            except BlockingIOError:
                if (
                    not polls
                    or self._budget.nr_requests
                    or output.is_blocked
                    or not poller.look_again()
                ):
                    return
                continue
            if poller.is_looking:
                poller.hit()
            if nr_bytes:
                if received.complete is not None:
                    requests.in_flight.start_large(received.take_complete())
                if self._host.is_frozen and received.is_plain:
                    self._watch.stop_reading()
                    return
                if nr_bytes > REQUEST.size and received.is_batch:
                    poller.not_alone()
                    polls = False
                requests.serve()
                if flow.is_counting:
                    flow.end_turn()
            else:
                self._host.disc()
            goes_on = polls
            if not output.is_empty and not output.is_blocked:
                self._host.flush()
            elif self._host.state == DRAINING:
                self._host.maybe_finish()
            elif output.is_empty and not flow.nr_requests:
                goes_on = True  # see "Errors" in the module head
            if not goes_on and self._tls is not None:
                goes_on = self._tls.has_pending
            if not goes_on or not self._watch.is_reading:
                return
            batches_left -= 1
            if not batches_left:
                self._loop.call_soon(self._host.read_on)
                return

    def _receive_fast(self, fast: FastTurn, stop: int | None = None) -> bool:
        """Receive and serve on the compiled fast path, and what it leaves in the usual way; whether the turn is over."""
        output, received = self._output, self._input
        try:
            is_over = fast.serve(stop)
        except EOFError:
            self._host.disc()
            is_over = True
        if (
            not is_over
            and self._host.state == TRANSMISSION
            and not self._flow.is_paused
            and received.is_plain
            and received.end > received.begin
        ):
            self._requests.serve()
            if self._flow.is_counting:
                self._flow.end_turn()
        if not output.is_empty and not (output.is_blocked and self._watch.is_writing):
            self._host.flush()
        elif self._host.state == DRAINING:
            self._host.maybe_finish()
        return is_over or not self._watch.is_reading
