# SPDX-License-Identifier: Apache-2.0
"""The compiled fast path by itself: a socket pair, a file, and the bytes on the wire."""

import errno as errnos
import os
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from bitarray.util import zeros

from nbdtarget.fast import compiled
from tests.support.plane import COOKIE, SIZE, Bench, data_chunk, request, simple

pytestmark = pytest.mark.skipif(
    not compiled.IS_COMPILED, reason=f"{compiled.describe()}"
)
if compiled.IS_COMPILED:
    from nbdtarget_fast import (
        BLOCKED,
        CLOSED,
        DONE,
        FAILED,
        POLLED,
        SLOW,
        TURN_OVER,
        UNFINISHED,
        FastFile,
        Route,
    )

READ, WRITE, FLUSH = 0, 1, 3
FUA = 1


def hole_chunk(offset: int, length: int, cookie: int = COOKIE) -> bytes:
    head = struct.pack(">IHHQI", 0x668E33EF, 1, 2, cookie, 12)
    return head + struct.pack(">QI", offset, length)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "disk")
    yield made
    made.close()


# ---- what is served ----


def test_read_is_answered_with_the_bytes_of_the_file(bench: Bench) -> None:
    assert bench.turn(request(READ, 8192, 512)) == DONE
    assert bench.replies() == data_chunk(8192, bench.content[8192 : 8192 + 512])
    assert bench.plane.begin == bench.plane.end == 0
    assert bench.plane.base == bench.plane.out == 0


def test_read_is_answered_simply_without_structured_replies(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "disk", structured=False)
    assert bench.turn(request(READ, 4096, 4096)) == DONE
    assert bench.replies() == simple() + bench.content[4096:8192]
    bench.close()


def test_write_is_in_the_file_before_it_is_answered(bench: Bench) -> None:
    data = os.urandom(4096)
    assert bench.turn(request(WRITE, 4096, 4096, data)) == DONE
    assert bench.replies() == simple()
    bench.content[4096:8192] = data
    assert bench.on_disk() == bench.content


def test_long_write_is_whole_though_it_goes_in_pieces(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "disk", received=1 << 19)
    data = os.urandom(200_000)
    bench.peer.setblocking(True)
    wire = request(WRITE, 1000, len(data), data)
    at = 0
    while at < len(wire):
        at += bench.peer.send(wire[at : at + 50_000])
        stop = bench.turn()
    bench.peer.setblocking(False)
    assert stop == DONE
    assert bench.replies() == simple()
    bench.content[1000 : 1000 + len(data)] = data
    assert bench.on_disk() == bench.content
    bench.close()


def test_batch_is_answered_in_its_order_in_one_turn(bench: Bench) -> None:
    data = os.urandom(512)
    wire = request(READ, 0, 512, cookie=1) + request(WRITE, 0, 512, data, cookie=2)
    assert bench.turn(wire + request(READ, 0, 512, cookie=3)) == DONE
    before = data_chunk(0, bench.content[:512], 1)
    assert bench.replies() == before + simple(2) + data_chunk(0, data, 3)
    assert bench.plane.was_batch


def test_one_request_is_no_batch_even_if_it_is_a_write(bench: Bench) -> None:
    assert bench.turn(request(WRITE, 0, 512, bytes(512))) == DONE
    assert not bench.plane.was_batch


def test_request_that_comes_in_parts_waits_for_its_rest(bench: Bench) -> None:
    data = os.urandom(512)
    wire = request(READ, 0, 512, cookie=1) + request(WRITE, 512, 512, data, cookie=2)
    for at in range(0, len(wire), 7):
        assert bench.turn(wire[at : at + 7]) == DONE
    first = data_chunk(0, bench.content[:512], 1)
    assert bench.replies() == first + simple(2)
    assert bench.on_disk()[512:1024] == data


def test_zeroes_are_answered_with_a_hole_from_zero_min_on(bench: Bench) -> None:
    os.pwrite(bench.fd, bytes(1 << 16), 0)
    assert bench.turn(request(READ, 0, 32 << 10)) == DONE
    assert bench.replies() == hole_chunk(0, 32 << 10)
    assert bench.turn(request(READ, 0, (32 << 10) - 1)) == DONE
    assert bench.replies() == data_chunk(0, bytes((32 << 10) - 1))


@pytest.mark.parametrize("at", [0, 1, (32 << 10) - 1])
def test_one_byte_that_is_not_zero_is_data(bench: Bench, at: int) -> None:
    data = bytearray(32 << 10)
    data[at] = 1
    os.pwrite(bench.fd, data, 0)
    assert bench.turn(request(READ, 0, 32 << 10)) == DONE
    assert bench.replies() == data_chunk(0, data)


