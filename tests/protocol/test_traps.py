# SPDX-License-Identifier: Apache-2.0
"""The mistakes that NBD servers make most often, one test each, as far as they concern the rules of the wire.

The numbers are those of our list of traps. What only a server with sockets and devices can
get wrong (a slow client, a flush over two connections, replies after DISC, a disk that fails
within a reply) is tested there; here is what the wire contributes to it.
"""

from dataclasses import replace

import pytest

from nbdtarget_protocol.client import ClientTransmission
from nbdtarget_protocol.consts import (
    CHUNK,
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EINVAL,
    EIO,
    ENOSPC,
    ENOTSUP,
    EOVERFLOW,
    EPERM,
    ESHUTDOWN,
    FLAG_CAN_MULTI_CONN,
    FLAG_READ_ONLY,
    FLAG_SEND_DF,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FUA,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_BLOCK_SIZE_PAYLOAD,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_EXPORT_PAYLOAD,
    INFO_NAME,
    OFFSET_DATA,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    OPTION,
    REP_ACK,
    REP_ERR_INVALID,
    REP_ERR_SHUTDOWN,
    REP_ERR_TOO_BIG,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    REPLY_FLAG_DONE,
    SIMPLE_REPLY,
    STRING_MAX,
    U16,
    U32,
)
from nbdtarget_protocol.errors import ReplyError
from nbdtarget_protocol.handshake import Negotiated, ServerHandshake
from nbdtarget_protocol.options import (
    encode_info_request,
    encode_meta_context_request,
    encode_option,
)
from nbdtarget_protocol.transmission import (
    PAYLOAD_ACCEPT,
    PAYLOAD_DISCONNECT,
    PAYLOAD_DRAIN,
    ServerTransmission,
    block_status,
    clip_extents,
    error_chunk,
    none_chunk,
    offset_data_header,
    simple_reply,
    wire_errno,
)
from tests.support.protocol_feed import (
    ALL_FLAGS,
    CONTEXTS,
    DISK,
    KIB,
    MIB,
    NEW_CLIENT,
    SERVED,
    SERVED_SIMPLE,
    STRUCTURED,
    OneExport,
    answer,
    ask,
    client,
    data_of,
    feed_server,
    replies,
    server,
)

GO = encode_option(OPT_GO, encode_info_request("disk", []))
STRUCTURED_REPLY = encode_option(OPT_STRUCTURED_REPLY)
ALLOCATION = encode_meta_context_request("disk", ["base:allocation"])
SET_ALLOCATION = encode_option(OPT_SET_META_CONTEXT, ALLOCATION)
UINT32_MAX = (1 << 32) - 1


def validate(
    command: int,
    offset: int,
    length: int,
    flags: int = 0,
    negotiated: Negotiated = SERVED,
) -> int:
    return ServerTransmission(negotiated).validate(command, flags, offset, length)


def contexts_after(*options: bytes) -> tuple[tuple[int, str], ...]:
    handshake, _ = feed_server(b"".join(options))
    assert handshake.negotiated is not None
    return handshake.negotiated.contexts


# Handshake.


def test_trap_01_unknown_option_puts_the_stream_out_of_step() -> None:
    unknown = encode_option(0x4711, OPTION.pack(IHAVEOPT, OPT_ABORT, 0) * 3)
    assert ask(unknown, GO) == [
        (0x4711, REP_ERR_UNSUP),
        (OPT_GO, REP_INFO),
        (OPT_GO, REP_ACK),
    ]


@pytest.mark.parametrize(
    ("option", "rep"), [(OPT_GO, REP_ERR_TOO_BIG), (0x4711, REP_ERR_UNSUP)]
)
def test_trap_02_long_option_is_buffered_or_drops_the_client(
    option: int, rep: int
) -> None:
    handshake = server()
    handshake.receive_data(NEW_CLIENT + OPTION.pack(IHAVEOPT, option, 32 * MIB))
    for _ in range(512):
        handshake.receive_data(bytes(64 * KIB))
        assert len(handshake._buffer) == 0
    handshake.receive_data(GO)
    sent = replies(b"".join(handshake.data_to_send()))
    assert [r for _, r, _ in sent] == [rep, REP_INFO, REP_ACK]


