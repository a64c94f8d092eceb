# SPDX-License-Identifier: Apache-2.0
"""The client's transmission: good replies of every shape, and each broken rule."""

import itertools
import random
from struct import Struct

import pytest

from nbdtarget_protocol.client import ClientNegotiated, ClientTransmission
from nbdtarget_protocol.client_transmission import (
    DIRECT_MIN,
    HEADER_OFFER,
    SCRATCH_SIZE,
)
from nbdtarget_protocol.consts import (
    CHUNK,
    CMD_BLOCK_STATUS,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FUA,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_WRITE,
    EINVAL,
    EIO,
    ENOSPC,
    ESHUTDOWN,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_ERROR,
    REPLY_TYPE_ERROR_OFFSET,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    REQUEST,
    REQUEST_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    U32,
    U64,
)
from nbdtarget_protocol.errors import ReplyError, RequestError
from nbdtarget_protocol.transmission import (
    block_status,
    error_chunk,
    none_chunk,
    offset_data_header,
    offset_hole,
    simple_reply,
)
from tests.support.protocol_feed import (
    ALL_FLAGS,
    GARBAGE,
    KIB,
    MIB,
    SIMPLE,
    STRUCTURED,
    Request,
    client,
    data_of,
    feed_replies,
)

READ: Request = (CMD_READ, 0, 1, 4096, 1024)
READ_DF: Request = (CMD_READ, CMD_FLAG_DF, 1, 4096, 1024)
WRITE: Request = (CMD_WRITE, 0, 2, 0, 512)
STATUS: Request = (CMD_BLOCK_STATUS, 0, 3, 4096, 1024)
STATUS_ONE: Request = (CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, 3, 4096, 1024)
DATA = random.Random(1).randbytes(1024)


def chunk(flags: int, kind: int, cookie: int, payload: bytes) -> bytes:
    return (
        CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload)) + payload
    )


def data_chunk(begin: int, end: int, done: bool = False) -> bytes:
    return offset_data_header(1, 4096 + begin, end - begin, done) + DATA[begin:end]


def read_result(data: bytes) -> tuple[int, bytes]:
    [completion] = feed_replies(data, READ)
    return completion.error, data_of(completion)


def test_request_bytes() -> None:
    transmission = ClientTransmission(STRUCTURED)
    encoded = transmission.request(CMD_WRITE, CMD_FLAG_FUA, 7, 4096, 512)
    assert encoded == REQUEST.pack(REQUEST_MAGIC, 1, CMD_WRITE, 7, 4096, 512)
    assert list(transmission.in_flight) == [7]


def test_disc_waits_for_no_reply() -> None:
    transmission = client(STRUCTURED, [WRITE])
    assert len(transmission.request(CMD_DISC, 0, 2, 0, 0)) == 28
    assert [c.command for c in transmission.in_flight.values()] == [CMD_WRITE]


def test_cookie_in_flight_is_ours_to_keep_apart() -> None:
    transmission = client(STRUCTURED, [WRITE])
    with pytest.raises(AssertionError):
        transmission.request(*WRITE)


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 512), (0, -1), (1 << 64, 512), (0, 1 << 32)]
)
def test_range_that_no_disk_has_is_refused(offset: int, length: int) -> None:
    transmission = client(STRUCTURED, [])
    with pytest.raises(RequestError, match="no such range"):
        transmission.request(CMD_WRITE, 0, 1, offset, length)
    assert not transmission.in_flight


def test_private_comes_back() -> None:
    transmission = ClientTransmission(STRUCTURED)
    mine = object()
    transmission.request(CMD_FLUSH, 0, 7, 0, 0, private=mine)
    [completion] = transmission.receive_data(simple_reply(0, 7))
    assert completion.private is mine
    assert repr(completion) == "<FLUSH 0+0 cookie=0x7 error=0>"


def test_simple_read() -> None:
    [completion] = feed_replies(simple_reply(0, 1) + DATA, READ, negotiated=SIMPLE)
    assert data_of(completion) == DATA


