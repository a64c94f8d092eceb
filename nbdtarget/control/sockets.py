# SPDX-License-Identifier: Apache-2.0
"""The listening sockets of the control server.

One server for one path. Looking at the path and taking it are done under a lock on its
directory, so that two servers that start together cannot both think the other's socket stale.
A socket that nobody answers on was left behind by a killed server and is replaced; anything
else that lies there is not ours to remove.
"""

import asyncio
import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import Final

from nbdtarget.clock import sleep
from nbdtarget.control.paths import TcpControl
from nbdtarget.errors import NbdTargetError

__all__ = ["BACKLOG_MAX", "SocketInUseError", "take_tcp_socket", "take_unix_socket"]

BACKLOG_MAX: Final = 64
LOCK_TRIES_MAX: Final = 20
LOCK_RETRY_S: Final = 0.05


class SocketInUseError(NbdTargetError):
    """A live server has the socket, or something that is not ours lies there."""


async def take_tcp_socket(address: TcpControl) -> socket.socket:
    """Listen on the first address of a host. Raises: SocketInUseError."""
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
        raise SocketInUseError(f"{address}: {reason}") from None
    listener.setblocking(False)
    return listener


async def take_unix_socket(path: Path) -> socket.socket:
    """Listen on `path` with mode 0600, in place of a dead server's socket if need be.

    Raises: SocketInUseError.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            await _lock(directory)
            _clear_stale(path)
            return _bind(path)
        finally:
            os.close(directory)
    except OSError as error:
        raise SocketInUseError(f"{path}: {error.strerror or error}") from None


def _bind(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_mask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG_MAX)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(old_mask)
    listener.setblocking(False)
    return listener


async def _lock(directory: int) -> None:
    for _ in range(LOCK_TRIES_MAX):
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            await sleep(LOCK_RETRY_S)
        else:
            return
    # Somebody sits on the lock of a directory that others may open: go on without.


def _clear_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketInUseError(f"{path}: exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise SocketInUseError(f"{path}: {error.strerror or error}") from None
    raise SocketInUseError(f"{path}: a server is running on this control socket")