def test_trap_02_endless_option_is_swallowed_for_ever() -> None:
    handshake, sent = feed_server(OPTION.pack(IHAVEOPT, 0x4711, 32 * MIB + 1))
    assert handshake.closed
    assert sent == b""


@pytest.mark.parametrize("option", [OPT_INFO, OPT_GO])
@pytest.mark.parametrize(
    "data",
    [
        U32.pack(7) + b"disk" + U16.pack(0),
        U32.pack(UINT32_MAX) + b"disk" + U16.pack(0),
        U32.pack(5) + b"disk\0" + U16.pack(0),
        U32.pack(1) + b"\xff" + U16.pack(0),
        U32.pack(STRING_MAX + 1) + b"x" * (STRING_MAX + 1) + U16.pack(0),
    ],
)
def test_trap_03_name_is_longer_than_its_option_or_no_text(
    option: int, data: bytes
) -> None:
    assert answer(option, data) == REP_ERR_INVALID


def test_trap_04_info_and_go_disagree() -> None:
    infos = [INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE]
    request = encode_info_request("", infos)
    _, sent = feed_server(
        STRUCTURED_REPLY
        + encode_option(OPT_INFO, request)
        + encode_option(OPT_GO, request)
    )
    answers = replies(sent)[1:]
    infos_of = {
        option: [data for o, _, data in answers if o == option]
        for option in (OPT_INFO, OPT_GO)
    }
    assert infos_of[OPT_INFO] == infos_of[OPT_GO]
    flags = ALL_FLAGS | FLAG_SEND_DF
    assert INFO_EXPORT_PAYLOAD.pack(INFO_EXPORT, MIB, flags) in infos_of[OPT_INFO]


@pytest.mark.parametrize("infos", [[], [77], [INFO_NAME, INFO_NAME, 0xFFFF]])
def test_trap_05_export_info_is_left_out_or_unknown_infos_refused(
    infos: list[int],
) -> None:
    _, sent = feed_server(encode_option(OPT_GO, encode_info_request("disk", infos)))
    answers = replies(sent)
    kinds = [U16.unpack_from(data)[0] for _, rep, data in answers if rep == REP_INFO]
    assert kinds.count(INFO_EXPORT) == 1
    assert kinds.count(INFO_NAME) == (INFO_NAME in infos)
    assert answers[-1][1] == REP_ACK


def test_trap_06_list_is_one_giant_buffer() -> None:
    handshake = ServerHandshake(
        OneExport(listed=[(f"disk{i}", "") for i in range(9999)])
    )
    handshake.data_to_send()
    handshake.receive_data(NEW_CLIENT + encode_option(OPT_LIST))
    pieces = handshake.data_to_send()
    assert max(map(len, pieces)) < 40
    reps = [rep for _, rep, _ in replies(b"".join(pieces))]
    assert reps == [REP_SERVER] * 9999 + [REP_ACK]


@pytest.mark.parametrize(
    "second",
    [
        encode_meta_context_request("disc", ["base:allocation"]),  # unknown export
        encode_meta_context_request("disk", []),
        encode_meta_context_request("disk", ["base:"]),
        b"malformed",
        bytes(300 * KIB),  # ERR_TOO_BIG
    ],
)
def test_trap_07_old_contexts_survive_a_new_call(second: bytes) -> None:
    handshake = server()
    handshake.receive_data(NEW_CLIENT + STRUCTURED_REPLY + SET_ALLOCATION)
    handshake.receive_data(encode_option(OPT_SET_META_CONTEXT, second) + GO)
    assert handshake.negotiated is not None
    assert handshake.negotiated.contexts == ()


def test_trap_07_contexts_survive_a_go_for_another_name() -> None:
    assert contexts_after(STRUCTURED_REPLY, SET_ALLOCATION, GO) == CONTEXTS
    other = encode_option(OPT_GO, encode_info_request("", []))
    assert contexts_after(STRUCTURED_REPLY, SET_ALLOCATION, other) == ()
    other = encode_option(OPT_EXPORT_NAME, b"")
    assert contexts_after(STRUCTURED_REPLY, SET_ALLOCATION, other) == ()


