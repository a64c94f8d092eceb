# SPDX-License-Identifier: Apache-2.0
"""`Patience`: how long a connection waits for its client, in each of its states.

    handshake          `handshake_timeout_s` for each option, `handshake_total_s` for all of them. The handshake of TLS that follows
                       STARTTLS has no time of its own
    replies            a client that has said DISC takes a reply now and then: `stall_timeout_s`. Without DISC it may take its
                       time, as long as no other client waits (`Listener`)
    after the end      `linger_s`, in which the client can close its half

There is one timer, because these follow each other.
"""

import logging
from typing import Protocol

from nbdtarget.common.clock import Clock, Timer
from nbdtarget.server.flow import Flow
from nbdtarget.server.limits import Limits
from nbdtarget.server.output import Output
from nbdtarget.server.states import TRANSMISSION
from nbdtarget_protocol.handshake import ServerHandshake

__all__ = ["Patience"]

log = logging.getLogger(__name__)


class Waiting(Protocol):
    """The methods of a connection that are called here."""

    peer: str
    state: int

    def has_said_disc(self) -> bool:
        """Whether the client wants to leave. Its DISC may stand behind requests that a bound keeps from being served."""

    def abort(self) -> None:
        """Close now."""


class Patience:
    """See the module head."""

    __slots__ = (
        "_began_ns",
        "_clock",
        "_connection",
        "_flow",
        "_handshake",
        "_limits",
        "_nr_options",
        "_output",
        "_timer",
    )

    def __init__(
        self,
        connection: Waiting,
        limits: Limits,
        clock: Clock,
        handshake: ServerHandshake,
        flow: Flow,
        output: Output,
    ) -> None:
        self._connection: Waiting | None = connection
        self._limits, self._clock = limits, clock
        self._handshake, self._flow, self._output = handshake, flow, output
        self._began_ns = clock.now_ns()
        self._nr_options = 0  # of the handshake, at the last look
        self._timer: Timer | None = None

    def await_handshake(self) -> None:
        """Close the connection if no option comes in time, or the whole handshake takes too long."""
        self._timer = self._clock.call_later(
            self._limits.handshake_timeout_s, self._handshake_timed_out
        )

    def await_replies(self) -> None:
        """Look after `stall_timeout_s` whether the client has said DISC and does not take its replies."""
        if self._timer is None:
            self._timer = self._clock.call_later(
                self._limits.stall_timeout_s, self._replies_timed_out
            )

    def linger(self) -> None:
        """Close the connection in a moment."""
        self.end()
        self._timer = self._clock.call_later(self._limits.linger_s, self._lingered)

    def end(self) -> None:
        """Wait for nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def release(self) -> None:
        """The connection is closed: let go of it."""
        self.end()
        self._connection = None

    def _lingered(self) -> None:
        self._flow.met("linger_s")
        assert self._connection is not None
        self._connection.abort()

    def _handshake_timed_out(self) -> None:
        limits = self._limits
        nr_options, before = self._handshake.nr_options, self._nr_options
        total_s = (self._clock.now_ns() - self._began_ns) / 1e9
        # A handshake of TLS that has begun counts from the beginning of the connection, and gets no time of its own.
        goes_on = nr_options > before and not self._handshake.starts_tls
        if goes_on and total_s < limits.handshake_total_s:
            self._nr_options = nr_options
            self.await_handshake()
            return
        assert self._connection is not None
        is_all = total_s >= limits.handshake_total_s
        self._flow.met("handshake_total_s" if is_all else "handshake_timeout_s")
        log.info("%s: no handshake in time", self._connection.peer)
        self._connection.abort()

    def _replies_timed_out(self) -> None:
        self._timer = None
        connection, is_blocked = self._connection, self._output.is_blocked
        assert connection is not None
        if connection.state == TRANSMISSION and not is_blocked:
            return  # the next blocked reply calls again
        waited_ns = self._clock.now_ns() - self._flow.progress_ns
        left_s = self._limits.stall_timeout_s - waited_ns / 1e9
        if left_s > 0:
            self._timer = self._clock.call_later(left_s, self._replies_timed_out)
        elif is_blocked and connection.has_said_disc():
            log.info(
                "%s: the client has said DISC and does not take its replies",
                connection.peer,
            )
            self._flow.met("stall_timeout_s")
            connection.abort()
        else:
            self.await_replies()
