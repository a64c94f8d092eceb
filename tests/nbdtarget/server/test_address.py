# SPDX-License-Identifier: Apache-2.0
"""Addresses to listen on."""

import socket

import pytest

from nbdtarget.common.errors import ListenError
from nbdtarget.server.address import (
    TcpAddress,
    UnixAddress,
    VsockAddress,
    parse_address,
    public_address,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unix:/run/a:b.sock", UnixAddress("/run/a:b.sock")),
        ("tcp:[::1]:0", TcpAddress("::1", 0)),
        ("tcp::10809", TcpAddress("", 10809)),
        ("vsock:any:10809", VsockAddress(socket.VMADDR_CID_ANY, 10809)),
        ("vsock:host:1", VsockAddress(2, 1)),
        ("vsock:local:1", VsockAddress(1, 1)),
        ("vsock:4294967295:4294967294", VsockAddress(0xFFFFFFFF, 0xFFFFFFFE)),
    ],
)
def test_address(text: str, expected: object) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "vsock:",
        "vsock:3",
        "vsock:x:1",
        "vsock:3:",
        "vsock:3:4294967295",
        "vsock:4294967296:1",
        "vsock:²:1",
        "vsock:3:1:2",
        pytest.param("vsock:3:" + "9" * 5000, id="long"),
    ],
)
def test_vsock_that_is_none(text: str) -> None:
    with pytest.raises(ListenError, match="is not a vsock address: write vsock:CID:"):
        parse_address(text)


class Bound(socket.socket):
    """A socket that says where it is bound."""

    def __init__(self, family: int, name: object) -> None:
        self._said_family, self._name = family, name

    @property
    def family(self) -> int:  # type: ignore[override]
        return self._said_family

    def getsockname(self) -> object:
        return self._name


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        (socket.AF_INET, ("127.0.0.2", 1), ""),
        (socket.AF_INET, ("0.0.0.0", 1), "tcp:0.0.0.0:1"),
        (socket.AF_INET6, ("::1", 1, 0, 0), ""),
        (socket.AF_INET6, ("::ffff:127.0.0.1", 1, 0, 0), ""),
        (socket.AF_INET6, ("fe80::1%lo", 1, 0, 1), "tcp:[fe80::1%lo]:1"),
        (socket.AF_UNIX, "/run/a.sock", ""),
        (socket.AF_VSOCK, (0xFFFFFFFF, 100_000), "vsock:any:100000"),
        (socket.AF_VSOCK, (3, 4294967294), "vsock:3:4294967294"),
        (socket.AF_VSOCK, (1, 1), ""),
    ],
)
def test_address_that_other_machines_can_reach(
    family: int, name: object, expected: str
) -> None:
    assert public_address(Bound(family, name)) == expected