def test_trap_07_unknown_queries_are_errors() -> None:
    queries = [
        "qemu:dirty-bitmap:x",
        "base:nonsense",
        "base:allocation",
        "base:allocation",
        "no",
    ]
    data = encode_meta_context_request("disk", queries)
    _, sent = feed_server(STRUCTURED_REPLY + encode_option(OPT_SET_META_CONTEXT, data))
    assert [rep for _, rep, _ in replies(sent)][1:] == [REP_META_CONTEXT, REP_ACK]


def test_trap_07_wildcard_is_selected() -> None:
    wildcard = encode_meta_context_request("disk", ["base:"])
    set_option = encode_option(OPT_SET_META_CONTEXT, wildcard)
    assert ask(STRUCTURED_REPLY, set_option)[1:] == [(OPT_SET_META_CONTEXT, REP_ACK)]
    list_option = encode_option(OPT_LIST_META_CONTEXT, wildcard)
    assert (OPT_LIST_META_CONTEXT, REP_META_CONTEXT) in ask(
        STRUCTURED_REPLY, list_option
    )


def test_trap_07_contexts_without_structured_replies() -> None:
    assert answer(OPT_SET_META_CONTEXT, ALLOCATION) == REP_ERR_INVALID
    assert contexts_after(SET_ALLOCATION, STRUCTURED_REPLY, GO) == ()


@pytest.mark.parametrize(
    ("client_flags", "length"), [(0, 134), (1, 134), (2, 10), (3, 10)]
)
def test_trap_08_zero_padding_is_wrong(client_flags: int, length: int) -> None:
    handshake = ServerHandshake(OneExport())
    assert handshake.data_to_send()[0].endswith(
        U16.pack(3)
    )  # NO_ZEROES is always offered
    handshake.receive_data(
        U32.pack(client_flags) + encode_option(OPT_EXPORT_NAME, b"disk")
    )
    sent = b"".join(handshake.data_to_send())
    assert len(sent) == length
    assert not any(sent[10:])


def test_trap_09_slow_client_costs_memory_while_it_waits() -> None:
    handshake = server()
    handshake.receive_data(NEW_CLIENT + OPTION.pack(IHAVEOPT, OPT_GO, 1000))
    for _ in range(999):
        handshake.receive_data(b"x")
    assert len(handshake._buffer) == OPTION.size + 999
    assert handshake.data_to_send() == []


def test_trap_10_size_of_2_to_the_63() -> None:
    assert replace(DISK, size=(1 << 63) - 1).size
    with pytest.raises(AssertionError):
        replace(DISK, size=1 << 63)


# Size constraints.


def test_trap_11_defaults_are_not_kept() -> None:
    assert (DISK.block_size_min, DISK.block_size_preferred) == (1, 4096)
    assert DISK.payload_max == 33_554_432
    assert validate(CMD_WRITE, 1, 3) == 0


@pytest.mark.parametrize(
    "sizes", [(3, 4096), (1 << 17, 1 << 17), (4096, 512), (1, 256), (512, 1000)]
)
def test_trap_12_block_sizes_are_no_powers_of_two(sizes: tuple[int, int]) -> None:
    minimum, preferred = sizes
    with pytest.raises(AssertionError):
        replace(DISK, block_size_min=minimum, block_size_preferred=preferred)


def test_trap_13_client_that_did_not_ask_for_block_sizes_corrupts_data() -> None:
    assert ask(GO)[-1] == (OPT_GO, REP_ACK)  # never ERR_BLOCK_SIZE_REQD
    export = replace(DISK, block_size_min=4096)
    negotiated = Negotiated(export, False)
    assert validate(CMD_WRITE, 512, 512, negotiated=negotiated) == EINVAL


def test_trap_14_block_sizes_that_bind_are_only_told_when_asked() -> None:
    handshake = ServerHandshake(OneExport(replace(DISK, block_size_min=4096)))
    handshake.data_to_send()
    handshake.receive_data(NEW_CLIENT + GO)
    told = INFO_BLOCK_SIZE_PAYLOAD.pack(INFO_BLOCK_SIZE, 4096, 4096, 32 * MIB)
    assert told in [data for _, _, data in replies(b"".join(handshake.data_to_send()))]


