# SPDX-License-Identifier: Apache-2.0
"""Wire fuzzing: what a seed makes of both ends of the NBD protocol, and what must come of it.

Each fuzzer takes a source of random numbers and nothing else. It makes a conversation that is mostly right, for it must get
past the first message, and then (in about half of the cases) damages its bytes and cuts them up. It
raises if something is wrong, and otherwise returns in a few words how the case ended. Equal numbers end alike: those of a
seed (`random.Random`), or bytes that a coverage-guided fuzzer chooses (`wire_bytes.py`).

    server handshake      a client's options, against `ServerHandshake`
    client handshake      a server's answers, against `ClientHandshake`
    client transmission   a server's replies, against `ClientTransmission`
    server                handshake and requests over a socket, against a whole `Listener`

What must come of it: no exception but the documented ones; the same outcome however the bytes are cut up; only what was
asked for is answered, and only once; without damage everything is answered, and as a small model says. The server must
also answer another client meanwhile, hold nothing afterwards (no request, byte, device or descriptor), and log no error.
"""

import asyncio
import contextlib
import logging
import os
import random
import re
import socket
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from nbdtarget.bio import Bio
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener
from nbdtarget_protocol import consts as c
from nbdtarget_protocol.client import ClientHandshake, ClientTransmission, Completion
from nbdtarget_protocol.client_handshake import ClientNegotiated
from nbdtarget_protocol.errors import ReplyError
from nbdtarget_protocol.handshake import ServerHandshake
from nbdtarget_protocol.options import encode_option
from nbdtarget_protocol.transmission import simple_reply
from tests.support.patience import PATIENCE_S
from tests.support.peer import Directory, Disk
from tests.support.protocol_feed import ALL_FLAGS, DISK, OneExport
from tests.support.wire_chunks import Chunks
from tests.support.wire_conversation import (
    ASKS_FOR,
    HOW,
    KIB,
    PAYLOAD_MAX,
    RANGE_SLICE,
    READ_SLICE,
    SIZE,
    Conversation,
    Received,
    allocation_of,
    check_answers,
)

__all__ = ["FUZZERS", "Ended"]

NR_OPTIONS: Final = 2  # of a conversation with a whole server, at least
QUIET_AT: Final = 8 * KIB  # where another client reads
PIECES_MAX: Final = 400  # of one conversation, about
LATE_S: Final = 150.0  # another client waits so long for a reply, on a machine that has much else to do
TIMEOUT_S: Final = 300.0  # for one conversation; it takes a second, on a machine that has nothing else to do
OPTIONS: Final = (
    *(c.OPT_LIST, c.OPT_INFO, c.OPT_GO, c.OPT_EXPORT_NAME, c.OPT_STRUCTURED_REPLY),
    *(c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT, c.OPT_STARTTLS, 77),
    c.OPT_EXTENDED_HEADERS,
)
NAMES: Final = ("", "disk", "disk", "disk", "nobody", "\0", "x" * 5000)
QUERIES: Final = ("base:", "base:allocation", "x-nbdtarget:hydration", "y", ":")


