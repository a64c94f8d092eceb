# SPDX-License-Identifier: Apache-2.0
"""`Traffic`: what the clients of an export have asked for, in numbers that only grow: requests, bytes, time, failures.

Theory of operation. Each connection counts for itself, and nothing is added up while requests are served. `Accounts` adds up when it is
asked: for each device, the connections that it has, and one sum of those that have ended. So a request costs two additions of integers.

A batch costs two looks at the clock. For the compiled path that is much, so while the server is busy it times only some of its batches (`nbdtarget_counting.h`). Python
times each one: the interpreter needs longer for the additions than for the looks.

The numbers of a connection stand in two places: the compiled path counts what it answers (`nbdtarget_fast.Plane.counted`),
and Python counts everything else. No request is in both.

The time of a request begins when it has been received (the whole batch, for the requests of a batch), and ends when its reply is ready to be
sent. It counts in one bucket of a histogram: the first whose bound is not below it. A request that failed counts as one request that
has failed, with its time; its bytes do not count. A request that was refused counts only as one that has failed.

A restart, and a hand-over to another process, begin at 0.
"""

import operator
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from nbdtarget.bio import Bio
from nbdtarget.common.access import Identity
from nbdtarget.common.clock import perf_counter_ns
from nbdtarget.devices.base import Device
from nbdtarget.server.buffers import Buffer
from nbdtarget.server.request import Request
from nbdtarget_protocol.consts import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
)

__all__ = [
    "BOUNDS_NS",
    "NR_TOTALS",
    "OPERATIONS",
    "Account",
    "Accounts",
    "Client",
    "Counts",
    "Traffic",
    "new_request",
    "sum_of",
]

# Of the buckets; one more is for all that took longer. The compiled path has the same.
BOUNDS_NS: Final = (
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    50_000_000,
    250_000_000,
    1_000_000_000,
)
# By command of the protocol: what the numbers are called.
OPERATIONS: Final = {
    CMD_READ: "read",
    CMD_WRITE: "write",
    CMD_FLUSH: "flush",
    CMD_TRIM: "discard",
    CMD_CACHE: "cache",
    CMD_WRITE_ZEROES: "write_zeroes",
    CMD_BLOCK_STATUS: "block_status",
}
_NR_COMMANDS: Final = max(OPERATIONS) + 1
_COMPILED: Final = (
    CMD_READ,
    CMD_WRITE,
    CMD_FLUSH,
)  # what the compiled path counts, too

# Of one command: how many requests were carried out (those that failed among them), their bytes, their time in ns, how many
# failed; then one number for each of BOUNDS_NS, and one more: how many took how long.
Counts = list[int]
_NR, _NR_BYTES, _TAKEN_NS, _NR_FAILED, NR_TOTALS = range(5)

# The figures of the compiled path for one command: how many, their bytes, their time in ns, and how many of them in each bucket.
_Answered = tuple[int, int, int, list[int]]


class _Compiled(Protocol):
    """The counters of the compiled path: `nbdtarget_fast.Plane`."""

    def counted(self) -> tuple[_Answered, _Answered, _Answered]:
        """Return the counters, in the order of `_COMPILED`."""
        ...


def _nothing() -> Counts:
    return [0] * (NR_TOTALS + len(BOUNDS_NS) + 1)


