# SPDX-License-Identifier: Apache-2.0
"""The messages with which a listener and its connections hand themselves over to another process.

The sockets themselves are passed as descriptors, in this order: for each listening socket the socket and, of a unix socket, the
lock of its path; then one for each connection.
"""

import msgspec

from nbdtarget.server.limits import Limits
from nbdtarget.server.tls import TlsOptions
from nbdtarget_protocol.handshake import Negotiated

__all__ = [
    "BegunRange",
    "ConnectionState",
    "ListenerState",
    "MovedConnection",
    "SocketState",
]


class BegunRange(msgspec.Struct, frozen=True):
    """A TRIM, WRITE_ZEROES or CACHE, of which the first `done` bytes have been carried out. The other fields: as the client sent them."""

    cookie: int
    command: int
    flags: int
    offset: int
    length: int
    done: int


class ConnectionState(msgspec.Struct, frozen=True):
    """One connection that is at rest.

    Attributes:
        peer: for the log.
        received: requests that have not begun, perhaps the first bytes of one more.
        unsent: replies that the client has not taken, perhaps without the first bytes.
        begun: requests that were stopped between two slices.
    """

    peer: str
    negotiated: Negotiated
    received: bytes
    unsent: bytes
    begun: tuple[BegunRange, ...] = ()


class MovedConnection(msgspec.Struct, frozen=True):
    """`origin`: as `nbdtarget.server.admission.origin_of` says."""

    origin: str
    state: ConnectionState


class SocketState(msgspec.Struct, frozen=True):
    """One listening socket.

    Attributes:
        path: of a unix socket whose path is ours.
        address: what was asked for.
        tls: the options with which the old process served it. The configuration file may have changed since.
    """

    path: str | None
    address: str
    tls: TlsOptions


class ListenerState(msgspec.Struct, frozen=True):
    """All sockets of a listener. `limits`: the bounds of the old process. The configuration file may have changed since."""

    sockets: tuple[SocketState, ...]
    connections: tuple[MovedConnection, ...]
    limits: Limits

    @property
    def nr_descriptors(self) -> int:
        locks = sum(each.path is not None for each in self.sockets)
        return len(self.sockets) + locks + len(self.connections)