class Ended(NamedTuple):
    """How a case ended.

    Attributes:
        nr_messages: options, answers to options, requests or replies that were made for it; each counts once, also if it is
            received twice, whole and in pieces.
    """

    outcome: str
    nr_messages: int


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
    # Each piece of a few bytes costs as much as a long one: in much data, every other one is long.
    leap = len(data) // PIECES_MAX * 2 if len(data) > PIECES_MAX * longest else 0
    at = 0
    while at < len(data):
        length = rng.randint(1, longest)
        if leap and rng.random() < 0.5:
            length = leap - rng.randrange(leap // 2)
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


def options(rng: random.Random) -> tuple[bytes, int]:
    """Return options that a client may send in its handshake, and the number of messages."""
    flags = rng.choice((3, 3, 3, 1, 0, 4))
    nr = rng.randrange(6)
    some = b"".join(option(rng) for _ in range(nr))
    if rng.random() < 0.4:
        some += ASKS_FOR[rng.choice(HOW[1:])]
        some += encode_option(c.OPT_SET_META_CONTEXT, allocation_of(""))
        nr += 2
    last = rng.choice(
        (
            encode_option(c.OPT_GO, struct.pack(">IH", 0, 0)),
            encode_option(c.OPT_GO, struct.pack(">IH", 0, 0)),
            encode_option(c.OPT_EXPORT_NAME, b"disk"),
            encode_option(c.OPT_ABORT),
            b"",
        )
    )
    return c.CLIENT_FLAGS.pack(flags) + some + last, nr + 1 + bool(last)


def fuzz_server_handshake(rng: random.Random) -> Ended:
    stream, nr = options(rng)
    stream += rng.randbytes(rng.randrange(40))
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
    return Ended(_end_of_handshake(whole, is_damaged=is_damaged), nr)


def _end_of_handshake(server: ServerHandshake, *, is_damaged: bool) -> str:
    if server.negotiated is not None:
        how = HOW[server.negotiated.structured + server.negotiated.extended]
        return f"negotiated, {how} replies, {len(server.negotiated.contexts)} contexts"
    if server.error is not None:
        assert server.closed
        return f"error: {_beginning(server.error)}"
    if server.closed:
        return "left"
    return "damaged and unfinished" if is_damaged else "unfinished"


# ---- a server's handshake ----


def fuzz_client_handshake(rng: random.Random) -> Ended:
    flags = sum(1 << nr for nr in range(12) if rng.random() < 0.8)
    flags &= ALL_FLAGS & ~c.FLAG_HAS_FLAGS
    if not flags & c.FLAG_SEND_WRITE_ZEROES:
        flags &= ~c.FLAG_SEND_FAST_ZERO
    export = replace(DISK, flags=flags, size=rng.choice((0, 1, 1 << 20, 1 << 62)))
    structured, block_size = rng.random() < 0.8, rng.random() < 0.8
    wants_extended = rng.random() < 0.5
    damage_at = rng.randrange(12)  # which of the server's answers is damaged, if any
    name = rng.choice(("", "disk", "disk", "nobody"))
    damage_seed = rng.getrandbits(32)
    nr_answers = 0

    def talk(*, in_pieces: bool) -> ClientHandshake:
        nonlocal nr_answers
        client = ClientHandshake(
            name,
            want_structured=structured,
            want_extended=wants_extended,
            want_block_size=block_size,
        )
        server = ServerHandshake(OneExport(export))
        for nr in range(20):
            answer = b"".join(server.data_to_send())
            nr_answers += not in_pieces
            if nr == damage_at:
                answer = damaged(random.Random(damage_seed), answer)
            for piece in pieces(rng, answer) if in_pieces else (answer,):
                client.receive_data(piece)
            question = b"".join(client.data_to_send())
            if not question:
                break
            server.receive_data(question)
        return client

    whole, sliced = talk(in_pieces=False), talk(in_pieces=True)
    assert str(sliced.error) == str(whole.error)
    assert sliced.negotiated == whole.negotiated
    ends = {bool(each.negotiated) and bool(each.error) for each in (whole, sliced)}
    assert ends == {False}, "negotiated and failed"
    if whole.error is not None:
        return Ended(f"error: {_beginning(whole.error)}", nr_answers)
    if whole.negotiated is None:
        return Ended("unfinished", nr_answers)
    how = HOW[whole.negotiated.structured + whole.negotiated.extended]
    nr = len(whole.negotiated.contexts)
    return Ended(f"negotiated, {how} replies, {nr} contexts", nr_answers)


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


def fuzz_client_transmission(rng: random.Random) -> Ended:
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
        return Ended(f"error: {_beginning(error)}", len(asked))
    assert len({id(each) for each in done}) == len(done), "a request ended twice"
    assert all(any(each is it for it in asked) for each in done)
    if not is_damaged and len(done) < len(asked):
        raise AssertionError("a reply was overlooked")
    is_all = len(done) == len(asked)
    return Ended("all answered" if is_all else "some unanswered", len(asked))


# ---- a whole server ----


class LateDisk(Disk):
    """Ends its bios in a later turn of the loop, in the order in which they came."""

    def submit(self, bio: Bio) -> None:
        bio.own()
        asyncio.get_running_loop().call_soon(self.carry_out, bio)


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
    """Return the bytes that a server sent behind the last answer to an option; empty if it did not get so far."""
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
        range_slice=RANGE_SLICE,
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
                receiving = asyncio.create_task(_receive_all(hostile))
                await _check_quiet(quiet, disk, receiving)
                received = await receiving
                await sending
        finally:
            quiet.close()
            hostile.close()
            await listener.close(grace_s=PATIENCE_S)
        assert listener.nr_connections == 0
        budget = listener.budget
        assert budget is not None
        assert (budget.nr_requests, budget.nr_bytes, budget.nr_waiters) == (0, 0, 0)
    assert directory.nr_open == {"disk": 0}
    return received


async def _check_quiet(
    sock: socket.socket, disk: Disk, hostile: asyncio.Task[bytes]
) -> None:
    """Another client, which was greeted before, attaches and reads as long as the hostile one is served, and once more."""
    loop = asyncio.get_running_loop()
    attach = c.CLIENT_FLAGS.pack(3) + encode_option(c.OPT_EXPORT_NAME, b"disk")
    await loop.sock_sendall(sock, attach)
    head_bytes, reply_bytes = 18 + 10, 16 + 4096
    async with asyncio.timeout(LATE_S):
        await _receive_exactly(sock, head_bytes)
    cookie, is_last = 0, False
    while not is_last:
        is_last = hostile.done()
        cookie += 1
        read = c.REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_READ, cookie, QUIET_AT, 4096)
        await loop.sock_sendall(sock, read)
        async with asyncio.timeout(LATE_S):
            received = await _receive_exactly(sock, reply_bytes)
        assert received[:16] == simple_reply(0, cookie)
    assert received[16:] == disk.data[QUIET_AT : QUIET_AT + 4096]
    disc = c.REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_DISC, 7, 0, 0)
    await loop.sock_sendall(sock, disc)
    assert await _receive_all(sock) == b""


