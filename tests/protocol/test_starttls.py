# SPDX-License-Identifier: Apache-2.0
"""STARTTLS on both sides. Each fault that other servers and clients had is a test with its name."""

import pytest

from nbdtarget_protocol.client import ClientHandshake
from nbdtarget_protocol.consts import (
    FLAG_C_NO_ZEROES,
    GREETING,
    IHAVEOPT,
    INFO_EXPORT,
    INFO_EXPORT_PAYLOAD,
    NBDMAGIC,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_EXTENDED_HEADERS,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_NAMES,
    OPT_PEEK_EXPORT,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    REP_ACK,
    REP_ERR_INVALID,
    REP_ERR_PLATFORM,
    REP_ERR_POLICY,
    REP_ERR_SHUTDOWN,
    REP_ERR_TLS_REQD,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_META_CONTEXT,
    U32,
)
from nbdtarget_protocol.handshake import ServerHandshake, TlsMode
from nbdtarget_protocol.options import (
    encode_info_request,
    encode_meta_context,
    encode_meta_context_request,
    encode_option,
    encode_option_reply,
)
from tests.support.protocol_feed import (
    ALL_FLAGS,
    MIB,
    NEW_CLIENT,
    OneExport,
    feed_client,
    replies,
)

STARTTLS = encode_option(OPT_STARTTLS)
STRUCTURED = encode_option(OPT_STRUCTURED_REPLY)
GO = encode_option(OPT_GO, encode_info_request("disk", []))
SET = encode_option(
    OPT_SET_META_CONTEXT, encode_meta_context_request("disk", ["base:allocation"])
)
TALKING = [TlsMode.ON, TlsMode.REQUIRE]

GREETING_FIXED = GREETING.pack(NBDMAGIC, IHAVEOPT, 3)
ACK_TLS = encode_option_reply(OPT_STARTTLS, REP_ACK)


def server(tls: TlsMode, *options: bytes) -> ServerHandshake:
    """A server that was sent client flags and options, one after another."""
    handshake = ServerHandshake(OneExport(), tls=tls)
    handshake.data_to_send()
    handshake.receive_data(NEW_CLIENT)
    for option in options:
        handshake.receive_data(option)
    return handshake


def encrypted(tls: TlsMode, *before: bytes) -> ServerHandshake:
    """A server behind the TLS handshake; nothing is queued."""
    handshake = server(tls, *before, STARTTLS)
    handshake.data_to_send()
    handshake.tls_started()
    return handshake


def answers(handshake: ServerHandshake) -> list[tuple[int, int]]:
    sent = b"".join(handshake.data_to_send())
    return [(option, rep) for option, rep, _ in replies(sent)]


# ---- the server ----


@pytest.mark.parametrize("tls", TALKING)
def test_starttls_is_acknowledged_and_tls_starts(tls: TlsMode) -> None:
    handshake = server(tls, STARTTLS)
    assert answers(handshake) == [(OPT_STARTTLS, REP_ACK)]
    assert handshake.starts_tls
    assert not handshake.is_encrypted
    handshake.tls_started()
    assert handshake.is_encrypted
    handshake.receive_data(STRUCTURED + GO)
    assert handshake.negotiated is not None
    assert handshake.negotiated.structured


def test_server_without_tls_says_so_and_goes_on() -> None:
    handshake = server(TlsMode.OFF, STARTTLS, GO)
    assert answers(handshake)[0] == (OPT_STARTTLS, REP_ERR_UNSUP)
    assert not handshake.starts_tls
    assert handshake.negotiated is not None


def test_tls_is_optional_with_on() -> None:
    assert server(TlsMode.ON, GO).negotiated is not None


@pytest.mark.parametrize("tls", TALKING)
@pytest.mark.parametrize("behind", [b"\x16", GO, STRUCTURED + GO])
def test_plaintext_sent_together_with_starttls_is_not_carried_over(
    tls: TlsMode, behind: bytes
) -> None:
    handshake = server(tls, STARTTLS + behind)
    assert handshake.closed
    assert not handshake.starts_tls
    assert answers(handshake) == []
    shown = f"{len(behind)} bytes of plaintext behind STARTTLS"
    assert str(handshake.error) == shown


def test_plaintext_between_the_acknowledgement_and_tls_is_not_carried_over() -> None:
    handshake = server(TlsMode.ON, STARTTLS)
    handshake.receive_data(b"")
    assert not handshake.closed
    handshake.receive_data(GO)
    assert handshake.closed
    assert handshake.negotiated is None
    assert "plaintext behind STARTTLS" in str(handshake.error)


def test_structured_replies_injected_before_starttls_do_not_hold_afterwards() -> None:
    handshake = encrypted(TlsMode.ON, STRUCTURED)
    handshake.receive_data(GO)
    assert handshake.negotiated is not None
    assert not handshake.negotiated.structured


