# SPDX-License-Identifier: Apache-2.0
"""`Traffic`: what the clients of an export have asked for, in numbers that only grow: requests, bytes, time, failures.

Theory of operation. Each connection counts for itself, and nothing is added up while requests are served. `Accounts` adds up when it is
asked: for each device, the connections that it has, and one sum of those that have ended. So a request costs two additions of integers, and a batch two
looks at the clock.

The numbers of a connection stand in two places: the compiled path counts what it answers (`nbdtarget_fast.Plane.counted`),
and Python counts everything else. No request is in both.

The time of a request begins when it has been received (the whole batch, for the requests of a batch), and ends when its reply is ready to be
sent. It counts in one bucket of a histogram: the first whose bound is not below it. A request that failed counts as one request that
has failed, with its time; its bytes do not count. A request that was refused counts only as one that has failed.

A restart, and a hand-over to another process, begin at 0.
"""

from bisect import bisect_left
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
    "OPERATIONS",
    "Account",
    "Accounts",
    "Client",
    "Traffic",
    "new_request",
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

# Of one command: how many, their bytes, their time in ns, and how many of them in each bucket.
_Answered = tuple[int, int, int, list[int]]


class _Counts(Protocol):
    """What the compiled path has counted: `nbdtarget_fast.Plane`."""

    def counted(self) -> tuple[_Answered, _Answered]:
        """Of READs and of WRITEs."""
        ...


class Traffic:
    """The numbers of one connection, or a sum of several.

    Attributes: compiled: the compiled half of the connection, which counts, too.
    """

    __slots__ = ("_buckets", "_nr", "_nr_bytes", "_nr_failed", "_taken_ns", "compiled")

    def __init__(self) -> None:
        self._nr = [0] * _NR_COMMANDS
        self._nr_bytes = [0] * _NR_COMMANDS
        self._taken_ns = [0] * _NR_COMMANDS
        self._nr_failed = [0] * _NR_COMMANDS
        self._buckets: list[list[int]] = [
            [0] * (len(BOUNDS_NS) + 1) for _ in range(_NR_COMMANDS)
        ]
        self.compiled: _Counts | None = None

    # hot: 0.4 us, once for each batch and operation, and for each request that takes the slow path
    def note(self, command: int, nr: int, nr_bytes: int, taken_ns: int) -> None:
        """Count `nr` requests with `nr_bytes` bytes in all, which have taken `taken_ns` each."""
        self._nr[command] += nr
        self._nr_bytes[command] += nr_bytes
        self._taken_ns[command] += nr * taken_ns
        self._buckets[command][bisect_left(BOUNDS_NS, taken_ns)] += nr

    def note_ended(self, request: Request, bio: Bio) -> None:
        """Count a request whose bio has ended."""
        nr_bytes = 0 if bio.status else bio.length
        taken_ns = perf_counter_ns() - request.begun_ns
        self.note(request.command, 1, nr_bytes, taken_ns)

    def note_failed(self, command: int) -> None:
        """Count a request that was answered with an error. A command that NBD does not have is not counted."""
        if 0 <= command < _NR_COMMANDS:
            self._nr_failed[command] += 1

    def totals(self, command: int) -> tuple[int, int, int, int]:
        """Return requests that were carried out (failed ones among them), bytes, time in ns, requests that failed."""
        nr, nr_bytes, taken_ns = 0, 0, 0
        if self.compiled is not None and command in (CMD_READ, CMD_WRITE):
            nr, nr_bytes, taken_ns, _ = self.compiled.counted()[command]
        return (
            self._nr[command] + nr,
            self._nr_bytes[command] + nr_bytes,
            self._taken_ns[command] + taken_ns,
            self._nr_failed[command],
        )

    def buckets(self, command: int) -> tuple[int, ...]:
        """Return how many requests took how long: one number for each of BOUNDS_NS, and one more."""
        mine = self._buckets[command]
        if self.compiled is None or command not in (CMD_READ, CMD_WRITE):
            return tuple(mine)
        more = self.compiled.counted()[command][3]
        return tuple(map(sum, zip(mine, more, strict=True)))

    def add(self, other: "Traffic") -> None:
        """Add all that another one has counted."""
        for command in OPERATIONS:
            nr, nr_bytes, taken_ns, nr_failed = other.totals(command)
            if nr or nr_bytes or nr_failed:
                self._nr[command] += nr
                self._nr_bytes[command] += nr_bytes
                self._taken_ns[command] += taken_ns
                self._nr_failed[command] += nr_failed
                mine = self._buckets[command]
                for at, more in enumerate(other.buckets(command)):
                    mine[at] += more


class Account:
    """Several connections: one sum of those that have ended, and those that are there."""

    __slots__ = ("ended", "open")

    def __init__(self) -> None:
        self.ended = Traffic()
        self.open: set[Traffic] = set()

    def totals(self, command: int) -> tuple[int, int, int, int]:
        """As `Traffic.totals`, of all of them."""
        nr, nr_bytes, taken_ns, nr_failed = self.ended.totals(command)
        for each in self.open:
            more = each.totals(command)
            nr, nr_bytes = nr + more[0], nr_bytes + more[1]
            taken_ns, nr_failed = taken_ns + more[2], nr_failed + more[3]
        return nr, nr_bytes, taken_ns, nr_failed

    def buckets(self, command: int) -> tuple[int, ...]:
        """As `Traffic.buckets`, of all of them."""
        parts = (self.ended, *self.open)
        return tuple(
            map(sum, zip(*(each.buckets(command) for each in parts), strict=True))
        )


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
            account.ended.add(traffic)

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
