# SPDX-License-Identifier: Apache-2.0
"""The other end of the server's socket, byte by byte; and devices that do what they are told.

`Peer` is an NBD client that may say anything at all, and shares no code with ours but the
numbers. `Disk` is a device in memory that can hold bios back, fail, or answer slowly.
"""

import asyncio
import ssl
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from nbdtarget.bio import OP_DISCARD, OP_READ, OP_WRITE, OP_WRITE_ZEROES, Bio
from nbdtarget.common.clock import Clock
from nbdtarget.devices.base import Device, Extent
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener
from nbdtarget_protocol import consts as c
from tests.support.patience import PATIENCE_S, until

__all__ = [
    "MIB",
    "Directory",
    "Disk",
    "LaterDisk",
    "Peer",
    "Reply",
    "Served",
]

MIB = 1 << 20


class Disk(Device):
    """Memory; counts and keeps what it is asked to.

    Attributes:
        bios: (op, offset, length, flags) of each bio submitted.
        hold: keep bios (owned) in `held` until `let_go`.
        fail: the status each bio ends with, without effect.
    """

    can_discard = True
    can_write_zeroes = True

    def __init__(self, size: int = MIB, *, read_only: bool = False) -> None:
        super().__init__("disk", size, read_only=read_only)
        self.data = bytearray(size)
        self.bios: list[tuple[int, int, int, int]] = []
        self.held: list[Bio] = []
        self.hold = False
        self.fail = 0
        self.extent_list: list[Extent] = []

    def submit(self, bio: Bio) -> None:
        self.bios.append((bio.op, bio.offset, bio.length, bio.flags))
        if self.hold:
            bio.own()
            self.held.append(bio)
        else:
            self.carry_out(bio)

    def carry_out(self, bio: Bio) -> None:
        end = bio.offset + bio.length
        if self.fail:
            bio.end(self.fail)
            return
        if bio.op == OP_READ:
            assert bio.payload is not None
            bio.payload[:] = self.data[bio.offset : end]
        elif bio.op == OP_WRITE:
            assert bio.payload is not None
            self.data[bio.offset : end] = bio.payload
        elif bio.op in (OP_WRITE_ZEROES, OP_DISCARD):
            self.data[bio.offset : min(end, self.size)] = bytes(bio.length)
        bio.end(0)

    def let_go(self, nr: int | None = None) -> None:
        held, self.held = self.held[:nr], [] if nr is None else self.held[nr:]
        for bio in held:
            self.carry_out(bio)

    async def until_held(self, nr: int) -> None:
        await until(lambda: len(self.held) >= nr)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return self.extent_list or await super().extents(offset, length)

    async def close(self) -> None:
        pass


class LaterDisk(Disk):
    """Ends every bio in a later turn of the loop."""

    def submit(self, bio: Bio) -> None:
        bio.own()
        asyncio.get_running_loop().call_soon(super().submit, bio)


class Directory:
    """Devices by name, and how often each is open."""

    def __init__(self, devices: dict[str, Device]) -> None:
        self.devices = devices
        self.nr_open = dict.fromkeys(devices, 0)
        self.missing: dict[str, str] = {}

    def names(self) -> Iterable[tuple[str, str]]:
        return [(name, f"about {name}") for name in self.devices]

    def claimed_names(self) -> Iterable[str]:
        return [*self.devices, *self.missing]

    def maybe_get(self, name: str) -> Device | None:
        return self.devices.get(name)

    def listed(self, device: Device) -> tuple[str, str]:
        name = self._name(device)
        return name, f"about {name}"

    def why_missing(self, name: str) -> str:
        return self.missing.get(name, "")

    def acquire(self, name: str) -> Device:
        device = self.maybe_get(name)
        if device is None:
            raise KeyError(name)
        self.nr_open[self._name(device)] += 1
        return device

    def release(self, device: Device) -> None:
        self.nr_open[self._name(device)] -= 1

    def _name(self, device: Device) -> str:
        return next(name for name, it in self.devices.items() if it is device)


class Reply(NamedTuple):
    """A reply, whole: all chunks of a structured one."""

    cookie: int
    error: int
    data: bytes = b""
    chunks: tuple[int, ...] = ()  # types; empty for a simple reply
    message: str = ""
    extents: tuple[tuple[int, int], ...] = ()


