# SPDX-License-Identifier: Apache-2.0
"""Every bound of the server, by name, and the budget that all connections share.

Theory of operation. The memory that clients can make the server hold is bounded four times: for one
connection, for those of one export (`shares.py`), for all of them (`Budget`), and by the number of connections. A connection that
meets a bound stops reading from its socket, so that the client's own socket buffer fills and
the client waits; nothing is refused. A connection with nothing at all in flight may always start one
request, of any size, unless the shared budget is used up: then it waits in the budget's
line, and is woken when something was given back. A short request (`guaranteed_bytes`) does not wait even
then, so a client that asks for little is not held up by others that stall. And a connection has at most four times as much
in flight as is left for all others (`flow.py`), so a few of them never use all of it up. A request of the fast path
is counted only if it does not end at once, so each connection may be above its bound by one.
Reads of the compiled path that wait for the disk are counted, and begin only while there is room.

What counts: a request, from its submission until its bio has ended; a byte, from the moment when
memory was taken for it until the reply has left, or the write has ended. Memory for the payload of a
large WRITE is taken as the payload arrives (`large_write.py`). The fixed buffers
of a connection (`receive_buffer`, `arena`) do not count: together they take `connections_max` times
their size at most. With TLS there are half a MiB more, of encrypted bytes (`nbdtarget/fast/nbdtarget_tls.pyx`).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nbdtarget.server.bounds import BoundsMet

__all__ = ["RELATIONS", "Budget", "Limits"]

# The first of each pair must not exceed the second.
RELATIONS: Final = (
    ("requests_in_flight_max", "requests_total_max"),
    ("payload_max", "bytes_total_max"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a listener and its connections; bytes unless the name says otherwise.

    Args:
        connections_max: on TCP, and as many on unix sockets; above, new ones are closed at once.
        peer_connections_max: on TCP from one address.
        export_connections_max: attached to one export; a further client is refused with that reason.
        handshakes_max: connections in their handshake, and those whose client was refused in it and has not gone. If there is one more, the
            oldest of them is closed, a refused one first.
        backlog_max: connections the kernel keeps waiting.
        handshake_timeout_s: from accept to the transmission phase. The time begins anew when it is over
            and options came meanwhile, for example from a client that asks for each of many exports.
        handshake_total_s: for a whole handshake, even if options keep coming.
        handshake_output_max: answers to options, in all. A LIST that needs more is refused, and a
            client that asks for twice as much is disconnected.
        stall_timeout_s: a client in the middle of a large WRITE that sends nothing for so
            long is disconnected, **if** others wait for the memory that it holds. A client that said DISC
            and reads none of its replies for so long is disconnected in any case.
        stall_total_s: a client that is in the middle of a request and sends nothing, or that reads none of its replies, for so
            long is disconnected in any case, at the latest after half as much again (`stalls.py`).
        linger_s: after our half of a connection was closed, at shutdown or because its TLS handshake was refused, how long
            the client has to close its own.
        requests_in_flight_max, bytes_in_flight_max: of one connection.
        guaranteed_bytes: a connection with nothing in flight may always begin a request of at most so many bytes, however much
            the others have in flight.
        export_requests_max, export_bytes_max: of all connections that are attached to one export (`shares.py`).
        requests_total_max, bytes_total_max: of all.
        send_buffer_max: replies that wait for the socket; above, no request is started.
        send_queue_max: pieces of such replies, because a small piece is mostly overhead. Requests that
            lie in the receive buffer already may add more.
        turn_us, turn_bytes_max: how long, and how many bytes of large READs and WRITEs, one
            connection is served in one turn of the loop; 0 us: only bytes count.
        read_slice: a longer READ is sent to the device in slices of so many bytes, one in each turn of the loop.
        range_slice: a TRIM, WRITE_ZEROES or CACHE of a longer range goes to the device in slices that begin with so many
            bytes, and a BLOCK_STATUS of a longer range is asked for so; see `nbdtarget.server.sliced_range`.
        payload_step: a large WRITE takes so much of `bytes_total_max` at a time, as its payload arrives.
        progress_bytes: a client that sends less of a payload than this in `stall_timeout_s` counts as stalled.
        payload_max: of one READ or WRITE.
        receive_buffer: of each connection. A WRITE that fits is used where it lies.
        arena: where replies to small READs are built, one after another.
        arena_read_max: a longer READ gets a buffer of its own.
        own_payload_min: a WRITE of at least this length that was received only in part gets a buffer of its own.
        pool_bytes_max: of large buffers kept for reuse, until nothing has needed them for a while (`spare_memory.py`).
        socket_buffer: SO_SNDBUF and SO_RCVBUF of each connection, as far as the kernel allows.
        zero_check_min: a READ of at least this length is answered with a hole if all of its data is zeroes.
        flush_at: replies are sent when so many bytes of them are packed.
        poll_us: after an answer, how long to look for the next request before sleeping.
        poison_borrowed: for tests: overwrite the receive buffer and the arena after use.
    """

    connections_max: int = 256
    peer_connections_max: int = 128
    export_connections_max: int = 256
    handshakes_max: int = 64
    backlog_max: int = 128
    handshake_timeout_s: float = 10.0
    handshake_total_s: float = 120.0
    handshake_output_max: int = 2 << 20
    stall_timeout_s: float = 30.0
    stall_total_s: float = 300.0
    linger_s: float = 0.2
    requests_in_flight_max: int = 256
    bytes_in_flight_max: int = 64 << 20
    guaranteed_bytes: int = 64 << 10
    export_requests_max: int = 2048
    export_bytes_max: int = 256 << 20
    requests_total_max: int = 4096
    bytes_total_max: int = 512 << 20
    send_buffer_max: int = 2 << 20
    send_queue_max: int = 4096
    turn_us: int = 2000
    turn_bytes_max: int = 16 << 20
    read_slice: int = 1 << 20
    range_slice: int = 1 << 30
    payload_step: int = 256 << 10
    progress_bytes: int = 64 << 10
    payload_max: int = 64 << 20
    receive_buffer: int = (512 << 10) + 64  # two WRITEs of 256 KiB, and half a header
    arena: int = 1 << 20
    arena_read_max: int = 64 << 10
    own_payload_min: int = 32 << 10
    pool_bytes_max: int = 32 << 20
    socket_buffer: int = 2 << 20
    zero_check_min: int = 32 << 10
    flush_at: int = 64 << 10
    poll_us: int = 50
    poison_borrowed: bool = False

    def __post_init__(self) -> None:
        assert self.arena_read_max + 64 <= self.arena
        # The receive buffer is compacted when it is half full.
        assert 2 * self.own_payload_min + (16 << 10) <= self.receive_buffer
        assert self.requests_in_flight_max >= 1
        for smaller, larger in RELATIONS:
            assert getattr(self, smaller) <= getattr(self, larger), (smaller, larger)


