# SPDX-License-Identifier: Apache-2.0
"""NBD URIs, as the protocol's URI document defines them, and for vsock as libnbd does.

    nbd://HOST[:PORT]/EXPORT            TCP; port 10809 by default; IPv6 in brackets
    nbd+unix:///EXPORT?socket=PATH      %00 first in PATH: an abstract socket
    nbd+vsock://[CID[:PORT]]/EXPORT     vsock(7); by default CID 2, which is the host of this machine, and port 10809
    nbds://…, nbds+unix://…, nbds+vsock://…    the same with TLS, or not at all

Export name and values are %-decoded. A query key that is not known is refused by its name: what it was meant to say, for
example that a certificate is to be verified, must not be ignored. For the same reason a key that stands twice is refused. With TLS:

    tls-certificates=DIR       ca-cert.pem, client-cert.pem, … (see `nbdtarget.common.tls_context`); without it, the
                               authorities that the system trusts, and no certificate of ours
    tls-hostname=NAME          the name in the server's certificate; without it HOST, or localhost for a unix socket and vsock
    tls-verify-peer=false      any certificate will do
    tls-type=psk, tls-psk-file=FILE, and NAME@ in front of HOST: a pre-shared key

Two are our own, and no part of what the URI names:

    request-timeout=SECONDS    a request that the server does not answer for so long makes the
                               connection lost; 0: none does. Without it, reads have a minute,
                               and writes and flushes have all the time in the world
    connections=NUMBER         at most so many connections, if the server says that several may be used; 4
"""

import difflib
import os
import pwd
import socket
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import unquote, urlsplit

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.numbers import ID_MAX, maybe_number

__all__ = [
    "CONNECTIONS",
    "CONNECTIONS_MAX",
    "NBD_PORT",
    "NBD_SCHEMES",
    "NbdTls",
    "NbdUri",
    "parse_nbd_uri",
]