def test_trap_15_large_payload_is_treated_as_an_attack() -> None:
    transmission = ServerTransmission(SERVED)
    assert transmission.payload_rule(32 * MIB) == PAYLOAD_ACCEPT
    assert transmission.payload_rule(64 * MIB) == PAYLOAD_ACCEPT
    assert transmission.payload_rule(64 * MIB + 1) == PAYLOAD_DRAIN
    assert transmission.payload_rule(UINT32_MAX) == PAYLOAD_DISCONNECT


@pytest.mark.parametrize(
    "command", [CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE, CMD_BLOCK_STATUS]
)
def test_trap_16_command_without_payload_is_held_to_the_payload_limit(
    command: int,
) -> None:
    negotiated = replace(SERVED, export=replace(DISK, size=1 << 40))
    assert validate(command, 0, UINT32_MAX, negotiated=negotiated) == 0


# Transmission.


@pytest.mark.parametrize(
    ("offset", "flags", "export_flags", "errno"),
    [
        (MIB, 0, ALL_FLAGS, ENOSPC),
        (0, CMD_FLAG_DF, ALL_FLAGS, EINVAL),
        (0, 0, ALL_FLAGS | FLAG_READ_ONLY, EPERM),
    ],
)
def test_trap_17_payload_of_a_refused_write_is_taken_for_requests(
    offset: int, flags: int, export_flags: int, errno: int
) -> None:
    negotiated = Negotiated(replace(DISK, flags=export_flags), True)
    transmission = ServerTransmission(negotiated)
    assert transmission.validate(CMD_WRITE, flags, offset, 512) == errno
    # The rule for the payload does not depend on whether the request is refused.
    assert transmission.payload_rule(512) == PAYLOAD_ACCEPT


@pytest.mark.parametrize(
    ("command", "errno"),
    [
        (CMD_WRITE, ENOSPC),
        (CMD_WRITE_ZEROES, ENOSPC),
        (CMD_READ, EINVAL),
        (CMD_TRIM, EINVAL),
        (CMD_CACHE, EINVAL),
        (CMD_BLOCK_STATUS, EINVAL),
    ],
)
@pytest.mark.parametrize(
    ("offset", "length"),
    [(MIB, 1), (MIB - 1, 2), ((1 << 64) - 1, 1), ((1 << 64) - 512, 1024), (MIB + 1, 0)],
)
def test_trap_18_range_past_the_end_or_round_the_corner(
    command: int, errno: int, offset: int, length: int
) -> None:
    assert validate(command, offset, length) == errno


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (8, 0),
        (0xFFFF, 0),
        (CMD_READ, CMD_FLAG_NO_HOLE),
        (CMD_WRITE, CMD_FLAG_REQ_ONE),
        (CMD_FLUSH, 1 << 5),
        (CMD_TRIM, CMD_FLAG_NO_HOLE),
        (CMD_CACHE, 1 << 15),
    ],
)
def test_trap_19_unknown_command_or_flag_is_let_through(
    command: int, flags: int
) -> None:
    assert validate(command, 0, 512, flags) == EINVAL


@pytest.mark.parametrize(
    "command", [CMD_READ, CMD_WRITE, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES]
)
@pytest.mark.parametrize("offset", [0, MIB])
def test_trap_20_length_0_is_an_error(command: int, offset: int) -> None:
    assert validate(command, offset, 0) == 0
    assert (
        validate(CMD_BLOCK_STATUS, offset, 0) == EINVAL
    )  # no descriptor would be right


@pytest.mark.parametrize("command", range(8))
def test_trap_21_fua_is_refused_or_taken_without_offer(command: int) -> None:
    assert validate(command, 0, 512, CMD_FLAG_FUA) == 0
    export = replace(DISK, flags=ALL_FLAGS & ~FLAG_SEND_FUA)
    without = Negotiated(export, True, CONTEXTS)
    expected = 0 if command == CMD_DISC else EINVAL
    assert validate(command, 0, 512, CMD_FLAG_FUA, without) == expected


def test_trap_22_flush_with_a_range_is_refused() -> None:
    assert validate(CMD_FLUSH, 1 << 63, 512) == 0
    assert validate(CMD_FLUSH, 0, 0) == 0


def test_trap_23_multi_conn_is_lost_or_made_up() -> None:
    assert SERVED.flags & FLAG_CAN_MULTI_CONN
    without = replace(DISK, flags=ALL_FLAGS & ~FLAG_CAN_MULTI_CONN)
    assert not Negotiated(without, True).flags & FLAG_CAN_MULTI_CONN


