# SPDX-License-Identifier: Apache-2.0
"""A strict little NBD server for the tests of NbdDevice: it serves a bytearray with simple
replies, notes what it was asked, and breaks in the ways that it is told to.
"""

import asyncio
import contextlib
import struct
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from nbdtarget_protocol import consts
from nbdtarget_protocol.transmission import block_status

__all__ = ["StrictServer"]

FLAGS_ALL = (
    consts.FLAG_HAS_FLAGS
    | consts.FLAG_SEND_FLUSH
    | consts.FLAG_SEND_FUA
    | consts.FLAG_SEND_TRIM
    | consts.FLAG_SEND_WRITE_ZEROES
    | consts.FLAG_SEND_FAST_ZERO
    | consts.FLAG_SEND_CACHE
    | consts.FLAG_CAN_MULTI_CONN
)

Noted = tuple[int, int, int, int]  # command, flags, offset, length


class StrictServer:
    """Serves `disk`; refuses what a server with these limits may refuse.

    Attributes:
        noted: each request but DISC, in the order of arrival.
        errors: command -> errno to answer with instead of carrying it out.
        gate: cleared, requests wait; set, they are answered.
        greeting: what to say instead of a handshake; then hang up, unless `is_silent`.
        status: answers BLOCK_STATUS, (offset, length) -> descriptors; without it there are
            no structured replies. READ is not answered with one: do not ask.
        hang_up_after: close the connection at the request of this number, from 0.
    """

    def __init__(
        self,
        directory: Path,
        size: int = 1 << 20,
        *,
        flags: int = FLAGS_ALL,
        block_min: int = 1,
        payload_max: int = 32 << 20,
        status: Callable[[int, int], list[tuple[int, int]]] | None = None,
    ) -> None:
        self.path = directory / "nbd.sock"
        self.uri = f"nbd+unix:///disk?socket={quote(str(self.path))}"
        self.disk = bytearray(size)
        self.flags = flags
        self.block_min = block_min
        self.payload_max = payload_max
        self.noted: list[Noted] = []
        self.errors: dict[int, int] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.hang_up_after = -1
        self.greeting: bytes | None = None
        self.is_silent = False
        self.status = status
        self.nr_connections = 0
        self.nr_goodbyes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> "StrictServer":
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def hang_up_all(self) -> None:
        """Close each connection, whatever is under way; what waits at the gate never happens."""
        for task in tuple(self._tasks):
            task.cancel()
        for writer in tuple(self._writers):
            writer.close()

    def commands(self) -> list[int]:
        return [noted[0] for noted in self.noted]

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.nr_connections += 1
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                if self.greeting is not None:
                    writer.write(self.greeting)
                    if self.is_silent:
                        await reader.read()
                    return
                await self._shake_hands(reader, writer)
                while await self._answer_one(reader, writer):
                    pass
        except asyncio.CancelledError:
            pass  # told to hang up
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _shake_hands(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(consts.GREETING.pack(consts.NBDMAGIC, consts.IHAVEOPT, 3))
        await reader.readexactly(4)
        while True:
            header = await reader.readexactly(consts.OPTION.size)
            _, option, length = consts.OPTION.unpack(header)
            await reader.readexactly(length)
            if self.status is not None and option == consts.OPT_STRUCTURED_REPLY:
                self._reply(writer, option, consts.REP_ACK)
                continue
            if self.status is not None and option == consts.OPT_SET_META_CONTEXT:
                context = consts.U32.pack(9) + b"base:allocation"
                self._reply(writer, option, consts.REP_META_CONTEXT, context)
                self._reply(writer, option, consts.REP_ACK)
                continue
            if option != consts.OPT_GO:
                self._reply(writer, option, consts.REP_ERR_UNSUP)
                continue
            export = consts.INFO_EXPORT_PAYLOAD.pack(0, len(self.disk), self.flags)
            self._reply(writer, option, consts.REP_INFO, export)
            limits = consts.INFO_BLOCK_SIZE_PAYLOAD.pack(
                3, self.block_min, max(4096, self.block_min), self.payload_max
            )
            self._reply(writer, option, consts.REP_INFO, limits)
            self._reply(writer, option, consts.REP_ACK)
            return

    def _reply(
        self, writer: asyncio.StreamWriter, option: int, reply: int, data: bytes = b""
    ) -> None:
        magic = consts.OPTION_REPLY_MAGIC
        writer.write(consts.OPTION_REPLY.pack(magic, option, reply, len(data)) + data)

    async def _answer_one(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        header = await reader.readexactly(consts.REQUEST.size)
        magic, flags, command, cookie, offset, length = consts.REQUEST.unpack(header)
        assert magic == consts.REQUEST_MAGIC
        if command == consts.CMD_DISC:
            self.nr_goodbyes += 1
            return False
        payload = b""
        if command == consts.CMD_WRITE:
            assert length <= self.payload_max
            payload = await reader.readexactly(length)
        assert offset % self.block_min == 0
        assert length % self.block_min == 0
        assert offset + length <= len(self.disk)
        self.noted.append((command, flags, offset, length))
        if len(self.noted) - 1 == self.hang_up_after:
            return False
        await self.gate.wait()
        error = self.errors.get(command, 0)
        if self.status is not None and command == consts.CMD_BLOCK_STATUS and not error:
            writer.write(block_status(cookie, 9, self.status(offset, length), True))
            await writer.drain()
            return True
        data = b"" if error else self._carry_out(command, offset, length, payload)
        writer.write(struct.pack(">IIQ", consts.SIMPLE_REPLY_MAGIC, error, cookie))
        writer.write(data)
        await writer.drain()
        return True

    def _carry_out(
        self, command: int, offset: int, length: int, payload: bytes
    ) -> bytes:
        end = offset + length
        if command == consts.CMD_READ:
            assert length <= self.payload_max
            return bytes(self.disk[offset:end])
        if command == consts.CMD_WRITE:
            self.disk[offset:end] = payload
        elif command == consts.CMD_WRITE_ZEROES:
            self.disk[offset:end] = bytes(length)
        elif command == consts.CMD_TRIM:
            self.disk[offset:end] = b"\xdb" * length
        return b""
