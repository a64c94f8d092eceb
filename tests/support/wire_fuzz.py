# SPDX-License-Identifier: Apache-2.0
"""Wire fuzzing: what a seed makes of both ends of the NBD protocol, and what must come of it.

Each fuzzer takes a seed and nothing else. It makes a conversation that is mostly right, for it must get
past the first message, and then (in about half of the cases) damages its bytes and cuts them up. It
raises if something is wrong, and otherwise returns in a few words how the case ended. Equal seeds end alike.

    server handshake      a client's options, against `ServerHandshake`
    client handshake      a server's answers, against `ClientHandshake`
    client transmission   a server's replies, against `ClientTransmission`
    server                handshake and requests over a socket, against a whole `Listener`

What must come of it: no exception but the documented ones; the same outcome however the bytes are cut up; only what was
asked for is answered, and only once; without damage everything is answered, and as a small model says. The server must
also stay as it was for another client, hold nothing afterwards, and log no error.
"""

import asyncio
import contextlib
import hashlib
import logging
import random
import re
import socket
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from nbdtarget.bio import Bio
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener
from nbdtarget_protocol import consts as c
from nbdtarget_protocol import extended as ext
from nbdtarget_protocol.client import ClientHandshake, ClientTransmission, Completion
from nbdtarget_protocol.client_handshake import ClientNegotiated
from nbdtarget_protocol.errors import ReplyError
from nbdtarget_protocol.handshake import ServerHandshake
from nbdtarget_protocol.options import encode_option
from nbdtarget_protocol.transmission import simple_reply
from tests.support.peer import Directory, Disk
from tests.support.protocol_feed import ALL_FLAGS, DISK, OneExport
from tests.support.wire_chunks import Chunks

__all__ = ["FUZZERS"]

KIB: Final = 1 << 10
SIZE: Final = 256 * KIB
PAYLOAD_MAX: Final = 96 * KIB
READ_SLICE: Final = 32 * KIB
TIMEOUT_S: Final = 60.0  # for one conversation; it takes a second, on a machine that has nothing else to do
OPTIONS: Final = (
    *(c.OPT_LIST, c.OPT_INFO, c.OPT_GO, c.OPT_EXPORT_NAME, c.OPT_STRUCTURED_REPLY),
    *(c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT, c.OPT_STARTTLS, 77),
    c.OPT_EXTENDED_HEADERS,
)
# What is negotiated: simple replies, structured ones, or extended headers.
HOW: Final = ("simple", "structured", "extended")
ASKS_FOR: Final = {
    "simple": b"",
    "structured": encode_option(c.OPT_STRUCTURED_REPLY),
    "extended": encode_option(c.OPT_EXTENDED_HEADERS),
}
NAMES: Final = ("", "disk", "disk", "disk", "nobody", "\0", "x" * 5000)
QUERIES: Final = ("base:", "base:allocation", "x-nbdtarget:hydration", "y", ":")
COMMANDS: Final = (
    *(c.CMD_READ, c.CMD_WRITE) * 4,
    *(c.CMD_FLUSH, c.CMD_TRIM, c.CMD_CACHE, c.CMD_WRITE_ZEROES, c.CMD_BLOCK_STATUS),
)


# ---- bytes ----


def damaged(rng: random.Random, data: bytes) -> bytes:
    """`data` with some of it changed, doubled, left out, or cut off."""
    damage = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not damage:
            break
        at = rng.randrange(len(damage))
        length = min(rng.choice((1, 2, 4, 8, 28)), len(damage) - at)
        match rng.randrange(5):
            case 0:
                damage[at] ^= 1 << rng.randrange(8)
            case 1:
                damage[at : at + length] = rng.randbytes(length)
            case 2:
                del damage[at : at + length]
            case 3:
                damage[at:at] = damage[at : at + length]
            case _:
                damage[at : at + length] = rng.choice((b"\0", b"\xff")) * length
    if rng.random() < 0.2:
        del damage[rng.randrange(len(damage) + 1) :]
    return bytes(damage)


def _beginning(error: Exception) -> str:
    """The words that a message begins with, up to the first number or name."""
    found = re.match(r"[A-Za-z_ ]+", str(error))
    return found[0].strip() if found else "?"


def pieces(rng: random.Random, data: bytes) -> Iterator[bytes]:
    """`data`, cut up."""
    longest = rng.choice((1, 3, 30, 500, 1 << 20))
    if longest == 1 and len(data) > 20_000:
        longest = 1000
    at = 0
    while at < len(data):
        length = rng.randint(1, longest)
        yield data[at : at + length]
        at += length