class Peer:
    """One connection of a client; see the module head."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.size = 0
        self.flags = 0
        self.structured = False
        self.extended = False
        self.reads: dict[int, tuple[int, int]] = {}  # cookie: offset, length
        self.offsets: dict[int, int] = {}  # with extended headers, cookie: offset
        self.cookie = 0

    @classmethod
    async def connect(cls, path: Path) -> "Peer":
        return cls(*await asyncio.open_unix_connection(str(path)))

    def option(self, option: int, data: bytes = b"") -> None:
        self.writer.write(c.OPTION.pack(c.IHAVEOPT, option, len(data)) + data)

    async def option_reply(self) -> tuple[int, bytes]:
        _, _, kind, length = c.OPTION_REPLY.unpack(await self.reader.readexactly(20))
        return kind, await self.reader.readexactly(length)

    async def greet(self) -> None:
        assert await self.reader.readexactly(18) == c.GREETING.pack(
            c.NBDMAGIC, c.IHAVEOPT, 3
        )
        self.writer.write(c.CLIENT_FLAGS.pack(3))

    async def encrypt(self, context: ssl.SSLContext) -> None:
        """Ask for TLS, behind the greeting."""
        self.option(c.OPT_STARTTLS)
        assert await self.option_reply() == (c.REP_ACK, b"")
        await self.writer.start_tls(context, server_hostname="localhost")

    async def attach(
        self,
        name: str = "",
        *,
        structured: bool = False,
        extended: bool = False,
        contexts: bool | Sequence[str] = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        await self.greet()
        if tls is not None:
            await self.encrypt(tls)
        encoded = struct.pack(">I", len(name)) + name.encode()
        if structured or extended:
            option = c.OPT_EXTENDED_HEADERS if extended else c.OPT_STRUCTURED_REPLY
            self.option(option)
            assert await self.option_reply() == (c.REP_ACK, b"")
        self.structured, self.extended = structured or extended, extended
        names = ["base:allocation"] if contexts is True else contexts or []
        if names:
            queries = [struct.pack(">I", len(it)) + it.encode() for it in names]
            count = struct.pack(">I", len(queries))
            self.option(c.OPT_SET_META_CONTEXT, encoded + count + b"".join(queries))
            while (kind := (await self.option_reply())[0]) == c.REP_META_CONTEXT:
                pass
            assert kind == c.REP_ACK
        self.option(c.OPT_GO, encoded + struct.pack(">H", 0))
        kind, data = await self.option_reply()
        assert kind == c.REP_INFO
        _, self.size, self.flags = c.INFO_EXPORT_PAYLOAD.unpack(data)
        assert (await self.option_reply())[0] == c.REP_ACK

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int | None = None,
        payload: bytes = b"",
        flags: int = 0,
        magic: int = 0,
    ) -> bytes:
        """Encode a request. Its cookie is `self.cookie`. With extended headers, a payload has PAYLOAD_LEN."""
        self.cookie += 1
        length = len(payload) if length is None else length
        if command == c.CMD_READ:
            self.reads[self.cookie] = offset, length
        layout, right = c.REQUEST, c.REQUEST_MAGIC
        if self.extended:
            self.offsets[self.cookie] = offset
            layout, right = c.EXTENDED_REQUEST, c.EXTENDED_REQUEST_MAGIC
            if payload or (command == c.CMD_WRITE and length):
                flags |= c.CMD_FLAG_PAYLOAD_LEN
        header = layout.pack(
            magic or right, flags, command, self.cookie, offset, length
        )
        return header + payload

    def send(self, command: int, *args: int, **kwargs: int | bytes) -> int:
        self.writer.write(self.request(command, *args, **kwargs))  # type: ignore[arg-type]  # a test's shorthand
        return self.cookie

    async def reply(self) -> Reply:
        """Receive one whole reply. Raises: IncompleteReadError: the connection is closed."""
        head = await self.reader.readexactly(16)
        if self.extended:
            return await self._structured(head)
        if struct.unpack_from(">I", head)[0] == c.SIMPLE_REPLY_MAGIC:
            _, error, cookie = c.SIMPLE_REPLY.unpack(head)
            _, length = self.reads.pop(cookie, (0, 0))
            assert not (self.structured and length), "READ answered with a simple reply"
            data = await self.reader.readexactly(0 if error else length)
            return Reply(cookie, error, data)
        return await self._structured(head)

    async def _structured(self, head: bytes) -> Reply:
        assert self.structured
        data, chunks, error, message = bytearray(), [], 0, ""
        extents: list[tuple[int, int]] = []
        while True:
            layout = c.EXTENDED_CHUNK if self.extended else c.CHUNK
            head += await self.reader.readexactly(layout.size - len(head))
            magic, flags, kind, cookie, *at, length = layout.unpack(head)
            if self.extended:
                assert magic == c.EXTENDED_REPLY_MAGIC
                assert at == [self.offsets[cookie]]
            else:
                assert magic == c.STRUCTURED_REPLY_MAGIC
            body = await self.reader.readexactly(length)
            chunks.append(kind)
            if kind == c.REPLY_TYPE_OFFSET_DATA:
                self._check_offset(cookie, body, len(data))
                data += body[8:]
            elif kind == c.REPLY_TYPE_OFFSET_HOLE:
                self._check_offset(cookie, body, len(data))
                data += bytes(struct.unpack(">QI", body)[1])
            elif kind == c.REPLY_TYPE_ERROR:
                error, size = struct.unpack_from(">IH", body)
                message = body[6 : 6 + size].decode()
            elif kind == c.REPLY_TYPE_BLOCK_STATUS:
                assert not self.extended
                extents += struct.iter_unpack(">II", body[4:])
            elif kind == c.REPLY_TYPE_BLOCK_STATUS_EXT:
                assert self.extended
                assert struct.unpack_from(">I", body, 4) == ((len(body) - 8) // 16,)
                extents += struct.iter_unpack(">QQ", body[8:])
            if flags & c.REPLY_FLAG_DONE:
                self.reads.pop(cookie, None)
                return Reply(
                    cookie, error, bytes(data), tuple(chunks), message, tuple(extents)
                )
            head = b""

    def _check_offset(self, cookie: int, body: bytes, nr_received: int) -> None:
        (offset,) = struct.unpack_from(">Q", body)
        assert offset == self.reads[cookie][0] + nr_received

    async def ask(self, command: int, *args: int, **kwargs: int | bytes) -> Reply:
        """Send one request and wait for its reply."""
        cookie = self.send(command, *args, **kwargs)
        reply = await self.reply()
        assert reply.cookie == cookie
        return reply

    async def at_end(self) -> bool:
        """Wait until the server closes; whether it did so without another byte."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionResetError:
            return True

    async def errors_to_the_end(self) -> list[int]:
        """Receive replies until the server closes; return their errors."""
        errors: list[int] = []
        while True:
            try:
                errors.append((await self.reply()).error)
            except (asyncio.IncompleteReadError, ConnectionError):
                return errors

    def close(self) -> None:
        self.writer.close()


