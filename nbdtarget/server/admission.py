# SPDX-License-Identifier: Apache-2.0
"""`Admission`: bounds on the number of connections, so that no client keeps all others out.

    from TCP        `connections_max` in all, and `peer_connections_max` from one address (IPv6: from one /64)
    from unix       `connections_max` in all, counted separately: a client on this machine can connect, however
                    many connections come from the network
    descriptors     the last DESCRIPTORS_RESERVE of the process are not for clients: the control socket and
                    the disks need them

A connection above a bound is accepted and closed at once, so that its client learns of it and does not wait.
"""

import resource
import socket
from collections import Counter
from ipaddress import IPv6Address
from typing import Final, NamedTuple

from nbdtarget.server.limits import Limits

__all__ = [
    "DESCRIPTORS_RESERVE",
    "Admission",
    "Refusal",
    "origin_of",
    "raise_descriptor_limit",
]

DESCRIPTORS_RESERVE: Final = 64
# More than any server needs. Unused descriptors cost nothing: the kernel's table grows with the highest one in use.
_DESCRIPTORS_MAX: Final = 1 << 16
_UNIX: Final = ""


def origin_of(client: socket.socket, address: object) -> str:
    """Return where a connection comes from: an address, a /64 of IPv6, "vsock:CID", or "" for all unix sockets.

    Args:
        address: as `accept` returned it.
    """
    if client.family == socket.AF_UNIX:
        return _UNIX
    assert isinstance(address, tuple)
    if client.family == socket.AF_VSOCK:
        return f"vsock:{address[0]}"
    host = str(address[0])
    if client.family != socket.AF_INET6:
        return host
    prefix = int(IPv6Address(host.partition("%")[0])) >> 64 << 64
    return f"{IPv6Address(prefix)}/64"


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files, which distributions set low, to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS_MAX
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Refusal(NamedTuple):
    """Why a connection was closed at once. `bound`: of `Limits`; "": that of the process on its descriptors."""

    bound: str
    reason: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.bound or 'ulimit -n'})"


class Admission:
    """Counts the connections of a listener by where they come from; see the module head."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_origin: Counter[str] = Counter()
        self._nr_remote = 0

    def maybe_refusal(self, origin: str, descriptor: int) -> Refusal | None:
        """Return why a new connection must be closed; None: it may stay."""
        limits = self._limits
        all_max, peer_max = limits.connections_max, limits.peer_connections_max
        here = self._by_origin[origin]
        if origin == _UNIX:
            if here >= all_max:
                return Refusal("connections_max", f"{here} connections on unix sockets")
        elif self._nr_remote >= all_max:
            return Refusal("connections_max", f"{self._nr_remote} connections")
        elif here >= peer_max:
            reason = f"{here} connections from {origin}"
            return Refusal("peer_connections_max", reason)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        reserve = min(DESCRIPTORS_RESERVE, soft // 4)
        if soft != resource.RLIM_INFINITY and descriptor >= soft - reserve:
            return Refusal("", f"few of the {soft} file descriptors are left")
        return None

    def used(self) -> dict[str, int]:
        """How much of each bound is used: by the family, and by the address, that use most of it."""
        remote = [nr for origin, nr in self._by_origin.items() if origin != _UNIX]
        return {
            "connections_max": max(self._by_origin[_UNIX], self._nr_remote),
            "peer_connections_max": max(remote, default=0),
        }

    def enter(self, origin: str) -> None:
        self._by_origin[origin] += 1
        self._nr_remote += origin != _UNIX

    def leave(self, origin: str) -> None:
        self._by_origin[origin] -= 1
        if not self._by_origin[origin]:
            del self._by_origin[origin]
        self._nr_remote -= origin != _UNIX