# ---- a client's handshake ----


def _name(rng: random.Random) -> bytes:
    return rng.choice(NAMES).encode()


def option(rng: random.Random) -> bytes:
    """One option that a client may send, right or nearly so."""
    kind = rng.choice(OPTIONS)
    name = _name(rng)
    data = b""
    if kind in (c.OPT_INFO, c.OPT_GO):
        wanted = [rng.choice((0, 1, 2, 3, 9)) for _ in range(rng.randrange(4))]
        data = struct.pack(">I", len(name)) + name
        data += struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)
    elif kind == c.OPT_EXPORT_NAME:
        data = name
    elif kind in (c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT):
        queries = [rng.choice(QUERIES).encode() for _ in range(rng.randrange(4))]
        data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
        data += b"".join(struct.pack(">I", len(it)) + it for it in queries)
    encoded = encode_option(kind, data)
    if rng.random() < 0.05:
        magic, code, length = c.OPTION.unpack_from(encoded)
        length = rng.choice((0, length + 1, 300_000, 1 << 31))
        encoded = c.OPTION.pack(magic, code, length) + encoded[c.OPTION.size :]
    return encoded


def _allocation_of(name: str) -> bytes:
    """SET_META_CONTEXT for base:allocation of an export."""
    query = c.BASE_ALLOCATION.encode()
    head = struct.pack(">I", len(name)) + name.encode() + struct.pack(">I", 1)
    return head + struct.pack(">I", len(query)) + query


def options(rng: random.Random) -> bytes:
    flags = rng.choice((3, 3, 3, 1, 0, 4))
    some = b"".join(option(rng) for _ in range(rng.randrange(6)))
    if rng.random() < 0.4:
        some += ASKS_FOR[rng.choice(HOW[1:])]
        some += encode_option(c.OPT_SET_META_CONTEXT, _allocation_of(""))
    last = rng.choice(
        (
            encode_option(c.OPT_GO, struct.pack(">IH", 0, 0)),
            encode_option(c.OPT_GO, struct.pack(">IH", 0, 0)),
            encode_option(c.OPT_EXPORT_NAME, b"disk"),
            encode_option(c.OPT_ABORT),
            b"",
        )
    )
    return c.CLIENT_FLAGS.pack(flags) + some + last


def fuzz_server_handshake(seed: int) -> str:
    rng = random.Random(seed)
    stream = options(rng) + rng.randbytes(rng.randrange(40))
    if is_damaged := rng.random() < 0.5:
        stream = damaged(rng, stream)
    whole, sliced = ServerHandshake(OneExport()), ServerHandshake(OneExport())
    whole.receive_data(stream)
    sent = b"".join(whole.data_to_send())
    parts = b"".join(sliced.data_to_send())
    for piece in pieces(rng, stream):
        sliced.receive_data(piece)
        parts += b"".join(sliced.data_to_send())
    assert parts == sent, "what is answered depends on how the bytes come"
    assert (sliced.negotiated, sliced.closed) == (whole.negotiated, whole.closed)
    assert str(sliced.error) == str(whole.error)
    assert sliced.trailing_data() == whole.trailing_data()
    assert len(sent) < 1 << 20, "a short stream has a long answer"
    if whole.negotiated is not None:
        how = HOW[whole.negotiated.structured + whole.negotiated.extended]
        return f"negotiated, {how} replies, {len(whole.negotiated.contexts)} contexts"
    if whole.error is not None:
        assert whole.closed
        return f"error: {_beginning(whole.error)}"
    if whole.closed:
        return "left"
    return "damaged and unfinished" if is_damaged else "unfinished"


# ---- a server's handshake ----


