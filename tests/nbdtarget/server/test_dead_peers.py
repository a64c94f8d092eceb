# SPDX-License-Identifier: Apache-2.0
"""A peer that goes away with a reset is noticed, wherever it was, on each event loop and each kind of socket.

A peer that closes a socket with bytes unread resets it. uvloop then calls a reader once and never again
(asyncio's own loop calls on), so this runs on both.
"""

import asyncio
import socket
import struct
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import uvloop

from nbdtarget.server.listener import Listener
from nbdtarget_protocol import consts as c
from tests.support.patience import until
from tests.support.peer import MIB, Served

LOOPS: Final = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
KINDS: Final = ("unix", "tcp")

Scene = Callable[["_Stage"], Coroutine[Any, Any, None]]


class _Stage:
    """A server and a minimal client, both in this loop."""

    def __init__(self, served: Served, listener: Listener, port: int | None) -> None:
        self.served = served
        self.listener = listener
        family = socket.AF_UNIX if port is None else socket.AF_INET
        self._where = str(served.path) if port is None else ("127.0.0.1", port)
        self._sock = socket.socket(family)
        self._sock.setblocking(False)
        # On TCP closing is a reset in any case then.
        self._sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._sock, self._where)
        assert len(await loop.sock_recv(self._sock, 100)) == 18

    async def attach(self) -> None:
        """Attach, and leave the answer to a READ unread: a unix socket's close is a reset then."""
        await self.connect()
        loop = asyncio.get_running_loop()
        option = c.OPTION.pack(c.IHAVEOPT, c.OPT_EXPORT_NAME, 4) + b"disk"
        await loop.sock_sendall(self._sock, c.CLIENT_FLAGS.pack(3) + option)
        assert len(await loop.sock_recv(self._sock, 100)) == 10
        self._sock.send(request(c.CMD_READ, 0, 8))
        await until(self._has_answer)

    def _has_answer(self) -> bool:
        try:
            return bool(self._sock.recv(100, socket.MSG_PEEK))
        except BlockingIOError:
            return False

    def send_and_reset(self, rest: bytes) -> None:
        """Send data and reset the connection, both before the server has a turn."""
        assert self._sock.send(rest) == len(rest)
        self._sock.close()


def request(command: int, offset: int, length: int) -> bytes:
    return c.REQUEST.pack(c.REQUEST_MAGIC, 0, command, 1, offset, length)


async def _in_a_large_payload(stage: _Stage) -> None:
    await stage.attach()
    stage.send_and_reset(request(c.CMD_WRITE, 0, MIB) + bytes(100_000))


async def _in_a_small_payload(stage: _Stage) -> None:
    await stage.attach()
    stage.send_and_reset(request(c.CMD_WRITE, 0, 4096) + bytes(10))


async def _in_the_payload_of_a_refused_write(stage: _Stage) -> None:
    await stage.attach()
    stage.send_and_reset(request(c.CMD_WRITE, 2 * MIB, MIB) + bytes(100_000))


async def _in_a_header(stage: _Stage) -> None:
    await stage.attach()
    stage.send_and_reset(request(c.CMD_READ, 0, 8)[:20])


async def _in_the_handshake(stage: _Stage) -> None:
    await stage.connect()
    # An answer that it does not read, then half an option.
    stage.send_and_reset(c.CLIENT_FLAGS.pack(3) + c.OPTION.pack(c.IHAVEOPT, 99, 0))


SCENES: Final[tuple[Scene, ...]] = (
    _in_a_large_payload,
    _in_a_small_payload,
    _in_the_payload_of_a_refused_write,
    _in_a_header,
    _in_the_handshake,
)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scene", SCENES, ids=lambda it: it.__name__.strip("_"))
def test_a_peer_that_resets_is_noticed(
    tmp_path: Path, scene: Scene, kind: str, loop: str
) -> None:
    async def main() -> None:
        served = Served(tmp_path)
        served.limits = replace(served.limits, handshake_timeout_s=60)
        listener = await served.start()
        port = None
        if kind == "tcp":
            (uri,) = await listener.start("tcp:127.0.0.1:0")
            port = int(uri.split(":")[2].split("/")[0])
        stage = _Stage(served, listener, port)
        await scene(stage)
        await until(lambda: listener.nr_connections == 0)
        assert served.directory.nr_open == {"disk": 0}
        await served.close()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())
