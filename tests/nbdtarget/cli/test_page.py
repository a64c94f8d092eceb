# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget page` passes on what has the token, and the files of the page, and nothing else."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.cli import page as page_module
from nbdtarget.cli.page import PageServer
from nbdtarget.control.api import ControlServer
from nbdtarget.control.verbs import Verbs
from tests.support.command_line import CommandLine
from tests.support.dm import make_registry
from tests.support.patience import PATIENCE_S


class Page:
    """A page server before a control socket."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self.registry, _ = make_registry(a=8192)
        path = folder / "control.sock"
        self.control = ControlServer(Verbs(self.registry), path)
        self.page = PageServer(path, read_only=read_only)
        self.port = 0
        self.token = ""

    async def start(self) -> None:
        await self.control.start()
        url = await self.page.start()
        address, _, self.token = url.partition("/#token=")
        self.port = int(address.rpartition(":")[2])

    async def ask(
        self, head: str, body: str = "", *headers: str, token: bool = True
    ) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        lines = [f"{head} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", *headers]
        if token:
            lines.append(f"Authorization: Bearer {self.token}")
        lines += [f"Content-Length: {len(body)}", "Connection: keep-alive", "", body]
        writer.write("\r\n".join(lines).encode())
        answer = (await reader.read()).decode()
        writer.close()
        return answer


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    made = Page(tmp_path)
    await made.start()
    yield made
    await made.page.close()
    await made.control.close()
    await made.registry.close()


async def test_a_request_with_the_token_is_passed_on(page: Page) -> None:
    body = json.dumps({"name": "x", "table": "0 8 zero"})
    assert " 200 " in (await page.ask("POST /v1/create", body)).partition("\r\n")[0]
    assert [device.dm_name for device in page.registry.devices()] == ["x"]
    answer = await page.ask("GET /v1/info?name=x")
    assert json.loads(answer.partition("\r\n\r\n")[2])["devices"][0]["name"] == "x"


@pytest.mark.parametrize(
    "url",
    [
        "/v1/info",
        "/metrics",
        "/v1/openapi.json",
        "/page/../v1/info",
        "/page/a/../../v1/info",
        "//v1/info",
        "/?/v1/info",
    ],
)
async def test_nothing_but_the_page_is_passed_on_without_it(
    page: Page, url: str
) -> None:
    for head in (f"GET {url}", f"POST {url}"):
        assert " 401 " in (await page.ask(head, token=False)).partition("\r\n")[0]


async def test_the_files_of_the_page_need_none(page: Page) -> None:
    for url in ("/", "/page/app.js", "/page/vendor/uplot.js"):
        answer = await page.ask(f"GET {url}", token=False)
        assert " 200 " in answer.partition("\r\n")[0]
        assert "Content-Security-Policy" in answer


@pytest.mark.parametrize("linger_s", [PATIENCE_S, 0.0], ids=["body-comes", "not"])
async def test_a_refused_browser_reads_why_though_its_body_comes_late(
    page: Page, linger_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Browsers send header and body apart. A connection that is closed with the body unread tells of a reset instead."""
    monkeypatch.setattr(page_module, "LINGER_S", linger_s)
    reader, writer = await asyncio.open_connection("127.0.0.1", page.port)
    async with asyncio.timeout(PATIENCE_S):
        writer.write(b"POST /v1/info HTTP/1.1\r\nContent-Length: 6\r\n\r\n")
        answer = await reader.readuntil(b"}")
        assert b" 401 " in answer.partition(b"\r\n")[0]
        if linger_s:
            for piece in (b"la", b"te", b"{}"):
                writer.write(piece)
                await writer.drain()
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_what_is_no_request_is_closed(page: Page) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", page.port)
    writer.write(b"x" * (65 << 10))
    assert await reader.read() == b""
    writer.close()


def test_a_server_on_tcp_is_opened_at_its_own_address(cli: CommandLine) -> None:
    said = cli("page", "--control", "tcp:127.0.0.1:8080", status=1)
    assert "open http://127.0.0.1:8080/ and give its token there" in said


async def test_a_read_only_page_changes_nothing(tmp_path: Path) -> None:
    page = Page(tmp_path, read_only=True)
    await page.start()
    body = json.dumps({"name": "x", "table": "0 8 zero"})
    for headers in ((), ("Nbdtarget-Rights: all",), ("nbdtarget-rights: all",)):
        answer = await page.ask("POST /v1/create", body, *headers)
        assert " 403 " in answer.partition("\r\n")[0]
    assert page.registry.devices() == []
    answer = await page.ask("GET /v1/info")
    assert " 200 " in answer.partition("\r\n")[0]
    assert "Nbdtarget-Rights: look" in answer
    await page.page.close()
    await page.control.close()
    await page.registry.close()