NBD_PORT: Final = 10809
NBD_SCHEMES: Final = frozenset(
    {"nbd", "nbd+unix", "nbd+vsock", "nbds", "nbds+unix", "nbds+vsock"}
)
EXPORT_NAME_MAX: Final = 4096  # bytes
READ_TIMEOUT_S: Final = 60.0
REQUEST_TIMEOUT_S_MAX: Final = 86_400
CONNECTIONS: Final = 4
CONNECTIONS_MAX: Final = 16
_TLS_SCHEMES: Final = frozenset({"nbds", "nbds+unix", "nbds+vsock"})
_KEYS: Final = ("socket", "request-timeout", "connections")
_TLS_KEYS: Final = (
    "tls-type",
    "tls-hostname",
    "tls-verify-peer",
    "tls-certificates",
    "tls-psk-file",
)
_BOOLEANS: Final = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class NbdTls:
    """How a URI wants its TLS.

    Attributes:
        hostname: the name that the server's certificate must have.
        certificates, psk_file: None: not given.
        username: whose pre-shared key it is: by default that of the user whose process this is.
    """

    hostname: str
    verify_peer: bool = True
    certificates: str | None = None
    psk_file: str | None = None
    username: str = ""


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where an export is.

    Attributes:
        host: of TCP; else empty.
        port: of TCP or vsock.
        socket_path: unix socket; starts with NUL if abstract; else empty.
        cid: of vsock; else None.
        read_timeout_s, write_timeout_s: see `request-timeout`; 0: none.
        connections: how many are used at most.
        tls: None: the connection is not encrypted.
    """

    export_name: str
    host: str = ""
    port: int = NBD_PORT
    socket_path: str = ""
    read_timeout_s: float = READ_TIMEOUT_S
    write_timeout_s: float = 0.0
    connections: int = CONNECTIONS
    tls: NbdTls | None = None
    cid: int | None = None

    @property
    def server(self) -> str:
        """The same for each way to write where the server is."""
        if self.cid is not None:
            return f"vsock:{self.cid}:{self.port}"
        path = self.socket_path
        if path:
            return path if path.startswith("\0") else os.path.realpath(path)
        return f"{self.host.lower()}:{self.port}"

    @property
    def identity(self) -> Hashable:
        """The same for each way to write this URI."""
        return ("nbd", self.server, self.export_name)


def parse_nbd_uri(name: str) -> NbdUri:
    """Take an NBD URI apart. Raises: ResolveError."""
    try:
        parts = urlsplit(name)
        scheme = parts.scheme.lower()
        # The ports of vsock have higher numbers than those of TCP.
        port = None if scheme.endswith("+vsock") else parts.port
        export_name = unquote(parts.path.removeprefix("/"), errors="strict")
        query = _query(name, parts.query)
    except ValueError as error:  # also UnicodeDecodeError
        raise ResolveError(name, f"not an NBD URI: {error}") from None
    if scheme not in NBD_SCHEMES:
        raise ResolveError(name, f"{scheme}: is not supported")
    if "\0" in export_name or len(export_name.encode()) > EXPORT_NAME_MAX:
        raise ResolveError(name, "not an export name: it has a NUL or is too long")
    _check_keys(name, scheme, query)
    host_name = None if scheme.endswith("+vsock") else parts.hostname
    tls = _tls(name, host_name, parts.username, query) if _has_tls(scheme) else None
    if scheme.endswith("+vsock"):
        cid, port = _vsock(name, parts.netloc)
        uri = NbdUri(export_name, port=port, cid=cid, tls=tls)
        return _with_options(name, uri, query)
    if not scheme.endswith("+unix"):
        if not parts.hostname:
            raise ResolveError(name, "the URI names no host")
        # 0 is a port that the URI may well say; it is only not one to connect to.
        port = NBD_PORT if port is None else port
        host = unquote(parts.hostname)
        uri = NbdUri(export_name, host, port, tls=tls)
        return _with_options(name, uri, query)
    if parts.netloc.rpartition("@")[2] or (parts.netloc and tls is None):
        raise ResolveError(
            name, "a unix URI has no host: nbd+unix:///EXPORT?socket=PATH"
        )
    path = query.get("socket", "")
    if not path:
        raise ResolveError(name, "the URI names no socket: add ?socket=PATH")
    if "\0" in path[1:]:
        raise ResolveError(name, "a socket path has no NUL byte")
    uri = NbdUri(export_name, socket_path=path, tls=tls)
    return _with_options(name, uri, query)


def _vsock(name: str, netloc: str) -> tuple[int, int]:
    """Return CID and port. Raises: ResolveError."""
    cid, colon, port = netloc.rpartition("@")[2].partition(":")
    found = (
        maybe_number(cid or str(socket.VMADDR_CID_HOST), ID_MAX),
        maybe_number(port if colon else str(NBD_PORT), ID_MAX),
    )
    if found[0] is None or found[1] is None:
        reason = "CID and port of vsock are numbers, as in nbd+vsock://2:10809/EXPORT"
        raise ResolveError(name, reason)
    return found[0], found[1]


def _has_tls(scheme: str) -> bool:
    return scheme in _TLS_SCHEMES


def _check_keys(name: str, scheme: str, query: dict[str, str]) -> None:
    for key in query:
        if key == "socket" and not scheme.endswith("+unix"):
            reason = (
                f"`socket' is for unix sockets: write {scheme.partition('+')[0]}+unix:"
            )
            raise ResolveError(name, reason)
        if key in _KEYS or (key in _TLS_KEYS and _has_tls(scheme)):
            continue
        if key in _TLS_KEYS:
            reason = f"`{key}' needs TLS: write {scheme.replace('nbd', 'nbds')}:"
        else:
            near = difflib.get_close_matches(key, (*_KEYS, *_TLS_KEYS), 1)
            hint = f" (did you mean `{near[0]}'?)" if near else ""
            reason = f"unknown key `{key}' in the URI{hint}"
        raise ResolveError(name, reason)


def _tls(
    name: str, host: str | None, username: str | None, query: dict[str, str]
) -> NbdTls:
    verify = query.get("tls-verify-peer", "true").lower()
    if verify not in _BOOLEANS:
        raise ResolveError(name, f"tls-verify-peer is true or false, not {verify}")
    psk_file = query.get("tls-psk-file")
    kind = query.get("tls-type", "x509" if psk_file is None else "psk")
    if kind not in ("x509", "psk"):
        raise ResolveError(name, f"tls-type {kind} is not supported: x509 and psk are")
    if (kind == "psk") is not (psk_file is not None):
        raise ResolveError(name, "tls-type=psk and tls-psk-file=FILE belong together")
    user = unquote(username or "")
    if psk_file is not None and not user:
        user = _local_user()
    return NbdTls(
        query.get("tls-hostname") or unquote(host or "localhost"),
        _BOOLEANS[verify],
        query.get("tls-certificates"),
        psk_file,
        user,
    )


def _local_user() -> str:
    """The name of the user whose process this is; "": it has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""


def _with_options(name: str, uri: NbdUri, query: dict[str, str]) -> NbdUri:
    if (text := query.get("request-timeout")) is not None:
        limit_s = maybe_number(text, REQUEST_TIMEOUT_S_MAX)
        if limit_s is None:
            reason = (
                f"request-timeout is 0 to {REQUEST_TIMEOUT_S_MAX} seconds, not {text}"
            )
            raise ResolveError(name, reason)
        seconds = float(limit_s)
        uri = replace(uri, read_timeout_s=seconds, write_timeout_s=seconds)
    if (text := query.get("connections")) is not None:
        connections = maybe_number(text, CONNECTIONS_MAX)
        if not connections:
            reason = f"connections is a number from 1 to {CONNECTIONS_MAX}, not {text}"
            raise ResolveError(name, reason)
        uri = replace(uri, connections=connections)
    return uri


def _query(name: str, text: str) -> dict[str, str]:
    """Keys and %-decoded values. A "+" is a plus here, unlike in HTML forms. Raises: ResolveError, ValueError."""
    found: dict[str, str] = {}
    for key, _, value in (item.partition("=") for item in text.split("&") if item):
        if key in found:
            raise ResolveError(name, f"`{key}' stands twice in the URI")
        found[key] = unquote(value, errors="strict")
    return found