def test_extended_headers_injected_before_starttls_do_not_hold_afterwards() -> None:
    handshake = encrypted(TlsMode.ON, encode_option(OPT_EXTENDED_HEADERS))
    handshake.receive_data(GO)
    assert handshake.negotiated is not None
    assert not handshake.negotiated.structured
    assert not handshake.negotiated.extended


def test_contexts_injected_before_starttls_do_not_hold_afterwards() -> None:
    handshake = encrypted(TlsMode.ON, STRUCTURED, SET)
    handshake.receive_data(STRUCTURED + GO)
    assert handshake.negotiated is not None
    assert handshake.negotiated.contexts == ()


@pytest.mark.parametrize(
    "option",
    [
        OPT_LIST,
        OPT_PEEK_EXPORT,
        OPT_INFO,
        OPT_GO,
        OPT_STRUCTURED_REPLY,
        OPT_LIST_META_CONTEXT,
        OPT_SET_META_CONTEXT,
        OPT_EXTENDED_HEADERS,
        0,
        77,
    ],
)
@pytest.mark.parametrize("payload", [b"", b"any", bytes(300 << 10)])
def test_only_starttls_and_abort_are_answered_where_tls_is_required(
    option: int, payload: bytes
) -> None:
    handshake = server(TlsMode.REQUIRE, encode_option(option, payload))
    assert handshake.lacks_tls
    handshake.receive_data(STARTTLS)
    assert not handshake.lacks_tls
    assert answers(handshake) == [(option, REP_ERR_TLS_REQD), (OPT_STARTTLS, REP_ACK)]


def test_export_name_without_tls_ends_the_connection_where_tls_is_required() -> None:
    handshake = server(TlsMode.REQUIRE, encode_option(OPT_EXPORT_NAME, b"disk"))
    assert handshake.closed
    assert answers(handshake) == []
    assert str(handshake.error) == "EXPORT_NAME refused: this server requires TLS"


def test_abort_is_acknowledged_where_tls_is_required() -> None:
    handshake = server(TlsMode.REQUIRE, encode_option(OPT_ABORT))
    assert answers(handshake) == [(OPT_ABORT, REP_ACK)]
    assert handshake.closed
    assert handshake.error is None


def test_export_name_through_tls_is_answered() -> None:
    handshake = encrypted(TlsMode.REQUIRE)
    handshake.receive_data(encode_option(OPT_EXPORT_NAME, b"disk"))
    assert handshake.negotiated is not None


@pytest.mark.parametrize("tls", TALKING)
def test_second_starttls_is_invalid(tls: TlsMode) -> None:
    handshake = encrypted(tls)
    handshake.receive_data(STARTTLS + GO)
    assert answers(handshake)[0] == (OPT_STARTTLS, REP_ERR_INVALID)
    assert handshake.negotiated is not None


def test_starttls_with_a_payload_is_invalid_and_starts_nothing() -> None:
    handshake = server(TlsMode.REQUIRE, encode_option(OPT_STARTTLS, b"x"))
    assert answers(handshake) == [(OPT_STARTTLS, REP_ERR_INVALID)]
    assert not handshake.starts_tls


def test_starttls_during_a_shutdown_is_refused() -> None:
    handshake = server(TlsMode.ON)
    handshake.shutdown()
    handshake.receive_data(STARTTLS)
    assert answers(handshake) == [(OPT_STARTTLS, REP_ERR_SHUTDOWN)]


def test_options_before_and_after_starttls_count_together() -> None:
    handshake = ServerHandshake(OneExport(), tls=TlsMode.ON, options_max=2)
    handshake.receive_data(NEW_CLIENT + STRUCTURED)
    handshake.receive_data(STARTTLS)
    handshake.tls_started()
    handshake.receive_data(GO)
    assert str(handshake.error) == "more than 2 options"


# ---- the client ----


def test_client_begins_with_starttls_and_names_nothing_in_plaintext() -> None:
    handshake, sent = feed_client(GREETING_FIXED, want_tls=True)
    assert sent == NEW_CLIENT + STARTTLS
    handshake.receive_data(ACK_TLS)
    assert handshake.starts_tls
    assert handshake.data_to_send() == []
    handshake.tls_started()
    assert handshake.data_to_send() == [STRUCTURED]
    info = INFO_EXPORT_PAYLOAD.pack(INFO_EXPORT, MIB, ALL_FLAGS)
    context = encode_meta_context(1, "base:allocation")
    handshake.receive_data(
        encode_option_reply(OPT_STRUCTURED_REPLY, REP_ACK)
        + encode_option_reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, context)
        + encode_option_reply(OPT_SET_META_CONTEXT, REP_ACK)
        + encode_option_reply(OPT_GO, REP_INFO, info)
        + encode_option_reply(OPT_GO, REP_ACK)
    )
    assert handshake.negotiated is not None
    assert handshake.negotiated.structured


