# SPDX-License-Identifier: Apache-2.0
"""`passed_socket`: a listening socket that another process made and passed to this one."""

import socket
from typing import Final

from nbdtarget.common.errors import ListenError

__all__ = ["passed_socket"]

_FAMILIES: Final = (
    socket.AF_UNIX,
    socket.AF_INET,
    socket.AF_INET6,
    socket.AF_VSOCK,
)


def passed_socket(fd: int) -> socket.socket:
    """Own the descriptor from now on. Raises: ListenError: it is not a listening stream socket."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ListenError(f"fd {fd}", str(error.strerror)) from error
    if (
        sock.type != socket.SOCK_STREAM
        or sock.family not in _FAMILIES
        or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        sock.detach()
        raise ListenError(f"fd {fd}", "is not a listening stream socket")
    sock.setblocking(False)
    return sock
