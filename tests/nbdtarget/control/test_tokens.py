# SPDX-License-Identifier: Apache-2.0
"""Who may change something over a control socket, and who may only look: each verb, each way to ask."""

import asyncio
import errno as errnos
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control import messages as m
from nbdtarget.control.api import ControlServer
from nbdtarget.control.examples import EXAMPLES
from nbdtarget.control.paths import (
    LOOK_TOKEN_VARIABLE,
    TOKEN_VARIABLE,
    TcpControl,
)
from nbdtarget.control.tokens import (
    RIGHTS_HEADER,
    ControlTokens,
    Rights,
    control_tokens,
)
from nbdtarget.control.verbs import Verbs
from nbdtarget.monitor.observer import Observer
from nbdtarget.server.listener import Listener
from tests.support.dm import make_registry

FULL: Final = "correct-horse-battery"
LOOK: Final = "only-a-quick-look-please"
BOTH: Final = ControlTokens(FULL, LOOK)
# Written out here, and not taken from the product: a verb that is new must be put here by a person who has thought of it.
LOOKING: Final = {
    "access",
    "deps",
    "events",
    "figures",
    "history",
    "info",
    "map",
    "measure",
    "status",
    "table",
    "targets",
    "version",
    "wait",
}
CHANGING: Final = {
    "clear",
    "create",
    "load",
    "message",
    "remove",
    "remove_all",
    "rename",
    "resume",
    "set_access",
    "set_geometry",
    "set_uuid",
    "suspend",
    "uncache",
    "upgrade",
    "wipe_table",
}


class Reply(NamedTuple):
    status: int
    rights: str | None
    body: bytes


