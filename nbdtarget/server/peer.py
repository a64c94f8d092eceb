# SPDX-License-Identifier: Apache-2.0
"""Asks the kernel about the client's end of a connection, without reading from the socket."""

import select
import socket
import struct
from typing import Final

from nbdtarget.common.access import Identity
from nbdtarget.common.tls_socket import TlsSocket

__all__ = ["HUNG_UP", "hang_up_events", "identity_of"]

_CREDENTIALS: Final = struct.Struct("iII")  # pid, uid, gid: see unix(7)
_SO_PEERGROUPS: Final = 59  # Python has no name for it
_GROUPS_BYTES_MAX: Final = 1024  # of 4 bytes each; Python takes no more

HUNG_UP: Final = select.POLLHUP | select.POLLERR  # nothing can be sent to the client


def hang_up_events(sock: socket.socket | TlsSocket) -> int:
    """Return POLLRDHUP, POLLHUP and POLLERR, or'ed; 0 while the client may still send something.

    POLLRDHUP is set as soon as the client has closed its sending half, also while bytes are unread.
    """
    looker = select.poll()
    looker.register(sock.fileno(), select.POLLRDHUP)
    return sum(events for _, events in looker.poll(0))


def identity_of(client: socket.socket) -> Identity:
    """Return who is at the other end of an accepted socket, before TLS. Raises: OSError: it has gone."""
    if client.family == socket.AF_UNIX:
        level, size = socket.SOL_SOCKET, _CREDENTIALS.size
        _, uid, gid = _CREDENTIALS.unpack(
            client.getsockopt(level, socket.SO_PEERCRED, size)
        )
        try:
            groups = client.getsockopt(level, _SO_PEERGROUPS, _GROUPS_BYTES_MAX)
        except OSError:
            groups = (
                b""  # more than that, or an old kernel: only the first group counts
            )
        more = struct.unpack(f"{len(groups) // 4}I", groups)
        return Identity(uid=uid, gids=tuple(dict.fromkeys((gid, *more))))
    if client.family in (socket.AF_INET, socket.AF_INET6):
        return Identity(str(client.getpeername()[0]))
    if client.family == socket.AF_VSOCK:
        return Identity(cid=client.getpeername()[0])
    return Identity()
