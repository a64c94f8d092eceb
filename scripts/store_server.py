# SPDX-License-Identifier: Apache-2.0
"""A web server with one file that is as far away, and as fast, as it is told to be; for benchmarks.

    python -m scripts.store_server FILE PORT_FILE [--port 0] [--latency-ms 30] [--mib-s 200]

It listens on 127.0.0.1, on a port that it writes into PORT_FILE. Each answer begins `--latency-ms` after its request; all bodies
together go out at `--mib-s` MiB a second, in slices, one stream after the other, so that all of them have an equal share. It
knows GET and HEAD, ranges and keep-alive, and nothing else.
"""

import argparse
import asyncio
import contextlib
import mmap
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import uvloop

SLICE: Final = 128 << 10
AHEAD_S: Final = 0.002  # that a slice may go out before its time: timers are coarse
# A server that comes late, because others had the processor, catches up: the line is not slower for that. More than this is lost.
CATCH_UP_S: Final = 0.02
_RANGE: Final = re.compile(rb"\r\nrange: *bytes=(\d+)-(\d*)", re.IGNORECASE)


class Link:
    """The wire that all answers share."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0

    async def take(self, length: int) -> None:
        """Wait until `length` bytes may go out."""
        now_s = asyncio.get_running_loop().time()
        begin_s = max(now_s - CATCH_UP_S, self._free_s)
        self._free_s = begin_s + length / self._bytes_per_s
        if begin_s > now_s + AHEAD_S:
            await asyncio.sleep(begin_s - now_s - AHEAD_S)


class StoreServer:
    def __init__(self, data: memoryview, link: Link, latency_s: float) -> None:
        self._data = data
        self._link = link
        self._latency_s = latency_s
        self.nr_requests = 0

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(self._latency_s)
                await self._answer(head, writer)
        writer.close()

    async def _answer(self, head: bytes, writer: asyncio.StreamWriter) -> None:
        self.nr_requests += 1
        size = len(self._data)
        match = _RANGE.search(head)
        begin, end = 0, size
        lines = ["HTTP/1.1 200 OK"]
        if match is not None:
            begin = int(match[1])
            end = min(int(match[2]) + 1, size) if match[2] else size
            lines = [
                "HTTP/1.1 206 Partial Content",
                f"Content-Range: bytes {begin}-{end - 1}/{size}",
            ]
        lines += [f"Content-Length: {end - begin}", 'ETag: "one"']
        lines += ["Accept-Ranges: bytes", "", ""]
        writer.write("\r\n".join(lines).encode())
        if head.startswith(b"HEAD"):
            return
        for at in range(begin, end, SLICE):
            stop = min(at + SLICE, end)
            await self._link.take(stop - at)
            writer.write(self._data[at:stop])
            await writer.drain()


async def run(data: memoryview, options: argparse.Namespace) -> None:
    link = Link(options.mib_s * (1 << 20))
    store = StoreServer(data, link, options.latency_ms / 1000)
    server = await asyncio.start_server(store.serve, "127.0.0.1", options.port)
    tell_port(options.port_file, server.sockets[0].getsockname()[1])
    await server.serve_forever()


def tell_port(port_file: str, port: int) -> None:
    """Write the port; the file appears with its content."""
    ready = Path(f"{port_file}.new")
    ready.write_text(str(port))
    ready.rename(port_file)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A web server that is far away.")
    parser.add_argument("file")
    parser.add_argument("port_file")
    parser.add_argument("--port", type=int, default=0, help="0: any")
    parser.add_argument("--latency-ms", type=float, default=30.0)
    parser.add_argument("--mib-s", type=float, default=200.0)
    options = parser.parse_args(argv)
    with open(options.file, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        uvloop.run(run(memoryview(mapped), options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
