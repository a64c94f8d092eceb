# SPDX-License-Identifier: Apache-2.0
"""The requests that the server refuses, and the bytes of its replies."""

import errno as errnos
from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    EXTENTS_MAX,
    FLAG_READ_ONLY,
    FLAG_SEND_FAST_ZERO,
)
from nbdtarget_protocol.handshake import Negotiated
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
    offset_hole,
    pack_offset_data_into,
    pack_simple_reply_into,
    simple_reply,
    wire_errno,
)
from tests.support.protocol_feed import (
    ALL_FLAGS,
    CONTEXTS,
    DISK,
    MIB,
    SERVED,
    SERVED_SIMPLE,
)

# As proto.md has it, command by command: transmission flag bit needed, flags beyond FUA, errno
# past the end. Written apart from the code under test.
TABLE = {
    CMD_READ: (0, CMD_FLAG_DF, EINVAL),
    CMD_WRITE: (0, 0, ENOSPC),
    CMD_FLUSH: (1 << 2, 0, 0),
    CMD_TRIM: (1 << 5, 0, EINVAL),
    CMD_CACHE: (1 << 10, 0, EINVAL),
    CMD_WRITE_ZEROES: (1 << 6, CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO, ENOSPC),
    CMD_BLOCK_STATUS: (0, CMD_FLAG_REQ_ONE, EINVAL),
}
WRITES = (CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES)
RANGES = [
    (0, 0),
    (0, 1),
    (MIB - 1, 1),
    (0, MIB),
    (MIB, 0),
    (MIB, 1),
    (MIB + 1, 0),
    (MIB - 1, 2),
    (0, MIB + 1),
    (0, (1 << 32) - 1),
    ((1 << 64) - 1, 1),
    ((1 << 64) - MIB, MIB),
]
NEGOTIATED = [
    SERVED,
    SERVED_SIMPLE,
    Negotiated(DISK, True, ()),  # those with extended headers: test_extended.py
    Negotiated(replace(DISK, flags=0), True, CONTEXTS),
    Negotiated(replace(DISK, flags=ALL_FLAGS | FLAG_READ_ONLY), True, CONTEXTS),
    Negotiated(replace(DISK, flags=ALL_FLAGS & ~FLAG_SEND_FAST_ZERO), False),
]


def expected_errno(
    negotiated: Negotiated, command: int, flags: int, offset: int, length: int
) -> int:
    wire_flags = negotiated.flags
    if command == CMD_DISC:
        return 0
    if command in WRITES and wire_flags & FLAG_READ_ONLY:
        return EPERM
    if command not in TABLE:
        return EINVAL
    needs, may, past_end = TABLE[command]
    if wire_flags & (1 << 3):
        may |= CMD_FLAG_FUA
    if not wire_flags & (1 << 7):
        may &= ~CMD_FLAG_DF
    if not wire_flags & (1 << 11):
        may &= ~CMD_FLAG_FAST_ZERO
    if wire_flags & needs != needs or flags | may != may:
        return EINVAL
    if command == CMD_BLOCK_STATUS and (length == 0 or not negotiated.contexts):
        return EINVAL
    if command == CMD_FLUSH:
        return 0
    return past_end if offset + length > MIB else 0


@pytest.mark.parametrize("negotiated", NEGOTIATED)
def test_validate_is_the_table_of_the_document(negotiated: Negotiated) -> None:
    transmission = ServerTransmission(negotiated)
    commands = (*range(10), 255, 65535)
    all_flags = (*range(64), 1 << 15, 65535)
    wrong = [
        (command, flags, at)
        for command, flags, at in product(commands, all_flags, RANGES)
        if transmission.validate(command, flags, *at)
        != expected_errno(negotiated, command, flags, *at)
    ]
    assert wrong == []


@pytest.mark.parametrize("command", [CMD_READ, CMD_WRITE])
def test_validate_bounds_payloads(command: int) -> None:
    transmission = ServerTransmission(SERVED, payload_max=4096)
    assert transmission.validate(command, 0, 0, 4096) == 0
    assert transmission.validate(command, 0, 0, 4097) == EINVAL


def test_validate_bounds_payloads_of_df_with_eoverflow() -> None:
    transmission = ServerTransmission(SERVED, payload_max=4096)
    assert transmission.validate(CMD_READ, CMD_FLAG_DF, 0, 4097) == EOVERFLOW