async def _receive_exactly(sock: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        piece = await asyncio.get_running_loop().sock_recv(sock, length - len(received))
        assert piece, "the server has closed a client that did nothing wrong"
        received += piece
    return received


class _Errors(logging.Handler):
    """Keeps what the server logs as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def fuzz_server(rng: random.Random) -> Ended:
    is_late = rng.random() < 0.4
    disk = LateDisk(SIZE) if is_late else Disk(SIZE)
    disk.data[:] = rng.randbytes(SIZE)
    disk.data[: 64 * KIB] = bytes(64 * KIB)  # holes
    conversation = Conversation(rng, bytes(disk.data))
    stream = conversation.stream
    if is_damaged := rng.random() < 0.5:
        stream = damaged(rng, stream)
    nr_messages = NR_OPTIONS + len(conversation.asked)
    nr_open = len(os.listdir("/proc/self/fd"))
    errors = _Errors()
    logger = logging.getLogger("nbdtarget")
    logger.addHandler(errors)
    try:
        sent = asyncio.run(_talk(rng, conversation, stream, disk))
    finally:
        logger.removeHandler(errors)
    assert not errors.records, errors.records[0].getMessage()
    assert len(os.listdir("/proc/self/fd")) == nr_open, "a descriptor stays open"
    if is_damaged:
        end = "attached" if _transmission_of(sent) else "not attached"
        return Ended(f"damaged: {end}", nr_messages)
    check_answers(conversation, Received(_transmission_of(sent), conversation))
    assert conversation.expects(disk.data), "the disk does not hold what was written"
    when = "late" if is_late else "at once"
    end = f"ended by {conversation.ends}, {conversation.how} replies {when}"
    return Ended(end, nr_messages)


FUZZERS: Final = {
    "server handshake": fuzz_server_handshake,
    "client handshake": fuzz_client_handshake,
    "client transmission": fuzz_client_transmission,
    "server": fuzz_server,
}
