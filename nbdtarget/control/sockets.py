# SPDX-License-Identifier: Apache-2.0
"""The listening sockets of the control server. How a unix socket is taken: `nbdtarget.common.unix_socket`."""

import asyncio
import os
import socket
from pathlib import Path
from typing import Final

from nbdtarget.common.unix_socket import (
    PRIVATE,
    SocketAccess,
    SocketInUseError,
    UnixSocket,
    take_unix_socket,
)
from nbdtarget.control.paths import (
    ControlAddress,
    NoSocketError,
    TcpControl,
    make_directory,
)

__all__ = [
    "BACKLOG_MAX",
    "NoSocketError",
    "SocketInUseError",
    "address_of",
    "take_path",
    "take_tcp_socket",
]

BACKLOG_MAX: Final = 64
DIRECTORY_TRIES_MAX: Final = 20


async def take_tcp_socket(address: TcpControl) -> socket.socket:
    """Listen on the first address of a host. Raises: NoSocketError."""
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM
        )
        family, kind, proto, _, where = infos[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(BACKLOG_MAX)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NoSocketError(f"{address}: {reason}") from None
    listener.setblocking(False)
    return listener


def address_of(listener: socket.socket) -> ControlAddress:
    """Return the address of a socket that was passed to this process.

    Raises: NoSocketError: it is neither a unix socket nor one on TCP.
    """
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return Path(os.fsdecode(name))
    if listener.family in (socket.AF_INET, socket.AF_INET6):
        return TcpControl(name[0], name[1])
    raise NoSocketError(f"fd {listener.fileno()}: no control socket on this family")


def take_path(path: Path, access: SocketAccess = PRIVATE) -> UnixSocket:
    """Listen on `path`. The directory is made if it is missing.

    Raises: SocketInUseError; NoSocketError.
    """
    for tries_left in reversed(range(DIRECTORY_TRIES_MAX)):
        try:
            make_directory(path.parent, is_shared=access.is_shared)
            taken = take_unix_socket(str(path), access)
            taken.socket.listen(BACKLOG_MAX)
        except FileNotFoundError as error:
            # The last `clone` or `cache` that ends removes the directory; that may just have happened.
            if not tries_left:
                raise NoSocketError(f"{path}: {error.strerror or error}") from None
        except OSError as error:
            raise NoSocketError(f"{path}: {error.strerror or error}") from None
        else:
            return taken
    raise AssertionError("the last try raises")