def test_simple_read_of_nothing() -> None:
    [completion] = feed_replies(simple_reply(0, 1), (0, 0, 1, 0, 0), negotiated=SIMPLE)
    assert (completion.error, data_of(completion)) == (0, b"")


def test_simple_errors_have_no_payload() -> None:
    data = simple_reply(EIO, 1) + simple_reply(ENOSPC, 2)
    completions = feed_replies(data, WRITE, READ, negotiated=SIMPLE)
    assert [(c.cookie, c.error) for c in completions] == [(1, EIO), (2, ENOSPC)]


def test_simple_reply_to_a_write_in_structured_mode() -> None:
    [completion] = feed_replies(simple_reply(0, 2), WRITE)
    assert completion.error == 0


def test_simple_error_to_block_status() -> None:
    [completion] = feed_replies(simple_reply(EIO, 3), STATUS)
    assert (completion.error, completion.extents) == (EIO, None)


def test_error_outside_of_the_eight_counts_as_einval() -> None:
    [completion] = feed_replies(simple_reply(9999, 2), WRITE)
    assert completion.error == EINVAL


def test_eshutdown_is_noticed() -> None:
    transmission = client(STRUCTURED, [WRITE])
    transmission.receive_data(simple_reply(ESHUTDOWN, 2))
    assert transmission.shutting_down


@pytest.mark.parametrize(
    "data",
    [
        data_chunk(0, 1024, True),
        data_chunk(0, 1024) + none_chunk(1),
        data_chunk(0, 512) + data_chunk(512, 1024, True),
        data_chunk(512, 1024) + data_chunk(0, 512, True),
        data_chunk(100, 200) + data_chunk(300, 400) + data_chunk(400, 1024)
        + data_chunk(0, 100) + data_chunk(200, 300) + none_chunk(1),
        data_chunk(1, 1024) + data_chunk(0, 1) + none_chunk(1),
    ],
)  # fmt: skip
def test_structured_read_in_any_pieces(data: bytes) -> None:
    assert read_result(data) == (0, DATA)


def test_structured_read_with_a_hole() -> None:
    hole = offset_hole(1, 4096 + 512, 512, True)
    assert read_result(data_chunk(0, 512) + hole) == (0, DATA[:512] + bytes(512))
    hole = offset_hole(1, 4096, 1024, False)
    assert read_result(hole + none_chunk(1)) == (0, bytes(1024))


def test_large_hole() -> None:
    size = MIB - 1
    hole = offset_hole(1, 0, size, True)
    transmission = client(STRUCTURED, [(CMD_READ, 0, 1, 0, size)])
    [completion] = transmission.receive_data(hole)
    assert data_of(completion) == bytes(size)


def test_structured_read_of_nothing() -> None:
    [completion] = feed_replies(none_chunk(1), (CMD_READ, 0, 1, 0, 0))
    assert completion.error == 0


def test_error_chunk_has_a_message() -> None:
    [completion] = feed_replies(error_chunk(1, EIO, b"bad\nsector"), READ)
    assert (completion.error, completion.message) == (EIO, "bad?sector")


def test_error_need_not_be_the_last_chunk() -> None:
    error = error_chunk(1, EIO, b"first", 4097, done=False)
    second = error_chunk(1, ENOSPC, b"second", done=False)
    assert read_result(data_chunk(0, 512) + error + second + none_chunk(1))[0] == EIO


def test_unknown_flags_of_a_chunk_mean_nothing() -> None:
    unknown = 0xFFFF ^ REPLY_FLAG_DONE
    payload = U64.pack(4096) + DATA[:512]
    first = chunk(unknown, REPLY_TYPE_OFFSET_DATA, 1, payload)
    last = chunk(unknown | REPLY_FLAG_DONE, REPLY_TYPE_NONE, 1, b"")
    rest = data_chunk(512, len(DATA))
    assert read_result(first + rest + last) == (0, DATA)


def test_unknown_error_chunk_is_an_error() -> None:
    payload = Struct(">IH").pack(EIO, 2) + b"oh" + b"fields of tomorrow"
    [completion] = feed_replies(chunk(REPLY_FLAG_DONE, 0x9000, 2, payload), WRITE)
    assert (completion.error, completion.message) == (EIO, "oh")