def test_trap_24_disc_with_bogus_fields_is_refused() -> None:
    assert validate(CMD_DISC, (1 << 64) - 1, UINT32_MAX, 0xFFFF) == 0


def test_trap_25_server_drops_a_client_that_only_haggles_badly() -> None:
    bad = [
        encode_option(option, b"\xff" * 9) for option in (3, 4, 5, 6, 8, 9, 10, 11, 12)
    ]
    handshake, sent = feed_server(b"".join(bad) + GO)
    assert not handshake.closed
    assert handshake.negotiated is not None
    assert len(replies(sent)) == len(bad) + 2


@pytest.mark.parametrize("cookie", [0, 1, (7 << 32) | 127, (1 << 64) - 1])
def test_trap_26_cookie_is_looked_into(cookie: int) -> None:
    transmission = ClientTransmission(STRUCTURED)
    for reply in (
        simple_reply(0, cookie),
        none_chunk(cookie),
        error_chunk(cookie, EIO),
    ):
        transmission.request(CMD_FLUSH, 0, cookie, 0, 0)  # again and again the same
        [completion] = transmission.receive_data(reply)
        assert completion.cookie == cookie


def test_trap_27_replies_in_another_order_are_mixed_up() -> None:
    requests = [(CMD_READ, 0, cookie, cookie * 512, 512) for cookie in range(4)]
    transmission = client(STRUCTURED, requests)
    order = [2, 0, 3, 1]
    data = b"".join(
        offset_data_header(cookie, cookie * 512, 512, True) + bytes([cookie]) * 512
        for cookie in order
    )
    completions = transmission.receive_data(data)
    assert [c.cookie for c in completions] == order
    assert all(data_of(c) == bytes([c.cookie]) * 512 for c in completions)


def test_trap_28_read_gets_a_simple_reply_in_structured_mode() -> None:
    assert ServerTransmission(SERVED).structured
    error = error_chunk(1, EINVAL, b"x" * 5000)
    assert len(error) == CHUNK.size + 6 + STRING_MAX
    for reply in (simple_reply(EINVAL, 1), simple_reply(0, 1) + bytes(512)):
        with pytest.raises(ReplyError, match="simple reply"):
            client(STRUCTURED, [(CMD_READ, 0, 1, 0, 512)]).receive_data(reply)


def test_trap_29_done_on_data_that_may_still_fail() -> None:
    may_fail = offset_data_header(1, 0, 512, False) + bytes(512)
    assert not CHUNK.unpack_from(may_fail)[1] & REPLY_FLAG_DONE
    transmission = client(STRUCTURED, [(CMD_READ, 0, 1, 0, 512)])
    assert transmission.receive_data(may_fail) == []
    [completion] = transmission.receive_data(error_chunk(1, EIO, offset=100))
    assert completion.error == EIO


def test_trap_30_df_is_refused_or_allowed_without_structured_replies() -> None:
    assert validate(CMD_READ, 0, 65536, CMD_FLAG_DF) == 0
    assert validate(CMD_READ, 0, 65536, CMD_FLAG_DF, SERVED_SIMPLE) == EINVAL
    small = ServerTransmission(SERVED, payload_max=65536)
    assert small.validate(CMD_READ, CMD_FLAG_DF, 0, 65536) == 0
    assert small.validate(CMD_READ, CMD_FLAG_DF, 0, 65537) == EOVERFLOW
    assert not SERVED_SIMPLE.flags & FLAG_SEND_DF


@pytest.mark.parametrize("length", [MIB - 1, MIB, MIB + 1, 2 * MIB])
def test_trap_30_df_gets_a_chunk_beyond_the_maximum_payload(length: int) -> None:
    export = replace(DISK, size=4 * MIB, payload_max=MIB)
    transmission = ServerTransmission(Negotiated(export, structured=True))
    unfragmented = (CMD_READ, CMD_FLAG_DF, 0, length)
    assert transmission.validate(*unfragmented) == (length > MIB and EOVERFLOW)
    assert transmission.validate(CMD_READ, 0, 0, length) == 0  # in several chunks


