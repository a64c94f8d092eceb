# SPDX-License-Identifier: Apache-2.0
"""Any bytes give events or an error, never anything else, and cost a bounded memory.

Purely random bytes end at the first magic, so most of these strings are made of good pieces:
whole messages, cut, mixed and with bytes changed.
"""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdtarget_protocol import extended
from nbdtarget_protocol.client import ClientHandshake
from nbdtarget_protocol.consts import (
    CHUNK,
    CMD_BLOCK_STATUS,
    CMD_FLAG_DF,
    CMD_READ,
    CMD_WRITE,
    EXPORT,
    EXTENDED_CHUNK,
    EXTENDED_REPLY_MAGIC,
    GREETING,
    IHAVEOPT,
    INFO_BLOCK_SIZE_PAYLOAD,
    INFO_EXPORT_PAYLOAD,
    NBDMAGIC,
    OPTION,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
)
from nbdtarget_protocol.errors import ReplyError
from nbdtarget_protocol.handshake import ServerHandshake
from nbdtarget_protocol.options import (
    encode_info_request,
    encode_meta_context,
    encode_meta_context_request,
    encode_option,
    encode_option_reply,
)
from nbdtarget_protocol.transmission import (
    ServerTransmission,
    block_status,
    error_chunk,
    none_chunk,
    offset_data_header,
    offset_hole,
    simple_reply,
)
from tests.support.protocol_feed import (
    EXTENDED,
    NEW_CLIENT,
    SERVED,
    SERVED_EXTENDED,
    SERVED_SIMPLE,
    SIMPLE,
    STRUCTURED,
    OneExport,
    client,
)

pytestmark = pytest.mark.slow
# How many streams are tried: fixed ones, the first of which are the same.
each_number = pytest.mark.parametrize(
    "nr_examples", [100, pytest.param(400, marks=pytest.mark.long)]
)

U16S = st.integers(0, 3) | st.integers(0, 0xFFFF)
U32S = st.integers(0, 40) | st.integers(0, 0xFFFFFFFF)
U64S = st.integers(0, 40) | st.integers(0, (1 << 64) - 1)
NAMES = st.sampled_from(["disk", "", "disc"])
QUERIES = st.lists(st.sampled_from(["base:", "base:allocation", "qemu:x", "nonsense"]))


def streams(*messages: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Return strings made of messages, whole or cut, and garbage."""
    cut = st.tuples(st.one_of(*messages), st.integers(0, 60)).map(
        lambda pair: pair[0][: pair[1]]
    )
    piece = st.one_of(*messages, *messages, cut, st.binary(max_size=60))
    return st.lists(piece, max_size=12).map(b"".join)


def chopped(data: Any, stream: bytes) -> list[bytes]:
    """Cut a stream as receives might."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    return [
        stream[begin:end]
        for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)
    ]


OPTIONS = (
    st.builds(encode_option, st.integers(0, 12), st.binary(max_size=40)),
    st.builds(encode_option, st.integers(2, 11)),
    st.builds(
        encode_option,
        st.sampled_from([6, 7]),
        st.builds(encode_info_request, NAMES, st.lists(U16S)),
    ),
    st.builds(
        encode_option,
        st.sampled_from([9, 10]),
        st.builds(encode_meta_context_request, NAMES, QUERIES),
    ),
    st.builds(OPTION.pack, st.just(IHAVEOPT), U32S, U32S),
)


SERVER_HANDSHAKE_INPUT = given(
    st.data(), streams(*OPTIONS), st.just(NEW_CLIENT) | st.binary(max_size=5)
)


def server_handshake(data: Any, stream: bytes, start: bytes) -> None:
    handshake = ServerHandshake(
        OneExport(), option_length_max=200, options_max=10, output_max=500
    )
    for piece in chopped(data, start + stream):
        handshake.receive_data(piece)
        if handshake.negotiated is None:
            assert len(handshake._buffer) < 16 + 200
    assert sum(map(len, handshake.data_to_send())) < 3000
    assert not (handshake.negotiated and handshake.closed)
    assert handshake.error is None or handshake.closed


@each_number
def test_server_handshake(nr_examples: int) -> None:
    settings(max_examples=nr_examples)(SERVER_HANDSHAKE_INPUT(server_handshake))()


REPLIES = (
    st.builds(encode_option_reply, st.integers(0, 12), st.integers(0, 5)),
    st.builds(
        encode_option_reply,
        st.sampled_from([7, 8, 10, 11]),
        st.integers(1, 4) | st.integers(0x80000000, 0x8000000B),
        st.binary(max_size=30),
    ),
    st.sampled_from([encode_option_reply(option, 1) for option in (7, 8, 10, 11)]),
    st.builds(
        encode_option_reply,
        st.just(10),
        st.just(4),
        st.builds(encode_meta_context, U32S, st.just("base:allocation")),
    ),
    st.builds(
        encode_option_reply,
        st.just(7),
        st.just(3),
        st.builds(INFO_EXPORT_PAYLOAD.pack, st.just(0), U64S, U16S)
        | st.builds(INFO_BLOCK_SIZE_PAYLOAD.pack, st.just(3), U32S, U32S, U32S),
    ),
    st.builds(EXPORT.pack, U64S, U16S),
    st.builds(OPTION_REPLY.pack, st.just(OPTION_REPLY_MAGIC), U32S, U32S, U32S),
)
GREETINGS = (
    st.builds(GREETING.pack, st.just(NBDMAGIC), st.just(IHAVEOPT), U16S)
    | st.sampled_from(
        [
            GREETING.pack(NBDMAGIC, IHAVEOPT, 3) + encode_option_reply(8, 1),
            GREETING.pack(NBDMAGIC, IHAVEOPT, 3)
            + encode_option_reply(8, 1)
            + encode_option_reply(10, 1),
            GREETING.pack(NBDMAGIC, IHAVEOPT, 3) + encode_option_reply(11, 1),
            GREETING.pack(NBDMAGIC, IHAVEOPT, 3)
            + encode_option_reply(11, 0x80000001)
            + encode_option_reply(8, 1),
        ]
    )
    | st.binary(max_size=20)
)