def test_replies_may_interleave_and_come_out_of_order() -> None:
    other: Request = (CMD_READ, 0, 9, 0, 512)
    data = (
        data_chunk(512, 1024)
        + simple_reply(0, 2)
        + offset_data_header(9, 0, 512, True)
        + DATA[:512]
        + data_chunk(0, 512, True)
    )
    completions = feed_replies(data, READ, WRITE, other)
    assert [c.cookie for c in completions] == [2, 9, 1]
    assert data_of(completions[2]) == DATA


def test_cookie_may_come_again_after_its_end() -> None:
    transmission = client(STRUCTURED, [WRITE])
    assert len(transmission.receive_data(simple_reply(0, 2))) == 1
    transmission.request(*WRITE)
    assert len(transmission.receive_data(none_chunk(2))) == 1


def test_block_status() -> None:
    data = block_status(3, 1, [(512, 3), (512, 0)], True)
    [completion] = feed_replies(data, STATUS)
    assert completion.extents == [(512, 3), (512, 0)]


@pytest.mark.parametrize(
    ("sent", "taken"),
    [([(512, 3)], [(512, 3)]), ([(512, 3), (4096, 0)], [(512, 3), (512, 0)])],
)
def test_block_status_may_be_shorter_or_longer(
    sent: list[tuple[int, int]], taken: list[tuple[int, int]]
) -> None:
    data = block_status(3, 1, sent, False) + none_chunk(3)
    [completion] = feed_replies(data, STATUS)
    assert completion.extents == taken


def test_block_status_of_one() -> None:
    [completion] = feed_replies(block_status(3, 1, [(1024, 3)], True), STATUS_ONE)
    assert completion.extents == [(1024, 3)]


def test_block_status_of_two_contexts_is_that_of_the_first() -> None:
    contexts = ((1, "base:allocation"), (2, "qemu:dirty-bitmap:x"))
    negotiated = ClientNegotiated("disk", MIB, ALL_FLAGS, True, contexts)
    data = block_status(3, 2, [(64, 1)], False) + block_status(3, 1, [(512, 3)], True)
    [completion] = feed_replies(data, STATUS, negotiated=negotiated)
    assert completion.extents == [(512, 3)]


def test_block_status_that_fails_has_no_extents() -> None:
    data = block_status(3, 1, [(512, 3)], False) + error_chunk(3, EIO)
    [completion] = feed_replies(data, STATUS)
    assert (completion.error, completion.extents) == (EIO, None)


def test_block_status_larger_than_the_scratch() -> None:
    extents = [(1, i & 1) for i in range(1 << 16)]
    transmission = client(STRUCTURED, [(CMD_BLOCK_STATUS, 0, 3, 0, 1 << 16)])
    [completion] = transmission.receive_data(block_status(3, 1, extents, True))
    assert completion.extents == extents


def test_block_status_beyond_what_is_taken_is_dropped() -> None:
    transmission = ClientTransmission(STRUCTURED, extents_max=2)
    transmission.request(CMD_BLOCK_STATUS, 0, 3, 0, 4096)
    extents = [(512, 3), (512, 0), (512, 3), (0, 0)]
    [completion] = transmission.receive_data(block_status(3, 1, extents, True))
    assert completion.extents == [(512, 3), (512, 0)]


NONE = REPLY_TYPE_NONE
DONE = REPLY_FLAG_DONE
ERROR = REPLY_TYPE_ERROR
ERROR_OFFSET = REPLY_TYPE_ERROR_OFFSET
BLOCK = REPLY_TYPE_BLOCK_STATUS


