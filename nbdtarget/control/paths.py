# SPDX-License-Identifier: Apache-2.0
"""Where control sockets and the default NBD sockets are, and the token of a control socket on TCP.

In the runtime directory:

    control.sock            of `serve`
    control/NAME.sock       of the `clone` or `cache` that serves NAME: each of them has its own
    nbd.sock, NAME.sock     for NBD clients, if no other address is given

A name that would make a path too long for a socket is shortened, and a digest of the name is appended.
"""

import errno as errnos
import os
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.numbers import maybe_number

__all__ = [
    "LOOK_TOKEN_VARIABLE",
    "TOKEN_VARIABLE",
    "ControlAddress",
    "NoSocketError",
    "TcpControl",
    "control_address",
    "control_token",
    "forget_directory",
    "is_control_given",
    "job_control_path",
    "known_controls",
    "make_directory",
    "runtime_directory",
    "serve_control_path",
    "socket_path",
]

SOCKET_PATH_MAX: Final = 107  # bytes
TCP_PORT_MAX: Final = 0xFFFF
DIGEST_LENGTH: Final = 16
CONTROL_DIRECTORY: Final = "control"
CONTROL_VARIABLE: Final = "NBDTARGET_CONTROL"
TOKEN_VARIABLE: Final = "NBDTARGET_CONTROL_TOKEN"
LOOK_TOKEN_VARIABLE: Final = "NBDTARGET_CONTROL_READ_TOKEN"
TOKEN_LENGTH_MIN: Final = 16
TOKEN_LENGTH_MAX: Final = 4096


class NoSocketError(NbdTargetError):
    """The socket cannot be made: no directory, no permission, no such address, or the path is too long."""


class TcpControl(NamedTuple):
    """A control socket on TCP; IPv6 addresses come without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


ControlAddress = Path | TcpControl


def runtime_directory() -> Path:
    """$RUNTIME_DIRECTORY, as systemd sets it; else $XDG_RUNTIME_DIR/nbdtarget; else /run/nbdtarget for
    root; else ~/.local/state/nbdtarget.

    Each of them belongs to the user: no other user can put a socket there, or replace one.
    """
    given = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "nbdtarget"
    if os.geteuid() == 0:
        return Path("/run/nbdtarget")
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "nbdtarget"


def make_directory(directory: Path, *, is_shared: bool) -> None:
    """Make a directory and its missing parents. If `is_shared`, other users can pass through them, and nothing else.

    Raises: OSError.
    """
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    for each in reversed(missing):
        # Not with `parents`: it makes parents that are open to all users.
        each.mkdir(mode=0o711 if is_shared else 0o700, exist_ok=True)
    if not directory.is_dir():
        raise NotADirectoryError(errnos.ENOTDIR, os.strerror(errnos.ENOTDIR))


def forget_directory(directory: Path) -> None:
    """Remove the directory of the control sockets of `clone` and `cache`, if it is that one and is empty."""
    if directory.name == CONTROL_DIRECTORY:
        with suppress(OSError):  # not empty
            directory.rmdir()


def socket_path(directory: Path, name: str) -> Path:
    """`NAME.sock` in `directory`. Raises: NoSocketError: the directory's path is too long."""
    path = directory / f"{name}.sock"
    room = SOCKET_PATH_MAX - len(os.fsencode(path))
    if room >= 0:
        return path
    raw = os.fsencode(name)
    kept = len(raw) + room - DIGEST_LENGTH - 1
    if kept < 0:
        raise NoSocketError(f"{directory}: the path is too long for a socket in it")
    import hashlib  # here: few names are too long, and every command would wait for OpenSSL

    digest = hashlib.sha256(raw).hexdigest()[:DIGEST_LENGTH]
    return directory / f"{raw[:kept].decode('ascii', 'replace')[:kept]}~{digest}.sock"


def serve_control_path() -> Path:
    """The control socket of `serve`."""
    return runtime_directory() / "control.sock"


def job_control_path(name: str) -> Path:
    """The control socket of the `clone` or `cache` that serves `name`. Raises: NbdTargetError."""
    return socket_path(runtime_directory() / CONTROL_DIRECTORY, name)


def known_controls() -> list[Path]:
    """The control sockets in the runtime directory. Some may belong to servers that were killed."""
    directory = runtime_directory()
    found = [path for path in (directory / "control.sock",) if path.exists()]
    try:
        names = sorted(os.listdir(directory / CONTROL_DIRECTORY))
    except OSError:
        names = []  # there was no `clone` or `cache` yet
    directory /= CONTROL_DIRECTORY
    found += [directory / name for name in names if name.endswith(".sock")]
    return found


def is_control_given(given: str | None) -> bool:
    """Whether the user says which server to ask."""
    return bool(given or os.environ.get(CONTROL_VARIABLE))


def control_address(given: str | None) -> ControlAddress:
    """Return the address that was `given`, $NBDTARGET_CONTROL, or the runtime directory's control.sock.

    A path, `unix:PATH` or `tcp:HOST:PORT`. Raises: NbdTargetError.
    """
    address = given or os.environ.get(CONTROL_VARIABLE)
    if not address:
        return serve_control_path()
    if address.startswith("tcp:"):
        host, _, port = address.removeprefix("tcp:").rpartition(":")
        host = host.strip("[]")
        number = maybe_number(port, TCP_PORT_MAX)
        if not host or number is None:
            raise NbdTargetError(f"{address}: is not tcp:HOST:PORT")
        return TcpControl(host, number)
    return Path(address.removeprefix("unix:"))


def control_token(
    file: str | None = None, variable: str = TOKEN_VARIABLE
) -> str | None:
    """The token: the first line of `file`, else what stands in the environment, else None.

    Raises: NbdTargetError: unreadable, too short, or more than one word.
    """
    token = os.environ.get(variable) or None
    source = f"${variable}"
    if file is not None:
        source = file
        try:
            with open(file, encoding="ascii") as lines:
                token = lines.readline(TOKEN_LENGTH_MAX + 1).strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not ASCII"
            raise NbdTargetError(f"{file}: {reason}") from None
    if token is None:
        return None
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise NbdTargetError(f"{source}: the token must be one word of ASCII")
    if not TOKEN_LENGTH_MIN <= len(token) <= TOKEN_LENGTH_MAX:
        raise NbdTargetError(
            f"{source}: the token must have {TOKEN_LENGTH_MIN} to {TOKEN_LENGTH_MAX}"
            " characters"
        )
    return token
