# SPDX-License-Identifier: Apache-2.0
"""`Flow`: what one connection has in flight, and whether it goes on with receiving and serving.

Theory of operation. A connection takes requests until it meets a bound. Then it is *paused*: nothing is received, and
requests that were received before lie in the buffer. The client's own socket buffer fills up, and the client waits.

    state       why                                             what may end it
    RUNNING     -
    FULL        the client does not take its replies, or the    `ask`: something was sent or has ended
                connection's own bounds are met
    IN_LINE     the budget of all connections is used up        only the budget: something was given back to it
    YIELDING    the connection used up its share of this        only its next turn (`Turns`)
                turn of the loop

`bound_met` answers which bound is met and changes nothing. `pause` is the only way out of RUNNING, and `run` the only
way back. In between, `resume` of the connection is called; it looks whether a bound is still met.

The share of a turn is counted in bytes (`spend`) and in time: `may_serve_on` looks at the clock. Small requests
that are served on the fast path are not counted; the clock bounds them.

No other code writes these numbers. The sum of all connections is in `Budget`, and each
change here is passed on to it.
"""

from collections.abc import Callable
from typing import Final, Protocol

from nbdtarget.common.clock import Clock, perf_counter_ns
from nbdtarget.common.turns import Soon, Turns
from nbdtarget.server.buffers import Buffer, BufferPool
from nbdtarget.server.limits import Budget, Limits
from nbdtarget.server.shares import Share

__all__ = ["FULL", "IN_LINE", "NEVER", "RUNNING", "YIELDING", "Flow", "Flowing"]

RUNNING: Final = 0
FULL: Final = 1
IN_LINE: Final = 2
YIELDING: Final = 3
# A connection has at most so many times as much in flight as is left in the budget. So a few clients that take none of their
# replies never use all of it up.
TIMES_WHAT_IS_LEFT: Final = 4


def _nothing() -> None:
    """Do nothing: the connection is closed."""


# A closed connection has this in place of its own `Soon`, which refers to it: then the memory of the connection is
# given back at once, and not at the next garbage collection.
NEVER: Final = Soon(_nothing)


class Flowing(Protocol):
    """The methods of a connection that `Flow` calls."""

    def pause(self) -> None:
        """Stop receiving."""

    def resume(self) -> None:
        """Look whether a bound is still met, and go on if not."""


