# SPDX-License-Identifier: Apache-2.0
"""The control socket as any HTTP client sees it."""

import asyncio
import errno as errnos
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.control import messages as m
from nbdtarget.control.api import ControlServer
from nbdtarget.control.bodies import BODY_BYTES_MAX, OTHER_BODY_BYTES_MAX
from nbdtarget.control.client import ControlClient
from nbdtarget.control.examples import EXAMPLES
from nbdtarget.control.openapi import openapi
from nbdtarget.control.paths import TOKEN_VARIABLE, TcpControl, control_token
from nbdtarget.control.tokens import ControlTokens
from nbdtarget.control.verbs import Verbs
from nbdtarget.dm.mapped_device import State
from nbdtarget.monitor.observer import Observer
from nbdtarget.server.listener import Listener
from tests.support.dm import make_registry
from tests.support.patience import PATIENCE_S

TOKEN = "correct-horse-battery"


class Reply(NamedTuple):
    status: int
    content: Any


class HttpServer:
    """A control server, and bytes sent to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.registry, _ = make_registry(a=8192)
        verbs = Verbs(self.registry)
        self.monitor = Observer(self.registry, Listener(self.registry))
        verbs.monitor = self.monitor
        self.control = ControlServer(verbs, path)

    async def __call__(self, method: str, url: str, body: bytes = b"") -> Reply:
        reader, writer = await asyncio.open_unix_connection(self.path)
        head = f"{method} {url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        reply = await reader.read()
        writer.close()
        head, _, content = reply.decode().partition("\r\n\r\n")
        assert "application/json" in head
        return Reply(int(head.split()[1]), json.loads(content))


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[HttpServer]:
    server = HttpServer(tmp_path / "control.sock")
    await server.control.start()
    yield server
    await server.registry.close()
    await server.control.close()


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0.001)


async def test_reading_verbs_answer_a_plain_get(http: HttpServer) -> None:
    await http.registry.create("x", "0 8 linear /a 0")
    await http.registry.create("y", None)
    for verb in m.READING_VERBS:
        assert (await http("GET", f"/v1/{verb}")).status == 200
    _, answer = await http("GET", "/v1/info?name=y")
    assert [device["name"] for device in answer["devices"]] == ["y"]
    _, answer = await http("GET", "/v1/deps?name=y&name=x")
    assert [device["deps"] for device in answer["devices"]] == [[], ["/a"]]


async def test_a_post_without_a_body_is_an_empty_request(http: HttpServer) -> None:
    assert await http("POST", "/v1/remove_all") == Reply(200, {"busy": []})


@pytest.mark.parametrize(
    ("method", "url", "body", "status", "errno", "reason"),
    [
        ("POST", "/v1/nosuch", b"", 404, errnos.ENOENT, "no such verb; /v1/ has: "),
        ("GET", "/x", b"", 404, errnos.ENOENT, "/x: no such verb"),
        ("GET", "/v1/create", b"", 405, errnos.EINVAL, "takes POST, not GET"),
        ("POST", "/v1/create", b"{", 400, errnos.EINVAL, "bad request: "),
        ("POST", "/v1/create", b"{}", 400, errnos.EINVAL, "required field `name`"),
        ("GET", "/v1/info?nme=x", b"", 400, errnos.EINVAL, "unknown field `nme`"),
        ("GET", "/v1/info?name=x", b"", 404, errnos.ENXIO, "Device does not exist"),
        ("POST", "/v1/remove", b'{"name":"held"}', 409, errnos.EBUSY, "busy"),
        (
            "POST",
            "/v1/create",
            b'{"name":"x","table":"0 8 foo"}',
            422,
            errnos.EINVAL,
            "foo: unknown target type",
        ),
        (
            "POST",
            "/v1/create",
            b" " * (BODY_BYTES_MAX + 1),
            413,
            errnos.E2BIG,
            f"the request is larger than {BODY_BYTES_MAX} bytes",
        ),
        (
            "POST",
            "/v1/message",
            b" " * (OTHER_BODY_BYTES_MAX + 1),
            413,
            errnos.E2BIG,
            f"the request is larger than {OTHER_BODY_BYTES_MAX} bytes",
        ),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value),
)
async def test_what_is_refused_says_why(
    http: HttpServer,
    method: str,
    url: str,
    body: bytes,
    status: int,
    errno: int,
    reason: str,
) -> None:
    await http.registry.create("held", "0 8 linear /a 0")
    held = http.registry.acquire("held")
    reply = await http(method, url, body)
    assert (reply.status, reply.content["errno"]) == (status, errno)
    assert reason in reply.content["reason"]
    http.registry.release(held)


async def test_a_compressed_body_is_refused(http: HttpServer) -> None:
    reader, writer = await asyncio.open_unix_connection(http.path)
    head = "POST /v1/info HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += "Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}"
    writer.write(head.encode())
    reply = (await reader.read()).decode()
    writer.close()
    assert reply.startswith("HTTP/1.1 415 ")
    failure = json.loads(reply.partition("\r\n\r\n")[2])
    assert failure["errno"] == errnos.EINVAL
    assert "Content-Encoding" in failure["reason"]


@pytest.mark.parametrize(
    "junk", [b"\0\xff\r\n\r\n", b"GET /v1/version HTTP/1.1\r\n\r\n"]
)
async def test_bytes_that_are_not_http_cause_no_traceback(
    http: HttpServer, junk: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await asyncio.open_unix_connection(http.path)
    writer.write(junk)
    assert b" 400 " in await reader.readline()
    await reader.read()
    writer.close()
    assert not [record for record in caplog.records if record.exc_info]
    assert (await http("GET", "/v1/version")).status == 200


async def test_long_calls_do_not_delay_others(http: HttpServer) -> None:
    await http.registry.create("x", "0 8 linear /a 0")
    waits = [
        asyncio.create_task(http("POST", "/v1/wait", b'{"name":"x"}'))
        for _ in range(20)
    ]
    await turns()
    assert (await http("GET", "/v1/version")).status == 200
    assert not any(wait.done() for wait in waits)
    http.registry.get("x").event()
    assert {(await wait).content["event_nr"] for wait in waits} == {1}


async def test_a_client_that_goes_away_while_it_waits_leaves_nothing(
    http: HttpServer,
) -> None:
    await http.registry.create("x", "0 8 linear /a 0")
    await http("GET", "/v1/version")
    device = http.registry.get("x")
    _, writer = await asyncio.open_unix_connection(http.path)
    body = b'{"name":"x"}'
    head = f"POST /v1/wait HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    while not device.events.nr_waiters:
        await turns(1)
    writer.transport.abort()
    while device.events.nr_waiters:
        await turns(1)


async def test_a_verb_that_has_begun_is_carried_out(
    http: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await http.registry.create("x", "0 8 linear /a 0")
    await http("GET", "/v1/version")
    device = http.registry.get("x")
    go = asyncio.Event()
    begun = asyncio.Event()
    suspend = device.suspend

    async def slow(*, noflush: bool, within_s: float | None) -> None:
        begun.set()
        await go.wait()
        await suspend(noflush=noflush, within_s=within_s)

    monkeypatch.setattr(device, "suspend", slow)
    _, writer = await asyncio.open_unix_connection(http.path)
    body = b'{"name":"x"}'
    head = (
        f"POST /v1/suspend HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await begun.wait()
    writer.transport.abort()
    await turns()
    go.set()
    while device.state is not State.SUSPENDED:
        await turns(1)


async def test_tcp_without_a_token_is_refused() -> None:
    registry, _ = make_registry()
    control = ControlServer(Verbs(registry), TcpControl("127.0.0.1", 0))
    with pytest.raises(NbdTargetError, match="on TCP needs a token"):
        await control.start()
    assert control.port is None


async def test_tcp_wants_the_token() -> None:
    registry, _ = make_registry()
    control = ControlServer(
        Verbs(registry), TcpControl("127.0.0.1", 0), tokens=ControlTokens(TOKEN)
    )
    await control.start()
    assert control.port is not None
    address = TcpControl("127.0.0.1", control.port)
    assert control.address == address  # that is what the log says

    async def ask(token: str | None) -> m.Answer:
        client = ControlClient(address, token)
        return await asyncio.to_thread(client.ask, "deps", m.Deps(), m.DevicesAnswer)

    assert await ask(TOKEN) == m.DevicesAnswer(())
    for wrong in (None, "", TOKEN[:-1], TOKEN + "x", "wörng"):
        with pytest.raises(TableError, match="token is missing or wrong"):
            await ask(wrong)
    await control.close()


@pytest.mark.parametrize("is_allowed", [False, True])
async def test_tcp_starts_programs_only_if_that_is_configured(is_allowed: bool) -> None:
    registry, opener = make_registry()
    verbs = Verbs(registry)
    verbs.tcp_starts_programs = is_allowed
    control = ControlServer(
        verbs, TcpControl("127.0.0.1", 0), tokens=ControlTokens(TOKEN)
    )
    await control.start()
    assert control.port is not None
    client = ControlClient(TcpControl("127.0.0.1", control.port), TOKEN)
    opener.sizes["nbdkit:null"] = 1 << 20
    request = m.Create("d", "0 8 linear nbdkit:null 0", readonly=True)
    asking = asyncio.to_thread(client.ask, "create", request, m.Done)
    if is_allowed:
        assert await asking == m.Done()
        await registry.remove("d")
    else:
        with pytest.raises(TableError, match="control_starts_programs"):
            await asking
        assert opener.opened == []
    await control.close()


async def test_tcp_port_that_is_taken() -> None:
    registry, _ = make_registry()
    first = ControlServer(
        Verbs(registry), TcpControl("127.0.0.1", 0), tokens=ControlTokens(TOKEN)
    )
    await first.start()
    assert first.port is not None
    second = ControlServer(
        Verbs(registry),
        TcpControl("127.0.0.1", first.port),
        tokens=ControlTokens(TOKEN),
    )
    with pytest.raises(NbdTargetError, match=rf"tcp:127.0.0.1:{first.port}: Address"):
        await second.start()
    await first.close()


def test_token_comes_from_the_file_or_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert control_token() is None
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert control_token() == TOKEN
    file = tmp_path / "token"
    with pytest.raises(NbdTargetError, match="No such file"):
        control_token(str(file))
    for content, reason in [
        ("short\n", "must have 16 to 4096 characters"),
        ("\n", "must have 16"),
        ("two words of sixteen", "one word"),
        ("x" * 5000, "must have 16"),
        ("wörng", "not ASCII"),
    ]:
        file.write_text(content)
        with pytest.raises(NbdTargetError, match=reason):
            control_token(str(file))
    file.write_text(f"  {TOKEN}x\nnot this\n")
    assert control_token(str(file)) == TOKEN + "x"


async def test_openapi_is_served_and_kept_as_a_file(http: HttpServer) -> None:
    document = json.loads(json.dumps(openapi()))
    assert await http("GET", "/v1/openapi.json") == Reply(200, document)
    kept = Path(__file__).parents[3] / "docs" / "openapi.json"
    assert json.loads(kept.read_text()) == document, (
        "run: python -m nbdtarget.control.openapi > docs/openapi.json"
    )


def test_openapi_refers_to_nothing_that_is_not_there() -> None:
    document = openapi()
    text = json.dumps(document)
    names = set(document["components"]["schemas"])
    referred = {
        part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]
    }
    assert referred <= names
    assert set(document["paths"]) == {f"/v1/{verb}" for verb in m.VERBS}
    for verb in m.READING_VERBS:
        assert not document["paths"][f"/v1/{verb}"]["post"]["requestBody"]["required"]


@pytest.mark.interop
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_curl(http: HttpServer) -> None:
    await http.registry.create("x", "0 8 zero")
    words = ["curl", "-sS", "--unix-socket", str(http.path)]

    async def curl(*more: str) -> Any:
        done = await asyncio.to_thread(
            subprocess.run,
            [*words, *more],
            check=True,
            capture_output=True,
            timeout=PATIENCE_S,
        )
        return json.loads(done.stdout)

    lines = (await curl("http://localhost/v1/table"))["devices"][0]["lines"]
    assert (lines[0]["start"], lines[0]["length"], lines[0]["type"]) == (0, 8, "zero")
    body = '{"name": "x"}'
    assert await curl("http://localhost/v1/suspend", "-d", body) == {"busy": []}
    assert http.registry.get("x").state is State.SUSPENDED


def test_openapi_describes_each_property_and_gives_valid_examples() -> None:
    document = openapi()
    schemas = document["components"]["schemas"]
    for name, schema in schemas.items():
        for key, value in schema["properties"].items():
            assert value.get("description"), (name, key)
    assert EXAMPLES.keys() == m.VERBS.keys()
    for verb, (request_type, answer_type) in m.VERBS.items():
        post = document["paths"][f"/v1/{verb}"]["post"]
        request = post["requestBody"]["content"]["application/json"]["example"]
        assert msgspec.convert(request, request_type) == EXAMPLES[verb][0]
        answer = post["responses"]["200"]["content"]["application/json"]["example"]
        assert msgspec.convert(answer, answer_type) == EXAMPLES[verb][1]
