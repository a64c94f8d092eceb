# SPDX-License-Identifier: Apache-2.0
"""The client's handshake against every kind of server, good and bad."""

import pytest

from nbdtarget_protocol.client import ClientHandshake
from nbdtarget_protocol.consts import (
    CLISERV_MAGIC,
    EXPORT,
    GREETING,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_BLOCK_SIZE_PAYLOAD,
    INFO_EXPORT,
    INFO_EXPORT_PAYLOAD,
    INFO_NAME,
    NBDMAGIC,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    OPTION_REPLY,
    REP_ACK,
    REP_ERR_BLOCK_SIZE_REQD,
    REP_ERR_INVALID,
    REP_ERR_POLICY,
    REP_ERR_SHUTDOWN,
    REP_ERR_TLS_REQD,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    U16,
    U32,
)
from nbdtarget_protocol.options import (
    encode_info_request,
    encode_meta_context,
    encode_meta_context_request,
    encode_option,
    encode_option_reply,
)
from tests.support.protocol_feed import ALL_FLAGS, MIB, feed_client

GREETING_FIXED = GREETING.pack(NBDMAGIC, IHAVEOPT, 3)
ACK_STRUCTURED = encode_option_reply(OPT_STRUCTURED_REPLY, REP_ACK)
NO_STRUCTURED = encode_option_reply(OPT_STRUCTURED_REPLY, REP_ERR_UNSUP)
CONTEXT = encode_option_reply(
    OPT_SET_META_CONTEXT, REP_META_CONTEXT, encode_meta_context(7, "base:allocation")
)
ACK_CONTEXT = encode_option_reply(OPT_SET_META_CONTEXT, REP_ACK)
EXPORT_INFO = encode_option_reply(
    OPT_GO, REP_INFO, INFO_EXPORT_PAYLOAD.pack(INFO_EXPORT, MIB, ALL_FLAGS)
)
ACK_GO = encode_option_reply(OPT_GO, REP_ACK)

UP_TO_CONTEXT = GREETING_FIXED + ACK_STRUCTURED
UP_TO_GO = UP_TO_CONTEXT + CONTEXT + ACK_CONTEXT
ABORT = encode_option(OPT_ABORT)


def block_size(minimum: int, preferred: int, payload_max: int) -> bytes:
    info = INFO_BLOCK_SIZE_PAYLOAD.pack(
        INFO_BLOCK_SIZE, minimum, preferred, payload_max
    )
    return encode_option_reply(OPT_GO, REP_INFO, info)


def failure(data: bytes, **kwargs: bool) -> str:
    """Feed a server that fails; return the sentence."""
    handshake, _ = feed_client(data, **kwargs)
    assert handshake.negotiated is None
    assert handshake.error is not None
    assert handshake.trailing_data() == b""
    return str(handshake.error)


def test_all_is_negotiated() -> None:
    data = UP_TO_GO + EXPORT_INFO + block_size(512, 4096, 16 * MIB) + ACK_GO
    handshake, sent = feed_client(data)
    negotiated = handshake.negotiated
    assert negotiated is not None
    assert (negotiated.size, negotiated.flags) == (MIB, ALL_FLAGS)
    assert negotiated.structured
    assert negotiated.contexts == ((7, "base:allocation"),)
    assert negotiated.block_size_min == 512
    assert negotiated.block_size_preferred == 4096
    assert negotiated.payload_max == 16 * MIB
    assert sent == U32.pack(3) + encode_option(OPT_STRUCTURED_REPLY) + encode_option(
        OPT_SET_META_CONTEXT, encode_meta_context_request("disk", ["base:allocation"])
    ) + encode_option(OPT_GO, encode_info_request("disk", [INFO_BLOCK_SIZE]))


def test_nothing_but_go_when_nothing_is_wanted() -> None:
    data = GREETING_FIXED + EXPORT_INFO + block_size(512, 512, 512) + ACK_GO
    handshake, sent = feed_client(data, want_structured=False, want_block_size=False)
    assert sent == U32.pack(3) + encode_option(OPT_GO, encode_info_request("disk", []))
    assert handshake.negotiated is not None
    assert not handshake.negotiated.structured
    assert handshake.negotiated.block_size_min == 1  # unasked: does not bind us
    assert handshake.negotiated.payload_max == 32 * MIB


def test_structured_without_contexts() -> None:
    handshake = ClientHandshake("disk", want_extended=False, want_contexts=())
    handshake.receive_data(UP_TO_CONTEXT + EXPORT_INFO + ACK_GO)
    assert handshake.negotiated is not None
    assert handshake.negotiated.structured
    assert handshake.negotiated.contexts == ()


def test_simple_replies_when_structured_ones_are_refused() -> None:
    handshake, _ = feed_client(GREETING_FIXED + NO_STRUCTURED + EXPORT_INFO + ACK_GO)
    assert handshake.negotiated is not None
    assert not handshake.negotiated.structured
    assert handshake.negotiated.contexts == ()