@pytest.mark.parametrize("command", [CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE])
def test_validate_bounds_no_command_without_payload(command: int) -> None:
    transmission = ServerTransmission(SERVED, payload_max=4096)
    assert transmission.validate(command, 0, 0, MIB) == 0


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 511), (256, 256)])
def test_validate_refuses_unaligned_when_a_minimum_is_advertised(
    offset: int, length: int
) -> None:
    export = replace(DISK, block_size_min=512)
    transmission = ServerTransmission(Negotiated(export, True))
    assert transmission.validate(CMD_WRITE, 0, offset, length) == EINVAL
    assert transmission.validate(CMD_WRITE, 0, 512, 512) == 0


def test_refusal_says_what_is_wrong() -> None:
    transmission = ServerTransmission(SERVED)
    refusal = transmission.refusal(CMD_TRIM, 1 << 15 | CMD_FLAG_DF, 0, 1)
    assert str(refusal) == "EINVAL: TRIM with flags DF|0x8000"
    refusal = transmission.refusal(CMD_WRITE, 0, MIB, 1)
    assert str(refusal) == "ENOSPC: WRITE 1048576+1 past the end at 1048576"


@pytest.mark.parametrize(
    ("length", "rule"),
    [
        (0, PAYLOAD_ACCEPT),
        (32 * MIB, PAYLOAD_ACCEPT),
        (64 * MIB, PAYLOAD_ACCEPT),
        (64 * MIB + 1, PAYLOAD_DRAIN),
        (128 * MIB, PAYLOAD_DRAIN),
        (128 * MIB + 1, PAYLOAD_DISCONNECT),
        ((1 << 32) - 1, PAYLOAD_DISCONNECT),
    ],
)
def test_payload_rule(length: int, rule: int) -> None:
    assert ServerTransmission(SERVED).payload_rule(length) == rule


def test_payload_rule_drains_32_mib_even_with_a_small_maximum() -> None:
    transmission = ServerTransmission(SERVED, payload_max=4096)
    assert transmission.payload_rule(32 * MIB) == PAYLOAD_DRAIN
    assert transmission.payload_rule(32 * MIB + 1) == PAYLOAD_DISCONNECT


# Encoders, byte for byte.

COOKIE = 0x0102030405060708
COOKIE_HEX = "0102030405060708"


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        (simple_reply(EIO, COOKIE), f"67446698 00000005 {COOKIE_HEX}"),
        (
            offset_data_header(COOKIE, 0x1000, 0x200, True),
            f"668e33ef 0001 0001 {COOKIE_HEX} 00000208 0000000000001000",
        ),
        (
            offset_data_header(COOKIE, 0x1000, 0x200, False),
            f"668e33ef 0000 0001 {COOKIE_HEX} 00000208 0000000000001000",
        ),
        (
            offset_hole(COOKIE, 0x1000, 0x200, False),
            f"668e33ef 0000 0002 {COOKIE_HEX} 0000000c 0000000000001000 00000200",
        ),
        (
            offset_hole(COOKIE, 0x1000, 0x200, True),
            f"668e33ef 0001 0002 {COOKIE_HEX} 0000000c 0000000000001000 00000200",
        ),
        (none_chunk(COOKIE), f"668e33ef 0001 0000 {COOKIE_HEX} 00000000"),
        (
            error_chunk(COOKIE, EIO, b"oh"),
            f"668e33ef 0001 8001 {COOKIE_HEX} 00000008 00000005 0002 6f68",
        ),
        (
            error_chunk(COOKIE, EIO, offset=9, done=False),
            f"668e33ef 0000 8002 {COOKIE_HEX} 0000000e 00000005 0000 0000000000000009",
        ),
        (
            block_status(COOKIE, 1, [(512, 3), (512, 0)], True),
            f"668e33ef 0001 0005 {COOKIE_HEX} 00000014 00000001"
            " 00000200 00000003 00000200 00000000",
        ),
        (
            block_status(COOKIE, 1, [(512, 3)], False),
            f"668e33ef 0000 0005 {COOKIE_HEX} 0000000c 00000001 00000200 00000003",
        ),
    ],
)
def test_reply_bytes(encoded: bytes, expected: str) -> None:
    assert encoded == bytes.fromhex(expected)


def test_pack_into_packs_the_same_bytes() -> None:
    buffer = bytearray(60)
    pack_simple_reply_into(buffer, 1, EIO, COOKIE)
    pack_offset_data_into(memoryview(buffer), 20, COOKIE, 7, 9, True)
    assert buffer[1:17] == simple_reply(EIO, COOKIE)
    assert buffer[20:48] == offset_data_header(COOKIE, 7, 9, True)
    pack_offset_data_into(buffer, 20, COOKIE, 7, 9, False)
    assert buffer[20:48] == offset_data_header(COOKIE, 7, 9, False)


def test_error_message_is_cut_between_characters() -> None:
    chunk = error_chunk(1, EIO, ("x" + "é" * 3000).encode())
    assert len(chunk) == CHUNK.size + 6 + 4095
    chunk[CHUNK.size + 6 :].decode()


