# SPDX-License-Identifier: Apache-2.0
"""`ImageServer`: a web server with one image, which can misbehave in every way that a test asks for.

It speaks just enough HTTP/1.1 for ranged GETs, and is written by hand, because a server library would correct its answers.
"""

import asyncio
import contextlib
import random
import re
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

__all__ = ["Answer", "ImageServer", "Request", "etag_of", "image_of"]

_RANGE: Final = re.compile(r"bytes=(\d+)-(\d+)")


def image_of(size: int) -> bytes:
    """Bytes that differ from one place to another."""
    return random.Random(7).randbytes(size)


def etag_of(name: str) -> str:
    return f'"{name}"'


class Request(NamedTuple):
    """A request. `headers` have lower-case names; a range is half-open; `end` 0: there is no range."""

    method: str
    target: str
    headers: dict[str, str]
    begin: int
    end: int


class Answer:
    """An answer. A test may change every part of it.

    Attributes:
        sends: how many bytes of the body are sent before the server hangs up; None: all.
        pause: awaited in the middle of the body.
        text: raw bytes that are sent instead of everything else.
    """

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.sends: int | None = None
        self.pause: Callable[[], Awaitable[object]] | None = None
        self.hangs_up = False
        self.text = b""


Behave = Callable[[Request, Answer], Answer | None]


class ImageServer:
    """An image, and what is noted of the requests for it.

    Attributes:
        image, etag, last_modified: what is served; a test may replace them. An empty validator is not told.
        behave: changes each answer, in place or by returning another one; None: nothing is changed.
        pages: what is answered to requests for other paths, which need not ask for a range, by the beginning of the path.
        noted: all requests so far.
        latency_s: before each answer.
        nr_open: requests that are being answered; nr_open_max: most at a time.
    """

    def __init__(
        self,
        image: bytes,
        context: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.image = image
        self.etag = etag_of("one")
        self.last_modified = "Mon, 30 Nov 2026 10:00:00 GMT"
        self.behave: Behave | None = None
        self.pages: dict[str, Callable[[Request], bytes]] = {}
        self.noted: list[Request] = []
        self.latency_s = 0.0
        self.nr_open = self.nr_open_max = self.nr_connections = 0
        self._context = context
        self._host = host
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> "ImageServer":
        self._server = await asyncio.start_server(
            self._serve, self._host, 0, ssl=self._context
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()
        await self._server.wait_closed()
        await asyncio.gather(*self._serving, return_exceptions=True)
        self._server = None

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def url(
        self, path: str = "/disk.img", user: str = "", host: str = "127.0.0.1"
    ) -> str:
        scheme = "http" if self._context is None else "https"
        return f"{scheme}://{user}{host}:{self.port}{path}"

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._writers.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        self.nr_connections += 1
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while await self._serve_one(reader, writer):
                    pass
        finally:
            # Not `abort`, which drops what has not left yet.
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self._writers.discard(writer)

    async def _serve_one(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request = _parsed(head)
        for path, page in self.pages.items():
            if request.target.startswith(path):
                await reader.readexactly(int(request.headers.get("content-length", 0)))
                json = {"Content-Type": "application/json"}
                return await _send(writer, Answer(200, json, page(request)))
        assert request.end, "each request for the image asks for a range"
        self.noted.append(request)
        self.nr_open += 1
        self.nr_open_max = max(self.nr_open_max, self.nr_open)
        try:
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            answer = self._answer(request)
            if self.behave is not None:
                answer = self.behave(request, answer) or answer
            return await _send(writer, answer)
        finally:
            self.nr_open -= 1

    def _answer(self, request: Request) -> Answer:
        headers = {"Accept-Ranges": "bytes"}
        if self.etag:
            headers["ETag"] = self.etag
        if self.last_modified:
            headers["Last-Modified"] = self.last_modified
        size = len(self.image)
        if request.headers.get("if-match", self.etag) != self.etag:
            return Answer(412, headers, b"")
        if request.headers.get("if-unmodified-since", self.last_modified) != (
            self.last_modified
        ):
            return Answer(412, headers, b"")
        if request.begin >= size:
            return Answer(416, headers | {"Content-Range": f"bytes */{size}"}, b"")
        end = min(request.end, size)
        headers["Content-Range"] = f"bytes {request.begin}-{end - 1}/{size}"
        return Answer(206, headers, self.image[request.begin : end])


def _parsed(head: str) -> Request:
    first, *lines = head.split("\r\n")
    method, target, _ = first.split(" ")
    pairs = (line.partition(":") for line in lines if line)
    headers = {key.strip().lower(): value.strip() for key, _, value in pairs}
    match = _RANGE.fullmatch(headers.get("range", ""))
    begin, end = (0, 0) if match is None else (int(match[1]), int(match[2]) + 1)
    return Request(method, target, headers, begin, end)


async def _send(writer: asyncio.StreamWriter, answer: Answer) -> bool:
    """Send it; return whether the connection is kept."""
    if answer.text:
        writer.write(answer.text)
        await writer.drain()
        return False
    headers = {"Content-Length": str(len(answer.body))} | answer.headers
    lines = [
        f"HTTP/1.1 {answer.status} So",
        *(f"{k}: {v}" for k, v in headers.items() if v),
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
    body = answer.body if answer.sends is None else answer.body[: answer.sends]
    if answer.pause is not None:
        half = len(body) // 2
        writer.write(body[:half])
        await writer.drain()
        await answer.pause()
        body = body[half:]
    writer.write(body)
    await writer.drain()
    return answer.sends is None and not answer.hangs_up
