# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget page`: the live page of a server in a browser of this machine, which cannot open a unix socket by itself.

Theory of operation. It listens on 127.0.0.1 and passes each request on to the control socket. Other users of this machine can reach that port, too,
so everything but the files of the page needs a token, which is made anew each time and stands behind the `#` of the printed address:
browsers send that part to no server, and the page takes it from there. One connection carries one request. With `--read-only` each request asks the
server for the right to look alone (`nbdtarget.control.tokens`).
"""

import asyncio
import contextlib
import hmac
import re
import secrets
import socket
from pathlib import Path
from typing import Annotated, Final

import typer

from nbdtarget.cli.common import Control
from nbdtarget.common.clock import timeout
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control.client import no_server
from nbdtarget.control.paths import control_address, is_control_given
from nbdtarget.control.servers import default_server
from nbdtarget.control.tokens import RIGHTS_HEADER, Rights

__all__ = ["PageServer", "register"]

HEAD_BYTES_MAX: Final = 64 << 10
HEAD_S: Final = 10.0
LINGER_S: Final = 2.0  # for what a browser still sends after its answer
TOKEN_BYTES: Final = 24
PIECE_BYTES: Final = 64 << 10

Port = Annotated[
    int,
    typer.Option(
        "--port", metavar="PORT", min=0, max=65535, help="Port on 127.0.0.1; 0: any."
    ),
]
Open = Annotated[
    bool, typer.Option("--open", help="Open the page in the browser of the desktop.")
]


ReadOnly = Annotated[
    bool,
    typer.Option(
        "--read-only", help="The page may look, and change nothing: it has no buttons."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(page)


def page(
    port: Port = 0,
    open_: Open = False,
    read_only: ReadOnly = False,
    control: Control = None,
) -> int:
    """Show the live page of a server in a browser: devices, maps, rates, clients, events.

    This prints an address of this machine that works until Ctrl-C, and holds a key to the server: do not pass it on.
    """
    address = (
        control_address(control) if is_control_given(control) else default_server()
    )
    if not isinstance(address, Path):
        raise NbdTargetError(
            f"{address}: this server is on TCP: open http://{address.host}:{address.port}/ and give its token there"
        )
    if not address.exists():
        raise no_server(address)
    server = PageServer(address, read_only=read_only)
    return asyncio.run(_serve(server, port, open_=open_))


async def _serve(server: "PageServer", port: int, *, open_: bool) -> int:
    url = await server.start(port)
    print(url, flush=True)
    if open_:
        import webbrowser  # here: it looks through the machine for browsers

        await asyncio.to_thread(webbrowser.open, url)
    await server.serve()
    return 0


class PageServer:
    """See the module head.

    Args:
        control: the control socket.
        read_only: have the server refuse what would change something.
    """

    def __init__(self, control: Path, *, read_only: bool = False) -> None:
        self._control = control
        self._added = [f"{RIGHTS_HEADER}: {Rights.LOOK.value}"] if read_only else []
        self._expected = ""
        self._server: asyncio.Server | None = None

    async def start(self, port: int = 0) -> str:
        """Listen; the address for the browser. Raises: NbdTargetError: the port is taken."""
        token = secrets.token_urlsafe(TOKEN_BYTES)
        self._expected = f"Bearer {token}"
        listener = socket.socket()
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            listener.close()
            raise NbdTargetError(f"127.0.0.1:{port}: {error.strerror}") from None
        self._server = await asyncio.start_server(
            self._connected, sock=listener, limit=HEAD_BYTES_MAX
        )
        return f"http://127.0.0.1:{listener.getsockname()[1]}/#token={token}"

    async def serve(self) -> None:
        """Serve until the task is cancelled."""
        assert self._server is not None
        await self._server.serve_forever()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            async with timeout(HEAD_S):
                head = await reader.readuntil(b"\r\n\r\n")
            passed_on = self._head(head)
            if passed_on is None:
                writer.write(_NO_TOKEN)
                await writer.drain()
            else:
                await self._pass_on(passed_on, reader, writer)
        except (TimeoutError, asyncio.LimitOverrunError, asyncio.IncompleteReadError):
            pass  # no request of a browser: there is nothing to answer
        except OSError:
            pass  # the browser or the server has gone; the page says so itself
        else:
            await _hang_up(reader, writer)
        finally:
            writer.close()

    def _head(self, head: bytes) -> bytes | None:
        """Return the head for the control socket; None: the token is missing or wrong."""
        first, *lines = head.decode("latin-1").split("\r\n")
        path = [*first.split(" "), ""][1]
        given = ""
        kept = [first]
        for line in lines:
            name = line.partition(":")[0].strip().lower()
            if name == "authorization":
                given = line.partition(":")[2].strip()
            elif name not in ("connection", RIGHTS_HEADER.lower()) and line:
                kept.append(line)
        expected = self._expected.encode()
        if not _FILE.fullmatch(path) and not hmac.compare_digest(
            given.encode("latin-1"), expected
        ):
            return None
        kept += [*self._added, "Connection: close", "", ""]
        return "\r\n".join(kept).encode("latin-1")

    async def _pass_on(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        from_server, to_server = await asyncio.open_unix_connection(self._control)
        request = asyncio.create_task(_copy(reader, to_server))
        try:
            to_server.write(head)
            await _copy(from_server, writer)
        finally:
            request.cancel()
            await asyncio.wait([request])
            to_server.close()


_FILE: Final = re.compile(r"/|/page/([a-z]+/)?[a-z]+\.(js|css)")
_NO_TOKEN: Final = (
    b"HTTP/1.1 401 Unauthorized\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    b'{"reason":"the token is missing or wrong: take the address that `nbdtarget page\' printed","errno":13}'
)


async def _hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close our half, and drop what still comes until the browser closes its own, for LINGER_S.

    A socket that is closed with unread bytes in it tells of a reset, which may overtake the answer.
    """
    with contextlib.suppress(OSError, TimeoutError):
        writer.write_eof()
        async with timeout(LINGER_S):
            while await reader.read(PIECE_BYTES):
                pass


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while piece := await source.read(PIECE_BYTES):
        target.write(piece)
        await target.drain()
