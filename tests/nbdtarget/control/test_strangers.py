# SPDX-License-Identifier: Apache-2.0
"""The control socket on TCP, and clients without the token: what they can make the server do."""

import asyncio
import contextlib
import gzip
import json
import resource
from collections.abc import AsyncIterator

import pytest

from nbdtarget.control import doorkeeper
from nbdtarget.control import http as control_http
from nbdtarget.control.api import ControlServer
from nbdtarget.control.paths import TcpControl
from nbdtarget.control.tokens import ControlTokens
from nbdtarget.control.verbs import Verbs
from tests.support.dm import make_registry
from tests.support.patience import PATIENCE_S, until

TOKEN = "correct-horse-battery"
RIGHT = f"Authorization: Bearer {TOKEN}\r\n"


class Stranger:
    """Connections to a control server on TCP."""

    def __init__(self, control: ControlServer) -> None:
        assert control.port is not None
        self.port = control.port
        self._control = control

    async def until_open(self, nr: int) -> None:
        """Wait until the server has so many connections."""
        assert self._control._answering is not None
        server = await self._control._answering
        await until(lambda: len(server._keepers[0]._open) == nr)

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
def linger_s(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """How long the server drops what is left of a refused body: on a busy machine its own bound may be short."""
    seconds: float = getattr(request, "param", PATIENCE_S)
    monkeypatch.setattr(control_http, "LINGER_S", seconds)
    return seconds


@pytest.fixture
async def stranger(linger_s: float) -> AsyncIterator[Stranger]:
    registry, _ = make_registry(a=8192)
    control = ControlServer(
        Verbs(registry), TcpControl("127.0.0.1", 0), tokens=ControlTokens(TOKEN)
    )
    await control.start()
    it = Stranger(control)
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
    async with asyncio.timeout(PATIENCE_S):
        assert (await stranger.ask("", b"some", length=1 << 20))[0] == 401
        assert (await stranger.ask("", b"{}"))[0] == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [("", 401), (f"{RIGHT}Content-Encoding: gzip\r\n", 415)],
    ids=["no-token", "compressed"],
)
@pytest.mark.parametrize(
    ("length", "body"),
    [
        ("Content-Length: 4", b"late"),
        ("Content-Length: 9000000", b"late" * 2_250_000),
        ("Transfer-Encoding: chunked", b"4\r\nlate\r\n0\r\n\r\n"),
    ],
    ids=["short", "too-long", "in-chunks"],
)
async def test_a_refused_client_reads_the_answer_though_it_sends_its_body_late(
    stranger: Stranger, headers: str, status: int, length: str, body: bytes
) -> None:
    """Browsers send header and body apart. A connection that is closed with the body unread tells of a reset instead."""
    reader, writer = await stranger.connect()
    head = f"POST /v1/info HTTP/1.1\r\nHost: x\r\n{headers}{length}\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(PATIENCE_S):
        assert (await reader.readexactly(12)).endswith(f" {status}".encode())
        writer.write(body)
        await reader.readuntil(b"}")
        # The connection is still of use.
        writer.write(head.encode() + body)
        assert (await reader.readexactly(12)).endswith(f" {status}".encode())
    writer.close()


@pytest.mark.parametrize("linger_s", [0.05], indirect=True)
async def test_the_rest_of_a_refused_body_is_waited_for_only_so_long(
    stranger: Stranger, linger_s: float
) -> None:
    reader, writer = await stranger.connect()
    writer.write(b"POST /v1/info HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
    async with asyncio.timeout(PATIENCE_S):
        assert b" 401 " in await reader.readline()
        await reader.read()
    writer.close()


async def test_half_a_header_has_its_time(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorkeeper, "HEADER_S", 0.05)
    reader, writer = await stranger.connect()
    writer.write(b"POST /v1/info HT")
    async with asyncio.timeout(PATIENCE_S):
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
    async with asyncio.timeout(PATIENCE_S):
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
    async with asyncio.timeout(PATIENCE_S):
        assert (await stranger.ask(RIGHT, b"{", length=100))[0] == 408


async def test_connections_are_bounded_and_one_more_is_closed_at_once(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorkeeper, "CONNECTIONS_MAX", 3)
    await stranger.until_open(0)
    idle = [await stranger.connect() for _ in range(3)]
    await stranger.until_open(3)
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await stranger.connect()
        assert await reader.read() == b""
        writer.close()
        for _, each in idle:
            each.close()
        await stranger.until_open(0)
        assert (await stranger.ask(RIGHT, b""))[0] == 200


BAD_REQUESTS = [
    b"GET /v1/info HTTP/1.1\r\nHost x\r\n\r\n",
    b"GET /v1/info HTTP/9.9\r\n\r\n",
    b"GET /v1/info\r\n\r\n",
    b"GET /%ff%00%0a HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET " + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 20_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: x\r\n" * 500 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: \xff\xfe\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nExpect: tea\r\n\r\n",
    b"POST /v1/info HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"POST /v1/info HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/info HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n1\r\nx",
    b"POST /v1/info HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/info HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nhalf",
    b"POST /v1/info HTTP/1.1\r\nHost: x\r\n"
    + RIGHT.encode()
    + b"Content-Length: 99\r\n\r\nhalf",
    b"POST /v1/info HTTP/1.1\r\nHost: x\r\nContent-Encoding: br\r\nContent-Length: 4\r\n\r\nhalf",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


@pytest.mark.parametrize("is_reset", [False, True])
async def test_no_request_leaves_a_traceback_in_the_log(
    stranger: Stranger, is_reset: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for request in BAD_REQUESTS:
        reader, writer = await stranger.connect()
        writer.write(request)
        if is_reset:
            await asyncio.sleep(0.01)
            writer.transport.abort()
            continue
        writer.write_eof()
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE_S):
                await reader.read()
        writer.close()
    await asyncio.sleep(0.05)
    assert (await stranger.ask(RIGHT, b""))[0] == 200
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


async def test_a_reason_is_printable_and_short(stranger: Stranger) -> None:
    table = "0 8 linear /" + "\x1b[2J\n" + "x" * 1_000_000 + " 0"
    body = json.dumps({"name": "a", "table": table}).encode()
    reader, writer = await stranger.connect()
    head = f"POST /v1/create HTTP/1.1\r\nHost: x\r\n{RIGHT}Connection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = (await reader.read()).partition(b"\r\n\r\n")[2]
    writer.close()
    reason = json.loads(answer)["reason"]
    assert len(reason) < 5000
    assert reason.isprintable()