CLIENT_HANDSHAKE_INPUT = given(st.data(), streams(*REPLIES), GREETINGS, st.booleans())


def client_handshake(data: Any, stream: bytes, start: bytes, wanted: bool) -> None:
    handshake = ClientHandshake(
        "disk", want_extended=wanted, reply_length_max=100, replies_max=5
    )
    for piece in chopped(data, start + stream):
        handshake.receive_data(piece)
        if handshake.negotiated is None:
            assert len(handshake._buffer) < 20 + 124
    handshake.receive_eof()
    assert (handshake.negotiated is None) is (handshake.error is not None)
    assert handshake.error is None or "\n" not in str(handshake.error)
    handshake.data_to_send()


@each_number
def test_client_handshake(nr_examples: int) -> None:
    settings(max_examples=nr_examples)(CLIENT_HANDSHAKE_INPUT(client_handshake))()


COOKIES = st.integers(1, 5)
EXTENTS = st.lists(st.tuples(U32S, U32S), min_size=1, max_size=4)
CHUNKS = (
    st.builds(simple_reply, U32S, COOKIES),
    st.builds(lambda c, o, d, e: offset_data_header(c, o, len(d), e) + d,
              COOKIES, st.integers(0, 70), st.binary(min_size=1, max_size=64), st.booleans()),
    st.builds(offset_hole, COOKIES, st.integers(0, 70), st.integers(1, 70), st.booleans()),
    st.builds(none_chunk, COOKIES),
    st.builds(error_chunk, COOKIES, st.integers(1, 110), st.binary(max_size=20),
              st.none() | U64S, st.booleans()),
    st.builds(block_status, COOKIES, st.integers(1, 2), EXTENTS, st.booleans()),
    st.builds(CHUNK.pack, st.just(STRUCTURED_REPLY_MAGIC), U16S, U16S, COOKIES, U32S),
    st.just(SIMPLE_REPLY_MAGIC.to_bytes(4, "big")),
)  # fmt: skip
# `at` is right for most of the requests below.
AT = st.sampled_from([0, 0, 7])
EXTENDED_CHUNKS = (
    st.builds(lambda c, a, o, d, e: extended.offset_data_header(c, a, o, len(d), e) + d,
              COOKIES, AT, st.integers(0, 70), st.binary(min_size=1, max_size=64), st.booleans()),
    st.builds(extended.offset_hole, COOKIES, AT, st.integers(0, 70), st.integers(1, 70), st.booleans()),
    st.builds(extended.none_chunk, COOKIES, AT),
    st.builds(extended.error_chunk, COOKIES, AT, st.integers(1, 110), st.binary(max_size=20),
              st.none() | U64S, st.booleans()),
    st.builds(extended.block_status, COOKIES, AT, st.integers(1, 2), EXTENTS, st.booleans()),
    st.builds(EXTENDED_CHUNK.pack, st.just(EXTENDED_REPLY_MAGIC), U16S, U16S, COOKIES, AT, U64S),
    st.just(SIMPLE_REPLY_MAGIC.to_bytes(4, "big")),
)  # fmt: skip


CLIENT_TRANSMISSION_INPUT = given(
    st.data(),
    st.one_of(
        st.tuples(streams(*CHUNKS), st.sampled_from([STRUCTURED, SIMPLE])),
        st.tuples(streams(*EXTENDED_CHUNKS), st.just(EXTENDED)),
    ),
)


def client_transmission(data: Any, fed: tuple[bytes, Any]) -> None:
    stream, negotiated = fed
    requests = [
        (CMD_READ, 0, 1, 0, 64),
        (CMD_READ, CMD_FLAG_DF, 2, 7, 64),
        (CMD_READ, 0, 3, 0, 0),
        (CMD_WRITE, 0, 4, 0, 64),
        (CMD_BLOCK_STATUS, 0, 5, 0, 64),
    ]
    transmission = client(negotiated, requests)
    completed = []
    with suppress(ReplyError):
        for piece in chopped(data, stream):
            completed += transmission.receive_data(piece)
    assert "\n" not in str(transmission.error)
    completed += transmission.fail_all(1000)
    assert sorted(c.cookie for c in completed) == [1, 2, 3, 4, 5]


@each_number
def test_client_transmission(nr_examples: int) -> None:
    settings(max_examples=nr_examples)(CLIENT_TRANSMISSION_INPUT(client_transmission))()


@given(
    U16S, U16S, U64S, U64S, st.sampled_from([SERVED, SERVED_SIMPLE, SERVED_EXTENDED])
)
def test_server_transmission(
    command: int, flags: int, offset: int, length: int, negotiated: Any
) -> None:
    transmission = ServerTransmission(negotiated)
    refusal = transmission.refusal(command, flags, offset, length)
    errno = transmission.validate(command, flags, offset, length)
    assert errno == (0 if refusal is None else refusal.errno)
    assert errno in (0, 1, 22, 28, 75)
