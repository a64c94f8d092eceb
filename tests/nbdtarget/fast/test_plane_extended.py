# SPDX-License-Identifier: Apache-2.0
"""`Plane` with extended headers: 32 bytes in both directions, and every reply a chunk."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.fast import compiled
from tests.support.plane import SIZE, Bench

pytestmark = pytest.mark.skipif(
    not compiled.IS_COMPILED, reason=f"{compiled.describe()}"
)
if compiled.IS_COMPILED:
    from nbdtarget_fast import DONE, SLOW

READ, WRITE, FLUSH = 0, 1, 3
FUA, PAYLOAD_LEN = 1, 1 << 5
COOKIE = 0x1122334455667788


def request(
    command: int,
    offset: int,
    length: int,
    payload: bytes = b"",
    *,
    flags: int = 0,
    cookie: int = COOKIE,
    magic: int = 0x21E41C71,
) -> bytes:
    head = struct.pack(">IHHQQQ", magic, flags, command, cookie, offset, length)
    return head + payload


def chunk(kind: int, at: int, payload: bytes = b"", cookie: int = COOKIE) -> bytes:
    return (
        struct.pack(">IHHQQQ", 0x6E8A278C, 1, kind, cookie, at, len(payload)) + payload
    )


def data_chunk(offset: int, data: bytes | bytearray, cookie: int = COOKIE) -> bytes:
    return chunk(1, offset, struct.pack(">Q", offset) + bytes(data), cookie)


@pytest.fixture(params=[False, True], ids=["plain", "poisoned"])
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(tmp_path / "disk", extended=True, poison=request.param)
    yield made
    made.close()


def test_read_is_answered_with_the_bytes_of_the_file(bench: Bench) -> None:
    assert bench.turn(request(READ, 8192, 512)) == DONE
    assert bench.replies() == data_chunk(8192, bench.content[8192 : 8192 + 512])
    assert bench.plane.begin == bench.plane.end == 0


@pytest.mark.parametrize("flags", [0, PAYLOAD_LEN])
def test_write_is_answered_with_the_offset_of_its_request(
    bench: Bench, flags: int
) -> None:
    data = os.urandom(4096)
    assert bench.turn(request(WRITE, 4096, 4096, data, flags=flags)) == DONE
    assert bench.replies() == chunk(0, 4096)
    bench.content[4096:8192] = data
    assert bench.on_disk() == bench.content


def test_zeroes_become_a_hole(bench: Bench) -> None:
    wire = request(WRITE, 0, 40_000, bytes(40_000), flags=PAYLOAD_LEN)
    assert bench.turn(wire + request(READ, 0, 40_000)) == DONE
    assert bench.replies() == chunk(0, 0) + chunk(2, 0, struct.pack(">QI", 0, 40_000))


def test_batch_that_comes_byte_by_byte_is_answered_in_its_order(bench: Bench) -> None:
    data = os.urandom(512)
    wire = request(READ, 0, 512, cookie=1)
    wire += request(WRITE, 0, 512, data, cookie=2, flags=PAYLOAD_LEN)
    wire += request(READ, 0, 512, cookie=3)
    for at in range(len(wire)):
        assert bench.turn(wire[at : at + 1]) == DONE
    before = data_chunk(0, bench.content[:512], 1)
    after = chunk(0, 0, cookie=2) + data_chunk(0, data, 3)
    assert bench.replies() == before + after


@pytest.mark.parametrize(
    "odd",
    [
        request(READ, 0, 1 << 32),
        request(READ, 0, (1 << 32) + 512),
        request(READ, 0, (1 << 64) - 1),
        request(READ, (1 << 64) - 512, 512),
        request(READ, SIZE - 511, 512),
        request(READ, 0, 512, flags=PAYLOAD_LEN),
        request(READ, 0, 512, magic=0x25609513),
        request(WRITE, 0, (1 << 32) + 512, bytes(512), flags=PAYLOAD_LEN),
        request(WRITE, 0, 512, bytes(512), flags=PAYLOAD_LEN | FUA),
        request(FLUSH, 0, 0),
    ],
    ids=range(10),
)
def test_what_is_not_plain_is_left_to_python(bench: Bench, odd: bytes) -> None:
    assert bench.turn(request(READ, 0, 512) + odd) == SLOW
    assert bench.replies() == b""
    assert bench.plane.begin == 32
    assert bench.on_disk() == bench.content