@pytest.mark.parametrize(
    ("data", "request_", "sentence"),
    [
        (GARBAGE[:16], READ, "bad reply magic"),
        (simple_reply(0, 9), READ, "unknown cookie 0x9"),
        (none_chunk(9) + bytes(8), READ, "unknown cookie 0x9"),
        (simple_reply(0, 1), READ, "simple reply to <READ"),
        (simple_reply(EIO, 1), READ, "simple reply to <READ"),
        (simple_reply(0, 3), STATUS, "simple reply to <BLOCK_STATUS"),
        (
            error_chunk(2, EIO, done=False) + simple_reply(0, 2),
            WRITE,
            "simple reply after",
        ),
        (chunk(DONE, NONE, 1, b"x"), READ, "NONE chunk"),
        (chunk(0, NONE, 1, b""), READ, "NONE chunk"),
        (chunk(DONE, 3, 1, b"x"), READ, "unknown chunk type 3"),
        (chunk(DONE, 6, 1, bytes(24)), READ, "unknown chunk type 6"),
        (
            chunk(DONE, REPLY_TYPE_OFFSET_DATA, 1, bytes(8)),
            READ,
            "OFFSET_DATA chunk of 8",
        ),
        (
            chunk(DONE, REPLY_TYPE_OFFSET_HOLE, 1, bytes(11)),
            READ,
            "OFFSET_HOLE chunk of 11",
        ),
        (offset_data_header(1, 4095, 2, True), READ, "chunk 4095+2 outside of <READ"),
        (offset_data_header(1, 5119, 2, True), READ, "chunk 5119+2 outside of <READ"),
        (offset_data_header(1, 1 << 63, 2, True), READ, "outside of <READ"),
        (offset_data_header(2, 0, 512, True), WRITE, "outside of <WRITE"),
        (chunk(0, REPLY_TYPE_OFFSET_HOLE, 1, bytes(12)), READ, "of no bytes"),
        (offset_hole(1, 5119, 2, True), READ, "outside of <READ"),
        (none_chunk(1), READ, "only 0 bytes in reply"),
        (data_chunk(0, 1023, True), READ, "only 1023 bytes in reply"),
        (data_chunk(0, 512) + offset_hole(1, 4096, 512, True), READ, "overlapping"),
        (data_chunk(0, 1024) + data_chunk(0, 1), READ, "overlapping"),
        (data_chunk(0, 512) + data_chunk(256, 300), READ, "overlapping"),
        (data_chunk(512, 1024) + data_chunk(0, 513), READ, "overlapping"),
        (data_chunk(0, 512) + data_chunk(512, 1024), READ_DF, "second content chunk"),
        (chunk(DONE, ERROR, 1, bytes(5)), READ, "error chunk of 5 bytes"),
        (chunk(DONE, ERROR_OFFSET, 1, bytes(13)), READ, "error chunk of 13 bytes"),
        (chunk(DONE, ERROR, 1, bytes(5000)), READ, "error chunk of 5000 bytes"),
        (chunk(DONE, ERROR, 1, bytes(6)), READ, "error chunk with error 0"),
        (chunk(DONE, ERROR, 1, b"\0\0\0\5\0\1"), READ, "longer than its chunk"),
        (
            chunk(DONE, ERROR_OFFSET, 1, b"\0\0\0\5\0\1" + bytes(8)),
            READ,
            "longer than its",
        ),
        (error_chunk(1, EIO, b"", 4095), READ, "error at 4095, outside"),
        (error_chunk(1, EIO, b"", 5120), READ, "error at 5120, outside"),
        (chunk(DONE, BLOCK, 3, bytes(4)), STATUS, "BLOCK_STATUS chunk of 4 bytes"),
        (chunk(DONE, BLOCK, 3, bytes(16)), STATUS, "BLOCK_STATUS chunk of 16 bytes"),
        (
            CHUNK.pack(STRUCTURED_REPLY_MAGIC, 1, BLOCK, 3, 4 + 8 * (2**20 + 1)),
            STATUS,
            "BLOCK_STATUS chunk of 8388620 bytes",
        ),
        (block_status(1, 1, [(512, 0)], True), READ, "BLOCK_STATUS chunk in reply to"),
        (block_status(3, 9, [(512, 0)], True), STATUS, "context 9 unknown"),
        (
            block_status(3, 1, [(512, 0)], False) * 2,
            STATUS,
            "context 1 unknown or given",
        ),
        (none_chunk(3), STATUS, "metadata context missing"),
        (block_status(3, 1, [(0, 0)], True), STATUS, "descriptor of no bytes"),
        (block_status(3, 1, [(1024, 0), (1, 1)], True), STATUS, "past the end"),
        (block_status(3, 1, [(1, 0), (1, 1)], True), STATUS_ONE, "REQ_ONE was ignored"),
        (block_status(3, 1, [(1025, 0)], True), STATUS_ONE, "REQ_ONE was ignored"),
    ],
)
def test_broken_rule_is_named(data: bytes, request_: Request, sentence: str) -> None:
    with pytest.raises(ReplyError, match=sentence.replace("+", r"\+")):
        feed_replies(data, request_)


