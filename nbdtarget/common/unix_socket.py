# SPDX-License-Identifier: Apache-2.0
"""Unix sockets to listen on: exactly one server has a path, and the file's mode is what was asked for.

Theory of operation. Beside PATH lies PATH.lock, which the server that has PATH keeps locked until its
end. So of any number of servers that start together exactly one gets PATH, and the others are
refused without having touched it. The server that has the lock may remove a socket that was left behind: the
kernel unlocks the file of a server that was killed. The socket may belong to a program that knows no lock, so
it is probed as well: if connecting to it works, it stays. Both files are removed at the end, the lock last.

Mode. The file is made with mode 0600, whatever the umask is, then it gets its owner and group, then its
mode. So at no time may more users connect than was asked for. Connecting works only after `listen`.
"""

import fcntl
import os
import socket
import stat
from contextlib import suppress
from typing import Final, NamedTuple

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.numbers import ID_MAX, maybe_number

__all__ = [
    "PRIVATE",
    "SocketAccess",
    "SocketInUseError",
    "SocketOptions",
    "UnixSocket",
    "remove_if_stale",
    "take_unix_socket",
]

LOCK_SUFFIX: Final = ".lock"
LOCK_TRIES_MAX: Final = 1000  # a try fails if another server has just ended
PROBE_S_MAX: Final = 1.0
PRIVATE_MODE: Final = 0o600


class SocketInUseError(NbdTargetError):
    """A live server has the socket, or something that is not ours lies there."""


class SocketAccess(NamedTuple):
    """Which users may connect. `owner` and `group`: names or numbers; None: those of the process.

    On Linux a user that may write to the file may connect.
    """

    mode: int = PRIVATE_MODE
    owner: str | None = None
    group: str | None = None

    @classmethod
    def of(
        cls, mode: str | None, owner: str | None, group: str | None
    ) -> "SocketAccess":
        """Return the access that a user has written, with `mode` in octal. Raises: NbdTargetError."""
        number = PRIVATE_MODE
        if mode is not None:
            digits = mode.removeprefix("0o")
            if not (digits.isascii() and digits.isdecimal() and len(digits) <= 4):
                raise NbdTargetError(f"{mode}: is not a mode: write it as in 0660")
            try:
                number = int(digits, 8)
            except ValueError:
                raise NbdTargetError(
                    f"{mode}: is not a mode: write it as in 0660"
                ) from None
            if number > 0o777:
                raise NbdTargetError(
                    f"{mode}: is not a mode of a socket: it must be 0 to 0777"
                )
        access = cls(number, owner, group)
        access.ids()
        return access

    @property
    def is_shared(self) -> bool:
        """Whether others than the owner may connect."""
        return bool(self.mode & 0o077)

    def ids(self) -> tuple[int, int]:
        """User and group ids; -1: as it is. Raises: NbdTargetError: there is no such name."""
        return _id(self.owner, "owner"), _id(self.group, "group")


PRIVATE: Final = SocketAccess()


class SocketOptions(NamedTuple):
    """The options about the NBD sockets and the control socket. None: the option was not given."""

    socket_mode: str | None = None
    socket_owner: str | None = None
    socket_group: str | None = None
    control_mode: str | None = None
    control_owner: str | None = None
    control_group: str | None = None

    def or_else(self, other: "SocketOptions") -> "SocketOptions":
        """Return these options, with the values of `other` where this one has none."""
        pairs = zip(self, other, strict=True)
        return SocketOptions(*(a if a is not None else b for a, b in pairs))

    @property
    def listen(self) -> SocketAccess:
        """Raises: NbdTargetError."""
        return SocketAccess.of(self.socket_mode, self.socket_owner, self.socket_group)

    @property
    def control(self) -> SocketAccess:
        """Raises: NbdTargetError."""
        return SocketAccess.of(
            self.control_mode, self.control_owner, self.control_group
        )


class UnixSocket:
    """A bound socket, and the right to its path: `lock` is a descriptor, -1 after `release`."""

    def __init__(self, sock: socket.socket, path: str, lock: int) -> None:
        self.socket = sock
        self.path = os.path.abspath(path)
        self.lock = lock
        self._file = _file_of(path)

    def release(self) -> None:
        """Remove both files, and let go. The socket itself is the caller's to close, before."""
        if self.lock < 0:
            return
        with suppress(OSError):  # its directory is gone, or not ours any more
            if _file_of(self.path) == self._file:
                os.unlink(self.path)
        _unlock(self.path, self.lock)
        self.lock = -1


def take_unix_socket(path: str, access: SocketAccess = PRIVATE) -> UnixSocket:
    """Bind a stream socket to `path`, in place of a dead server's socket if need be.

    Raises: SocketInUseError; OSError: it cannot be made there.
    """
    lock = _lock(path)
    try:
        _remove_dead(path)
        return UnixSocket(_bind(path, access), path, lock)
    except BaseException:
        _unlock(path, lock)
        raise


def remove_if_stale(path: str) -> None:
    """Remove the socket of a server that was killed, and nothing else."""
    try:
        lock = _lock(path)
    except (SocketInUseError, OSError):
        return  # it has a server, or is none of our business
    with suppress(SocketInUseError, OSError):  # something else lies there
        _remove_dead(path)
    _unlock(path, lock)


def _lock(path: str) -> int:
    name = path + LOCK_SUFFIX
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    for _ in range(LOCK_TRIES_MAX):
        lock = os.open(name, flags, PRIVATE_MODE)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The server that had it may have removed the file after we had opened it.
            status = os.fstat(lock)
            if (status.st_dev, status.st_ino) == _file_of(name):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise SocketInUseError(
                f"{path}: another server is listening there"
            ) from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
    raise SocketInUseError(
        f"{path}: other servers take this socket and leave it all the time: try again"
    )


def _unlock(path: str, lock: int) -> None:
    with suppress(OSError):  # its directory is gone, or not ours any more
        os.unlink(path + LOCK_SUFFIX)
    os.close(lock)


def _file_of(path: str) -> tuple[int, int]:
    status = os.stat(path, follow_symlinks=False)
    return status.st_dev, status.st_ino


def _remove_dead(path: str) -> None:
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketInUseError(f"{path}: exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_S_MAX)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except TimeoutError:
            pass  # its backlog is full: very much alive
        except OSError as error:
            raise SocketInUseError(f"{path}: {error.strerror or error}") from None
    raise SocketInUseError(f"{path}: another server is listening there")


def _bind(path: str, access: SocketAccess) -> socket.socket:
    owner, group = access.ids()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    is_bound = False
    try:
        # Linux makes the file with the socket's own mode, less the umask.
        os.fchmod(sock.fileno(), PRIVATE_MODE)
        sock.bind(path)
        is_bound = True
        if (owner, group) != (-1, -1):
            os.chown(path, owner, group, follow_symlinks=False)
        os.chmod(path, access.mode)
    except BaseException:
        sock.close()
        if is_bound:
            os.unlink(path)
        raise
    sock.setblocking(False)
    return sock


def _id(name: str | None, what: str) -> int:
    if name is None:
        return -1
    number = maybe_number(name, ID_MAX)
    if number is not None:
        return number
    import grp  # here: hardly any socket has another owner
    import pwd

    try:
        return (
            pwd.getpwnam(name).pw_uid if what == "owner" else grp.getgrnam(name).gr_gid
        )
    except KeyError:
        raise NbdTargetError(f"{name}: there is no such {what}") from None