def test_client_without_structured_replies_goes_on_with_go() -> None:
    handshake = ClientHandshake("disk", want_tls=True, want_structured=False)
    handshake.receive_data(GREETING_FIXED + ACK_TLS)
    handshake.data_to_send()
    handshake.tls_started()
    assert b"disk" in handshake.data_to_send()[0]


@pytest.mark.parametrize(
    ("rep", "sentence"),
    [
        (REP_ERR_UNSUP, "server has no TLS, and this connection demands it: why"),
        (REP_ERR_POLICY, "server has no TLS, and this connection demands it: why"),
        (
            REP_ERR_PLATFORM,
            "server refused option STARTTLS with ERR_PLATFORM: why",
        ),
        (REP_ERR_INVALID, "server refused option STARTTLS with ERR_INVALID: why"),
        (REP_ERR_SHUTDOWN, "server is shutting down: why"),
    ],
)
def test_client_that_demands_tls_is_not_talked_out_of_it(
    rep: int, sentence: str
) -> None:
    refusal = encode_option_reply(OPT_STARTTLS, rep, b"why")
    handshake, sent = feed_client(GREETING_FIXED + refusal, want_tls=True)
    assert str(handshake.error) == sentence
    assert sent == NEW_CLIENT + STARTTLS + encode_option(OPT_ABORT)
    assert handshake.negotiated is None


def test_client_that_demands_tls_does_not_take_an_old_server() -> None:
    handshake, sent = feed_client(GREETING.pack(NBDMAGIC, IHAVEOPT, 2), want_tls=True)
    assert "server has no TLS" in str(handshake.error)
    assert sent == b""


@pytest.mark.parametrize("option", [OPT_STRUCTURED_REPLY, OPT_GO, OPT_EXPORT_NAME])
def test_acknowledgement_of_another_option_is_not_one_of_starttls(option: int) -> None:
    forged = encode_option_reply(option, REP_ACK)
    handshake, _ = feed_client(GREETING_FIXED + forged, want_tls=True)
    shown = f"reply to option {option} while {OPT_NAMES[OPT_STARTTLS]} is under way"
    assert str(handshake.error) == shown


def test_plaintext_sent_together_with_the_acknowledgement_is_not_carried_over() -> None:
    forged = encode_option_reply(OPT_STRUCTURED_REPLY, REP_ACK)
    handshake = ClientHandshake("disk", want_tls=True)
    handshake.receive_data(GREETING_FIXED + ACK_TLS + forged)
    assert not handshake.starts_tls
    assert "plaintext" in str(handshake.error)


def test_plaintext_after_the_acknowledgement_is_not_carried_over() -> None:
    forged = encode_option_reply(OPT_STRUCTURED_REPLY, REP_ACK)
    handshake = ClientHandshake("disk", want_tls=True)
    handshake.receive_data(GREETING_FIXED + ACK_TLS)
    handshake.receive_data(b"")
    assert handshake.error is None
    handshake.receive_data(forged)
    assert "plaintext" in str(handshake.error)


def test_server_that_hangs_up_during_the_tls_handshake() -> None:
    handshake = ClientHandshake("disk", want_tls=True)
    handshake.receive_data(GREETING_FIXED + ACK_TLS)
    handshake.receive_eof()
    assert str(handshake.error) == "server hung up during the TLS handshake"


@pytest.mark.parametrize("tls", TALKING)
def test_there_is_no_tls_for_a_client_without_fixed_newstyle(tls: TlsMode) -> None:
    handshake = ServerHandshake(OneExport(), tls=tls)
    handshake.data_to_send()
    handshake.receive_data(U32.pack(FLAG_C_NO_ZEROES) + STARTTLS)
    assert not handshake.starts_tls
    [(option, rep, _)] = replies(b"".join(handshake.data_to_send()))
    assert (option, rep) == (OPT_STARTTLS, REP_ERR_POLICY)
    handshake.receive_data(GO)
    [*_, (_, rep, _)] = replies(b"".join(handshake.data_to_send()))
    # Not ERR_TLS_REQD: this client cannot have TLS.
    assert rep == (REP_ACK if tls is TlsMode.ON else REP_ERR_POLICY)
    assert (handshake.negotiated is not None) is (tls is TlsMode.ON)


def test_export_name_of_a_client_without_fixed_newstyle_is_refused_where_tls_is_required() -> (
    None
):
    handshake = ServerHandshake(OneExport(), tls=TlsMode.REQUIRE)
    handshake.receive_data(U32.pack(0) + encode_option(OPT_EXPORT_NAME, b"disk"))
    assert handshake.closed
    assert handshake.negotiated is None


def test_shutdown_does_not_tell_of_options_before_tls() -> None:
    handshake = server(TlsMode.REQUIRE)
    handshake.shutdown()
    handshake.receive_data(GO + encode_option(OPT_PEEK_EXPORT))
    sent = replies(b"".join(handshake.data_to_send()))
    assert [rep for _, rep, _ in sent] == [REP_ERR_TLS_REQD] * 2
