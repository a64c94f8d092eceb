# SPDX-License-Identifier: Apache-2.0
"""`RingReads`: what a connection has to do with the READs that the compiled fast path has in the ring.

Theory of operation. A READ that the page cache cannot answer goes to the disk without a bio: `nbdtarget_fast.Plane`
puts it into the ring of `nbdtarget.devices.file.ring`, and sends the reply when it has ended. Between the two it is in
flight like any other request: it counts in `Flow`, and so in the budget; the connection is not released before it has
ended. The plane calls these methods, once for a batch:

    is_alone    before a READ that came alone: whether nothing of any connection is in flight
    room        before the first one of a turn: how many may begin
    begun       after the turn
    may_send    when some have ended: whether their replies may leave before all others
    push        what the socket did not take goes to the queue
    ended       after that
    read_again  one that failed or came short is read in the usual way, which meets the reason again, and tells it

A READ for which there is no room is served in the usual way, where it meets the bound and pauses the connection.
"""

from collections.abc import Callable

from nbdtarget.server.flow import TIMES_WHAT_IS_LEFT, Flow
from nbdtarget.server.output import Output
from nbdtarget.server.requests import Requests
from nbdtarget.server.shared import Host

__all__ = ["RingReads"]


class RingReads:
    """See the module head.

    Attributes: is_alone: returns whether no request of any connection is in flight.
    """

    __slots__ = (
        "_bytes_room",
        "_flow",
        "_host",
        "_nr_room",
        "_output",
        "_requests",
        "is_alone",
    )

    def __init__(
        self,
        host: Host,
        requests: Requests,
        output: Output,
        flow: Flow,
        is_alone: Callable[[], bool],
    ) -> None:
        self._host, self._requests = host, requests
        self._output, self._flow = output, flow
        self.is_alone = is_alone
        self._nr_room = self._bytes_room = 0  # what `room` has returned last

    # hot: these four once for each batch of READs that miss the page cache
    def room(self) -> tuple[int, int]:
        """Return how many READs, and how many bytes of them, may begin now."""
        self._nr_room, self._bytes_room = room = self._flow.room()
        return room

    def begun(self, nr: int, nr_bytes: int) -> None:
        flow = self._flow
        flow.begin_requests(nr, nr_bytes)
        # Looking at all bounds costs as much as the rest of this call. No bound is met while so much of the room is left: bytes that are
        # taken from the budget also lower how many a connection may have (TIMES_WHAT_IS_LEFT). Where nothing else is in flight, `room`
        # may have returned more than is left, or was not asked.
        if (
            flow.nr_requests == nr
            or nr >= self._nr_room
            or (1 + TIMES_WHAT_IS_LEFT) * nr_bytes > self._bytes_room
        ):
            self._requests.look_at_bounds()

    def may_send(self) -> bool:
        output = self._output
        return output.is_empty and not output.is_blocked

    def ended(self, nr: int, nr_bytes: int) -> None:
        """Args: nr_bytes: of those whose replies have left, or that have failed."""
        self._flow.end_requests(nr, nr_bytes)
        self._host.reads_ended()

    def push(self, data: bytes, charge: int) -> None:
        if self._host.is_closed:
            self._flow.give_back(charge, None)
        else:
            self._output.push(data, charge)

    def read_again(self, cookie: int, offset: int, length: int) -> None:
        if not self._host.is_closed:
            self._requests.read_again(cookie, offset, length)
