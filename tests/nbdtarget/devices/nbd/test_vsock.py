# SPDX-License-Identifier: Apache-2.0
"""Connecting over vsock, on each event loop. Whether it is vsock indeed shows in `make vm-test`: here, TCP plays its part."""

import asyncio
import errno as errnos
import os
import socket
from types import SimpleNamespace
from typing import Any, Final

import pytest
import uvloop

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.nbd import connection as nbd_connection
from nbdtarget.devices.nbd.connection import NbdConnection
from nbdtarget.devices.nbd.uri import parse_nbd_uri
from nbdtarget_protocol.client import ClientNegotiated

LOOPS: Final = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("is_listening", [True, False], ids=["listening", "refused"])
def test_connecting_waits_for_the_other_end(loop: str, is_listening: bool) -> None:
    async def main() -> None:
        server = socket.create_server(("127.0.0.1", 0))
        address = server.getsockname()
        if not is_listening:
            server.close()
        with socket.socket() as sock, server:
            sock.setblocking(False)
            connecting = nbd_connection._connect_socket(sock, socket.AF_VSOCK, address)
            if is_listening:
                await connecting
                assert sock.getpeername() == address
            else:
                with pytest.raises(ConnectionRefusedError):
                    await connecting

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())


async def test_reset_while_connecting_means_that_nothing_listens() -> None:
    """So the kernel says it for vsock."""

    class Resetting(socket.socket):
        def connect(self, _: object) -> None:
            raise BlockingIOError

        def getsockopt(self, *_: object) -> int:  # type: ignore[override]
            return errnos.ECONNRESET

    with socket.create_server(("127.0.0.1", 0)) as server, Resetting() as sock:
        socket.socket.connect(sock, server.getsockname())
        with pytest.raises(ConnectionRefusedError):
            await nbd_connection._connect_socket(sock, socket.AF_VSOCK, (1, 2))


class Filtered(socket.socket):
    """A socket of a container: a filter of system calls forbids vsock."""

    def __init__(self, family: int = -1, *args: Any, **named: Any) -> None:
        if family == socket.AF_VSOCK:
            raise PermissionError(errnos.EPERM, os.strerror(errnos.EPERM))
        super().__init__(family, *args, **named)


async def test_vsock_that_is_forbidden_cannot_be_connected_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "socket", Filtered)
    uri = "nbd+vsock://2/d"
    with pytest.raises(ResolveError) as raised:
        await nbd_connection._connected(uri, parse_nbd_uri(uri))
    assert str(raised.value) == f"{uri}: cannot connect: operation not permitted"
    assert raised.value.errno == errnos.EPERM


async def test_address_of_a_forbidden_family_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def addresses(*_: object) -> list[object]:
        return [(socket.AF_VSOCK, (2, 1)), (socket.AF_INET, server.getsockname())]

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(socket, "socket", Filtered)
        monkeypatch.setattr(nbd_connection, "_addresses", addresses)
        uri = "nbd://host/d"
        with await nbd_connection._connected(uri, parse_nbd_uri(uri)) as sock:
            assert sock.getpeername() == server.getsockname()


async def test_address_needs_no_look_up() -> None:
    uri = parse_nbd_uri("nbd+vsock://4000000000:4000000001/d")
    addresses = await nbd_connection._addresses("d", uri)
    assert addresses == [(socket.AF_VSOCK, (4000000000, 4000000001))]


async def test_connection_is_not_lent() -> None:
    """Python takes only numbers as options of vsock, so a thread that blocks could not be given a time."""
    lent = []
    for uri in ("nbd+vsock://1/d", "nbd+unix:///d?socket=/s"):
        ours, servers = socket.socketpair()
        ours.setblocking(False)
        # Any: what a handshake has led to, without shaking hands.
        handshake: Any = SimpleNamespace(
            negotiated=ClientNegotiated("d", 1 << 20, 1, structured=False),
            trailing_data=lambda: b"",
        )
        with ours, servers:
            connection = NbdConnection(ours, handshake, parse_nbd_uri(uri))
            lent.append(connection.maybe_lend() is not None)
            connection.close()
    assert lent == [False, True]


def test_options_of_tcp_are_not_set_for_vsock() -> None:
    with socket.socket(socket.AF_UNIX) as sock:  # it would refuse them, as vsock does
        nbd_connection._set_options(sock, socket.AF_VSOCK)