@pytest.mark.parametrize("extents", [[], [(1, 0)] * (EXTENTS_MAX + 1)])
def test_block_status_with_no_or_too_many_descriptors_is_our_fault(
    extents: list[tuple[int, int]],
) -> None:
    with pytest.raises(AssertionError):
        block_status(1, 1, extents, True)


# Errors.


@pytest.mark.parametrize(
    ("errno", "expected"),
    [
        (errnos.EPERM, EPERM),
        (errnos.EACCES, EPERM),
        (errnos.EROFS, EPERM),
        (errnos.EIO, EIO),
        (errnos.ENOMEM, EIO),
        (errnos.EINVAL, EINVAL),
        (errnos.ENOSPC, ENOSPC),
        (errnos.EDQUOT, ENOSPC),
        (errnos.EFBIG, ENOSPC),
        (errnos.ESHUTDOWN, ESHUTDOWN),
        (errnos.ENXIO, EIO),
        (9999, EIO),
    ],
)
def test_wire_errno(errno: int, expected: int) -> None:
    assert wire_errno(errno, CMD_WRITE, 0) == expected


@pytest.mark.parametrize(
    ("errno", "command", "flags", "expected"),
    [
        (errnos.ENOTSUP, CMD_WRITE_ZEROES, CMD_FLAG_FAST_ZERO, ENOTSUP),
        (errnos.ENOTSUP, CMD_WRITE_ZEROES, CMD_FLAG_NO_HOLE, EINVAL),
        (errnos.ENOTSUP, CMD_TRIM, 0, EINVAL),
        (errnos.EOVERFLOW, CMD_READ, CMD_FLAG_DF, EOVERFLOW),
        (errnos.EOVERFLOW, CMD_READ, 0, EINVAL),
        (errnos.EOVERFLOW, CMD_WRITE, 0, EINVAL),
        (errnos.EOVERFLOW, CMD_TRIM, 0, EOVERFLOW),
        (errnos.EOVERFLOW, CMD_WRITE_ZEROES, 0, EOVERFLOW),
        (errnos.EOVERFLOW, CMD_WRITE_ZEROES, CMD_FLAG_FAST_ZERO, EINVAL),
    ],
)
def test_wire_errno_of_the_two_that_depend_on_the_command(
    errno: int, command: int, flags: int, expected: int
) -> None:
    assert wire_errno(errno, command, flags) == expected


# Extents.


@pytest.mark.parametrize(
    ("extents", "req_one", "expected"),
    [
        ([(10, 0)], False, [(10, 0)]),
        ([(10, 0), (90, 3)], False, [(10, 0), (90, 3)]),
        ([(10, 0), (900, 3)], False, [(10, 0), (90, 3)]),
        ([(10, 0), (20, 0), (5, 1)], False, [(30, 0), (5, 1)]),
        ([(0, 1), (10, 0), (0, 3), (5, 0)], False, [(15, 0)]),
        ([(100, 3), (100, 0)], False, [(100, 3)]),
        ([(1 << 40, 3)], False, [(100, 3)]),
        ([(10, 0), (20, 0), (5, 1)], True, [(30, 0)]),
        ([(1 << 40, 3)], True, [(100, 3)]),
        ([], False, [(100, 0)]),
        ([(0, 3)], True, [(100, 0)]),
    ],
)
def test_clip_extents(
    extents: list[tuple[int, int]], req_one: bool, expected: list[tuple[int, int]]
) -> None:
    assert clip_extents(extents, 100, req_one=req_one) == expected


@pytest.mark.slow
def test_clip_extents_stops_at_2_to_the_20() -> None:
    extents = ((1, i & 1) for i in range(1 << 40))  # endless, as far as a test goes
    clipped = clip_extents(extents, (1 << 32) - 1, req_one=False)
    assert len(clipped) == EXTENTS_MAX
    assert len(block_status(1, 1, clipped, True)) == CHUNK.size + 4 + 8 * EXTENTS_MAX


@given(
    st.lists(st.tuples(st.integers(0, 50), st.sampled_from([0, 1, 3]))),
    st.integers(1, 200),
    st.booleans(),
)
def test_clip_extents_describes_the_same_bytes(
    extents: list[tuple[int, int]], length: int, req_one: bool
) -> None:
    clipped = clip_extents(extents, length, req_one=req_one)
    flags = [f for n, f in extents for _ in range(n)][:length] or [0] * length
    described = [f for n, f in clipped for _ in range(n)]
    assert described == flags[: len(described)]
    assert req_one or len(described) == len(flags)
    assert all(a[1] != b[1] for a, b in pairwise(clipped))
