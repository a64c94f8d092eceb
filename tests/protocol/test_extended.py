# SPDX-License-Identifier: Apache-2.0
"""Extended headers: their bytes, what the server refuses, and what the client takes."""

import struct
from dataclasses import replace
from itertools import product

import pytest

from nbdtarget_protocol import consts as c
from nbdtarget_protocol.client import ClientTransmission
from nbdtarget_protocol.errors import ReplyError, RequestError
from nbdtarget_protocol.extended import (
    block_status,
    decode_status_payload,
    encode_status_payload,
    error_chunk,
    none_chunk,
    offset_data_header,
    offset_hole,
)
from nbdtarget_protocol.handshake import Negotiated
from nbdtarget_protocol.transmission import (
    PAYLOAD_ACCEPT,
    PAYLOAD_DISCONNECT,
    ServerTransmission,
    clip_extents,
    simple_reply,
)
from tests.support.protocol_feed import (
    CONTEXTS,
    DISK,
    EXTENDED,
    MIB,
    SERVED_EXTENDED,
    STRUCTURED,
    Request,
    client,
    data_of,
    feed_replies,
)

PAYLOAD = c.CMD_FLAG_PAYLOAD_LEN
HUGE = replace(DISK, size=16 << 40)
READ: Request = (c.CMD_READ, 0, 1, 4096, 1024)
WRITE: Request = (c.CMD_WRITE, 0, 2, 8192, 512)
TRIM: Request = (c.CMD_TRIM, 0, 4, 512, 1 << 40)
STATUS: Request = (c.CMD_BLOCK_STATUS, 0, 3, 4096, 1 << 40)
STATUS_ONE: Request = (c.CMD_BLOCK_STATUS, c.CMD_FLAG_REQ_ONE, 3, 4096, 1 << 40)
DATA = bytes(range(256)) * 4
TWO = ((1, "base:allocation"), (7, "x-a:b"))


# ---- bytes ----


def test_bytes_of_the_chunks() -> None:
    head = struct.Struct(">IHHQQQ")
    magic = 0x6E8A278C
    assert none_chunk(5, 6) == head.pack(magic, 1, 0, 5, 6, 0)
    for done in (False, True):
        assert offset_data_header(5, 6, 7, 8, done) == head.pack(
            magic, done, 1, 5, 6, 16
        ) + struct.pack(">Q", 7)
        assert offset_hole(5, 6, 7, 8, done) == head.pack(
            magic, done, 2, 5, 6, 12
        ) + struct.pack(">QI", 7, 8)
        assert block_status(5, 6, 9, [(1 << 40, 3), (1, 1 << 33)], done) == head.pack(
            magic, done, 6, 5, 6, 40
        ) + struct.pack(">IIQQQQ", 9, 2, 1 << 40, 3, 1, 1 << 33)
        assert (
            error_chunk(5, 6, c.EIO, b"no", done=done)
            == head.pack(magic, done, 32769, 5, 6, 8)
            + struct.pack(">IH", c.EIO, 2)
            + b"no"
        )
    assert error_chunk(5, 6, c.EIO, b"", 7) == head.pack(
        magic, 1, 32770, 5, 6, 14
    ) + struct.pack(">IHQ", c.EIO, 0, 7)


def test_long_message_is_cut_at_a_character() -> None:
    chunk = error_chunk(1, 2, c.EIO, "x€".encode() * 2000)
    assert c.EXTENDED_CHUNK.unpack_from(chunk)[-1] == len(chunk) - 32
    size = struct.unpack_from(">H", chunk, 36)[0]
    assert size <= c.STRING_MAX
    assert chunk[38:].decode().startswith("x€x€")


def test_bytes_of_the_requests() -> None:
    transmission = ClientTransmission(EXTENDED)
    encoded = transmission.request(c.CMD_WRITE, c.CMD_FLAG_FUA, 7, 4096, 512)
    assert encoded == struct.pack(">IHHQQQ", 0x21E41C71, 33, 1, 7, 4096, 512)
    assert transmission.in_flight[7].flags == c.CMD_FLAG_FUA
    encoded = transmission.request(c.CMD_TRIM, 0, 8, 512, 1 << 44)
    assert encoded == struct.pack(">IHHQQQ", 0x21E41C71, 0, 4, 8, 512, 1 << 44)
    assert len(transmission.request(c.CMD_DISC, 0, 9, 0, 0)) == 32


# ---- the payload of a BLOCK_STATUS ----


