# SPDX-License-Identifier: Apache-2.0
"""`FastTurn`: a connection's way onto the compiled fast path, and back.

Theory of operation. The compiled half (`nbdtarget_fast.Plane`) serves plain requests; it uses the receive buffer of
`Input` and the arena of `Output` while it runs, and gives them back with four numbers. Here stands when it may
run, and what each of its answers means for the connection:

    DONE, POLLED   everything was served and sent
    SLOW           Python serves one request, in the usual way; then the compiled half goes on
    UNFINISHED     the same for a WRITE that the file took only in part: its device knows
    BLOCKED        the replies go to the queue of `Output`; what is left of the batch is served in the usual way
    TURN_OVER      others have their turn first
    CLOSED         the client has closed its half
    FAILED         the socket has failed; or the disk has, when a part of a reply had left

Reads that wait for the disk may be under way when it has ended: `nbdtarget.server.ring_reads`.

It may run while the device offers a `Route`, nothing waits in the queue of `Output`, the receive buffer holds requests
and no part of a large payload, and bios need not pass a gate.

The loop calls the compiled `Receiver` by itself (`receiver`). As long as a turn ends with DONE or POLLED, no Python code
runs between the loop and the system calls, and the Receiver does not ask again whether it may run. All that changes the answer has to
tell it (`python_ran`): whatever the connection does in Python, replies that are pushed to the queue, and a new registration
with the loop, as after a pause. The device need not, because a closed `Route` says so itself. With `Limits.poison_borrowed` the
Receiver looks each time that nothing was forgotten.
"""

import errno as errnos
import os
from collections.abc import Callable
from functools import partial
from socket import socket
from typing import Final, Protocol

from nbdtarget.common.tls_socket import TlsSocket
from nbdtarget.devices.base import Device
from nbdtarget.fast.compiled import IS_COMPILED, Plane, Receiver, Route
from nbdtarget.server.flow import Flow
from nbdtarget.server.input import Input
from nbdtarget.server.loop_epoll import maybe_epoll_of
from nbdtarget.server.output import Output
from nbdtarget.server.poller import (
    POLL_REST,
    POLL_SKIP_MAX,
    POLL_STREAK,
    Lateness,
)
from nbdtarget.server.requests import Requests
from nbdtarget.server.ring_reads import RingReads
from nbdtarget.server.shared import Host, Shared

if IS_COMPILED:
    from nbdtarget_fast import (
        BLOCKED,
        CLOSED,
        DONE,
        FAILED,
        POLLED,
        SLOW,
        TURN_OVER,
    )

__all__ = ["FastHost", "FastTurn"]

TURN_NS_MAX: Final = 1 << 62  # for a turn that is bounded by bytes alone
CUT: Final = "a part of a reply has left, and the rest of its data cannot be read"


class FastHost(Host, Protocol):
    """The methods of a connection that the compiled fast path calls."""

    def guard(self, call: Callable[[], None]) -> None:
        """Run `call`. An exception from it ends this connection and no other."""

    def readable(self) -> None:
        """Receive and serve in the usual way."""

    def receive_requests(self, stop: int | None = None) -> None:
        """Go on where the compiled half has stopped; see `FastTurn.serve`."""


