# SPDX-License-Identifier: Apache-2.0
"""Addresses to listen on: `unix:PATH` and `tcp:HOST:PORT`."""

import os
from typing import Final, NamedTuple

from nbdtarget.common.errors import ListenError

__all__ = ["TcpAddress", "UnixAddress", "parse_address"]

UNIX_PATH_MAX: Final = 107


class UnixAddress(NamedTuple):
    path: str


class TcpAddress(NamedTuple):
    """`host` "" is every interface; IPv6 addresses come without brackets."""

    host: str
    port: int


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
    raise ListenError(address, "is not unix:PATH or tcp:HOST:PORT")
