# SPDX-License-Identifier: Apache-2.0
"""Wire fuzzing: what a seed makes of both ends of the NBD protocol, and what must come of it.

Each fuzzer takes a source of random numbers and nothing else. It makes a conversation that is mostly right, for it must get
past the first message, and then (in about half of the cases) damages its bytes and cuts them up. It
raises if something is wrong, and otherwise returns in a few words how the case ended. Equal numbers end alike: those of a
seed (`random.Random`), or bytes that a coverage-guided fuzzer chooses (`wire_bytes.py`).

    server handshake      a client's options, against `ServerHandshake`
    client handshake      a server's answers, against `ClientHandshake`
    client transmission   a server's replies, against `ClientTransmission`
    server                handshake and requests over a socket, against a whole `Listener` (`wire_server.py`)
    server, tls           the same against a listener with TLS, which clients may or must use (`wire_server.py`)

What must come of it: no exception but the documented ones; the same outcome however the bytes are cut up; only what was
asked for is answered, and only once; without damage everything is answered, and as a small model says. The server must
also answer another client meanwhile, hold nothing afterwards (no request, byte, device or descriptor), and log no error.
"""

import random
import re
import struct
from dataclasses import replace
from typing import Final

from nbdtarget_protocol import consts as c
from nbdtarget_protocol.client import ClientHandshake, ClientTransmission, Completion
from nbdtarget_protocol.client_handshake import ClientNegotiated
from nbdtarget_protocol.errors import ReplyError
from nbdtarget_protocol.handshake import ServerHandshake
from nbdtarget_protocol.options import encode_option
from nbdtarget_protocol.transmission import simple_reply
from tests.support.protocol_feed import ALL_FLAGS, DISK, OneExport
from tests.support.wire_chunks import Chunks
from tests.support.wire_conversation import (
    ASKS_FOR,
    HOW,
    SIZE,
    allocation_of,
)
from tests.support.wire_damage import Ended, damaged, pieces
from tests.support.wire_server import fuzz_server, fuzz_server_with_tls

__all__ = ["FUZZERS", "Ended"]

OPTIONS: Final = (
    *(c.OPT_LIST, c.OPT_INFO, c.OPT_GO, c.OPT_EXPORT_NAME, c.OPT_STRUCTURED_REPLY),
    *(c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT, c.OPT_STARTTLS, 77),
    c.OPT_EXTENDED_HEADERS,
)
NAMES: Final = ("", "disk", "disk", "disk", "nobody", "\0", "x" * 5000)
QUERIES: Final = ("base:", "base:allocation", "x-nbdtarget:hydration", "y", ":")


def _beginning(error: Exception) -> str:
    """The words that a message begins with, up to the first number or name."""
    found = re.match(r"[A-Za-z_ ]+", str(error))
    return found[0].strip() if found else "?"


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


FUZZERS: Final = {
    "server handshake": fuzz_server_handshake,
    "client handshake": fuzz_client_handshake,
    "client transmission": fuzz_client_transmission,
    "server": fuzz_server,
    "server, tls": fuzz_server_with_tls,
}