class Served:
    """A listener on `tmp_path/s` and its peers; made by the `served` fixture."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path / "s"
        self.limits = Limits(poison_borrowed=True)
        self.disk = Disk()
        self.directory = Directory({"disk": self.disk})
        self.clock: Clock | None = None  # None: real time
        self.listener: Listener | None = None
        self.peers: list[Peer] = []

    async def start(self) -> Listener:
        if self.listener is None:
            self.listener = Listener(
                self.directory, limits=self.limits, clock=self.clock
            )
            await self.listener.start(f"unix:{self.path}")
        return self.listener

    async def connect(self) -> Peer:
        await self.start()
        peer = await Peer.connect(self.path)
        self.peers.append(peer)
        return peer

    async def attach(
        self,
        name: str = "",
        *,
        structured: bool = False,
        extended: bool = False,
        contexts: bool = False,
    ) -> Peer:
        peer = await self.connect()
        await peer.attach(
            name, structured=structured, extended=extended, contexts=contexts
        )
        return peer

    async def attach_with(self, contexts: Sequence[str]) -> Peer:
        """Attach with structured replies, and ask for these metadata contexts."""
        peer = await self.connect()
        await peer.attach("disk", structured=True, contexts=contexts)
        return peer

    async def until_connections(self, nr: int) -> None:
        listener = await self.start()
        await until(lambda: listener.nr_connections == nr)

    async def close(self) -> None:
        for peer in self.peers:
            peer.close()
        for device in self.directory.devices.values():
            if isinstance(device, Disk):
                device.hold = False
                device.let_go()
        if self.listener is not None:
            await self.listener.close(grace_s=PATIENCE_S)
            assert self.listener.nr_connections == 0
            budget = self.listener.budget
            assert budget is None or (budget.nr_requests, budget.nr_bytes) == (0, 0)
        assert not any(self.directory.nr_open.values())
