# SPDX-License-Identifier: Apache-2.0
"""`Stalls`: which clients are disconnected because they do not go on with what they have begun.

    in the handshake        `Patience` ends it: `handshake_timeout_s`, `handshake_total_s`
    with others waiting     `stall_timeout_s`: connections wait for the shared budget, and this one holds much of it and does not move:
                            half a large WRITE was sent, or replies are not read
    in any case             `stall_total_s`: in the middle of a request, however short, or replies are not read

A client that has said all of its requests and taken all of its replies is never stalled: it may be silent for days.

Theory of operation. The connections are looked at four times in `stall_total_s`, so nothing is measured for each request.
A client is disconnected between `stall_total_s` and one and a half times as much after its last byte. Where the look finds a
part of a request in the receive buffer, the connection asks to be told of the next bytes (`Connection.notice_next_bytes`).
"""

import logging
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from nbdtarget.common.clock import Clock, Timer
from nbdtarget.server.flow import Flow
from nbdtarget.server.input import Input
from nbdtarget.server.limits import Limits
from nbdtarget.server.output import Output
from nbdtarget.server.watch import Watch

__all__ = ["Stalls", "is_in_the_middle", "may_notice"]

log = logging.getLogger(__name__)

LOOKS: Final = 4  # in `stall_total_s`


def is_in_the_middle(
    output: Output, received: Input | None, flow: Flow, watch: Watch
) -> bool:
    """Whether it is up to the client of a connection that a reply does not leave, or a request is not complete."""
    if output.is_blocked or received is None or flow.is_paused:
        # A paused connection does not receive, so the client cannot be blamed.
        return output.is_blocked
    # The rest may have come without the loop's call, and all of it may have been served since.
    is_part = watch.is_noticing and received.begin < received.end
    return is_part or not received.is_plain


def may_notice(received: Input | None, watch: Watch) -> bool:
    """Whether a part of a request was received, and the connection waits for the rest."""
    return (
        received is not None
        and received.begin < received.end
        and received.is_plain
        and watch.is_reading
        and not watch.is_noticing
    )


class Stalling(Protocol):
    """The methods of a connection that are called here."""

    peer: str

    def is_stalled(self, now_ns: int, within_s: float) -> bool:
        """Whether the client is in the middle of something, and has not moved for so long."""

    def notice_next_bytes(self) -> None:
        """If a part of a request was received, find out when more of it comes."""

    def abort(self) -> None:
        """Close now."""


class Stalls:
    """See the module head.

    Args:
        connections: those of the listener.
        nr_waiters: how many of them wait for the budget.
        met: told which bound a client has met.
    """

    def __init__(
        self,
        limits: Limits,
        clock: Clock,
        connections: Callable[[], Iterable[Stalling]],
        nr_waiters: Callable[[], int],
        met: Callable[[str], None],
    ) -> None:
        self._limits, self._clock = limits, clock
        self._connections = connections
        self._nr_waiters, self._met = nr_waiters, met
        self._is_closed = False
        self._starved_timer: Timer | None = None
        self._look_timer: Timer | None = None

    def connected(self) -> None:
        """There is a connection: look from now on."""
        if self._look_timer is None and not self._is_closed:
            self._look_timer = self._clock.call_later(
                self._limits.stall_total_s / LOOKS, self._look
            )

    def starved(self) -> None:
        """A connection waits for the budget."""
        if self._starved_timer is None and not self._is_closed:
            self._starved_timer = self._clock.call_later(
                self._limits.stall_timeout_s, self._look_for_the_starved
            )

    def close(self) -> None:
        """Stop the timers."""
        self._is_closed = True
        for timer in (self._starved_timer, self._look_timer):
            if timer is not None:
                timer.cancel()

    def _look(self) -> None:
        self._look_timer = None
        connections = list(self._connections())
        self._end(connections, "stall_total_s", "stalled")
        for connection in connections:
            connection.notice_next_bytes()
        if connections:
            self.connected()

    def _look_for_the_starved(self) -> None:
        self._starved_timer = None
        if not self._nr_waiters():
            return
        connections = list(self._connections())
        self._end(connections, "stall_timeout_s", "stalled while others wait")
        if self._nr_waiters():
            self.starved()

    def _end(self, connections: list[Stalling], bound: str, why: str) -> None:
        now_ns, within_s = self._clock.now_ns(), float(getattr(self._limits, bound))
        for connection in connections:
            if connection.is_stalled(now_ns, within_s):
                log.warning(
                    "%s: %s for %g s: disconnected", connection.peer, why, within_s
                )
                self._met(bound)
                connection.abort()