class Traffic:
    """The numbers of one connection, or a sum of several.

    Attributes: compiled: the compiled half of the connection, which counts, too.
    """

    __slots__ = ("_counts", "compiled")

    def __init__(self) -> None:
        # By command; a command that no client has sent is missing.
        self._counts: defaultdict[int, Counts] = defaultdict(_nothing)
        self.compiled: _Compiled | None = None

    # hot: 0.3 us, once for each batch and operation, and for each request that takes the slow path
    def note(self, command: int, nr: int, nr_bytes: int, taken_ns: int) -> None:
        """Count `nr` requests with `nr_bytes` bytes in all, which have taken `taken_ns` each."""
        counts = self._counts[command]
        counts[_NR] += nr
        counts[_NR_BYTES] += nr_bytes
        counts[_TAKEN_NS] += nr * taken_ns
        counts[NR_TOTALS + bisect_left(BOUNDS_NS, taken_ns)] += nr

    def note_ended(self, request: Request, bio: Bio) -> None:
        """Count a request whose bio has ended."""
        nr_bytes = 0 if bio.status else bio.length
        taken_ns = perf_counter_ns() - request.begun_ns
        self.note(request.command, 1, nr_bytes, taken_ns)

    def note_failed(self, command: int) -> None:
        """Count a request that was answered with an error. A command that NBD does not have is not counted."""
        if 0 <= command < _NR_COMMANDS:
            self._counts[command][_NR_FAILED] += 1

    def counts(self) -> Mapping[int, Counts]:
        """Return the numbers by command; a command that no client has sent may be missing. Callers must not change them."""
        if self.compiled is None:
            return self._counts
        answered = zip(_COMPILED, self.compiled.counted(), strict=True)
        of_compiled = {
            command: [nr, nr_bytes, taken_ns, 0, *buckets]
            for command, (nr, nr_bytes, taken_ns, buckets) in answered
        }
        return sum_of((self._counts, of_compiled))

    def add(self, other: Mapping[int, Counts]) -> None:
        """Add what others have counted."""
        for command, more in other.items():
            mine = self._counts[command]
            mine[:] = map(operator.add, mine, more)


def sum_of(parts: Iterable[Mapping[int, Counts]]) -> Mapping[int, Counts]:
    """Return the sum of several `Traffic.counts`."""
    found: dict[int, list[Counts]] = {}
    for part in parts:
        for command, counts in part.items():
            found.setdefault(command, []).append(counts)
    return {
        command: each[0] if len(each) == 1 else list(map(sum, zip(*each, strict=True)))
        for command, each in found.items()
    }


class Account:
    """Several connections: one sum of those that have ended, and those that are there."""

    __slots__ = ("ended", "open")

    def __init__(self) -> None:
        self.ended = Traffic()
        self.open: set[Traffic] = set()

    def counts(self) -> Mapping[int, Counts]:
        """As `Traffic.counts`, of all of them."""
        parts = [counts for each in self.open if (counts := each.counts())]
        if ended := self.ended.counts():
            parts.append(ended)
        return parts[0] if len(parts) == 1 else sum_of(parts)

    def parts(self) -> list[Traffic]:
        """Return what `counts` is the sum of. Connections that end meanwhile do not change which they are, or count twice."""
        ended = Traffic()
        ended.add(self.ended.counts())
        return [ended, *self.open]


class Accounts:
    """The numbers of all devices that clients have been attached to. Those of a device that was removed are forgotten,
    but for `all`.

    Attributes: all: all devices together, those that were removed among them.
    """

    def __init__(self) -> None:
        self._accounts: WeakKeyDictionary[Device, Account] = WeakKeyDictionary()
        self.all = Account()

    def open(self, device: Device) -> Traffic:
        """A connection is attached to `device`: return the numbers that it counts in."""
        account = self._accounts.get(device)
        if account is None:
            account = self._accounts[device] = Account()
        traffic = Traffic()
        account.open.add(traffic)
        self.all.open.add(traffic)
        return traffic

    def close(self, device: Device, traffic: Traffic) -> None:
        """The connection has released `device`, and counts no more."""
        for account in (self._accounts[device], self.all):
            account.open.remove(traffic)
            account.ended.add(traffic.counts())

    def of(self, device: Device) -> Account | None:
        """Return the numbers of a device; None: no client was attached to it."""
        return self._accounts.get(device)


class Client(NamedTuple):
    """One connection, for those that look at the server.

    Attributes:
        peer: how the log names it.
        identity: who it has shown to be.
        device, traffic: what it is attached to, and what it has asked for; None in the handshake.
        in_flight: its requests that are in flight.
    """

    peer: str
    identity: Identity
    device: Device | None
    traffic: Traffic | None
    in_flight: int


def new_request(
    cookie: int,
    command: int,
    flags: int,
    offset: int,
    charge: int,
    buffer: Buffer | None,
) -> Request:
    """Return a request that begins now."""
    begun_ns = perf_counter_ns()
    return Request(cookie, command, flags, offset, charge, buffer, None, begun_ns)
