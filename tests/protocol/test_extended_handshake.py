# SPDX-License-Identifier: Apache-2.0
"""EXTENDED_HEADERS in the handshake, on both sides, with every other option around it."""

import struct
from dataclasses import replace

import pytest

from nbdtarget_protocol import consts as c
from nbdtarget_protocol.client import ClientHandshake, ClientNegotiated
from nbdtarget_protocol.handshake import Negotiated, ServerHandshake
from nbdtarget_protocol.options import (
    encode_info_request,
    encode_meta_context,
    encode_meta_context_request,
    encode_option,
    encode_option_reply,
)
from tests.support.protocol_feed import (
    ALL_FLAGS,
    CONTEXTS,
    DISK,
    MIB,
    OneExport,
    answer,
    ask,
    feed_client,
    feed_server,
    replies,
)

EXTENDED = encode_option(c.OPT_EXTENDED_HEADERS)
STRUCTURED = encode_option(c.OPT_STRUCTURED_REPLY)
SET = encode_option(
    c.OPT_SET_META_CONTEXT, encode_meta_context_request("disk", [c.BASE_ALLOCATION])
)
LIST = encode_option(
    c.OPT_LIST_META_CONTEXT, encode_meta_context_request("disk", [c.BASE_ALLOCATION])
)
GO = encode_option(c.OPT_GO, encode_info_request("disk", []))
INFO = encode_option(c.OPT_INFO, encode_info_request("disk", []))
NAME = encode_option(c.OPT_EXPORT_NAME, b"disk")


def negotiated(*options: bytes) -> Negotiated:
    handshake, _ = feed_server(b"".join(options))
    assert handshake.negotiated is not None
    return handshake.negotiated


def flags_told(option: int, *options: bytes) -> int:
    """The transmission flags that INFO or GO tell."""
    _, sent = feed_server(b"".join(options))
    [flags] = [
        c.INFO_EXPORT_PAYLOAD.unpack(data)[2]
        for code, rep, data in replies(sent)
        if (code, rep) == (option, c.REP_INFO) and data[:2] == b"\0\0"
    ]
    return int(flags)


# ---- the server ----


@pytest.mark.parametrize(
    "before", [(), (STRUCTURED,), (EXTENDED,), (STRUCTURED, EXTENDED)]
)
def test_granted_whatever_came_before(before: tuple[bytes, ...]) -> None:
    end = negotiated(*before, EXTENDED, GO)
    assert (end.structured, end.extended, end.contexts) == (True, True, ())
    assert ask(*before, EXTENDED)[-1] == (c.OPT_EXTENDED_HEADERS, c.REP_ACK)


def test_without_it_nothing_is_extended() -> None:
    assert not negotiated(GO).extended
    assert not negotiated(STRUCTURED, GO).extended
    assert not negotiated(STRUCTURED, NAME).extended


def test_payload_is_refused() -> None:
    assert answer(c.OPT_EXTENDED_HEADERS, b"x") == c.REP_ERR_INVALID
    assert not negotiated(encode_option(c.OPT_EXTENDED_HEADERS, b"x"), GO).extended


def test_structured_replies_cannot_be_had_back() -> None:
    assert ask(EXTENDED, STRUCTURED) == [
        (c.OPT_EXTENDED_HEADERS, c.REP_ACK),
        (c.OPT_STRUCTURED_REPLY, c.REP_ERR_EXT_HEADER_REQD),
    ]
    assert negotiated(EXTENDED, STRUCTURED, GO).extended


def test_contexts_need_no_structured_reply() -> None:
    assert negotiated(EXTENDED, SET, GO).contexts == CONTEXTS
    assert answer(c.OPT_LIST_META_CONTEXT, LIST[16:], EXTENDED) == c.REP_ACK
    # Without either they are refused.
    assert answer(c.OPT_SET_META_CONTEXT, SET[16:]) == c.REP_ERR_INVALID


def test_contexts_stay_selected() -> None:
    """proto.md says nothing of their end: only STARTTLS and another SET_META_CONTEXT end them."""
    assert negotiated(STRUCTURED, SET, EXTENDED, GO).contexts == CONTEXTS
    assert negotiated(EXTENDED, SET, EXTENDED, GO).contexts == CONTEXTS
    assert negotiated(SET, EXTENDED, GO).contexts == ()


def test_export_name_ends_the_connection() -> None:
    handshake, sent = feed_server(EXTENDED + NAME)
    assert handshake.closed
    assert str(handshake.error) == (
        "EXPORT_NAME refused: extended headers were negotiated"
    )
    assert [rep for _, rep, _ in replies(sent)] == [c.REP_ACK]


def test_flags() -> None:
    payload = c.FLAG_BLOCK_STATUS_PAYLOAD
    assert flags_told(c.OPT_GO, GO) == ALL_FLAGS
    assert flags_told(c.OPT_GO, STRUCTURED, SET, GO) == ALL_FLAGS | c.FLAG_SEND_DF
    assert flags_told(c.OPT_GO, EXTENDED, GO) == ALL_FLAGS | c.FLAG_SEND_DF
    extended = ALL_FLAGS | c.FLAG_SEND_DF | payload
    assert flags_told(c.OPT_GO, EXTENDED, SET, GO) == extended
    assert flags_told(c.OPT_INFO, EXTENDED, SET, INFO) == extended
    # INFO tells what a SET_META_CONTEXT would bring.
    assert flags_told(c.OPT_INFO, EXTENDED, INFO) == extended
    assert not flags_told(c.OPT_INFO, STRUCTURED, INFO) & payload
    bare = OneExport(replace(DISK, contexts=()))
    handshake = ServerHandshake(bare)
    handshake.receive_data(struct.pack(">I", 3) + EXTENDED + SET + INFO + GO)
    assert handshake.negotiated is not None
    assert not handshake.negotiated.flags & payload


