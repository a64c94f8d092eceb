# SPDX-License-Identifier: Apache-2.0
"""`hang_up_events`: what the kernel knows of the client's end of a connection, without reading from the socket."""

import select
import socket
from typing import Final

from nbdtarget.common.tls_socket import TlsSocket

__all__ = ["HUNG_UP", "hang_up_events"]

HUNG_UP: Final = select.POLLHUP | select.POLLERR  # nothing can be sent to the client


def hang_up_events(sock: socket.socket | TlsSocket) -> int:
    """Return POLLRDHUP, POLLHUP and POLLERR, or'ed; 0 while the client may still send something.

    POLLRDHUP is set as soon as the client has closed its sending half, also while bytes are unread.
    """
    looker = select.poll()
    looker.register(sock.fileno(), select.POLLRDHUP)
    return sum(events for _, events in looker.poll(0))