class Server:
    """A control server, and requests to it with any headers."""

    def __init__(self, address: Path | TcpControl, tokens: ControlTokens) -> None:
        self.registry, _ = make_registry(a=8192)
        verbs = Verbs(self.registry)
        verbs.monitor = Observer(self.registry, Listener(self.registry))
        self.control = ControlServer(verbs, address, tokens=tokens)

    async def ask(
        self, token: str | None, head: str, *headers: str, body: bytes = b""
    ) -> Reply:
        if isinstance(self.control.address, Path):
            path = self.control.address
            reader, writer = await asyncio.open_unix_connection(path)
        else:
            reader, writer = await asyncio.open_connection(*self.control.address)
        lines = [f"{head} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
        if token is not None:
            lines.append(f"Authorization: Bearer {token}")
        lines += [f"Content-Length: {len(body)}", "", ""]
        writer.write("\r\n".join(lines).encode() + body)
        answer = await reader.read()
        writer.close()
        first, *rest = answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        given = dict(line.split(": ", 1) for line in rest)
        content = answer.partition(b"\r\n\r\n")[2]
        return Reply(int(first.split()[1]), given.get(RIGHTS_HEADER), content)

    async def verb(self, token: str | None, verb: str, *headers: str) -> Reply:
        """Ask as the example in the documentation does."""
        body = msgspec.json.encode(EXAMPLES[verb][0])
        if verb in ("wait", "events"):
            body = b'{"name": "nosuch"}' if verb == "wait" else b"{}"  # at once
        return await self.ask(token, f"POST /v1/{verb}", *headers, body=body)


@pytest.fixture
async def tcp() -> AsyncIterator[Server]:
    made = Server(TcpControl("127.0.0.1", 0), BOTH)
    await made.control.start()
    yield made
    await made.registry.close()
    await made.control.close()


def test_each_verb_is_known_here() -> None:
    assert m.VERBS.keys() == LOOKING | CHANGING
    assert not LOOKING & CHANGING
    assert set(m.READING_VERBS) <= LOOKING


@pytest.mark.parametrize("verb", sorted(CHANGING))
async def test_who_may_look_does_not_change(tcp: Server, verb: str) -> None:
    await tcp.registry.create("disk", "0 8 linear /a 0")
    before = repr(tcp.registry.devices()), tcp.registry.get("disk").state
    reply = await tcp.verb(LOOK, verb)
    assert (reply.status, reply.rights) == (403, "look")
    failure = msgspec.json.decode(reply.body, type=m.Failure)
    assert failure == m.Failure(
        f"{verb}: this token may look, and not change", errnos.EACCES
    )
    assert (repr(tcp.registry.devices()), tcp.registry.get("disk").state) == before


@pytest.mark.parametrize("verb", sorted(LOOKING))
async def test_who_may_look_looks(tcp: Server, verb: str) -> None:
    reply = await tcp.verb(LOOK, verb)
    # 404: the device of the example is not there. It was looked for.
    assert reply.status in (200, 404)
    assert reply.rights == "look"


@pytest.mark.parametrize("verb", sorted(LOOKING | CHANGING))
async def test_the_other_token_allows_each_verb(tcp: Server, verb: str) -> None:
    reply = await tcp.verb(FULL, verb)
    assert reply.status not in (401, 403)
    assert reply.rights == "all"


@pytest.mark.parametrize("verb", sorted(LOOKING | CHANGING))
@pytest.mark.parametrize(
    "token", [None, "", LOOK[:-1], LOOK + "x", FULL + LOOK, "None", "wörng"]
)
async def test_no_other_token_does(tcp: Server, verb: str, token: str | None) -> None:
    reply = await tcp.verb(token, verb)
    assert (reply.status, reply.rights) == (401, None)


@pytest.mark.parametrize("path", ["/v1/cre%61te", "/v1/%63reate", "/v1/../v1/create"])
async def test_another_spelling_of_a_verb_is_no_way_around(
    tcp: Server, path: str
) -> None:
    body = b'{"name": "x", "table": "0 8 zero"}'
    reply = await tcp.ask(LOOK, f"POST {path}", body=body)
    assert reply.status in (403, 404)
    assert tcp.registry.devices() == []


async def test_metrics_and_the_description_are_looked_at_with_either_token(
    tcp: Server,
) -> None:
    for url in ("/metrics", "/v1/openapi.json"):
        for token, status in ((LOOK, 200), (FULL, 200), (None, 401)):
            assert (await tcp.ask(token, f"GET {url}")).status == status


async def test_a_body_is_not_read_before_the_token_has_allowed_the_verb(
    tcp: Server,
) -> None:
    head = "POST /v1/create HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\n"
    assert isinstance(tcp.control.address, TcpControl)
    reader, writer = await asyncio.open_connection(*tcp.control.address)
    writer.write(f"{head}Authorization: Bearer {LOOK}\r\n\r\n{{".encode())
    assert b" 403 " in await reader.readline()
    await reader.read()  # the server closes the connection, and waits for nothing
    writer.close()


async def test_a_request_may_ask_for_less_than_its_token_allows(tcp: Server) -> None:
    for wanted in ("look", "nonsense", ""):
        header = f"{RIGHTS_HEADER}: {wanted}"
        assert (await tcp.verb(FULL, "create", header)).status == 403
        assert (await tcp.verb(FULL, "info", header)).rights == "look"
    header = f"{RIGHTS_HEADER}: all"
    assert (await tcp.verb(LOOK, "create", header)).status == 403
    assert (await tcp.verb(FULL, "create", header)).rights == "all"


async def test_tcp_with_one_token_that_looks_lets_nobody_change() -> None:
    server = Server(TcpControl("127.0.0.1", 0), ControlTokens(look=LOOK))
    await server.control.start()
    assert (await server.verb(LOOK, "info")).status == 404
    assert (await server.verb(LOOK, "remove_all")).status == 403
    for token in (None, FULL, "None"):
        assert (await server.verb(token, "info")).status == 401
    await server.control.close()


async def test_a_unix_socket_asks_for_a_token_only_if_there_is_a_full_one(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path / "a", ControlTokens(look=LOOK))
    await server.control.start()
    assert (await server.verb(None, "remove_all")).status == 200
    assert (await server.verb(LOOK, "remove_all")).status == 403
    await server.control.close()
    server = Server(tmp_path / "b", BOTH)
    await server.control.start()
    assert (await server.verb(None, "version")).status == 401
    assert (await server.verb(LOOK, "version")).status == 200
    assert (await server.verb(FULL, "remove_all")).status == 200
    await server.control.close()


def test_rights_without_a_server() -> None:
    none = ControlTokens()
    assert none.rights("", is_tcp=False) is Rights.ALL
    assert not none.are_needed(is_tcp=True)
    assert BOTH.rights(f"Bearer {FULL}", is_tcp=True) is Rights.ALL
    assert BOTH.rights(f"Bearer {LOOK}", is_tcp=True) is Rights.LOOK
    for given in ("", FULL, LOOK, f"Basic {FULL}", "Bearer None", "Bearer "):
        assert BOTH.rights(given, is_tcp=True) is None
        assert BOTH.rights(given, is_tcp=False) is None


def test_tokens_of_a_server_come_from_files_or_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.delenv(LOOK_TOKEN_VARIABLE, raising=False)
    assert control_tokens() == ControlTokens()
    monkeypatch.setenv(TOKEN_VARIABLE, FULL)
    monkeypatch.setenv(LOOK_TOKEN_VARIABLE, LOOK)
    assert control_tokens() == BOTH
    file = tmp_path / "look"
    file.write_text(f"{LOOK}-2\n")
    assert control_tokens(None, str(file)) == ControlTokens(FULL, f"{LOOK}-2")
    file.write_text(FULL)
    with pytest.raises(NbdTargetError, match="look need another one"):
        control_tokens(None, str(file))
    file.write_text("short")
    with pytest.raises(NbdTargetError, match=f"{file}: the token must have 16"):
        control_tokens(None, str(file))


async def test_tcp_socket_of_another_process_is_not_served_without_a_token() -> None:
    server = ControlServer(Verbs(make_registry()[0]), Path())
    with (
        socket.socket() as listening,
        pytest.raises(NbdTargetError, match="needs a token"),
    ):
        server.take_over(listening, TcpControl("127.0.0.1", 1), None)