def test_extended_means_structured() -> None:
    with pytest.raises(AssertionError):
        Negotiated(DISK, False, (), extended=True)
    with pytest.raises(AssertionError):
        ClientNegotiated("disk", MIB, ALL_FLAGS, False, extended=True)


# ---- the client ----

GREETING = c.GREETING.pack(c.NBDMAGIC, c.IHAVEOPT, 3)
ACK_EXTENDED = encode_option_reply(c.OPT_EXTENDED_HEADERS, c.REP_ACK)
NO_EXTENDED = encode_option_reply(c.OPT_EXTENDED_HEADERS, c.REP_ERR_UNSUP)
ACK_STRUCTURED = encode_option_reply(c.OPT_STRUCTURED_REPLY, c.REP_ACK)
NO_STRUCTURED = encode_option_reply(c.OPT_STRUCTURED_REPLY, c.REP_ERR_UNSUP)
CONTEXT = encode_option_reply(
    c.OPT_SET_META_CONTEXT,
    c.REP_META_CONTEXT,
    encode_meta_context(7, c.BASE_ALLOCATION),
) + encode_option_reply(c.OPT_SET_META_CONTEXT, c.REP_ACK)
INFO_EXPORT = encode_option_reply(
    c.OPT_GO, c.REP_INFO, c.INFO_EXPORT_PAYLOAD.pack(c.INFO_EXPORT, MIB, ALL_FLAGS)
)
ACK_GO = INFO_EXPORT + encode_option_reply(c.OPT_GO, c.REP_ACK)


def test_client_asks_first_for_extended_headers() -> None:
    handshake, sent = feed_client(
        GREETING + ACK_EXTENDED + CONTEXT + ACK_GO, want_extended=True
    )
    assert handshake.negotiated is not None
    assert (handshake.negotiated.structured, handshake.negotiated.extended) == (1, 1)
    assert handshake.negotiated.contexts == ((7, c.BASE_ALLOCATION),)
    go = encode_option(c.OPT_GO, encode_info_request("disk", [c.INFO_BLOCK_SIZE]))
    assert sent == struct.pack(">I", 3) + EXTENDED + SET + go


@pytest.mark.parametrize("rep", [c.REP_ERR_UNSUP, c.REP_ERR_INVALID, c.REP_ERR_POLICY])
def test_client_goes_on_without(rep: int) -> None:
    refused = encode_option_reply(c.OPT_EXTENDED_HEADERS, rep, b"no")
    stream = GREETING + refused + ACK_STRUCTURED + CONTEXT + ACK_GO
    handshake, sent = feed_client(stream, want_extended=True)
    assert handshake.negotiated is not None
    assert (handshake.negotiated.structured, handshake.negotiated.extended) == (1, 0)
    assert EXTENDED + STRUCTURED + SET in sent
    stream = GREETING + refused + NO_STRUCTURED + ACK_GO
    handshake, _ = feed_client(stream, want_extended=True)
    assert handshake.negotiated is not None
    assert not handshake.negotiated.structured


def test_client_that_wants_simple_replies_asks_for_neither() -> None:
    _, sent = feed_client(GREETING, want_extended=True, want_structured=False)
    assert sent.startswith(struct.pack(">I", 3) + encode_option(c.OPT_GO, b"")[:12])


@pytest.mark.parametrize(
    ("stream", "sentence"),
    [
        (
            encode_option_reply(c.OPT_EXTENDED_HEADERS, c.REP_ERR_TLS_REQD),
            "server requires TLS",
        ),
        (
            # EXPORT_NAME is not allowed any more.
            ACK_EXTENDED + CONTEXT + encode_option_reply(c.OPT_GO, c.REP_ERR_UNSUP),
            "server refused option GO with ERR_UNSUP",
        ),
        (
            NO_EXTENDED
            + NO_STRUCTURED
            + encode_option_reply(c.OPT_GO, c.REP_ERR_EXT_HEADER_REQD, b"new ones"),
            "server requires extended headers: new ones",
        ),
        (
            encode_option_reply(c.OPT_EXTENDED_HEADERS, c.REP_ACK, b"x"),
            "ACK with a payload",
        ),
    ],
)
def test_client_gives_up(stream: bytes, sentence: str) -> None:
    handshake, _ = feed_client(GREETING + stream, want_extended=True)
    assert str(handshake.error) == sentence
    assert handshake.negotiated is None


@pytest.mark.parametrize("wanted", [True, False])
def test_our_client_and_our_server(wanted: bool) -> None:
    server = ServerHandshake(OneExport())
    client = ClientHandshake("disk", want_extended=wanted)
    for _ in range(10):
        client.receive_data(b"".join(server.data_to_send()))
        server.receive_data(b"".join(client.data_to_send()))
    assert server.negotiated is not None
    assert client.negotiated is not None
    assert client.negotiated.extended is server.negotiated.extended is wanted
    assert client.negotiated.contexts == server.negotiated.contexts == CONTEXTS
    assert client.negotiated.flags == server.negotiated.flags