@pytest.mark.parametrize("rep", [REP_ERR_UNSUP, REP_ERR_UNKNOWN, REP_ERR_INVALID])
def test_no_contexts_when_they_are_refused(rep: int) -> None:
    refused = encode_option_reply(OPT_SET_META_CONTEXT, rep)
    handshake, _ = feed_client(UP_TO_CONTEXT + CONTEXT + refused + EXPORT_INFO + ACK_GO)
    assert handshake.negotiated is not None
    assert handshake.negotiated.contexts == ()


def test_no_contexts_when_the_server_selects_none() -> None:
    handshake, _ = feed_client(UP_TO_CONTEXT + ACK_CONTEXT + EXPORT_INFO + ACK_GO)
    assert handshake.negotiated is not None
    assert handshake.negotiated.contexts == ()


def test_export_name_when_go_is_unknown() -> None:
    no_go = encode_option_reply(OPT_GO, REP_ERR_UNSUP)
    data = GREETING_FIXED + NO_STRUCTURED + no_go + EXPORT.pack(MIB, ALL_FLAGS)
    handshake, sent = feed_client(data)
    assert sent.endswith(encode_option(OPT_EXPORT_NAME, b"disk"))
    assert handshake.negotiated is not None
    assert (handshake.negotiated.size, handshake.negotiated.flags) == (MIB, ALL_FLAGS)


def test_export_name_when_the_server_is_not_fixed() -> None:
    greeting = GREETING.pack(NBDMAGIC, IHAVEOPT, 0)
    data = greeting + EXPORT.pack(MIB, ALL_FLAGS) + bytes(124)
    handshake, sent = feed_client(data)
    assert sent == U32.pack(0) + encode_option(OPT_EXPORT_NAME, b"disk")
    assert handshake.negotiated is not None


def test_unknown_infos_and_greeting_flags_are_ignored() -> None:
    name = encode_option_reply(OPT_GO, REP_INFO, U16.pack(INFO_NAME) + b"x")
    odd = encode_option_reply(OPT_GO, REP_INFO, U16.pack(999) + b"x")
    greeting = GREETING.pack(NBDMAGIC, IHAVEOPT, 0xFFFF)
    handshake, sent = feed_client(
        greeting + NO_STRUCTURED + name + odd + EXPORT_INFO + ACK_GO
    )
    assert handshake.negotiated is not None
    assert sent[:4] == U32.pack(3)


def test_flags_mean_nothing_without_has_flags() -> None:
    info = INFO_EXPORT_PAYLOAD.pack(INFO_EXPORT, MIB, 0xFFFE)
    data = encode_option_reply(OPT_GO, REP_INFO, info) + ACK_GO
    handshake, _ = feed_client(UP_TO_GO + data)
    assert handshake.negotiated is not None
    assert handshake.negotiated.flags == 0


@pytest.mark.parametrize(
    ("advertised", "taken"),
    [
        ((4096, 1024, 1 * MIB), (4096, 4096, MIB)),
        ((1, 5000, 0), (1, 4096, 32 * MIB)),
        ((65536, 65536, 0xFFFFFFFF), (65536, 65536, 0xFFFFFFFF)),
    ],
)
def test_nonsense_in_block_size_hints_is_replaced(
    advertised: tuple[int, int, int], taken: tuple[int, int, int]
) -> None:
    data = UP_TO_GO + EXPORT_INFO + block_size(*advertised) + ACK_GO
    negotiated = feed_client(data)[0].negotiated
    assert negotiated is not None
    assert taken == (
        negotiated.block_size_min,
        negotiated.block_size_preferred,
        negotiated.payload_max,
    )


@pytest.mark.parametrize(
    ("rep", "sentence"),
    [
        (REP_ERR_UNKNOWN, "server has no export 'disk': why"),
        (REP_ERR_TLS_REQD, "server requires TLS: why"),
        (REP_ERR_POLICY, "server does not allow export 'disk': why"),
        (REP_ERR_SHUTDOWN, "server is shutting down: why"),
        (
            REP_ERR_BLOCK_SIZE_REQD,
            "server requires clients to ask for block sizes: why",
        ),
        (REP_ERR_INVALID, "server refused option GO with ERR_INVALID: why"),
        (0x80001234, "server refused option GO with 0x80001234: why"),
    ],
)
def test_refused_go_is_one_clear_line_and_a_polite_end(rep: int, sentence: str) -> None:
    data = UP_TO_GO + encode_option_reply(OPT_GO, rep, b"why")
    handshake, sent = feed_client(data)
    assert str(handshake.error) == sentence
    assert sent.endswith(ABORT)


