# SPDX-License-Identifier: Apache-2.0
"""`Share`: what one export may have of the budget of all connections.

Theory of operation. A suspended export, or one on a disk that hangs, keeps the requests of its clients. Without a bound of its
own it would use the whole budget up, and the clients of all other exports would wait for it. So its clients together have
at most `export_requests_max` requests and `export_bytes_max` bytes in flight, and at most `export_connections_max` of
them are attached. A share has the methods of `Budget`, which a connection uses in its place as soon as it is attached.

A WRITE that has begun may take memory for the rest of its payload even above the share: what bounds that is
in `Budget.grow`. The next request waits then.
"""

from collections import deque
from collections.abc import Callable

from nbdtarget.devices.base import Device
from nbdtarget.server.limits import Budget, Limits

__all__ = ["Share", "Shares"]


class Share:
    """See the module head.

    Attributes:
        nr_connections: that are attached.
        nr_requests, nr_bytes: in flight now, of these connections.
        bounds_met: of all exports.
    """

    __slots__ = (
        "_budget",
        "_bytes_max",
        "_requests_max",
        "_waiters",
        "bounds_met",
        "nr_bytes",
        "nr_connections",
        "nr_requests",
    )

    def __init__(self, budget: Budget, limits: Limits) -> None:
        self.nr_connections = 0
        self.nr_requests = 0
        self.nr_bytes = 0
        self._budget = budget
        self.bounds_met = budget.bounds_met
        self._requests_max = limits.export_requests_max
        self._bytes_max = limits.export_bytes_max
        self._waiters: deque[Callable[[], None]] = deque()

    def _is_used_up(self, nr_bytes: int) -> bool:
        return self.nr_requests >= self._requests_max or (
            # A request of any size may begin when there is no other.
            self.nr_bytes > 0 and self.nr_bytes + nr_bytes > self._bytes_max
        )

    def is_full(self, nr_bytes: int, writer: object = None) -> bool:
        """As `Budget.is_full`."""
        if writer is None and self._is_used_up(nr_bytes):
            return True
        return self._budget.is_full(nr_bytes, writer)

    @property
    def bytes_bound(self) -> str:
        """As `Budget.bytes_bound`."""
        is_ours = self._bytes_max - self.nr_bytes < self._budget.room()[1]
        return "export_bytes_max" if is_ours else self._budget.bytes_bound

    def full_bound(self, nr_bytes: int, writer: object = None) -> str:
        """As `Budget.full_bound`, for a request of `nr_bytes` that `is_full` has let wait."""
        if writer is not None or not self._is_used_up(nr_bytes):
            return self._budget.full_bound(nr_bytes)
        is_by_requests = self.nr_requests >= self._requests_max
        return "export_requests_max" if is_by_requests else "export_bytes_max"

    def room(self) -> tuple[int, int]:
        """As `Budget.room`."""
        nr_requests, nr_bytes = self._budget.room()
        return (
            min(nr_requests, self._requests_max - self.nr_requests),
            min(nr_bytes, self._bytes_max - self.nr_bytes),
        )

    def take(self, nr_requests: int, nr_bytes: int) -> None:
        """As `Budget.take`."""
        self.nr_requests += nr_requests
        self.nr_bytes += nr_bytes
        self._budget.take(nr_requests, nr_bytes)

    def grow(self, writer: object, nr_bytes: int) -> bool:
        """As `Budget.grow`."""
        if not self._budget.grow(writer, nr_bytes):
            return False
        self.nr_bytes += nr_bytes
        return True

    def end_growth(self, writer: object, nr_bytes: int) -> None:
        """As `Budget.end_growth`."""
        self._budget.end_growth(writer, nr_bytes)

    def wait(self, wake: Callable[[], None]) -> None:
        """As `Budget.wait`."""
        if self._is_used_up(0):
            self._waiters.append(wake)
            self._budget.nr_waiters_elsewhere += 1
        else:
            self._budget.wait(wake)

    def stop_waiting(self, wake: Callable[[], None]) -> None:
        """As `Budget.stop_waiting`."""
        if wake in self._waiters:
            self._waiters.remove(wake)
            self._budget.nr_waiters_elsewhere -= 1
        else:
            self._budget.stop_waiting(wake)

    def give_back(self, nr_requests: int, nr_bytes: int) -> None:
        """As `Budget.give_back`."""
        self.nr_requests -= nr_requests
        self.nr_bytes -= nr_bytes
        assert self.nr_requests >= 0
        assert self.nr_bytes >= 0
        self._budget.give_back(nr_requests, nr_bytes)
        if self._waiters:
            waiters, self._waiters = self._waiters, deque()
            self._budget.nr_waiters_elsewhere -= len(waiters)
            for wake in waiters:
                wake()


class Shares:
    """The shares of all exports that have clients."""

    def __init__(self, budget: Budget, limits: Limits) -> None:
        self._budget = budget
        self._limits = limits
        self._shares: dict[Device, Share] = {}

    def used(self) -> dict[str, int]:
        """How much of each bound is used by the export that uses most of it."""
        shares = self._shares.values()
        return {
            "export_connections_max": max(
                (it.nr_connections for it in shares), default=0
            ),
            "export_requests_max": max((it.nr_requests for it in shares), default=0),
            "export_bytes_max": max((it.nr_bytes for it in shares), default=0),
        }

    def maybe_of(self, device: Device) -> Share | None:
        """Return the share of `device`; None: no connection is attached to it."""
        return self._shares.get(device)

    def why_full(self, device: Device) -> str:
        """Why no further connection may attach to `device`; "": it may."""
        share = self._shares.get(device)
        bound = self._limits.export_connections_max
        if share is None or share.nr_connections < bound:
            return ""
        self._budget.bounds_met.met("export_connections_max")
        return f"{bound} connections are attached to it (export_connections_max)"

    def enter(self, device: Device) -> Share:
        """One more connection is attached to `device`: return what it has part in."""
        share = self._shares.get(device)
        if share is None:
            share = self._shares[device] = Share(self._budget, self._limits)
        share.nr_connections += 1
        return share

    def leave(self, device: Device) -> None:
        """A connection has released `device`; nothing of it is in flight any more."""
        share = self._shares[device]
        share.nr_connections -= 1
        if not share.nr_connections:
            assert (share.nr_requests, share.nr_bytes) == (0, 0)
            del self._shares[device]