def test_chunk_where_only_simple_replies_were_negotiated() -> None:
    with pytest.raises(ReplyError, match="bad reply magic 0x668e33ef"):
        feed_replies(none_chunk(2), WRITE, negotiated=SIMPLE)


def test_too_many_scattered_chunks_are_refused() -> None:
    size = 1 << 18
    transmission = client(STRUCTURED, [(CMD_READ, 0, 1, 0, size)])
    holes = b"".join(offset_hole(1, at, 1, False) for at in range(0, size, 2))
    with pytest.raises(ReplyError, match="too many scattered"):
        transmission.receive_data(holes)


def test_fail_all_returns_what_completed_before_the_error_first() -> None:
    other: Request = (CMD_WRITE, 0, 5, 0, 1)
    transmission = client(STRUCTURED, [READ, WRITE, other])
    with pytest.raises(ReplyError):
        transmission.receive_data(simple_reply(0, 2) + GARBAGE)
    with pytest.raises(ReplyError):
        transmission.receive_data(simple_reply(0, 5))
    ended = transmission.fail_all(EIO)
    assert [(c.cookie, c.error) for c in ended] == [(2, 0), (1, EIO), (5, EIO)]
    assert transmission.fail_all(EIO) == []
    assert transmission.in_flight == {}


def test_fail_all_returns_what_completed_in_an_earlier_part_of_the_data() -> None:
    transmission = client(STRUCTURED, [WRITE, (CMD_READ, 0, 1, 0, MIB)])
    data = simple_reply(0, 2) + offset_hole(1, 0, MIB, True) + bytes(SCRATCH_SIZE)
    with pytest.raises(ReplyError):
        transmission.receive_data(data)
    assert [(c.cookie, c.error) for c in transmission.fail_all(EIO)] == [(2, 0), (1, 0)]


def test_fail_all_ends_the_connection_without_an_error_before() -> None:
    transmission = client(STRUCTURED, [WRITE])
    assert [c.error for c in transmission.fail_all(EIO)] == [EIO]
    assert str(transmission.error) == "connection was given up"
    with pytest.raises(AssertionError):
        transmission.request(*WRITE)


# Requests that are given up, and replies that come all the same.


def test_buffer_of_an_abandoned_read_is_not_written_to() -> None:
    transmission = ClientTransmission(SIMPLE)
    memory = bytearray(1024)
    mine = object()
    transmission.request(*READ, memoryview(memory), private=mine)
    transmission.request(*WRITE, private=mine)
    [given_up] = transmission.abandon(EIO, lambda each: each.command == CMD_READ)
    assert (given_up.cookie, given_up.error, given_up.private) == (1, EIO, mine)
    late, other = transmission.receive_data(
        simple_reply(0, 1) + DATA + simple_reply(0, 2)
    )
    assert (late.cookie, late.private) == (1, None)
    assert (other.cookie, other.private) == (2, mine)
    assert memory == bytes(1024)


def test_read_may_be_abandoned_in_the_middle_of_its_payload() -> None:
    transmission = ClientTransmission(SIMPLE)
    memory = bytearray(1024)
    transmission.request(*READ, memoryview(memory))
    assert transmission.receive_data(simple_reply(0, 1) + DATA[:100]) == []
    assert len(transmission.abandon(EIO, lambda _: True)) == 1
    [late] = transmission.receive_data(DATA[100:])
    assert (late.cookie, late.private) == (1, None)
    assert memory == DATA[:100] + bytes(924)