def fuzz_client_handshake(seed: int) -> str:
    rng = random.Random(seed)
    flags = sum(1 << nr for nr in range(12) if rng.random() < 0.8)
    flags &= ALL_FLAGS & ~c.FLAG_HAS_FLAGS
    if not flags & c.FLAG_SEND_WRITE_ZEROES:
        flags &= ~c.FLAG_SEND_FAST_ZERO
    export = replace(DISK, flags=flags, size=rng.choice((0, 1, 1 << 20, 1 << 62)))
    structured, block_size = rng.random() < 0.8, rng.random() < 0.8
    wants_extended = rng.random() < 0.5
    damage_at = rng.randrange(12)  # which of the server's answers is damaged, if any

    def talk(rng: random.Random, *, in_pieces: bool) -> ClientHandshake:
        client = ClientHandshake(
            rng.choice(("", "disk", "disk", "nobody")),
            want_structured=structured,
            want_extended=wants_extended,
            want_block_size=block_size,
        )
        server = ServerHandshake(OneExport(export))
        for nr in range(20):
            answer = b"".join(server.data_to_send())
            if nr == damage_at:
                answer = damaged(random.Random(seed + 1), answer)
            for piece in pieces(rng, answer) if in_pieces else (answer,):
                client.receive_data(piece)
            question = b"".join(client.data_to_send())
            if not question:
                break
            server.receive_data(question)
        return client

    whole = talk(random.Random(seed), in_pieces=False)
    sliced = talk(random.Random(seed), in_pieces=True)
    assert str(sliced.error) == str(whole.error)
    assert sliced.negotiated == whole.negotiated
    ends = {bool(each.negotiated) and bool(each.error) for each in (whole, sliced)}
    assert ends == {False}, "negotiated and failed"
    if whole.error is not None:
        return f"error: {_beginning(whole.error)}"
    if whole.negotiated is None:
        return "unfinished"
    how = HOW[whole.negotiated.structured + whole.negotiated.extended]
    return f"negotiated, {how} replies, {len(whole.negotiated.contexts)} contexts"


# ---- a server's replies ----


def _reply(rng: random.Random, asked: Completion, how: str) -> bytes:
    """A reply to `asked`; mostly a right one."""
    cookie, length, chunks_of = asked.cookie, asked.length, Chunks(asked, how)
    structured = how != "simple"
    if rng.random() < 0.15:
        if structured and (how == "extended" or rng.random() < 0.7):
            return chunks_of.error(b"no" * rng.randrange(3))
        return simple_reply(c.EIO, cookie)
    if asked.command == c.CMD_READ:
        if not structured:
            return simple_reply(0, cookie) + rng.randbytes(length)
        chunks, at = [], 0
        while at < length:
            part = min(length - at, rng.choice((1, 100, length)))
            done = at + part == length and rng.random() < 0.8
            offset = asked.offset + at
            if rng.random() < 0.3:
                chunks.append(chunks_of.hole(offset, part, done=done))
            else:
                header = chunks_of.data(offset, part, done=done)
                chunks.append(header + rng.randbytes(part))
            at += part
            if at == length and not done:
                chunks.append(chunks_of.none())
        return b"".join(chunks)
    if asked.command == c.CMD_BLOCK_STATUS:
        extents = [(rng.randint(1, length), rng.randrange(4)) for _ in range(2)]
        return chunks_of.status(extents[: rng.randint(1, 2)])
    return chunks_of.none() if structured else simple_reply(0, cookie)


def fuzz_client_transmission(seed: int) -> str:
    rng = random.Random(seed)
    how = rng.choice(HOW)
    structured, extended = how != "simple", how == "extended"
    contexts = ((0, c.BASE_ALLOCATION),) if structured else ()
    negotiated = ClientNegotiated(
        "disk", SIZE, ALL_FLAGS, structured, contexts, extended=extended
    )
    client = ClientTransmission(negotiated)
    commands = [c.CMD_READ, c.CMD_WRITE, c.CMD_FLUSH, c.CMD_TRIM]
    if structured:
        commands.append(c.CMD_BLOCK_STATUS)
    asked: list[Completion] = []
    for _ in range(rng.randint(1, 8)):
        command = rng.choice(commands)
        offset, length = rng.randrange(1000), rng.choice((1, 512, 3000))
        if extended and command in (c.CMD_TRIM, c.CMD_BLOCK_STATUS):
            length = rng.choice((length, 1 << 40, (1 << 63) - 1))
        if command == c.CMD_FLUSH:
            offset = length = 0
        buffer = memoryview(bytearray(length)) if command == c.CMD_READ else None
        cookie = rng.getrandbits(60) << 4 | len(asked)
        client.request(command, 0, cookie, offset, length, buffer)
        asked.append(client.in_flight[cookie])
    answered = rng.sample(asked, len(asked))
    stream = b"".join(_reply(rng, each, how) for each in answered)
    if is_damaged := rng.random() < 0.5:
        stream = damaged(rng, stream)
    done: list[Completion] = []
    try:
        for piece in pieces(rng, stream):
            done += client.receive_data(piece)
    except ReplyError as error:
        return f"error: {_beginning(error)}"
    assert len({id(each) for each in done}) == len(done), "a request ended twice"
    assert all(any(each is it for it in asked) for each in done)
    if not is_damaged and len(done) < len(asked):
        raise AssertionError("a reply was overlooked")
    return "all answered" if len(done) == len(asked) else "some unanswered"


