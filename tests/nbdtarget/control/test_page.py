# SPDX-License-Identifier: Apache-2.0
"""The files of the live page, and what a browser is refused. That the page works is shown in a real browser: tests/interop/test_live_page.py."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import nbdtarget.control
from nbdtarget.control.api import ControlServer
from nbdtarget.control.page import is_page
from nbdtarget.control.paths import TcpControl
from nbdtarget.control.tokens import ControlTokens
from nbdtarget.control.verbs import Verbs
from tests.support.dm import make_registry

STATIC = Path(nbdtarget.control.__file__).parent / "static"
TOKEN = "correct-horse-battery"


class Server:
    """A control server on TCP with a token, or on a unix socket without one."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.registry, _ = make_registry(a=8192)
        self.has_token = kind == "token"
        self.path = folder / "control.sock"
        self.control = ControlServer(
            Verbs(self.registry),
            TcpControl("127.0.0.1", 0) if self.has_token else self.path,
            tokens=ControlTokens(TOKEN if self.has_token else None),
        )

    async def get(self, url: str, *headers: str, host: str = "localhost") -> str:
        """Returns the whole answer."""
        if self.has_token:
            port = self.control.port
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        else:
            reader, writer = await asyncio.open_unix_connection(self.path)
        lines = [f"GET {url} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        answer = (await reader.read()).decode()
        writer.close()
        return answer


def status(answer: str) -> int:
    return int(answer.split()[1])


@pytest.fixture(params=["unix", "token"])
async def server(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Server]:
    made = Server(tmp_path, request.param)
    await made.control.start()
    yield made
    await made.registry.close()
    await made.control.close()


async def test_every_file_is_served_with_a_strict_policy(server: Server) -> None:
    for path in sorted(STATIC.rglob("*")):
        if path.suffix in (".js", ".css"):
            url = f"/page/{path.relative_to(STATIC)}"
            assert is_page(url)
            answer = await server.get(url)
            assert status(answer) == 200, url
            assert "X-Content-Type-Options: nosniff" in answer
    answer = await server.get("/")
    assert status(answer) == 200
    assert "Content-Security-Policy: default-src 'none'; script-src 'self';" in answer
    assert "unsafe" not in answer.partition("\r\n\r\n")[0]
    for url in ("/page/nothing.js", "/page/../verbs.py", "/page/index.html"):
        answer = await server.get(url, f"Authorization: Bearer {TOKEN}")
        assert status(answer) in (400, 404)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for path in STATIC.rglob("*"):
        if path.suffix in (".html", ".js", ".css") and "vendor" not in path.parts:
            text = path.read_text().replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?:|@import|innerHTML|eval\(", text), path
            if path.suffix == ".html":
                assert not re.search(r"\bon\w+=|style=|<script>|<style>", text)


@pytest.mark.parametrize(
    "headers",
    [
        ("Sec-Fetch-Site: cross-site",),
        ("Sec-Fetch-Site: same-site",),
        ("Origin: http://evil.example",),
        ("Origin: null",),
    ],
    ids=lambda headers: headers[0].partition(": ")[2].replace("http://", ""),
)
async def test_another_site_is_refused(
    server: Server, headers: tuple[str, ...]
) -> None:
    answer = await server.get("/v1/version", f"Authorization: Bearer {TOKEN}", *headers)
    assert status(answer) == 403
    assert "another site" in answer


async def test_the_page_itself_and_programs_are_answered(server: Server) -> None:
    token = f"Authorization: Bearer {TOKEN}"
    same = ("Origin: http://localhost", "Sec-Fetch-Site: same-origin")
    browser = "User-Agent: Mozilla/5.0 (X11; Linux x86_64)"
    assert status(await server.get("/v1/version", token, *same, browser)) == 200
    assert status(await server.get("/v1/version", token, host="x")) == 200
    for host in ("127.0.0.1:8080", "[::1]:8080", "page.localhost"):
        assert status(await server.get("/v1/version", token, browser, host=host)) == 200


async def test_a_name_that_was_made_to_point_here_is_refused_without_a_token(
    server: Server,
) -> None:
    browser = "User-Agent: Mozilla/5.0 (X11; Linux x86_64)"
    token = f"Authorization: Bearer {TOKEN}"
    answer = await server.get("/v1/version", browser, token, host="evil.example")
    if not server.has_token:
        assert status(answer) == 403
        assert "evil.example is not localhost" in answer
    else:  # a page that does not know the token learns nothing
        assert status(answer) == 200
        without = await server.get("/v1/version", browser, host="evil.example")
        assert status(without) == 401