def test_simple_replies_know_no_holes(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "disk", structured=False)
    os.pwrite(bench.fd, bytes(1 << 16), 0)
    assert bench.turn(request(READ, 0, 1 << 16)) == DONE
    assert bench.replies() == simple() + bytes(1 << 16)
    bench.close()


# ---- what is left to Python ----


@pytest.mark.parametrize(
    "wire",
    [
        request(FLUSH, 0, 0),
        request(READ, 0, 512, flags=FUA),
        request(WRITE, 0, 512, bytes(512), flags=FUA),
        request(READ, 0, 0),
        request(WRITE, 0, 0),
        request(READ, SIZE, 1),
        request(READ, SIZE - 1, 2),
        request(READ, (1 << 64) - 1, 2),
        request(READ, (1 << 64) - 512, 1024),
        request(WRITE, SIZE - 511, 512, bytes(512)),
        request(READ, 0, 200_001),  # longer than `length_max`
        request(READ, 0, (1 << 32) - 1),
        request(WRITE, 0, (1 << 32) - 1),
        request(2, 0, 0),
        request(4, 0, 512),
        request(0xFFFF, 0, 512),
        request(READ, 0, 512, magic=0x25609512),
        request(READ, 0, 512, magic=0x67446698),
    ],
)
def test_what_is_not_plain_stays_in_the_buffer(bench: Bench, wire: bytes) -> None:
    plain = request(READ, 0, 512)
    assert bench.turn(plain + wire + plain) == SLOW
    plane = bench.plane
    assert bench.received[plane.begin : plane.end] == wire + plain
    # The reply to what came before is packed, and Python sends it with its own.
    assert bench.arena[plane.base : plane.out] == data_chunk(0, bench.content[:512])
    assert bench.on_disk() == bench.content


def test_it_goes_on_behind_what_python_has_served(bench: Bench) -> None:
    slow = request(FLUSH, 0, 0)
    assert bench.turn(slow + request(READ, 0, 512)) == SLOW
    plane = bench.plane
    begin = plane.begin + len(slow)
    assert plane.turn(bench.route, 0, True, begin, plane.end, 0, 0) == DONE
    assert bench.replies() == data_chunk(0, bench.content[:512])


def test_read_that_the_page_cache_has_not_is_left(bench: Bench) -> None:
    bench.file.read_max = 0
    assert bench.turn(request(READ, 0, 512)) == SLOW


def test_read_behind_the_end_of_a_truncated_file_is_left(bench: Bench) -> None:
    os.ftruncate(bench.fd, 4096)
    assert bench.turn(request(READ, 4096 - 256, 512)) == SLOW
    assert bench.plane.out == 0


@pytest.mark.parametrize("command", [READ, WRITE])
def test_route_that_is_closed_for_it_leaves_the_request(
    bench: Bench, command: int
) -> None:
    bench.route.can_read = command != READ
    bench.route.can_write = command != WRITE
    wire = request(command, 0, 512, bytes(512) if command == WRITE else b"")
    assert bench.turn(wire) == SLOW
    assert bench.on_disk() == bench.content


def test_client_that_may_not_write_is_left_to_python(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "disk", can_write=False)
    assert bench.turn(request(WRITE, 0, 512, bytes(512))) == SLOW
    assert bench.on_disk() == bench.content
    bench.close()


def test_read_only_device_leaves_writes(bench: Bench) -> None:
    bench.route.is_read_only = True
    assert bench.turn(request(WRITE, 0, 512, bytes(512))) == SLOW
    assert bench.on_disk() == bench.content


def test_file_that_takes_no_writes_leaves_them(bench: Bench) -> None:
    bench.file.write_max = 0
    assert bench.turn(request(WRITE, 0, 512, bytes(512))) == SLOW
    assert bench.on_disk() == bench.content


def test_write_that_does_not_fit_the_buffer_is_left(bench: Bench) -> None:
    wire = request(WRITE, 0, 1 << 16, bytes(1000))
    assert bench.turn(wire) == SLOW
    assert bench.plane.end - bench.plane.begin == len(wire)


def test_read_that_does_not_fit_the_arena_is_left(bench: Bench) -> None:
    assert bench.turn(request(READ, 0, 1 << 18)) == SLOW


# ---- files that fail ----


def test_slow_write_is_told_once_and_the_next_one_left(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "disk", slow_ns=-1)
    one = request(WRITE, 0, 512, bytes(512))
    assert bench.turn(one + one) == SLOW
    assert bench.told == ["slow"]
    assert bench.file.write_max == 0
    bench.close()