def test_trap_31_chunk_header_counts_as_payload() -> None:
    header = offset_data_header(1, 0, 64 * MIB, True)
    assert len(header) == 28 == OFFSET_DATA.size
    assert CHUNK.unpack_from(header)[4] == 64 * MIB + 8


def test_trap_32_descriptors_are_empty_unmerged_or_too_long() -> None:
    extents = [(512, 0), (512, 0), (0, 3), (1 << 40, 3)]
    assert clip_extents(extents, 4096, req_one=False) == [(1024, 0), (3072, 3)]
    assert clip_extents(extents, 4096, req_one=True) == [(1024, 0)]
    assert clip_extents(extents, 100, req_one=True) == [(100, 0)]
    assert clip_extents([(1 << 40, 3)], UINT32_MAX, req_one=False) == [(UINT32_MAX, 3)]


@pytest.mark.slow
def test_trap_32_descriptors_are_off_by_one_or_overflow() -> None:
    extents = ((1, i & 1) for i in range((1 << 20) + 1))
    clipped = clip_extents(extents, UINT32_MAX, req_one=False)
    assert len(block_status(1, 1, clipped, True)) == CHUNK.size + 8_388_612


def test_trap_32_block_status_without_contexts_is_served() -> None:
    assert (
        validate(CMD_BLOCK_STATUS, 0, 512, negotiated=Negotiated(DISK, True)) == EINVAL
    )


def test_trap_32_done_is_on_each_context_s_chunk() -> None:
    contexts = ((1, "base:allocation"), (2, "x-y:z"))
    negotiated = replace(STRUCTURED, contexts=contexts)
    transmission = client(negotiated, [(CMD_BLOCK_STATUS, 0, 3, 0, 4096)])
    first = block_status(3, 1, [(4096, 0)], False)
    assert transmission.receive_data(first) == []
    # The second context may describe less than the first, or more.
    [completion] = transmission.receive_data(block_status(3, 2, [(512, 9)], True))
    assert completion.extents == [(4096, 0)]


def test_trap_32_short_description_is_filled_up() -> None:
    assert clip_extents([(512, 3)], 4096, req_one=False) == [(512, 3)]
    assert clip_extents([(512, 3)], 4096, req_one=True) == [(512, 3)]


def test_trap_33_unknown_space_is_reported_as_a_hole() -> None:
    assert clip_extents([], 4096, req_one=False) == [(4096, 0)]


def test_trap_34_enotsup_comes_without_fast_zero() -> None:
    assert (
        validate(CMD_WRITE_ZEROES, 0, 512, CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO) == 0
    )
    without = Negotiated(replace(DISK, flags=ALL_FLAGS & ~FLAG_SEND_FAST_ZERO), True)
    assert validate(CMD_WRITE_ZEROES, 0, 512, CMD_FLAG_FAST_ZERO, without) == EINVAL
    assert wire_errno(ENOTSUP, CMD_WRITE_ZEROES, CMD_FLAG_FAST_ZERO) == ENOTSUP
    assert wire_errno(ENOTSUP, CMD_WRITE_ZEROES, 0) == EINVAL


def test_trap_35_cache_is_bounded_like_a_read_or_ends_in_a_payload() -> None:
    transmission = ServerTransmission(SERVED, payload_max=4096)
    assert transmission.validate(CMD_CACHE, 0, 0, MIB) == 0
    assert transmission.validate(CMD_CACHE, CMD_FLAG_DF, 0, 512) == EINVAL
    assert len(simple_reply(0, 1)) == SIMPLE_REPLY.size


def test_trap_36_shutdown_hangs_up_instead_of_saying_so() -> None:
    handshake = server()
    handshake.shutdown()
    handshake.receive_data(NEW_CLIENT + GO)
    [(_, rep, _)] = replies(b"".join(handshake.data_to_send()))
    assert rep == REP_ERR_SHUTDOWN
    assert not handshake.closed
    assert wire_errno(ESHUTDOWN, CMD_READ, 0) == ESHUTDOWN
    transmission = client(STRUCTURED, [(CMD_WRITE, 0, 1, 0, 512)])
    transmission.receive_data(simple_reply(ESHUTDOWN, 1))
    assert transmission.shutting_down  # a client must disconnect, and knows
