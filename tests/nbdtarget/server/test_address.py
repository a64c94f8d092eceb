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