@pytest.mark.parametrize("ids", [(1,), (7,), (1, 7), (7, 1)])
def test_status_payload_there_and_back(ids: tuple[int, ...]) -> None:
    payload = encode_status_payload(1 << 50, ids)
    assert len(payload) == 8 + 4 * len(ids)
    length, contexts = decode_status_payload(payload, TWO)
    assert length == 1 << 50
    assert contexts == tuple(each for each in TWO if each[0] in ids)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "payload of 0 bytes"),
        (b"1234567", "payload of 7 bytes"),
        (encode_status_payload(1, ()), "payload of 8 bytes"),
        (encode_status_payload(1, (1,)) + b"x", "payload of 13 bytes"),
        (encode_status_payload(1, (1, 1)), "unknown, or given twice"),
        (encode_status_payload(1, (2,)), "unknown, or given twice"),
        (encode_status_payload(1, (1, 7, 1)), "3 metadata contexts"),
    ],
)
def test_bad_status_payload(payload: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        decode_status_payload(payload, TWO)
    assert caught.value.errno == c.EINVAL


def test_client_selects_contexts() -> None:
    flags = EXTENDED.flags | c.FLAG_BLOCK_STATUS_PAYLOAD
    negotiated = replace(EXTENDED, flags=flags, contexts=TWO)
    transmission = ClientTransmission(negotiated)
    encoded = transmission.request_status_of((7,), 0, 3, 4096, 1 << 40, "mine")
    assert encoded[:32] == struct.pack(">IHHQQQ", 0x21E41C71, 32, 7, 3, 4096, 12)
    assert decode_status_payload(encoded[32:], TWO) == (1 << 40, TWO[1:])
    [done] = transmission.receive_data(block_status(3, 4096, 7, [(1 << 40, 5)], True))
    assert (done.extents, done.private) == ([(1 << 40, 5)], "mine")
    transmission.request_status_of((7,), 0, 3, 4096, 1 << 40)
    with pytest.raises(ReplyError, match="unknown or given twice"):
        transmission.receive_data(block_status(3, 4096, 1, [(1, 0)], True))


# ---- what the server refuses ----


@pytest.mark.parametrize("contexts", [CONTEXTS, ()])
def test_flags_that_commands_may_have(contexts: tuple[tuple[int, str], ...]) -> None:
    transmission = ServerTransmission(Negotiated(HUGE, True, contexts, extended=True))
    may_have_payload = {
        command
        for command, flags in transmission.flags_allowed.items()
        if flags & PAYLOAD
    }
    assert may_have_payload == {
        c.CMD_WRITE,
        *([c.CMD_BLOCK_STATUS] if contexts else []),
    }
    for command, flags in product(range(9), (0, PAYLOAD)):
        expected = 0
        if command == c.CMD_WRITE:
            pass  # also without PAYLOAD_LEN, which QEMU leaves out
        elif command == c.CMD_BLOCK_STATUS:
            expected = 0 if contexts else c.EINVAL
        elif command == c.CMD_RESIZE or (flags and command != c.CMD_DISC):
            expected = c.EINVAL
        assert transmission.validate(command, flags, 0, 512) == expected


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (c.CMD_READ, c.EOVERFLOW),
        (c.CMD_WRITE, c.EINVAL),
        (c.CMD_TRIM, 0),
        (c.CMD_WRITE_ZEROES, 0),
        (c.CMD_CACHE, 0),
        (c.CMD_BLOCK_STATUS, 0),
        (c.CMD_FLUSH, 0),
    ],
)
def test_lengths_that_need_64_bits(command: int, error: int) -> None:
    transmission = ServerTransmission(Negotiated(HUGE, True, CONTEXTS, extended=True))
    flags = PAYLOAD if command == c.CMD_WRITE else 0
    assert transmission.validate(command, flags, 0, 16 << 40) == error
    past_end = c.ENOSPC if command in (c.CMD_WRITE, c.CMD_WRITE_ZEROES) else c.EINVAL
    if command != c.CMD_FLUSH:
        for offset, length in ((0, (16 << 40) + 1), (1, (1 << 64) - 1)):
            assert transmission.validate(command, flags, offset, length) == past_end


def test_how_long_a_payload_may_be() -> None:
    transmission = ServerTransmission(SERVED_EXTENDED)
    assert transmission.payload_rule(64 * MIB) == PAYLOAD_ACCEPT
    assert transmission.payload_rule(1 << 40) == PAYLOAD_DISCONNECT


def test_descriptors_may_need_64_bits() -> None:
    assert clip_extents([(1 << 50, 3)], 1 << 44, req_one=False) == [(1 << 44, 3)]


# ---- what the client takes ----


def test_reads() -> None:
    whole = offset_data_header(1, 4096, 4096, 1024, True) + DATA
    [done] = feed_replies(whole, READ, negotiated=EXTENDED)
    assert (done.error, data_of(done)) == (0, DATA)
    parts = offset_data_header(1, 4096, 4608, 512, False) + DATA[:512]
    parts += offset_hole(1, 4096, 4096, 512, False) + none_chunk(1, 4096)
    [done] = feed_replies(parts, READ, negotiated=EXTENDED)
    assert data_of(done) == bytes(512) + DATA[:512]
    hole = offset_hole(1, 4096, 4096, 1024, True)
    [done] = feed_replies(hole, READ, negotiated=EXTENDED)
    assert data_of(done) == bytes(1024)