class Flow:
    """See the module head.

    Args:
        starved: called when this connection waits for the budget.

    Attributes:
        nr_requests: requests in flight.
        nr_bytes: bytes in flight.
        is_paused: the state is not RUNNING.
        bound: the name of the one that `bound_met` has told of last.
        is_counting: something of this turn's share is used up; see `end_turn`.
        progress_ns: when the client last took or gave something large.
    """

    __slots__ = (
        "_budget",
        "_clock",
        "_limits",
        "_look_soon",
        "_pause",
        "_pool",
        "_resume",
        "_starved",
        "_state",
        "_turn_end_ns",
        "_turn_left",
        "_turns",
        "bound",
        "is_counting",
        "is_paused",
        "nr_bytes",
        "nr_requests",
        "progress_ns",
    )

    def __init__(
        self,
        connection: Flowing,
        limits: Limits,
        budget: Budget,
        pool: BufferPool,
        clock: Clock,
        turns: Turns,
        starved: Callable[[], None],
    ) -> None:
        self.nr_requests = 0
        self.nr_bytes = 0
        self.is_paused = False
        self.is_counting = False
        self.bound = ""
        self.progress_ns = clock.now_ns()
        self._state = RUNNING
        self._limits, self._pool = limits, pool
        self._budget: Budget | Share = budget
        self._clock, self._turns, self._starved = clock, turns, starved
        self._turn_left = limits.turn_bytes_max
        self._turn_end_ns = 0  # 0: the clock was not looked at in this turn
        self._pause = connection.pause
        self._resume = connection.resume
        self._look_soon = Soon(self._look)

    @property
    def is_yielding(self) -> bool:
        return self._state == YIELDING

    def share(self, share: Share) -> None:
        """The connection is attached: what it has in flight counts for its export, too."""
        assert not self.nr_requests
        assert not self.nr_bytes
        self._budget = share

    def moved(self) -> None:
        """The client took or gave something large."""
        self.progress_ns = self._clock.now_ns()

    def close(self) -> None:
        """The connection is closed. Requests in flight are still counted until they end."""
        if self._state == IN_LINE:
            self._budget.stop_waiting(self._budget_shrank)
        self._look_soon.cancel()
        # These refer to the connection and to this object; see NEVER.
        self._look_soon = NEVER
        self._pause = self._resume = _nothing

    # ---- what is in flight ----

    def begin_request(self, nr_bytes: int) -> None:
        """Count one more request in flight, with its bytes of memory."""
        self.nr_requests += 1
        self.nr_bytes += nr_bytes
        self._budget.take(1, nr_bytes)

    def end_request(self) -> None:
        """Count a request as no longer in flight. Its bytes stay in flight until `give_back`."""
        self.nr_requests -= 1
        self._budget.give_back(1, 0)

    def room(self) -> tuple[int, int]:
        """Return how many more requests may be in flight now, and how many bytes."""
        limits = self._limits
        nr_requests, nr_bytes = self._budget.room()
        if not (self.nr_requests or self.nr_bytes):
            return (
                min(max(nr_requests, 1), limits.requests_in_flight_max),
                min(max(nr_bytes, limits.guaranteed_bytes), limits.bytes_in_flight_max),
            )
        # As `_bytes_max`, without asking the budget again.
        bytes_max = min(limits.bytes_in_flight_max, TIMES_WHAT_IS_LEFT * nr_bytes)
        return (
            min(nr_requests, limits.requests_in_flight_max - self.nr_requests),
            min(nr_bytes, bytes_max - self.nr_bytes),
        )

    def begin_requests(self, nr: int, nr_bytes: int) -> None:
        """Count `nr` more requests in flight, with `nr_bytes` bytes of memory in all."""
        self.nr_requests += nr
        self.nr_bytes += nr_bytes
        self._budget.take(nr, nr_bytes)

    def end_requests(self, nr: int, nr_bytes: int) -> None:
        """Count `nr` requests, and their bytes, as no longer in flight."""
        self.nr_requests -= nr
        self.nr_bytes -= nr_bytes
        self._budget.give_back(nr, nr_bytes)

    def take(self, nr_bytes: int) -> None:
        """Count more bytes of memory in flight."""
        self.nr_bytes += nr_bytes
        self._budget.take(0, nr_bytes)

    def grow(self, writer: object, nr_bytes: int) -> bool:
        """As `take`, for more of a half-received WRITE. Return False if that has to wait: then nothing was taken."""
        if not self._budget.grow(writer, nr_bytes):
            return False
        self.nr_bytes += nr_bytes
        return True

    def end_growth(self, writer: object, nr_bytes: int) -> None:
        """End the growth of a WRITE, which was received or never will be. Its bytes are in flight until `give_back`."""
        self._budget.end_growth(writer, nr_bytes)

    def give_back(self, nr_bytes: int, buffer: Buffer | None) -> None:
        """The bytes are in flight no longer, for example because the reply has left; the buffer is free."""
        self.nr_bytes -= nr_bytes
        if buffer is not None:
            self._pool.give_back(buffer)
        self._budget.give_back(0, nr_bytes)

    def _bytes_max(self) -> int:
        """How many bytes this connection may have in flight, if it has some."""
        left = self._budget.room()[1]
        return min(self._limits.bytes_in_flight_max, TIMES_WHAT_IS_LEFT * left)

    # ---- pausing ----

    def bound_met(
        self, nr_bytes: int, writer: object = None, nr_written: int = 0
    ) -> int:
        """Return FULL or IN_LINE if a request that takes `nr_bytes` has to wait, else RUNNING.

        Args:
            writer: the half-received WRITE of this connection, if there is one.
            nr_written: the bytes that it has taken. It has begun, so it must not wait for itself to end.
        """
        limits = self._limits
        others = self.nr_bytes - nr_written
        if self.nr_requests >= limits.requests_in_flight_max:
            self.bound = "requests_in_flight_max"
            return FULL
        # A connection with nothing in flight may always begin, whatever the size.
        if others and others + nr_bytes > self._bytes_max():
            is_own = others + nr_bytes > limits.bytes_in_flight_max
            shared = self._budget.bytes_bound
            self.bound = "bytes_in_flight_max" if is_own else shared
            return FULL
        if not self._budget.is_full(nr_bytes, writer):
            return RUNNING
        if self.nr_requests or self.nr_bytes or nr_bytes > limits.guaranteed_bytes:
            self.bound = self._budget.full_bound(nr_bytes, writer)
            return IN_LINE
        return RUNNING

    def met(self, bound: str) -> None:
        """The client has met a bound."""
        self._budget.bounds_met.met(bound)

    def pause(self, why: int, bound: str = "") -> None:
        """Stop receiving, for the reason `why`: FULL, IN_LINE or YIELDING.

        Args: bound: which one is met, if it is one.
        """
        assert why != RUNNING
        if bound and self._state not in (FULL, IN_LINE):
            self.met(bound)  # once, until it goes on
        if why == IN_LINE:
            if self._state != IN_LINE:
                self._budget.wait(self._budget_shrank)
            self._starved()
        self._state = why
        self.is_paused = True
        self._pause()

    def run(self) -> None:
        """Go on, because no bound is met any more."""
        self._state = RUNNING
        self.is_paused = False

    def ask(self) -> None:
        """Something was given back: in the next turn of the loop, look whether it is enough."""
        if self._state == FULL:
            self._look_soon.ask()

    def _budget_shrank(self) -> None:
        self._state = FULL  # and no longer in the line
        self._look_soon.ask()

    def _look(self) -> None:
        if self._state == FULL:
            self._resume()

    # ---- the share of a turn of the loop ----

    def spend(self, nr_bytes: int) -> None:
        """A request with so many bytes is served in this turn."""
        self.is_counting = True
        self._turn_left -= nr_bytes

    def may_serve_on(self) -> bool:
        """Whether something of this turn's share is left. If not, the connection is paused until its next turn."""
        turn_us = self._limits.turn_us
        now_ns = perf_counter_ns() if turn_us else 0
        self.is_counting = True
        # The share begins with the first look; 1 is added so that 0 keeps its meaning.
        self._turn_end_ns = self._turn_end_ns or now_ns + turn_us * 1000 + 1
        if self._turn_left > 0 and now_ns <= self._turn_end_ns:
            return True
        self.give_way()
        return False

    def give_way(self) -> None:
        """Pause until other connections have had their turn."""
        self.pause(YIELDING)
        self._turns.ask(self._resume)

    def end_turn(self) -> None:
        """End the connection's share of this turn: the next turn has a share of its own."""
        self.is_counting = False
        self._turn_left, self._turn_end_ns = self._limits.turn_bytes_max, 0
