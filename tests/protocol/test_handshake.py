# SPDX-License-Identifier: Apache-2.0
"""The server's handshake, option by option."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from nbdtarget_protocol.consts import (
    EXPORT,
    FLAG_READ_ONLY,
    FLAG_SEND_DF,
    FLAG_SEND_FAST_ZERO,
    INFO_BLOCK_SIZE,
    INFO_BLOCK_SIZE_PAYLOAD,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_EXPORT_PAYLOAD,
    INFO_NAME,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_EXTENDED_HEADERS,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_PEEK_EXPORT,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    OPTION,
    REP_ACK,
    REP_ERR_INVALID,
    REP_ERR_SHUTDOWN,
    REP_ERR_TOO_BIG,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    U16,
    U32,
)
from nbdtarget_protocol.handshake import CONTEXTS_MAX, ExportInfo, ServerHandshake
from nbdtarget_protocol.options import (
    encode_info_request,
    encode_meta_context_request,
    encode_option,
)
from tests.support.protocol_feed import (
    ALL_FLAGS,
    DISK,
    KIB,
    MIB,
    NEW_CLIENT,
    OneExport,
    answer,
    ask,
    feed_server,
    replies,
    server,
)

STRUCTURED = encode_option(OPT_STRUCTURED_REPLY)
GO = encode_option(OPT_GO, encode_info_request("disk", []))
CONTEXTS = encode_meta_context_request("disk", ["base:allocation"])
SET = encode_option(OPT_SET_META_CONTEXT, CONTEXTS)


def test_greeting_is_there_at_once() -> None:
    handshake = ServerHandshake(OneExport())
    assert handshake.data_to_send() == [b"NBDMAGICIHAVEOPT\0\3"]
    assert handshake.data_to_send() == []
    assert handshake.trailing_data() == b""


def test_go_negotiates() -> None:
    handshake, sent = feed_server(GO)
    info = INFO_EXPORT_PAYLOAD.pack(INFO_EXPORT, MIB, ALL_FLAGS)
    assert replies(sent) == [(OPT_GO, REP_INFO, info), (OPT_GO, REP_ACK, b"")]
    assert handshake.negotiated is not None
    assert handshake.negotiated.export is DISK
    assert not handshake.negotiated.structured
    assert handshake.negotiated.contexts == ()
    assert not handshake.closed


def test_go_with_the_empty_name_takes_the_default_export() -> None:
    handshake, _ = feed_server(encode_option(OPT_GO, encode_info_request("", [])))
    assert handshake.negotiated is not None
    assert handshake.negotiated.export is DISK


def test_go_answers_what_was_asked() -> None:
    infos = [INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE, 999]
    data = encode_option(OPT_GO, encode_info_request("", infos))
    _, sent = feed_server(data)
    assert [data for _, _, data in replies(sent)] == [
        INFO_EXPORT_PAYLOAD.pack(INFO_EXPORT, MIB, ALL_FLAGS),
        U16.pack(INFO_NAME) + b"disk",
        U16.pack(INFO_DESCRIPTION) + b"a disk",
        INFO_BLOCK_SIZE_PAYLOAD.pack(INFO_BLOCK_SIZE, 1, 4096, 32 * MIB),
        b"",
    ]


def test_go_without_a_description_tells_none() -> None:
    handshake = ServerHandshake(OneExport(ExportInfo("disk", 1, 0)))
    infos = encode_info_request("disk", [INFO_DESCRIPTION])
    handshake.receive_data(NEW_CLIENT + encode_option(OPT_GO, infos))
    assert len(handshake.data_to_send()) == 3  # greeting, INFO_EXPORT, ACK


def test_go_tells_block_sizes_unasked_when_they_bind() -> None:
    export = ExportInfo("disk", MIB, 0, block_size_min=512)
    handshake = ServerHandshake(OneExport(export))
    handshake.data_to_send()
    handshake.receive_data(NEW_CLIENT + GO)
    payloads = [p for _, _, p in replies(b"".join(handshake.data_to_send()))]
    block_size = INFO_BLOCK_SIZE_PAYLOAD.pack(INFO_BLOCK_SIZE, 512, 4096, 32 * MIB)
    assert block_size in payloads


@pytest.mark.parametrize("option", [OPT_INFO, OPT_GO])
def test_unknown_export_is_said(option: int) -> None:
    data = encode_option(option, encode_info_request("disc", []))
    handshake, sent = feed_server(data)
    assert replies(sent) == [(option, REP_ERR_UNKNOWN, b"no export 'disc'")]
    assert handshake.negotiated is None
    assert not handshake.closed


def test_missing_default_export_is_said() -> None:
    class Nothing(OneExport):
        def lookup(self, name: str) -> ExportInfo | None:
            return None

    handshake = ServerHandshake(Nothing())
    handshake.data_to_send()
    data = encode_option(OPT_GO, encode_info_request("", []))
    handshake.receive_data(NEW_CLIENT + data)
    sent = b"".join(handshake.data_to_send())
    assert replies(sent) == [(OPT_GO, REP_ERR_UNKNOWN, b"no default export")]


def test_info_goes_on_haggling() -> None:
    info = encode_option(OPT_INFO, encode_info_request("disk", []))
    handshake, sent = feed_server(info + info)
    assert [rep for _, rep, _ in replies(sent)] == [REP_INFO, REP_ACK] * 2
    assert handshake.negotiated is None


def test_go_after_structured_reply_offers_df() -> None:
    handshake, sent = feed_server(STRUCTURED + GO)
    assert handshake.negotiated is not None
    assert handshake.negotiated.structured
    _, _, flags = INFO_EXPORT_PAYLOAD.unpack(replies(sent)[1][2])
    assert flags == ALL_FLAGS | FLAG_SEND_DF == handshake.negotiated.flags


def test_export_name_answers_without_a_header() -> None:
    handshake, sent = feed_server(encode_option(OPT_EXPORT_NAME, b"disk"))
    assert sent == EXPORT.pack(MIB, ALL_FLAGS)
    assert handshake.negotiated is not None


@pytest.mark.parametrize("name", [b"disc", b"\xff", b"disk\0", b"x" * 4097])
def test_export_name_closes_when_it_cannot_be_served(name: bytes) -> None:
    handshake, sent = feed_server(encode_option(OPT_EXPORT_NAME, name))
    assert sent == b""
    assert handshake.closed
    assert handshake.error is not None
    assert handshake.negotiated is None


def test_abort_is_acknowledged_and_closes() -> None:
    handshake, sent = feed_server(encode_option(OPT_ABORT))
    assert replies(sent) == [(OPT_ABORT, REP_ACK, b"")]
    assert handshake.closed
    assert handshake.error is None
    handshake.receive_data(GO)
    assert handshake.data_to_send() == []


@pytest.mark.parametrize("length", [5, 300 * KIB])
def test_abort_with_a_payload_is_acknowledged(length: int) -> None:
    handshake = server()
    handshake.receive_data(NEW_CLIENT + encode_option(OPT_ABORT, bytes(length)))
    sent = b"".join(handshake.data_to_send())
    assert replies(sent) == [(OPT_ABORT, REP_ACK, b"")]
    assert handshake.closed


def test_list_names_exports() -> None:
    _, sent = feed_server(encode_option(OPT_LIST))
    assert replies(sent) == [
        (OPT_LIST, REP_SERVER, U32.pack(4) + b"diska disk"),
        (OPT_LIST, REP_ACK, b""),
    ]


def test_list_leaves_out_names_that_cannot_be_sent() -> None:
    exports = OneExport(listed=[("\udc80", ""), ("ok", ""), ("x" * 4097, "")])
    handshake = ServerHandshake(exports)
    handshake.data_to_send()
    handshake.receive_data(NEW_CLIENT + encode_option(OPT_LIST))
    sent = replies(b"".join(handshake.data_to_send()))
    assert [payload for _, _, payload in sent] == [U32.pack(2) + b"ok", b""]


@pytest.mark.parametrize("option", [OPT_PEEK_EXPORT, OPT_STARTTLS, 0, 77])
def test_option_that_is_not_served_is_unsupported(option: int) -> None:
    assert ask(encode_option(option), GO)[0] == (option, REP_ERR_UNSUP)


@pytest.mark.parametrize(
    "option", [OPT_LIST, OPT_STARTTLS, OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS]
)
def test_option_without_payload_is_invalid_with_one(option: int) -> None:
    assert answer(option, b"payload") == REP_ERR_INVALID


def test_meta_contexts_are_listed() -> None:
    every = encode_meta_context_request("disk", [])
    _, sent = feed_server(STRUCTURED + encode_option(OPT_LIST_META_CONTEXT, every))
    context = U32.pack(0) + b"base:allocation"
    assert replies(sent)[1:] == [
        (OPT_LIST_META_CONTEXT, REP_META_CONTEXT, context),
        (OPT_LIST_META_CONTEXT, REP_ACK, b""),
    ]


@pytest.mark.parametrize(
    ("query", "listed"),
    [("base:", True), ("base:allocation", True), ("base:x", False), ("qemu:", False)],
)
def test_meta_contexts_are_listed_by_query(query: str, listed: bool) -> None:
    data = encode_meta_context_request("disk", [query])
    sent = ask(STRUCTURED, encode_option(OPT_LIST_META_CONTEXT, data))
    assert ((OPT_LIST_META_CONTEXT, REP_META_CONTEXT) in sent) is listed
    assert sent[-1] == (OPT_LIST_META_CONTEXT, REP_ACK)


@pytest.mark.parametrize("option", [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT])
def test_meta_contexts_of_an_unknown_export(option: int) -> None:
    data = encode_meta_context_request("disc", ["base:allocation"])
    assert answer(option, data, STRUCTURED) == REP_ERR_UNKNOWN


def test_meta_context_is_selected() -> None:
    handshake, _ = feed_server(STRUCTURED + SET + GO)
    assert handshake.negotiated is not None
    assert handshake.negotiated.contexts == ((1, "base:allocation"),)


BASE, HYDRATION, CACHE = "base:allocation", "x-nbdtarget:hydration", "x-nbdtarget:cache"
RICH = replace(DISK, contexts=(BASE, HYDRATION, CACHE))


def contexts_answered(option: int, queries: list[str]) -> list[tuple[int, str]]:
    """(id, name) of each META_CONTEXT reply, which an ACK must follow."""
    data = encode_meta_context_request("disk", queries)
    _, sent = feed_server(STRUCTURED + encode_option(option, data), RICH)
    *contexts, last = replies(sent)[1:]
    assert last == (option, REP_ACK, b"")
    assert {rep for _, rep, _ in contexts} <= {REP_META_CONTEXT}
    return [
        (U32.unpack_from(payload)[0], payload[4:].decode())
        for _, _, payload in contexts
    ]


@pytest.mark.parametrize(
    ("queries", "listed"),
    [
        ([], [BASE, HYDRATION, CACHE]),
        (["base:"], [BASE]),
        (["x-nbdtarget:"], [HYDRATION, CACHE]),
        (["x-nbdtarget:", HYDRATION, "base:", BASE], [BASE, HYDRATION, CACHE]),
        ([CACHE, BASE, CACHE], [BASE, CACHE]),
        (["x-nbdtarget", "x-:", "qemu:", "", ":", "x-nbdtarget:hydr"], []),
    ],
)
def test_meta_contexts_of_several_are_listed(
    queries: list[str], listed: list[str]
) -> None:
    answered = contexts_answered(OPT_LIST_META_CONTEXT, queries)
    assert answered == [(0, name) for name in listed]


@pytest.mark.parametrize(
    ("queries", "selected"),
    [
        ([], []),
        (["base:", "x-nbdtarget:"], []),
        ([HYDRATION], [(2, HYDRATION)]),
        ([CACHE, "nonsense", CACHE, BASE, "qemu:x"], [(1, BASE), (3, CACHE)]),
        ([HYDRATION, CACHE, BASE], [(1, BASE), (2, HYDRATION), (3, CACHE)]),
    ],
)
def test_meta_contexts_of_several_are_selected(
    queries: list[str], selected: list[tuple[int, str]]
) -> None:
    assert contexts_answered(OPT_SET_META_CONTEXT, queries) == selected
    data = encode_meta_context_request("disk", queries)
    set_option = encode_option(OPT_SET_META_CONTEXT, data)
    handshake, _ = feed_server(STRUCTURED + set_option + GO, RICH)
    assert handshake.negotiated is not None
    assert handshake.negotiated.contexts == tuple(selected)


def test_query_that_is_not_utf8_names_nothing() -> None:
    data = encode_meta_context_request("disk", ["??"]).replace(b"??", b"\xff\xfe")
    for option in (OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT):
        sent = ask(STRUCTURED, encode_option(option, data))
        assert sent[1:] == [(option, REP_ACK)]


@pytest.mark.parametrize(
    "contexts",
    [
        (BASE, BASE),
        ("leaf",),
        (":leaf",),
        ("space:",),
        ("name space:leaf",),
        ("name\nspace:leaf",),
        ("x-y:\0",),
        tuple(f"x-y:{nr}" for nr in range(CONTEXTS_MAX + 1)),
    ],
)
def test_contexts_that_can_not_be_offered_are_a_bug(contexts: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError, match="context"):
        replace(DISK, contexts=contexts)


def test_export_may_offer_no_context() -> None:
    _, sent = feed_server(STRUCTURED + SET + GO, replace(DISK, contexts=()))
    assert REP_META_CONTEXT not in [rep for _, rep, _ in replies(sent)]


def test_bad_magic_closes() -> None:
    handshake, sent = feed_server(OPTION.pack(1, OPT_GO, 0))
    assert sent == b""
    assert handshake.closed
    assert str(handshake.error) == "bad option magic 0x1"


@pytest.mark.parametrize("flags", [4, 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flag_closes(flags: int) -> None:
    handshake = server()
    handshake.receive_data(U32.pack(flags) + GO)
    assert handshake.closed
    assert str(handshake.error) == f"unknown client flags {flags:#x}"
    assert handshake.data_to_send() == []


def test_client_that_forgot_fixed_newstyle_is_served() -> None:
    handshake = server()
    handshake.receive_data(U32.pack(0) + GO)
    assert handshake.negotiated is not None


def test_too_many_options_close() -> None:
    options = encode_option(OPT_PEEK_EXPORT) * 5
    handshake, sent = feed_server(options, options_max=4)
    assert len(replies(sent)) == 4
    assert str(handshake.error) == "more than 4 options"


def test_too_many_answers_close() -> None:
    handshake, sent = feed_server(encode_option(OPT_LIST) * 100, output_max=200)
    assert (OPT_LIST, REP_ERR_TOO_BIG) in [(o, r) for o, r, _ in replies(sent)]
    assert str(handshake.error) == "asked for more than 400 bytes of answers"
    assert len(sent) < 500


def test_list_ends_when_there_are_too_many_exports() -> None:
    def names() -> Iterator[tuple[str, str]]:
        for i in range(1 << 40):  # lazily, or this test never ends
            yield str(i), ""

    class Many(OneExport):
        def names(self) -> Iterable[tuple[str, str]]:
            return names()

    handshake = ServerHandshake(Many(), list_max=3)
    handshake.data_to_send()
    handshake.receive_data(NEW_CLIENT + encode_option(OPT_LIST))
    reps = [rep for _, rep, _ in replies(b"".join(handshake.data_to_send()))]
    assert reps == [REP_SERVER] * 3 + [REP_ERR_TOO_BIG]


def test_shutdown_refuses_options_but_abort() -> None:
    handshake = server()
    handshake.receive_data(NEW_CLIENT)
    handshake.shutdown()
    # Known ones and others, also with a payload that is not taken.
    refused = [GO, encode_option(OPT_LIST), encode_option(OPT_LIST, b"x")]
    refused += [encode_option(OPT_PEEK_EXPORT), encode_option(77, b"payload")]
    handshake.receive_data(b"".join(refused) + encode_option(OPT_ABORT, b"x"))
    sent = replies(b"".join(handshake.data_to_send()))
    assert [rep for _, rep, _ in sent] == [REP_ERR_SHUTDOWN] * 5 + [REP_ACK]


def test_shutdown_closes_on_export_name() -> None:
    handshake = server()
    handshake.shutdown()
    handshake.receive_data(NEW_CLIENT + encode_option(OPT_EXPORT_NAME, b"disk"))
    assert handshake.closed
    assert "shutting down" in str(handshake.error)


def test_what_follows_go_is_left_alone() -> None:
    handshake = server()
    handshake.receive_data(NEW_CLIENT + GO + b"requests")
    handshake.receive_data(b" and more")
    assert handshake.trailing_data() == b"requests and more"
    assert handshake.trailing_data() == b""


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": -1},
        {"size": 1 << 63},
        {"name": "\udc80"},
        {"flags": FLAG_SEND_DF},
        {"flags": FLAG_SEND_FAST_ZERO | FLAG_READ_ONLY},
        {"block_size_min": 0},
        {"block_size_min": 3},
        {"block_size_min": 1 << 17},
        {"block_size_preferred": 256},
        {"block_size_preferred": 5000},
        {"payload_max": 1024},
        {"payload_max": 1 << 32},
    ],
)
def test_export_that_would_break_the_protocol_is_ours_to_fix(
    wrong: dict[str, Any],
) -> None:
    arguments: dict[str, Any] = {"name": "disk", "size": 1, "flags": 0}
    with pytest.raises(AssertionError):
        ExportInfo(**{**arguments, **wrong})