class FastTurn:
    """See the module head.

    Args:
        host: the connection.
        sock: of the connection; a real one, or one whose records compiled code carries.
        device: what its requests go to.

    Attributes:
        receiver: what the loop calls when the socket can be read.
    """

    __slots__ = (
        "_budget",
        "_device",
        "_flow",
        "_host",
        "_input",
        "_output",
        "_plane",
        "_requests",
        "_tls",
        "receiver",
    )

    def __init__(
        self,
        host: FastHost,
        sock: socket | TlsSocket,
        shared: Shared,
        device: Device,
        requests: Requests,
        received: Input,
        output: Output,
        flow: Flow,
    ) -> None:
        limits = shared.limits
        self._host, self._device, self._requests = host, device, requests
        self._input, self._output, self._flow = received, output, flow
        self._budget = shared.budget
        self._tls = sock.records if isinstance(sock, TlsSocket) else None
        self._plane = Plane(
            sock.fileno(),
            received.buffer,
            output.arena,
            structured=requests.structured,
            can_write=requests.can_write,
            size=requests.size,
            zero_min=limits.zero_check_min,
            length_max=limits.payload_max,
            turn_ns=limits.turn_us * 1000 or TURN_NS_MAX,
            flush_at=limits.flush_at,
            poison=limits.poison_borrowed,
            ring_reads=RingReads(host, requests, output, flow, self._may_poll),
            alone_max=min(limits.guaranteed_bytes, limits.bytes_in_flight_max),
            # A reply with extended headers has the offset of its request, which is not kept for a sync.
            flush_for=requests.flush_for
            if requests.can_flush and not requests.extended
            else None,
            extended=requests.extended,
            tls=self._tls,
        )
        requests.traffic.compiled = self._plane
        self.receiver = Receiver(
            self._plane,
            maybe_route=device.maybe_route,
            is_plain=self._is_plain,
            received=received,
            output=output,
            polling=shared.polling,
            may_poll=self._may_poll,
            has_no_losses=requests.in_flight.observer.has_none,
            find_loop_fd=partial(_find_loop_fd, sock.fileno()),
            poll_ns=limits.poll_us * 1000,
            poll_streak=POLL_STREAK,
            poll_skip_max=POLL_SKIP_MAX,
            poll_rest=POLL_REST,
            late=Lateness(),
            readable=host.readable,
            stopped=self._stopped,
            ended=self._ended,
            failed=self._failed,
        )
        output.pushed = self.receiver.python_ran

    def python_ran(self) -> None:
        """Something of the connection may have changed: the compiled half looks anew whether it may run."""
        self.receiver.python_ran()

    def release(self) -> None:
        """Let go of the buffers: the connection is closed."""
        self._plane.release()
        self.receiver.close()

    # hot: once for each batch that the compiled half does not serve to its end
    def serve(self, stop: int | None = None) -> bool:
        """Receive and serve as far as the compiled half goes.

        Args: stop: what the compiled half answered in this turn of the loop, if it has run.

        Returns whether that is all for this turn of the loop. If not, the rest is served in the usual way.
        Raises: OSError: the socket has failed. EOFError: the client has closed its half.
        """
        goes_on = stop is not None
        while True:
            if stop is None:
                route = self._device.maybe_route()
                if route is None or not self._is_plain():
                    return False
                stop = self._turn(route, goes_on)
            if stop in (DONE, POLLED, TURN_OVER):
                self._ended()
                if stop == TURN_OVER and not self._flow.is_paused:
                    self._flow.give_way()
                return True
            if stop == BLOCKED:
                return False
            if stop == CLOSED:
                raise EOFError
            if stop == FAILED:
                error = self._plane.error
                if error == errnos.EPROTO and self._tls is not None:
                    raise self._tls.tls_failure()
                if self._plane.is_cut:
                    raise OSError(error, f"{os.strerror(error)}: {CUT}")
                raise OSError(error, os.strerror(error))
            # SLOW, or UNFINISHED: then the device is about to get the WRITE that was begun, and nothing before it.
            if not self._serve_one(stop):
                return False
            stop, goes_on = None, True

    def _is_plain(self) -> bool:
        return not self._flow.is_paused and (
            self._input.is_plain and self._output.is_plain and self._requests.is_plain
        )

    def _may_poll(self) -> bool:
        return not self._budget.nr_requests

    def _turn(self, route: Route, goes_on: bool) -> int:
        plane, received, output = self._plane, self._input, self._output
        stop = plane.turn(
            route,
            0,
            goes_on,
            received.begin,
            received.end,
            output.base,
            output.end,
        )
        received.served(plane.begin, plane.end)
        output.sent_to(plane.base, plane.out)
        if plane.nr_syncs:
            self._requests.flush_for(*plane.take_syncs())
        return stop

    def _stopped(self, stop: int) -> None:
        self._host.guard(partial(self._host.receive_requests, stop))

    def _failed(self, error: Exception) -> None:
        self._host.guard(partial(_raise, error))

    def _ended(self) -> None:
        """End a turn in which Python has run."""
        if self._flow.is_counting:
            self._flow.end_turn()

    def _serve_one(self, stop: int) -> bool:
        """Serve the first request in the usual way. Returns whether the compiled half may go on."""
        received, flow = self._input, self._flow
        if stop == SLOW and (flow.is_paused or self._output.end > self._output.end_max):
            return False  # reads in the ring have met a bound; or there may be no room for one more reply
        left = received.end - received.begin
        self._requests.serve(only_first=True)
        if received.end - received.begin == left:
            return False  # it has to wait
        # A large WRITE whose payload is to come is received on, whatever the time.
        if received.is_plain and (flow.is_paused or not flow.may_serve_on()):
            flow.end_turn()
            return False
        return True


def _find_loop_fd(sock: int) -> int:
    found = maybe_epoll_of(sock)
    return -1 if found is None else found


def _raise(error: Exception) -> None:
    raise error
