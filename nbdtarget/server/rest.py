# SPDX-License-Identifier: Apache-2.0
"""`come_to_rest`: before a hand-over, wait until frozen connections have nothing under way.

Theory of operation. All clients wait meanwhile, so how long a connection is waited for depends on what it has under way:

    requests in flight                      as long as the caller says
    the rest of a WRITE's payload           as long as the caller says, but PAYLOAD_REST_S at most after the last byte has come
    a handshake; replies that a client has  HANDSHAKE_REST_S. Each machine that can reach the port can begin a handshake and then
    not taken behind its DISC               say nothing

A connection that has not come to rest by then, and has no request in flight, is left out of the hand-over. It is held: no more is
received from it, because devices have no tables while they change the process. If the hand-over fails, it goes on where it was. Else its
socket is closed with this process.
"""

from collections.abc import Callable, Iterable
from typing import Final, Protocol

from nbdtarget.common.clock import Clock

__all__ = ["HANDSHAKE_REST_S", "PAYLOAD_REST_S", "come_to_rest"]

HANDSHAKE_REST_S: Final = 0.2
PAYLOAD_REST_S: Final = 1.0
LOOK_S: Final = 0.002


class Resting(Protocol):
    """The parts of a connection that are looked at here."""

    peer: str

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is in flight, and no payload is being received."""

    @property
    def is_busy(self) -> bool:
        """Whether something is in flight."""

    @property
    def payload_left(self) -> int:
        """The bytes that are to come of a payload that is being received."""

    def hold(self) -> None:
        """Receive nothing any more."""


class _Waiting:
    """How long one hand-over waits for each of its connections."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._begun_ns = clock.now_ns()
        # Of a payload, how much was left at the last look, and since when.
        self._left: dict[Resting, tuple[int, int]] = {}

    def awaited(self, connections: Iterable[Resting]) -> list[Resting]:
        """Look at all connections; return those that are still waited for."""
        return [each for each in connections if self._has_to_wait(each)]

    def _has_to_wait(self, each: Resting) -> bool:
        if each.is_at_rest:
            return False
        if each.is_busy:
            return True
        now_ns, left = self._clock.now_ns(), each.payload_left
        if not left:
            return now_ns < self._begun_ns + HANDSHAKE_REST_S * 1e9
        before, since_ns = self._left.get(each, (0, now_ns))
        if left != before:
            since_ns = now_ns
        self._left[each] = left, since_ns
        return now_ns < since_ns + PAYLOAD_REST_S * 1e9


async def come_to_rest(
    connections: Callable[[], Iterable[Resting]],
    clock: Clock,
    within_s: float,
    is_hopeless: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Wait for connections that are frozen; see the module head.

    Args:
        connections: returns those that there are.
        is_hopeless: whether it is known that some requests will not end.
    Returns: the names of clients whose requests have not ended within `within_s`.
    """
    waiting, end_ns = _Waiting(clock), clock.now_ns() + int(within_s * 1e9)
    while waiting.awaited(connections()):
        if clock.now_ns() >= end_ns or is_hopeless():
            break
        await clock.sleep(LOOK_S)
    busy = []
    for each in list(connections()):
        if each.is_busy:
            busy.append(each.peer)
        elif not each.is_at_rest:
            each.hold()
    return busy
