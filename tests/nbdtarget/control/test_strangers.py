# SPDX-License-Identifier: Apache-2.0
"""The control socket on TCP, and clients without the token: what they can make the server do."""

import asyncio
import gzip
import json
import resource
from collections.abc import AsyncIterator

import pytest

from nbdtarget.control import doorkeeper
from nbdtarget.control import http as control_http
from nbdtarget.control.api import ControlServer
from nbdtarget.control.paths import TcpControl
from nbdtarget.control.verbs import Verbs
from tests.nbdtarget.dm.support import make_registry

TOKEN = "correct-horse-battery"
RIGHT = f"Authorization: Bearer {TOKEN}\r\n"


class Stranger:
    """Connections to a control server on TCP."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(
        self, headers: str, body: bytes, length: int | None = None
    ) -> tuple[int, str]:
        """Status and reason of a POST of `body`."""
        reader, writer = await self.connect()
        length = len(body) if length is None else length
        head = f"POST /v1/info HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {length}\r\n\r\n"
        writer.write(head.encode() + body)
        head_line = (await reader.readline()).decode()
        size = 0
        while line := (await reader.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                size = int(line.split(b":")[1])
        content = json.loads(await reader.readexactly(size))
        writer.close()
        return int(head_line.split()[1]), content.get("reason", "")


@pytest.fixture
async def stranger() -> AsyncIterator[Stranger]:
    registry, _ = make_registry(a=8192)
    control = ControlServer(Verbs(registry), TcpControl("127.0.0.1", 0), token=TOKEN)
    await control.start()
    assert control.port is not None
    it = Stranger(control.port)
    assert (await it.ask(RIGHT, b""))[0] == 200  # the library is imported now
    yield it
    await registry.close()
    await control.close()


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(("headers", "status"), [("", 401), (RIGHT, 415)])
async def test_a_compressed_body_is_not_inflated(
    stranger: Stranger, headers: str, status: int
) -> None:
    bomb = gzip.compress(bytes(100 << 20), 1)
    began_s = cpu_s()
    gzip.decompress(bomb)
    inflated_s = cpu_s() - began_s
    began_s = cpu_s()
    asked = await stranger.ask(f"Content-Encoding: gzip\r\n{headers}", bomb)
    assert asked[0] == status
    assert cpu_s() - began_s < inflated_s / 2


async def test_without_the_token_no_body_is_waited_for(stranger: Stranger) -> None:
    async with asyncio.timeout(5):
        assert (await stranger.ask("", b"some", length=1 << 20))[0] == 401
        assert (await stranger.ask("", b"{}"))[0] == 401


async def test_half_a_header_has_its_time(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorkeeper, "HEADER_S", 0.05)
    reader, writer = await stranger.connect()
    writer.write(b"POST /v1/info HT")
    async with asyncio.timeout(5):
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
    writer.close()


async def test_the_next_header_has_its_time_too(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorkeeper, "IDLE_S", 0.05)
    reader, writer = await stranger.connect()
    head = f"GET /v1/info HTTP/1.1\r\nHost: x\r\n{RIGHT}\r\n".encode()
    writer.write(head + head[:20])
    async with asyncio.timeout(5):
        answer = b""
        try:
            while piece := await reader.read(1000):
                answer += piece
        except ConnectionError:
            pass
    assert answer.startswith(b"HTTP/1.1 200")
    writer.close()


async def test_half_a_body_has_its_time(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_http, "BODY_S", 0.05)
    async with asyncio.timeout(5):
        assert (await stranger.ask(RIGHT, b"{", length=100))[0] == 408


async def test_connections_are_bounded_and_one_more_is_closed_at_once(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorkeeper, "CONNECTIONS_MAX", 3)
    idle = [await stranger.connect() for _ in range(3)]
    await asyncio.sleep(0.05)
    async with asyncio.timeout(5):
        reader, writer = await stranger.connect()
        assert await reader.read() == b""
        writer.close()
        for _, each in idle:
            each.close()
        await asyncio.sleep(0.05)
        assert (await stranger.ask(RIGHT, b""))[0] == 200
