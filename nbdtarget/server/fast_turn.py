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
    FAILED         the socket has failed

Reads that wait for the disk may be under way when it has ended: `nbdtarget.server.ring_reads`.

It may run while the device offers a `Route`, nothing waits in the queue of `Output`, the receive buffer holds requests
and no part of a large payload, and bios need not pass a gate.
"""

import os
from socket import socket
from typing import Final

from nbdtarget.devices.base import Device
from nbdtarget.fast.compiled import IS_COMPILED, Plane
from nbdtarget.server.flow import Flow
from nbdtarget.server.input import Input
from nbdtarget.server.limits import Limits
from nbdtarget.server.output import Output
from nbdtarget.server.poller import Poller
from nbdtarget.server.requests import Requests
from nbdtarget.server.ring_reads import RingReads
from nbdtarget.server.shared import Host

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

__all__ = ["FastTurn"]

TURN_NS_MAX: Final = 1 << 62  # for a turn that is bounded by bytes alone


class FastTurn:
    """See the module head.

    Args:
        host: the connection.
        sock: of the connection; a real one.
        device: what its requests go to.
    """

    __slots__ = (
        "_device",
        "_flow",
        "_input",
        "_output",
        "_plane",
        "_poll_ns",
        "_poller",
        "_requests",
    )

    def __init__(
        self,
        host: Host,
        sock: socket,
        limits: Limits,
        device: Device,
        requests: Requests,
        received: Input,
        output: Output,
        flow: Flow,
        poller: Poller,
    ) -> None:
        self._device, self._requests = device, requests
        self._input, self._output = received, output
        self._flow, self._poller = flow, poller
        self._poll_ns = limits.poll_us * 1000
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
            ring_reads=RingReads(host, requests, output, flow),
        )

    def release(self) -> None:
        """Let go of the buffers: the connection is closed."""
        self._plane.release()

    # hot: once for each batch
    def serve(self, polls: bool) -> bool:
        """Receive and serve as far as the compiled half goes.

        Args:
            polls: look at the socket for the next request after an answer.

        Returns whether that is all for this turn of the loop. If not, the rest is served in the usual way.
        Raises: OSError: the socket has failed. EOFError: the client has closed its half.
        """
        plane, received, output = self._plane, self._input, self._output
        requests, flow = self._requests, self._flow
        poll_ns = self._poll_ns if polls else 0
        goes_on = False
        while True:
            route = self._device.maybe_route()
            if (
                route is None
                or flow.is_paused
                or not received.is_plain
                or not output.is_plain
                or not requests.is_plain
            ):
                return False
            stop = plane.turn(
                route,
                poll_ns,
                goes_on,
                received.begin,
                received.end,
                output.base,
                output.end,
            )
            received.served(plane.begin, plane.end)
            output.sent_to(plane.base, plane.out)
            if plane.was_batch:
                self._poller.not_alone()
                poll_ns = 0
            elif plane.was_hit:
                self._poller.hit()
            if stop in (DONE, POLLED, TURN_OVER):
                if flow.is_counting:
                    flow.end_turn()
                if stop == POLLED:
                    self._poller.missed()
                elif stop == TURN_OVER and not flow.is_paused:
                    flow.give_way()
                return True
            if stop == BLOCKED:
                return False
            if stop == CLOSED:
                raise EOFError
            if stop == FAILED:
                raise OSError(plane.error, os.strerror(plane.error))
            if stop == SLOW and (flow.is_paused or output.end > output.end_max):
                return False  # reads in the ring have met a bound; or there may be no room for one more reply
            # SLOW, or UNFINISHED: then the device is about to get the WRITE that was begun, and nothing before it.
            left = received.end - received.begin
            requests.serve(only_first=True)
            if received.end - received.begin == left:
                return False  # it has to wait
            # A large WRITE whose payload is to come is received on, whatever the time.
            if received.is_plain and (flow.is_paused or not flow.may_serve_on()):
                flow.end_turn()
                return False
            if flow.nr_requests:
                poll_ns = 0
            goes_on = True