def test_write_that_the_file_refuses_is_told_with_its_errno(bench: Bench) -> None:
    full = os.open("/dev/full", os.O_RDWR)
    told: list[tuple[int, ...]] = []
    file = FastFile(full, 10**9, lambda: None, lambda *how: told.append(how))
    file.size = file.write_max = SIZE
    bench.route = Route.flat(file, 0, SIZE)
    bench.route.can_write = True
    assert bench.turn(request(WRITE, 0, 512, bytes(512))) == UNFINISHED
    assert told == [(0, 512, 0, errnos.ENOSPC, 0)]
    assert bench.plane.end - bench.plane.begin == 28 + 512
    assert bench.plane.out == 0
    os.close(full)


def test_write_that_is_taken_in_part_is_told_with_how_much(bench: Bench) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE - 256, before[1]))
    try:
        stop = bench.turn(request(WRITE, SIZE - 512, 512, bytes(512)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stop == UNFINISHED
    assert bench.told == [f"unfinished {(SIZE - 512, 512, 256, 0, 0)}"]


# ---- sockets ----


def test_nothing_there_is_done(bench: Bench) -> None:
    assert bench.turn() == DONE


def test_peer_that_has_gone_is_closed(bench: Bench) -> None:
    bench.peer.close()
    assert bench.turn() == CLOSED


def test_what_a_peer_has_sent_before_it_left_is_served_first(bench: Bench) -> None:
    data = os.urandom(512)
    bench.peer.sendall(request(WRITE, 0, 512, data))
    bench.peer.shutdown(socket.SHUT_WR)
    assert bench.turn() == DONE
    assert bench.turn() == CLOSED
    assert bench.on_disk()[:512] == data


def test_peer_that_takes_no_reply_fails_with_the_errno(bench: Bench) -> None:
    bench.peer.sendall(request(READ, 0, 512))
    bench.peer.close()
    assert bench.turn() == FAILED
    assert bench.plane.error in (errnos.EPIPE, errnos.ECONNRESET)


def test_peer_that_does_not_read_blocks_and_loses_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "disk", received=1 << 16, arena=1 << 18)
    expected = b""
    wire = b""
    for nr in range(400):
        wire += request(READ, nr * 512, 4096, cookie=nr)
        expected += data_chunk(nr * 512, bench.content[nr * 512 :][:4096], nr)
    bench.peer.sendall(wire)
    plane, got, has_blocked = bench.plane, b"", False
    base = out = 0
    while len(got) < len(expected):
        stop = plane.turn(bench.route, 0, False, plane.begin, plane.end, base, out)
        base, out = plane.base, plane.out
        has_blocked = has_blocked or stop == BLOCKED
        assert stop in (BLOCKED, DONE)
        got += bench.replies()
        while base < out:  # as `Output.flush` does
            base += bench.ours.send(bench.arena[base:out])
            got += bench.replies()
        base = out = 0
    assert has_blocked
    assert got == expected
    bench.close()


def test_polling_finds_nothing_and_ends(bench: Bench) -> None:
    stop = bench.turn(request(READ, 0, 512), poll_ns=100_000)
    # On a busy machine a look may come back late, and polling ends with it.
    assert stop == (DONE if bench.plane.was_late else POLLED)
    assert bench.replies() == data_chunk(0, bench.content[:512])


def test_turn_ends_when_its_time_is_up(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "disk", turn_ns=-1)
    assert bench.turn(request(READ, 0, 512) * 300) == TURN_OVER
    left = (bench.plane.end - bench.plane.begin) // 28
    assert 0 < left < 300
    bench.close()


def test_poisoning_overwrites_what_is_served_and_sent(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "disk", poison=True)
    wire = request(WRITE, 0, 512, b"w" * 512) + request(READ, 0, 512)
    assert bench.turn(wire + b"\x25\x60") == DONE
    assert bench.received[2 : len(wire) + 2] == b"\xdb" * len(wire)
    assert bench.arena[: 16 + 28 + 512] == b"\xdb" * (16 + 28 + 512)
    assert bytes(bench.received[:2]) == b"\x25\x60"
    bench.close()


def test_places_outside_of_the_buffers_are_refused(bench: Bench) -> None:
    turn = bench.plane.turn
    for places in [(-1, 0, 0, 0), (2, 1, 0, 0), (0, (1 << 16) + 1, 0, 0)]:
        with pytest.raises(ValueError, match="outside"):
            turn(bench.route, 0, True, *places)
    with pytest.raises(ValueError, match="outside"):
        turn(bench.route, 0, True, 0, 0, 0, (1 << 18) + 1)


def test_released_plane_leaves_everything(bench: Bench) -> None:
    bench.plane.release()
    bench.received.extend(b"it can be resized again")
    assert bench.turn(request(READ, 0, 512)) == SLOW


# ---- routes ----


def test_flat_route_adds_its_delta(bench: Bench) -> None:
    bench.route = Route.flat(bench.file, 8192, SIZE - 8192)
    bench.route.can_read = True
    assert bench.turn(request(READ, 512, 512)) == DONE
    assert bench.replies() == data_chunk(512, bench.content[8704:9216])
    # Behind the end of the device, though not of the export.
    assert bench.turn(request(READ, SIZE - 8192, 512)) == SLOW


def test_flat_route_with_a_delta_below_the_file_is_left(bench: Bench) -> None:
    bench.route = Route.flat(bench.file, -4096, SIZE)
    bench.route.can_read = True
    assert bench.turn(request(READ, 0, 512)) == SLOW


def test_served_requests_are_counted_once_a_turn(bench: Bench) -> None:
    counts: list[tuple[int, int]] = []
    bench.route.was_served = lambda reads, writes: counts.append((reads, writes))
    one, two = request(READ, 0, 512), request(WRITE, 0, 512, bytes(512))
    bench.turn(one + two + one)
    bench.turn(two)
    bench.turn()
    assert counts == [(2, 1), (0, 1)]


def test_requests_are_told_of_only_while_somebody_wants_to_know(bench: Bench) -> None:
    counts: list[tuple[int, int]] = []
    one = request(READ, 0, 512)
    bench.turn(one * 2)
    bench.route.was_served = lambda reads, writes: counts.append((reads, writes))
    bench.turn(one)
    bench.route.was_served = None
    bench.turn(one)
    assert counts == [(1, 0)]


def test_bitmap_says_which_file_has_a_region(bench: Bench, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"s" * SIZE)
    with source.open("rb") as opened:
        other = FastFile(opened.fileno(), 0, lambda: None, lambda *_: None)
        other.size = other.read_max = SIZE
        bits = zeros(SIZE >> 16, "little")
        bits[1] = bits[2] = 1
        route = Route.by_bitmap(bench.file, other, bits, len(bits), 16, 0, SIZE)
        route.can_read = route.can_write = True
        bench.route = route
        region = 1 << 16
        assert bench.turn(request(READ, 0, 512)) == DONE
        assert bench.replies() == data_chunk(0, b"s" * 512)
        assert bench.turn(request(READ, region, 512)) == DONE
        assert bench.replies() == data_chunk(
            region, bench.content[region : region + 512]
        )
        both = request(READ, 2 * region - 256, 512)  # of two set regions
        assert bench.turn(both) == DONE
        assert bench.replies() == data_chunk(
            2 * region - 256, bench.content[2 * region - 256 : 2 * region + 256]
        )
        assert bench.turn(request(WRITE, region, 512, b"w" * 512)) == DONE
        assert bench.replies() == simple()
        assert bench.on_disk()[region : region + 512] == b"w" * 512
        mixed = request(READ, region - 256, 2 * region + 512)  # of both files
        assert bench.turn(mixed) == DONE
        middle = bench.on_disk()[region : 3 * region]
        assert bench.replies() == data_chunk(
            region - 256, b"s" * 256 + middle + b"s" * 256
        )
        # A write to a region that is not set is Python's, and so is one to it and its neighbour.
        for offset in (0, region - 256):
            assert bench.turn(request(WRITE, offset, 512, bytes(512))) == SLOW
        assert bench.on_disk()[region : region + 512] == b"w" * 512
        route.close()
        bits.append(0)  # nothing holds it any more


def test_bitmap_whose_other_file_is_not_to_be_read_leaves_its_regions(
    bench: Bench,
) -> None:
    bits = zeros(SIZE >> 16, "little")
    bench.route = Route.by_bitmap(bench.file, bench.file, bits, len(bits), 16, 0, SIZE)
    bench.route.can_read = True
    bench.route.can_read_other = False
    assert bench.turn(request(READ, 0, 512)) == SLOW


def test_bitmap_without_another_file_leaves_its_regions(bench: Bench) -> None:
    bits = zeros(SIZE >> 16, "little")
    bench.route = Route.by_bitmap(bench.file, None, bits, len(bits), 16, 0, SIZE)
    bench.route.can_read = True
    assert bench.turn(request(READ, 0, 512)) == SLOW


def test_bitmap_that_is_too_short_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="too short"):
        Route.by_bitmap(bench.file, None, bytes(1), 9, 16, 0, SIZE)
