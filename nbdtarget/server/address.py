# SPDX-License-Identifier: Apache-2.0
"""Addresses to listen on: `unix:PATH` and `tcp:HOST:PORT`."""

import ipaddress
import os
from typing import Final, NamedTuple

from nbdtarget.common.errors import ListenError

__all__ = [
    "TcpAddress",
    "UnixAddress",
    "is_public",
    "parse_address",
]

UNIX_PATH_MAX: Final = 107


class UnixAddress(NamedTuple):
    path: str


class TcpAddress(NamedTuple):
    """`host` "" is every interface; IPv6 addresses come without brackets."""

    host: str
    port: int


def is_public(address: TcpAddress) -> bool:
    """Whether other machines can reach the address: it is not the loopback interface's."""
    if address.host.lower() == "localhost":
        return False
    try:
        return not ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return True  # every interface, or a name that has to be looked up


def parse_address(address: str) -> UnixAddress | TcpAddress:
    """Parse an address. Raises: ListenError."""
    family, _, rest = address.partition(":")
    if family == "unix" and rest:
        if len(os.fsencode(rest)) > UNIX_PATH_MAX:
            raise ListenError(address, f"path is longer than {UNIX_PATH_MAX} bytes")
        return UnixAddress(rest)
    if family == "tcp" and ":" in rest:
        host, _, port = rest.rpartition(":")
        if port.isascii() and port.isdecimal() and int(port) < 65536:
            return TcpAddress(host.strip("[]"), int(port))
    raise ListenError(
        address,
        "is not an address to listen on: write unix:PATH or tcp:HOST:PORT, for example"
        " tcp:127.0.0.1:10809",
    )