def test_other_requests_are_answered_with_chunks() -> None:
    replies = none_chunk(2, 8192) + error_chunk(4, 512, c.EIO, b"no")
    done = feed_replies(replies, WRITE, TRIM, negotiated=EXTENDED)
    assert [(each.cookie, each.error, each.message) for each in done] == [
        (2, 0, ""),
        (4, c.EIO, "no"),
    ]
    inside = error_chunk(4, 512, c.EIO, b"", 1 << 39)
    [completion] = feed_replies(inside, TRIM, negotiated=EXTENDED)
    assert completion.error == c.EIO


def test_status() -> None:
    reply = block_status(3, 4096, 1, [(1 << 39, 1 << 40 | 3), (1 << 40, 0)], True)
    [done] = feed_replies(reply, STATUS, negotiated=EXTENDED)
    # The last descriptor may go on behind the range, and is cut off there.
    assert done.extents == [(1 << 39, 1 << 40 | 3), (1 << 39, 0)]


def test_status_of_more_than_is_wanted() -> None:
    transmission = ClientTransmission(EXTENDED, extents_max=2)
    transmission.request(*STATUS)
    reply = block_status(3, 4096, 1, [(5, 1), (6, 0), (7, 1)], True)
    [done] = transmission.receive_data(reply)
    assert done.extents == [(5, 1), (6, 0)]


def chunk(kind: int, payload: bytes, at: int = 4096, magic: int = 0x6E8A278C) -> bytes:
    return struct.pack(">IHHQQQ", magic, 1, kind, 3, at, len(payload)) + payload


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (simple_reply(0, 3) + bytes(16), "bad reply magic 0x67446698"),
        (chunk(0, b"", magic=0x668E33EF), "bad reply magic 0x668e33ef"),
        (chunk(0, b"", at=4097), "chunk for offset 4097 in reply to"),
        (chunk(5, struct.pack(">III", 1, 512, 0)), "unknown chunk type 5"),
        (chunk(6, struct.pack(">II", 1, 0)), "BLOCK_STATUS chunk of 8 bytes"),
        (chunk(6, struct.pack(">IIQ", 1, 1, 5)), "BLOCK_STATUS chunk of 16 bytes"),
        (chunk(6, struct.pack(">IIQQ", 1, 2, 5, 0)), "with a count of 2"),
        (chunk(6, struct.pack(">IIQQ", 1, 0, 5, 0)), "with a count of 0"),
        (chunk(6, struct.pack(">IIQQ", 2, 1, 5, 0)), "context 2 unknown"),
        (chunk(6, struct.pack(">IIQQ", 1, 1, 0, 0)), "descriptor of no bytes"),
        (chunk(0, b""), "metadata context missing"),
        (
            chunk(6, b"")[:24] + struct.pack(">Q", 8 + 16 * ((1 << 20) + 1)),
            "BLOCK_STATUS chunk of 16777240 bytes",
        ),
        (chunk(6, b"")[:24] + struct.pack(">Q", (1 << 64) - 8), "BLOCK_STATUS chunk"),
        (chunk(1, b"")[:24] + struct.pack(">Q", (1 << 64) - 8), None),
        (chunk(32769, b"")[:24] + struct.pack(">Q", 1 << 63), "error chunk of"),
    ],
)
def test_broken_rules(reply: bytes, message: str | None) -> None:
    if message is None:
        # The offset behind the header is needed, too, before it is known to be outside of the request.
        reply, message = reply + bytes(8), "outside of"
    with pytest.raises(ReplyError, match=message):
        feed_replies(reply, STATUS, negotiated=EXTENDED)


def test_one_extent_means_one() -> None:
    reply = block_status(3, 4096, 1, [(1, 0), (1, 1)], True)
    with pytest.raises(ReplyError, match="REQ_ONE was ignored"):
        feed_replies(reply, STATUS_ONE, negotiated=EXTENDED)


def test_extended_status_is_no_structured_reply() -> None:
    with pytest.raises(ReplyError, match="unknown chunk type 6"):
        feed_replies(
            c.CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, 1, 6, 3, 24) + bytes(24),
            (c.CMD_BLOCK_STATUS, 0, 3, 4096, 1024),
            negotiated=STRUCTURED,
        )


def test_reads_are_given_up_as_ever() -> None:
    transmission = client(EXTENDED, [READ])
    [given_up] = transmission.abandon(c.EIO, lambda _: True)
    reply = offset_data_header(1, 4096, 4096, 1024, True) + DATA
    [dropped] = transmission.receive_data(reply)
    assert dropped is not given_up
    assert data_of(given_up) == b"\xee" * 1024