def test_abandoned_block_status_is_parsed_to_its_end() -> None:
    transmission = client(STRUCTURED, [STATUS, WRITE])
    reply = block_status(3, 1, [(1024, 0)], True)
    assert transmission.receive_data(reply[:-4]) == []
    [given_up] = transmission.abandon(EIO, lambda each: each.cookie == 3)
    assert given_up.error == EIO
    completed = transmission.receive_data(reply[-4:] + simple_reply(0, 2))
    assert [each.cookie for each in completed] == [3, 2]


def test_forgotten_request_is_no_longer_in_flight() -> None:
    transmission = client(SIMPLE, [READ, WRITE])
    transmission.forget([1])
    assert [each.cookie for each in transmission.fail_all(EIO)] == [2]


# Where bytes are received to.


def test_large_payload_is_received_into_the_callers_buffer() -> None:
    size = 4 * DIRECT_MIN
    memory = bytearray(size)
    transmission = ClientTransmission(SIMPLE)
    transmission.request(CMD_READ, 0, 1, 0, size, memoryview(memory))
    scratch = transmission.get_buffer()
    assert len(scratch) == SCRATCH_SIZE
    assert not transmission.wants_all
    scratch[:20] = simple_reply(0, 1) + b"abcd"
    assert transmission.buffer_updated(20) == []
    payload = transmission.get_buffer()
    assert payload.obj is memory
    assert len(payload) == size - 4
    assert transmission.wants_all
    payload[:] = bytes(range(256)) * (size // 256 - 1) + bytes(252)
    [completion] = transmission.buffer_updated(size - 4)
    assert memory[:4] == b"abcd"
    assert memory[4:260] == bytes(range(256))
    assert completion.cookie == 1


def test_tail_of_a_payload_comes_with_the_next_header() -> None:
    size = 100 * KIB
    transmission = client(SIMPLE, [(CMD_READ, 0, 1, 0, size), WRITE])
    transmission.receive_data(simple_reply(0, 1) + bytes(size - 100))
    buffer = transmission.get_buffer()
    assert len(buffer) == 100 + HEADER_OFFER
    buffer[:116] = bytes(range(100)) + simple_reply(0, 2)
    completions = transmission.buffer_updated(116)
    assert [c.cookie for c in completions] == [1, 2]
    assert data_of(completions[0])[-100:] == bytes(range(100))


def test_many_small_replies_are_taken_from_one_receive() -> None:
    requests = [(CMD_READ, 0, cookie, 0, 512) for cookie in range(100)]
    transmission = client(SIMPLE, requests)
    data = b"".join(
        simple_reply(0, cookie) + U32.pack(cookie) * 128 for cookie in range(100)
    )
    buffer = transmission.get_buffer()
    buffer[: len(data)] = data
    completions = transmission.buffer_updated(len(data))
    assert [c.cookie for c in completions] == list(range(100))
    assert all(data_of(c) == U32.pack(c.cookie) * 128 for c in completions)


@pytest.mark.parametrize("seed", range(20))
def test_structured_read_is_complete_for_any_cut(seed: int) -> None:
    rng = random.Random(seed)
    step = rng.choice([7, 28, 1000, 4097, 65536, 300_000])
    size = 200_000
    content = rng.randbytes(size)
    cuts = sorted({0, size, *rng.sample(range(1, size), rng.randrange(10))})
    pieces = list(itertools.pairwise(cuts))
    rng.shuffle(pieces)
    data = b"".join(
        offset_data_header(1, begin, end - begin, False) + content[begin:end]
        for begin, end in pieces
    )
    data += none_chunk(1)
    transmission = client(STRUCTURED, [(CMD_READ, 0, 1, 0, size)])
    completed = []
    for at in range(0, len(data), step):
        completed += transmission.receive_data(data[at : at + step])
    assert [data_of(c) for c in completed] == [content]
