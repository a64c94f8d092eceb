# SPDX-License-Identifier: Apache-2.0
"""Addresses to listen on: `unix:PATH`, `tcp:HOST:PORT` and `vsock:CID:PORT`."""

import ipaddress
import os
import socket
from typing import Final, NamedTuple

from nbdtarget.common.errors import ListenError
from nbdtarget.common.numbers import maybe_number

__all__ = [
    "TcpAddress",
    "UnixAddress",
    "VsockAddress",
    "parse_address",
    "public_address",
]

UNIX_PATH_MAX: Final = 107
TCP_PORT_MAX: Final = 0xFFFF
VSOCK_NUMBER_MAX: Final = 0xFFFFFFFF
VSOCK_LOCAL: Final = 1  # the CID by which a machine reaches itself
# CIDs that have a meaning of their own: see vsock(7).
VSOCK_WORDS: Final = {
    "any": str(socket.VMADDR_CID_ANY),
    "local": str(VSOCK_LOCAL),
    "host": str(socket.VMADDR_CID_HOST),
}


class UnixAddress(NamedTuple):
    path: str


class TcpAddress(NamedTuple):
    """`host` "" is every interface; IPv6 addresses come without brackets."""

    host: str
    port: int


class VsockAddress(NamedTuple):
    """A socket between a virtual machine and its host. `cid`: VMADDR_CID_ANY: all that this machine has."""

    cid: int
    port: int


Address = UnixAddress | TcpAddress | VsockAddress


def public_address(sock: socket.socket) -> str:
    """Return the address of a bound socket that other machines can reach; "": they cannot reach it."""
    name = sock.getsockname()
    if sock.family == socket.AF_VSOCK:
        cid = "any" if name[0] == socket.VMADDR_CID_ANY else name[0]
        return "" if cid == VSOCK_LOCAL else f"vsock:{cid}:{name[1]}"
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return ""
    address = ipaddress.ip_address(name[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if address.is_loopback:
        return ""
    host = f"[{name[0]}]" if sock.family == socket.AF_INET6 else name[0]
    return f"tcp:{host}:{name[1]}"


def parse_address(address: str) -> Address:
    """Parse an address. Raises: ListenError."""
    family, _, rest = address.partition(":")
    if family == "unix" and rest:
        if len(os.fsencode(rest)) > UNIX_PATH_MAX:
            raise ListenError(address, f"path is longer than {UNIX_PATH_MAX} bytes")
        return UnixAddress(rest)
    if family == "tcp" and ":" in rest:
        host, _, port = rest.rpartition(":")
        number = maybe_number(port, TCP_PORT_MAX)
        if number is not None:
            return TcpAddress(host.strip("[]"), number)
    if family == "vsock":
        where = _maybe_vsock(rest)
        if where is None:
            raise ListenError(
                address,
                "is not a vsock address: write vsock:CID:PORT, for example vsock:any:10809",
            )
        return where
    raise ListenError(
        address,
        "is not an address to listen on: write unix:PATH, tcp:HOST:PORT or vsock:CID:PORT, for"
        " example tcp:127.0.0.1:10809",
    )


def _maybe_vsock(text: str) -> VsockAddress | None:
    cid, _, port = text.partition(":")
    cid_number = maybe_number(VSOCK_WORDS.get(cid, cid), VSOCK_NUMBER_MAX)
    # The highest number of a port means any free one to the kernel.
    port_number = maybe_number(port, VSOCK_NUMBER_MAX - 1)
    if cid_number is None or port_number is None:
        return None
    return VsockAddress(cid_number, port_number)
