# SPDX-License-Identifier: Apache-2.0
"""`Poller`: when a connection looks at its socket again instead of going back to the event loop.

Theory of operation. At queue depth 1 each request costs two wake-ups, one of the server and one of the
client, and they cost more than the request itself. So after an answer a connection may *poll*: it looks at its
socket again and again, for `Limits.poll_us` at most, before it returns to the loop. It polls only if this is likely to
pay off:

    it is alone          it has received POLL_STREAK times in a row, and no other connection in between (`Polling`)
    depth 1              each time it received a single request; with more of them polling only makes the batches smaller
    nothing is pending   no request of any connection is in flight, and the socket takes our replies
    it paid off lately   each miss doubles the number of wake-ups that are not polled, up to POLL_SKIP_MAX; one hit
                         ends that
    it has rested        for each request that polling has found, POLL_REST wake-ups are not polled: a server that polls
                         uses its processor all the time, twice as much for a request as one that sleeps

A look gives the processor away (`sched_yield`), because on a machine with few cores the client needs it to send its next
request. If the look comes back late, something else used the processor, and this counts as a miss. If it comes back **very**
late, a program that computes has used up its share while our client waited, and will do so again: see `Lateness`.

The compiled `Receiver` (`nbdtarget.fast`) does the same for plain requests, by the same numbers.
"""

import os
from typing import Final

from nbdtarget.common.clock import perf_counter_ns

__all__ = [
    "LATE_FORGIVEN",
    "LATE_NS",
    "LATE_SKIP_MAX",
    "LATE_SKIP_MIN",
    "POLL_REST",
    "POLL_SKIP_MAX",
    "POLL_STREAK",
    "Lateness",
    "Poller",
    "Polling",
]

POLL_STREAK: Final = 16
POLL_SKIP_MAX: Final = 512
POLL_REST: Final = 2
POLL_GAP_NS: Final = 20_000  # a longer time between two looks: the processor was busy

LATE_NS: Final = 200_000  # so long the processor was away for one look
LATE_SKIP_MIN: Final = 1024  # wake-ups that are not polled after the first such look
LATE_SKIP_MAX: Final = 1 << 16
LATE_FORGIVEN: Final = 4096  # hits without such a look: half as many the next time

_sched_yield: Final = os.sched_yield


class Polling:
    """The state that the pollers of one listener share. Only they write it.

    Attributes:
        last: the `Poller` or `Receiver` of the connection that received last.
        streak: how many times in a row it did, one request each time.
    """

    __slots__ = ("last", "streak")

    def __init__(self) -> None:
        self.last: object = None
        self.streak = 0


class Lateness:
    """How often the processor that a look gave away came back very late.

    A thread that gives the processor away loses the rest of its share. Where programs wait for a processor, the thread then waits for a whole
    share of one of them: some milliseconds, a hundred times as long as the request takes. A hit may follow all the same, for the client has sent its
    request meanwhile. So this counts apart from hits and misses: each time, twice as many wake-ups as the last time are not polled.

    Attributes: late_ns: what counts as very late.
    """

    __slots__ = ("_nr_hits", "_skip", "late_ns")

    def __init__(self, late_ns: int = LATE_NS) -> None:
        self.late_ns = late_ns
        self._skip = 0
        self._nr_hits = 0

    def note_late(self) -> int:
        """A look came back very late. Return how many wake-ups are not to be polled now."""
        self._skip = min(max(2 * self._skip, LATE_SKIP_MIN), LATE_SKIP_MAX)
        self._nr_hits = 0
        return self._skip

    def note_hits(self, nr: int) -> None:
        """Note that this many looks have found something, and that none came back very late."""
        self._nr_hits += nr
        if self._nr_hits >= LATE_FORGIVEN:
            self._nr_hits = 0
            self._skip //= 2


class Poller:
    """The polling of one connection; see the module head.

    Attributes:
        is_looking: the last look found nothing, and the next one may find something.
    """

    __slots__ = (
        "_began_ns",
        "_late",
        "_looked_ns",
        "_nr_hits",
        "_penalty",
        "_poll_ns",
        "_polling",
        "_skip",
        "is_looking",
    )

    def __init__(self, polling: Polling, poll_us: int) -> None:
        self._polling = polling
        self._poll_ns = poll_us * 1000
        self._skip = 0  # wake-ups that are not polled
        self._nr_hits = 0  # since the last wake-up
        self._penalty = 0  # how many were skipped after the last miss
        self._began_ns = self._looked_ns = 0
        self._late = Lateness()
        self.is_looking = False

    # hot: once in each wake-up
    def begin(self) -> bool:
        """The loop has called because something can be received. Return whether to poll afterwards."""
        self.is_looking = False
        polling = self._polling
        if polling.last is self:
            polling.streak += 1
        else:
            polling.last = self
            polling.streak = 0
        if self._nr_hits:
            self._skip += self._nr_hits * POLL_REST
            self._nr_hits = 0
        if self._skip:
            self._skip -= 1
            return False
        return polling.streak >= POLL_STREAK and self._poll_ns > 0

    def look_again(self) -> bool:
        """Nothing could be received. Return whether to look again now; if not, this was a miss."""
        now_ns = perf_counter_ns()
        if not self.is_looking:
            self.is_looking = True
            self._began_ns = now_ns
        elif (
            now_ns - self._began_ns > self._poll_ns
            or now_ns - self._looked_ns > POLL_GAP_NS
        ):
            self.missed()
            return False
        _sched_yield()
        self._looked_ns = now_ns
        if perf_counter_ns() - now_ns > self._late.late_ns:
            # The last look of this turn.
            self._began_ns = now_ns - self._poll_ns - 1
            self._skip += self._late.note_late()
        return True

    def missed(self) -> None:
        """Polling has found nothing."""
        self._penalty = min(2 * self._penalty + 1, POLL_SKIP_MAX)
        self._skip += self._penalty

    def hit(self) -> None:
        """A look has found something: polling pays off."""
        self.is_looking = False
        self._penalty = 0
        self._nr_hits += 1
        self._late.note_hits(1)

    def close(self) -> None:
        """The connection is closed."""
        if self._polling.last is self:
            self._polling.last = None

    def not_alone(self) -> None:
        """Several requests came at once: the client does not wait for each answer."""
        self._polling.streak = 0
