# SPDX-License-Identifier: Apache-2.0
"""Where the control socket and the default NBD socket are, and the token of a control socket on TCP."""

import os
from pathlib import Path
from typing import Final, NamedTuple

from nbdtarget.errors import NbdTargetError

__all__ = [
    "TOKEN_VARIABLE",
    "ControlAddress",
    "TcpControl",
    "control_address",
    "control_token",
    "runtime_directory",
]

CONTROL_VARIABLE: Final = "NBDTARGET_CONTROL"
TOKEN_VARIABLE: Final = "NBDTARGET_CONTROL_TOKEN"
TOKEN_LENGTH_MIN: Final = 16
TOKEN_LENGTH_MAX: Final = 4096


class TcpControl(NamedTuple):
    """A control socket on TCP; IPv6 addresses come without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


ControlAddress = Path | TcpControl


def runtime_directory() -> Path:
    """$XDG_RUNTIME_DIR/nbdtarget; else /run/nbdtarget for root; else ~/.local/state/nbdtarget.

    All three are the user's own: nobody else can put a socket there, or replace ours.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "nbdtarget"
    if os.geteuid() == 0:
        return Path("/run/nbdtarget")
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "nbdtarget"


def control_address(given: str | None) -> ControlAddress:
    """What was `given`, $NBDTARGET_CONTROL, or the runtime directory's control.sock.

    A path, `unix:PATH` or `tcp:HOST:PORT`. Raises: NbdTargetError.
    """
    address = given or os.environ.get(CONTROL_VARIABLE)
    if not address:
        return runtime_directory() / "control.sock"
    if address.startswith("tcp:"):
        host, _, port = address.removeprefix("tcp:").rpartition(":")
        host = host.strip("[]")
        if not (host and port.isascii() and port.isdecimal() and int(port) < 65536):
            raise NbdTargetError(f"{address}: is not tcp:HOST:PORT")
        return TcpControl(host, int(port))
    return Path(address.removeprefix("unix:"))


def control_token(file: str | None = None) -> str | None:
    """The token: the first line of `file`, else $NBDTARGET_CONTROL_TOKEN, else None.

    Raises: NbdTargetError: unreadable, too short, or more than one word.
    """
    token = os.environ.get(TOKEN_VARIABLE) or None
    source = f"${TOKEN_VARIABLE}"
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
