# SPDX-License-Identifier: Apache-2.0
"""A server that resets the connection is noticed, however much it has sent before, on each event loop."""

import asyncio
import socket
from types import SimpleNamespace
from typing import Any, Final

import pytest
import uvloop

from nbdtarget.devices.nbd import connection as nbd_connection
from nbdtarget.devices.nbd.connection import NbdConnection
from nbdtarget.devices.nbd.uri import NbdUri
from nbdtarget_protocol import consts as c
from nbdtarget_protocol.client import ClientNegotiated
from tests.support.patience import until

LOOPS: Final = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
REPLY: Final = c.SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, 0, 1)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("command", [c.CMD_READ, c.CMD_WRITE])
@pytest.mark.parametrize("sent", [REPLY + bytes(100), b"garbage" * 20_000])
def test_a_server_that_resets_in_the_middle_of_what_it_sends_is_noticed(
    monkeypatch: pytest.MonkeyPatch, sent: bytes, command: int, loop: str
) -> None:
    monkeypatch.setattr(nbd_connection, "RECEIVES_MAX", 1)

    async def main() -> None:
        ours, servers = socket.socketpair()
        ours.setblocking(False)
        # Any: what a handshake has led to, without shaking hands.
        handshake: Any = SimpleNamespace(
            negotiated=ClientNegotiated("", 1 << 20, 1, structured=False),
            trailing_data=lambda: b"",
        )
        connection = NbdConnection(ours, handshake, NbdUri("", socket_path="/s"))
        lost: list[str] = []
        answered: list[object] = []

        def give_up(reason: str) -> None:
            lost.append(reason)
            connection.give_up()

        connection.start(answered.append, give_up)
        data = memoryview(bytearray(4096))
        if command == c.CMD_READ:
            connection.send(command, 0, 0, 4096, None, data, object())
        else:
            connection.send(command, 0, 0, 4096, data, None, object())
        # It closes with the request unread: that is a reset.
        assert servers.send(sent) == len(sent)
        servers.close()
        await until(connection.ended.is_set)
        assert len(lost) == 1

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())