class Budget:
    """Counts the requests in flight of all connections of a listener, and knows which connections wait for fewer.

    Attributes:
        nr_requests, nr_bytes: in flight now.
        nr_waiters_elsewhere: connections that wait for the share of their export.
        bounds_met: how often each bound was met.
    """

    __slots__ = (
        "_bytes_max",
        "_favoured",
        "_nr_growing",
        "_requests_max",
        "_waiters",
        "bounds_met",
        "nr_bytes",
        "nr_requests",
        "nr_waiters_elsewhere",
    )

    def __init__(self, limits: Limits) -> None:
        self.nr_requests = 0
        self.nr_bytes = 0
        self.nr_waiters_elsewhere = 0
        self.bounds_met = BoundsMet()
        self._requests_max = limits.requests_total_max
        self._bytes_max = limits.bytes_total_max
        self._nr_growing = 0  # bytes of half-received WRITEs behind their first step
        # The one half-received WRITE that may take more than there is, so that they do not all wait
        # for each other: at most `payload_max` more. Compared by identity.
        self._favoured: object = None
        self._waiters: deque[Callable[[], None]] = deque()

    @property
    def nr_waiters(self) -> int:
        return len(self._waiters) + self.nr_waiters_elsewhere

    def is_full(self, nr_bytes: int, writer: object = None) -> bool:
        """Whether `nr_bytes` more, or one more request, have to wait.

        Args:
            writer: the half-received WRITE of the connection that asks. If it is the favoured one, it never waits.
        """
        if writer is not None and writer is self._favoured:
            return False
        return (
            self.nr_requests >= self._requests_max
            or self.nr_bytes + nr_bytes > self._bytes_max
        )

    @property
    def bytes_bound(self) -> str:
        """The name of the bound that leaves the fewest bytes."""
        return "bytes_total_max"

    def full_bound(self, _: int = 0, writer: object = None) -> str:
        """The name of the bound because of which something has to wait."""
        is_by_requests = self.nr_requests >= self._requests_max
        return "requests_total_max" if is_by_requests else "bytes_total_max"

    def room(self) -> tuple[int, int]:
        """Return how many requests, and bytes, do not have to wait; at most 0: none."""
        return self._requests_max - self.nr_requests, self._bytes_max - self.nr_bytes

    def take(self, nr_requests: int, nr_bytes: int) -> None:
        """Count more requests and bytes in flight."""
        self.nr_requests += nr_requests
        self.nr_bytes += nr_bytes

    def grow(self, writer: object, nr_bytes: int) -> bool:
        """Take `nr_bytes` for more of a half-received WRITE. Return False if it has to wait: nothing was taken then."""
        if (
            self.nr_bytes + nr_bytes > self._bytes_max
            or self._nr_growing + nr_bytes > self._bytes_max // 2
        ):
            if self._favoured is None:
                self._favoured = writer
            elif self._favoured is not writer:
                return False
        self.nr_bytes += nr_bytes
        self._nr_growing += nr_bytes
        return True

    def end_growth(self, writer: object, nr_bytes: int) -> None:
        """A WRITE that took `nr_bytes` by `grow` is received, or never will be. The bytes stay in flight."""
        self._nr_growing -= nr_bytes
        if self._favoured is writer:
            self._favoured = None

    def wait(self, wake: Callable[[], None]) -> None:
        """Call `wake` once, when something was given back. The caller asks again then."""
        self._waiters.append(wake)

    def stop_waiting(self, wake: Callable[[], None]) -> None:
        """Do not call `wake`, which waits."""
        self._waiters.remove(wake)

    def give_back(self, nr_requests: int, nr_bytes: int) -> None:
        """Count requests and bytes as no longer in flight. Calls all that wait, in the order of waiting."""
        self.nr_requests -= nr_requests
        self.nr_bytes -= nr_bytes
        assert self.nr_requests >= 0
        assert self.nr_bytes >= 0
        if self._waiters:
            waiters, self._waiters = self._waiters, deque()
            for wake in waiters:
                wake()