@pytest.mark.parametrize(
    "data",
    [
        GREETING_FIXED + encode_option_reply(OPT_STRUCTURED_REPLY, REP_ERR_TLS_REQD),
        UP_TO_CONTEXT + encode_option_reply(OPT_SET_META_CONTEXT, REP_ERR_TLS_REQD),
    ],
)
def test_tls_required_ends_any_option(data: bytes) -> None:
    handshake, sent = feed_client(data)
    assert str(handshake.error) == "server requires TLS"
    assert sent.endswith(ABORT)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"S", "this is not an NBD server: no NBDMAGIC"),
        (b"HTTP/1.1 400 Bad Request\r\n", "this is not an NBD server: no NBDMAGIC"),
        (
            GREETING.pack(NBDMAGIC, CLISERV_MAGIC, 0),
            "server speaks only the oldstyle negotiation",
        ),
        (
            GREETING.pack(NBDMAGIC, 1, 0),
            "bad greeting: 0x1 instead of IHAVEOPT",
        ),
        (
            GREETING_FIXED + OPTION_REPLY.pack(1, 8, REP_ACK, 0),
            "bad option reply magic 0x1",
        ),
        (
            GREETING_FIXED + ACK_GO,
            "reply to option 7 while STRUCTURED_REPLY is under way",
        ),
        (
            GREETING_FIXED + ACK_STRUCTURED[:-4] + U32.pack(65537),
            "option reply of 65537 bytes",
        ),
        (
            GREETING_FIXED + encode_option_reply(OPT_STRUCTURED_REPLY, REP_SERVER),
            "reply SERVER to option STRUCTURED_REPLY",
        ),
        (
            GREETING_FIXED + encode_option_reply(OPT_STRUCTURED_REPLY, 77),
            "reply 77 to option STRUCTURED_REPLY",
        ),
        (
            GREETING_FIXED + encode_option_reply(OPT_STRUCTURED_REPLY, REP_ACK, b"x"),
            "ACK with a payload",
        ),
        (
            UP_TO_CONTEXT + encode_option_reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT),
            "META_CONTEXT reply is too short",
        ),
        (UP_TO_CONTEXT + CONTEXT + CONTEXT, "metadata context id 7 given twice"),
        (
            UP_TO_CONTEXT
            + encode_option_reply(
                OPT_SET_META_CONTEXT, REP_META_CONTEXT, encode_meta_context(1, "x-y:z")
            ),
            "metadata context 'x-y:z' was not asked for",
        ),
        (UP_TO_GO + ACK_GO, "GO acknowledged without INFO_EXPORT"),
        (
            UP_TO_GO + encode_option_reply(OPT_GO, REP_INFO, b"x"),
            "INFO reply is too short",
        ),
        (
            UP_TO_GO + encode_option_reply(OPT_GO, REP_INFO, bytes(11)),
            "INFO_EXPORT of 11 bytes",
        ),
        (
            UP_TO_GO + block_size(3, 4096, MIB),
            "server advertised a minimum block size of 3",
        ),
        (
            UP_TO_GO
            + encode_option_reply(
                OPT_GO, REP_INFO, INFO_EXPORT_PAYLOAD.pack(INFO_EXPORT, 1 << 63, 1)
            )
            + ACK_GO,
            "export size 9223372036854775808 is out of range",
        ),
        (UP_TO_GO + EXPORT_INFO * 1001, "more than 1000 replies to one option"),
    ],
)
def test_server_that_breaks_the_rules(data: bytes, sentence: str) -> None:
    assert failure(data) == sentence


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"NBDMAG", "server hung up before its greeting was whole"),
        (UP_TO_CONTEXT, "server hung up during option SET_META_CONTEXT"),
        (
            GREETING.pack(NBDMAGIC, IHAVEOPT, 0),
            "server has no export 'disk', or requires TLS: it hung up when asked for it",
        ),
    ],
)
def test_server_that_hangs_up(data: bytes, sentence: str) -> None:
    handshake, _ = feed_client(data)
    assert handshake.error is None
    assert not handshake.has_hung_up
    handshake.receive_eof()
    assert handshake.has_hung_up
    assert str(handshake.error) == sentence
    handshake.receive_eof()
    assert str(handshake.error) == sentence


def test_eof_after_the_handshake_is_not_the_handshakes() -> None:
    handshake, _ = feed_client(UP_TO_GO + EXPORT_INFO + ACK_GO)
    handshake.receive_eof()
    assert handshake.error is None


def test_nothing_is_read_after_an_error() -> None:
    handshake, _ = feed_client(b"SSH")
    handshake.receive_data(GREETING_FIXED)
    assert handshake.data_to_send() == []


def test_data_behind_an_error_message_cannot_harm_a_terminal() -> None:
    message = b"\x1b]0;gotcha\x07\nsecond line"
    data = UP_TO_GO + encode_option_reply(OPT_GO, REP_ERR_UNKNOWN, message)
    assert failure(data).isprintable()
