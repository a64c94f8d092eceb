# SPDX-License-Identifier: Apache-2.0
"""NBD URIs, as the protocol's URI document defines them; without TLS and vsock.

    nbd://HOST[:PORT]/EXPORT            TCP; port 10809 by default; IPv6 in brackets
    nbd+unix:///EXPORT?socket=PATH      %00 first in PATH: an abstract socket

Export name and socket path are %-decoded. Query keys that are not known are ignored, here and by other
programs. Two are our own, and no part of what the URI names:

    request-timeout=SECONDS    a request that the server does not answer for so long makes the
                               connection lost; 0: none does. Without it, reads have a minute,
                               and writes and flushes have all the time in the world
    connections=NUMBER         at most so many connections, if the server says that several may be used; 4
"""

import os
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import unquote, urlsplit

from nbdtarget.common.errors import ResolveError

__all__ = [
    "CONNECTIONS",
    "CONNECTIONS_MAX",
    "NBD_PORT",
    "NBD_SCHEMES",
    "NbdUri",
    "parse_nbd_uri",
]

NBD_PORT: Final = 10809
NBD_SCHEMES: Final = frozenset({"nbd", "nbd+unix"})
EXPORT_NAME_MAX: Final = 4096  # bytes
READ_TIMEOUT_S: Final = 60.0
REQUEST_TIMEOUT_S_MAX: Final = 86_400
CONNECTIONS: Final = 4
CONNECTIONS_MAX: Final = 16
_TLS_SCHEMES: Final = frozenset({"nbds", "nbds+unix"})


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where an export is.

    Attributes:
        host, port: TCP; `host` is empty for a unix socket.
        socket_path: unix socket; starts with NUL if abstract; empty for TCP.
        read_timeout_s, write_timeout_s: see `request-timeout`; 0: none.
        connections: how many are used at most.
    """

    export_name: str
    host: str = ""
    port: int = NBD_PORT
    socket_path: str = ""
    read_timeout_s: float = READ_TIMEOUT_S
    write_timeout_s: float = 0.0
    connections: int = CONNECTIONS

    @property
    def identity(self) -> Hashable:
        """The same for each way to write this URI."""
        path = self.socket_path
        if path and not path.startswith("\0"):
            path = os.path.realpath(path)
        return ("nbd", self.host.lower(), self.port, path, self.export_name)


def parse_nbd_uri(name: str) -> NbdUri:
    """Take an NBD URI apart. Raises: ResolveError."""
    try:
        parts = urlsplit(name)
        port = parts.port
        export_name = unquote(parts.path.removeprefix("/"), errors="strict")
        query = _query(parts.query)
    except ValueError as error:  # also UnicodeDecodeError
        raise ResolveError(name, f"not an NBD URI: {error}") from None
    scheme = parts.scheme.lower()
    if scheme in _TLS_SCHEMES:
        raise ResolveError(name, "TLS is not supported")
    if scheme not in NBD_SCHEMES:
        raise ResolveError(name, f"{scheme}: is not supported")
    if "\0" in export_name or len(export_name.encode()) > EXPORT_NAME_MAX:
        raise ResolveError(name, "not an export name: it has a NUL or is too long")
    if scheme == "nbd":
        if not parts.hostname:
            raise ResolveError(name, "the URI names no host")
        # 0 is a port that the URI may well say; it is only not one to connect to.
        port = NBD_PORT if port is None else port
        host = unquote(parts.hostname)
        return _with_options(name, NbdUri(export_name, host, port), query)
    if parts.netloc:
        raise ResolveError(
            name, "a unix URI has no host: nbd+unix:///EXPORT?socket=PATH"
        )
    path = query.get("socket", "")
    if not path:
        raise ResolveError(name, "the URI names no socket: add ?socket=PATH")
    if "\0" in path[1:]:
        raise ResolveError(name, "a socket path has no NUL byte")
    return _with_options(name, NbdUri(export_name, socket_path=path), query)


def _with_options(name: str, uri: NbdUri, query: dict[str, str]) -> NbdUri:
    if (text := query.get("request-timeout")) is not None:
        if not text.isdecimal() or int(text) > REQUEST_TIMEOUT_S_MAX:
            reason = (
                f"request-timeout is 0 to {REQUEST_TIMEOUT_S_MAX} seconds, not {text}"
            )
            raise ResolveError(name, reason)
        seconds = float(text)
        uri = replace(uri, read_timeout_s=seconds, write_timeout_s=seconds)
    if (text := query.get("connections")) is not None:
        if not text.isdecimal() or not 1 <= int(text) <= CONNECTIONS_MAX:
            reason = f"connections is a number from 1 to {CONNECTIONS_MAX}, not {text}"
            raise ResolveError(name, reason)
        uri = replace(uri, connections=int(text))
    return uri


def _query(text: str) -> dict[str, str]:
    """Keys and %-decoded values. A "+" is a plus here, unlike in HTML forms."""
    pairs = (item.partition("=") for item in text.split("&") if item)
    return {key: unquote(value, errors="strict") for key, _, value in pairs}