# ---- a whole server ----


class Asked:
    """A request as it is sent, and what a model of a disk says must come of it."""

    def __init__(self, cookie: int, command: int, offset: int) -> None:
        self.cookie = cookie
        self.command = command
        self.offset = offset
        self.is_error = False
        self.data = b""


class Conversation:
    """What one client sends: a handshake that is right, and requests that mostly are.

    Attributes:
        stream: all of it.
        asked: the requests that must be answered, in order, if nothing is damaged.
        ends: why nothing is served behind them: "DISC", "garbage", "too long" or "EOF".
        disk: what the disk holds afterwards.
    """

    def __init__(self, rng: random.Random, disk: bytes) -> None:
        self.how = rng.choice(HOW)
        self.structured = self.how != "simple"
        self.extended = self.how == "extended"
        self.disk = bytearray(disk)
        self.asked: list[Asked] = []
        self.ends = "EOF"
        self._rng = rng
        head = c.CLIENT_FLAGS.pack(3)
        if self.structured:
            head += ASKS_FOR[self.how]
            head += encode_option(c.OPT_SET_META_CONTEXT, _allocation_of("disk"))
        go = struct.pack(">I4sH", 4, b"disk", 0)
        self.stream = head + encode_option(c.OPT_GO, go)
        for _ in range(rng.randint(0, 30)):
            self.stream += self._request()
            if self.ends != "EOF":
                break

    def _request(self) -> bytes:
        rng = self._rng
        if rng.random() < 0.03:
            return self._end()
        command = rng.choice(COMMANDS)
        offset = rng.choice((0, 1, 4096, SIZE // 2, SIZE - 1, SIZE - 4096, SIZE))
        length = rng.choice((0, 1, 512, 4096, 40 * KIB, PAYLOAD_MAX))
        if rng.random() < 0.05:
            offset = rng.choice((SIZE + 1, 1 << 40, (1 << 64) - 1))
        if rng.random() < 0.03:
            length = rng.choice((PAYLOAD_MAX + 1, 2 * PAYLOAD_MAX))
        flags = rng.choice((0, 0, 0, 0, c.CMD_FLAG_FUA, c.CMD_FLAG_DF, 1 << 9))
        asked = Asked(len(self.asked) + 1, command, offset)
        self.asked.append(asked)
        has_payload = command == c.CMD_WRITE
        if self.extended:
            # Sometimes a WRITE does not say that it has a payload, and something else has one.
            says_so = has_payload ^ (rng.random() < 0.05)
            flags |= c.CMD_FLAG_PAYLOAD_LEN if says_so else 0
            has_payload |= says_so
            if not has_payload and rng.random() < 0.05:
                length = rng.choice((1 << 32, 1 << 40, (1 << 64) - 1))
        payload = rng.randbytes(length) if has_payload else b""
        if has_payload and command == c.CMD_BLOCK_STATUS:
            payload = self._status_payload(length)
        self._model(asked, flags, offset, length, payload)
        if has_payload:
            length = len(payload)
        return self._header(flags, command, asked.cookie, offset, length) + payload

    def _header(self, *fields: int) -> bytes:
        if self.extended:
            return c.EXTENDED_REQUEST.pack(c.EXTENDED_REQUEST_MAGIC, *fields)
        return c.REQUEST.pack(c.REQUEST_MAGIC, *fields)

    def _status_payload(self, length: int) -> bytes:
        ids = self._rng.choice(((1,), (1,), (), (2,), (1, 1), (1, 2), (0, 1, 2)))
        return ext.encode_status_payload(length, ids)

    def _end(self) -> bytes:
        self.ends = self._rng.choice(("DISC", "garbage", "too long"))
        if self.ends == "garbage":
            return self._rng.randbytes(c.EXTENDED_REQUEST.size)
        flags, command, length = 0, c.CMD_DISC, 0
        if self.ends == "too long":
            command, length = c.CMD_WRITE, 1 << 31
            if self.extended:
                flags = c.CMD_FLAG_PAYLOAD_LEN
                command = self._rng.choice((c.CMD_WRITE, c.CMD_TRIM, 77))
        return self._header(flags, command, 0, 0, length) + bytes(100)

    def _model(
        self, asked: Asked, flags: int, offset: int, length: int, payload: bytes
    ) -> None:
        """Say what must come of a request. Written from the standard, and not from the code."""
        command = asked.command
        allowed = c.CMD_FLAG_FUA
        if command == c.CMD_READ and self.structured:
            allowed |= c.CMD_FLAG_DF
        if self.extended and command in (c.CMD_WRITE, c.CMD_BLOCK_STATUS):
            allowed |= c.CMD_FLAG_PAYLOAD_LEN
        is_plain = command in (c.CMD_READ, c.CMD_WRITE)
        is_status = command == c.CMD_BLOCK_STATUS
        asked.is_error = bool(flags & ~allowed) or (is_status and not self.structured)
        if self.extended and is_status and flags & c.CMD_FLAG_PAYLOAD_LEN:
            asked.is_error |= payload[8:] != b"\0\0\0\1"  # the only context
        if command != c.CMD_FLUSH:
            asked.is_error |= offset + length > SIZE
            asked.is_error |= is_plain and length > PAYLOAD_MAX
            asked.is_error |= is_status and length == 0
        if asked.is_error:
            return
        if command == c.CMD_READ:
            asked.data = bytes(self.disk[offset : offset + length])
        elif command == c.CMD_WRITE:
            self.disk[offset : offset + length] = payload
        elif command in (c.CMD_WRITE_ZEROES, c.CMD_TRIM):
            self.disk[offset : offset + length] = bytes(length)


class LateDisk(Disk):
    """Ends its bios in a later turn of the loop, in the order in which they came."""

    def submit(self, bio: Bio) -> None:
        bio.own()
        asyncio.get_running_loop().call_soon(self.carry_out, bio)


class Received:
    """What the server sent in transmission, taken apart.

    Attributes:
        answers: (cookie, is an error, data) of each reply that is whole.
    """

    def __init__(self, data: bytes, conversation: Conversation) -> None:
        self.answers: list[tuple[int, bool, bytes]] = []
        self._data = data
        self._at = 0
        self._by_cookie = {each.cookie: each for each in conversation.asked}
        while self._at < len(data):
            (magic,) = struct.unpack_from(">I", data, self._at)
            if conversation.extended:
                assert magic == c.EXTENDED_REPLY_MAGIC
                self._take_chunks(c.EXTENDED_CHUNK)
            elif magic == c.SIMPLE_REPLY_MAGIC:
                self._take_simple(structured=conversation.structured)
            else:
                assert magic == c.STRUCTURED_REPLY_MAGIC
                assert conversation.structured
                self._take_chunks(c.CHUNK)

    def _take(self, length: int) -> bytes:
        taken = self._data[self._at : self._at + length]
        assert len(taken) == length, "a reply is cut off"
        self._at += length
        return taken

    def _take_simple(self, *, structured: bool) -> None:
        _, error, cookie = c.SIMPLE_REPLY.unpack(self._take(16))
        asked = self._by_cookie[cookie]
        is_read = asked.command == c.CMD_READ
        assert not (is_read and structured), "a simple reply to a structured READ"
        data = self._take(len(asked.data)) if is_read and not error else b""
        self.answers.append((cookie, bool(error), data))

    def _take_chunks(self, layout: struct.Struct) -> None:
        data, is_error = b"", False
        while True:
            head = self._take(layout.size)
            _, flags, kind, cookie, *at, length = layout.unpack(head)
            assert at in ([], [self._by_cookie[cookie].offset])
            body = self._take(length)
            if kind == c.REPLY_TYPE_OFFSET_DATA:
                data += body[8:]
            elif kind == c.REPLY_TYPE_OFFSET_HOLE:
                data += bytes(struct.unpack(">QI", body)[1])
            is_error |= bool(kind & 1 << 15)
            if flags & c.REPLY_FLAG_DONE:
                self.answers.append((cookie, is_error, data))
                return


def _check_answers(conversation: Conversation, received: Received) -> None:
    """Without damage: everything is answered once, and as the model says."""
    expected = Counter(
        (each.cookie, each.is_error, _digest(each.data)) for each in conversation.asked
    )
    answers = Counter(
        (cookie, is_error, _digest(data)) for cookie, is_error, data in received.answers
    )
    surplus, missing = answers - expected, expected - answers
    assert not surplus, surplus
    # After garbage the connection is closed at once, with what was not sent yet.
    assert not missing or conversation.ends in ("garbage", "too long"), missing


def _digest(data: bytes) -> tuple[int, str]:
    """Length and content, to compare and to print.

    Only the length of a READ that is carried out in slices: between them later requests are carried out, which the
    standard allows.
    """
    if len(data) > READ_SLICE:
        return len(data), "in slices"
    return len(data), hashlib.sha256(data).hexdigest()[:8]


async def _receive_all(sock: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    received = b""
    while True:
        try:
            piece = await loop.sock_recv(sock, 1 << 20)
        except ConnectionError:
            return received
        if not piece:
            return received
        received += piece


async def _send_all(sock: socket.socket, stream: Sequence[bytes]) -> None:
    loop = asyncio.get_running_loop()
    for piece in stream:
        try:
            await loop.sock_sendall(sock, piece)
        except ConnectionError:
            return
        await asyncio.sleep(0)
    with contextlib.suppress(OSError):  # the server was faster
        sock.shutdown(socket.SHUT_WR)


async def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, str(path))
    return sock


def _transmission_of(sent: bytes) -> bytes:
    """What a server sent behind the last answer to an option; nothing if it did not get so far."""
    at = 18
    while sent[at : at + 8] == c.OPTION_REPLY_MAGIC.to_bytes(8):
        _, code, kind, length = c.OPTION_REPLY.unpack_from(sent, at)
        at += c.OPTION_REPLY.size + length
        if (code, kind) == (c.OPT_GO, c.REP_ACK):
            return sent[at:]
    return b""


async def _talk(
    rng: random.Random, conversation: Conversation, stream: bytes, disk: Disk
) -> bytes:
    """Let a server of its own carry out `stream`; return what it sent."""
    limits = Limits(
        poison_borrowed=True,
        handshake_timeout_s=TIMEOUT_S,  # of the quiet client, while the hostile one talks
        payload_max=PAYLOAD_MAX,
        read_slice=READ_SLICE,
        range_slice=64 * KIB,
        turn_bytes_max=64 * KIB,
        flush_at=rng.choice((100, 128 * KIB)),
    )
    directory = Directory({"disk": disk})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        listener = Listener(directory, limits=limits)
        await listener.start(f"unix:{path}")
        quiet = await _connect(path)
        hostile = await _connect(path)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                sending = asyncio.create_task(
                    _send_all(hostile, list(pieces(rng, stream)))
                )
                received = await _receive_all(hostile)
                await sending
                await _check_quiet(quiet, disk)
        finally:
            quiet.close()
            hostile.close()
            await listener.close(grace_s=5)
        assert listener.nr_connections == 0
        budget = listener.budget
        assert budget is not None
        assert (budget.nr_requests, budget.nr_bytes, budget.nr_waiters) == (0, 0, 0)
    assert directory.nr_open == {"disk": 0}
    return received


async def _check_quiet(sock: socket.socket, disk: Disk) -> None:
    """Another client, which was greeted before, attaches and reads."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(
        sock,
        c.CLIENT_FLAGS.pack(3)
        + encode_option(c.OPT_EXPORT_NAME, b"disk")
        + c.REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_READ, 7, 0, 4096)
        + c.REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_DISC, 7, 0, 0),
    )
    received = await _receive_all(sock)
    assert received[28:] == simple_reply(0, 7) + disk.data[:4096]


class _Errors(logging.Handler):
    """Keeps what the server logs as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def fuzz_server(seed: int) -> str:
    rng = random.Random(seed)
    is_late = rng.random() < 0.4
    disk = LateDisk(SIZE) if is_late else Disk(SIZE)
    disk.data[:] = rng.randbytes(SIZE)
    disk.data[: 64 * KIB] = bytes(64 * KIB)  # holes
    conversation = Conversation(rng, bytes(disk.data))
    stream = conversation.stream
    if is_damaged := rng.random() < 0.5:
        stream = damaged(rng, stream)
    errors = _Errors()
    logger = logging.getLogger("nbdtarget")
    logger.addHandler(errors)
    try:
        sent = asyncio.run(_talk(rng, conversation, stream, disk))
    finally:
        logger.removeHandler(errors)
    assert not errors.records, errors.records[0].getMessage()
    if is_damaged:
        return "damaged: " + ("attached" if _transmission_of(sent) else "not attached")
    _check_answers(conversation, Received(_transmission_of(sent), conversation))
    assert disk.data == conversation.disk, "the disk does not hold what was written"
    when = "late" if is_late else "at once"
    return f"ended by {conversation.ends}, {conversation.how} replies {when}"


FUZZERS: Final = {
    "server handshake": fuzz_server_handshake,
    "client handshake": fuzz_client_handshake,
    "client transmission": fuzz_client_transmission,
    "server": fuzz_server,
}
