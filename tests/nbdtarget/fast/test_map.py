# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget_map`: long READs that the kernel sends from a mapping of the file, and the windows that are mapped."""

import ctypes
import errno as errnos
import mmap
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bitarray import bitarray

from nbdtarget.fast import compiled
from nbdtarget.policies.smq.block_table import BlockTable
from tests.support.plane import COOKIE, SIZE, Bench, data_chunk, request, simple

pytestmark = pytest.mark.skipif(
    not compiled.IS_COMPILED, reason=f"{compiled.describe()}"
)
if compiled.IS_COMPILED:
    from nbdtarget_fast import DONE, FAILED, SLOW, FastFile, Route
    from nbdtarget_map import Windows

READ, WRITE = 0, 1
LENGTH = 64 << 10
WINDOW = 128 << 10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Mapped(Bench):
    """A bench whose long READs are sent from windows."""

    def __init__(self, path: Path, **how: bool) -> None:
        super().__init__(path, **how)
        self.path = path
        self.nr_wanted = 0
        self.windows = Windows(8 * WINDOW, self.sweep_wanted, WINDOW, LENGTH)
        assert self.windows.takes(self.fd, SIZE)
        self.file.windows = self.windows
        self.file.fake_send_ns = 1  # however busy the machine is

    def sweep_wanted(self) -> None:
        self.nr_wanted += 1

    def take_away(self, begin: int, end: int) -> None:
        """Let the kernel fail to copy these bytes of the file from where they are mapped."""
        for first, last, offset in mapped_ranges(self.path):
            here = max(begin, offset) - offset + first
            there = min(end, offset + last - first) - offset + first
            if here < there:
                assert _libc.mprotect(here, there - here, 0) == 0

    def stop_reading(self) -> bytes:
        """Send to the peer until its socket takes no more; return what was sent."""
        sent = b""
        try:
            while True:
                part = os.urandom(4096)
                sent += part[: self.ours.send(part)]
        except BlockingIOError:
            return sent

    def unsent(self) -> bytes:
        return bytes(self.arena[self.plane.base : self.plane.out])


def mapped_ranges(path: Path) -> list[tuple[int, int, int]]:
    """Where the file is mapped into this process: begin, end, offset in the file."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[5] == str(path):
            begin, _, end = words[0].partition("-")
            found.append((int(begin, 16), int(end, 16), int(words[2], 16)))
    return found


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Mapped]]:
    made: list[Mapped] = []

    def one(**how: bool) -> Mapped:
        made.append(Mapped(tmp_path / f"disk{len(made)}", **how))
        return made[-1]

    yield one
    for bench in made:
        bench.windows.drop(bench.file.owner, 100)
        bench.close()


@pytest.fixture
def bench(make: Callable[..., Mapped]) -> Mapped:
    return make()


# ---- what is sent ----


def test_long_read_is_timed_though_its_batch_was_not_to_be(bench: Mapped) -> None:
    """A page that has gone is read from the disk while it is sent."""
    usual_ns = 10**15
    bench.plane.leave_untimed(100, usual_ns)
    assert bench.turn(request(READ, 0, LENGTH)) == DONE
    nr, _, taken_ns, _ = bench.plane.counted()[READ]
    assert nr == 1
    assert 0 < taken_ns < usual_ns


@pytest.mark.parametrize("offset", [0, 4096, 12345, WINDOW - LENGTH, WINDOW - 1])
def test_long_read_is_answered_with_the_bytes_of_the_file(
    bench: Mapped, offset: int
) -> None:
    assert bench.turn(request(READ, offset, LENGTH)) == DONE
    assert bench.replies() == data_chunk(
        offset, bench.content[offset : offset + LENGTH]
    )
    assert bench.windows.nr_sent == 1
    assert (bench.plane.base, bench.plane.out) == (0, 0)


@pytest.mark.parametrize("poison", [False, True])
def test_simple_reply(make: Callable[..., Mapped], poison: bool) -> None:
    bench = make(structured=False, poison=poison)
    assert bench.turn(request(READ, 5000, LENGTH)) == DONE
    assert bench.replies() == simple() + bench.content[5000 : 5000 + LENGTH]
    assert bench.windows.nr_sent == 1


def test_reply_with_extended_headers(make: Callable[..., Mapped]) -> None:
    bench = make(extended=True, poison=True)
    wire = struct.pack(">IHHQQQ", 0x21E41C71, 0, READ, COOKIE, 5000, LENGTH)
    assert bench.turn(wire) == DONE
    head = struct.pack(">IHHQQQ", 0x6E8A278C, 1, 1, COOKIE, 5000, LENGTH + 8)
    data = bench.content[5000 : 5000 + LENGTH]
    assert bench.replies() == head + struct.pack(">Q", 5000) + data
    assert bench.windows.nr_sent == 1


@pytest.mark.parametrize("poison", [False, True])
def test_batch_of_short_and_long_reads_is_answered_in_its_order(
    make: Callable[..., Mapped], poison: bool
) -> None:
    bench = make(poison=poison)
    data = os.urandom(512)
    wire = request(READ, 0, 512, cookie=1) + request(WRITE, LENGTH, 512, data, cookie=2)
    wire += request(READ, LENGTH, LENGTH, cookie=3) + request(READ, 0, 512, cookie=4)
    assert bench.turn(wire) == DONE
    bench.content[LENGTH : LENGTH + 512] = data
    assert bench.replies() == b"".join(
        (
            data_chunk(0, bench.content[:512], 1),
            simple(2),
            data_chunk(LENGTH, bench.content[LENGTH : 2 * LENGTH], 3),
            data_chunk(0, bench.content[:512], 4),
        )
    )
    assert bench.windows.nr_sent == 1


def test_what_is_written_is_read_from_a_window_that_was_there_before(
    bench: Mapped,
) -> None:
    for _ in range(3):
        data = os.urandom(8192)
        bench.turn(request(WRITE, 4096, len(data), data))
        bench.content[4096 : 4096 + len(data)] = data
        bench.turn(request(READ, 0, LENGTH))
        assert bench.replies() == simple() + data_chunk(0, bench.content[:LENGTH])
    assert bench.windows.nr_sent == 3


def test_short_read_is_copied(bench: Mapped) -> None:
    assert bench.turn(request(READ, 0, LENGTH - 1)) == DONE
    assert bench.replies() == data_chunk(0, bench.content[: LENGTH - 1])
    assert (bench.windows.nr_sent, bench.windows.nr_mapped) == (0, 0)


def test_pieces_of_two_files_are_one_reply(bench: Mapped, tmp_path: Path) -> None:
    source = os.urandom(SIZE)
    (tmp_path / "source").write_bytes(source)
    with (tmp_path / "source").open("rb") as opened:
        other = FastFile(opened.fileno(), 0, lambda: None, lambda *_: None)
        other.size = other.read_max = SIZE
        other.windows = bench.windows
        bits = bitarray("0110" * 16, endian="little")
        bench.route = Route.by_bitmap(bench.file, other, bits, 64, 14, 0, SIZE)
        bench.route.can_read = True
        assert bench.turn(request(READ, 4096, LENGTH + 8192)) == DONE
        expected = source[:16384] + bench.content[16384:49152] + source[49152:81920]
        assert bench.replies() == data_chunk(
            4096, expected[4096 : 4096 + LENGTH + 8192]
        )
        assert bench.windows.nr_sent == 1
        bench.route.close()
        bench.windows.drop(other.owner, 100)


def test_file_without_windows_among_the_pieces_has_all_of_them_copied(
    bench: Mapped, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(bench.content)
    with (tmp_path / "source").open("rb") as opened:
        other = FastFile(opened.fileno(), 0, lambda: None, lambda *_: None)
        other.size = other.read_max = SIZE
        bits = bitarray("01" * 32, endian="little")
        for first in (bench.file, other):
            last = other if first is bench.file else bench.file
            bench.route = Route.by_bitmap(first, last, bits, 64, 14, 0, SIZE)
            bench.route.can_read = True
            assert bench.turn(request(READ, 0, LENGTH)) == DONE
            assert bench.replies() == data_chunk(0, bench.content[:LENGTH])
            bench.route.close()
    assert bench.windows.nr_sent == 0


def test_blocks_of_a_cache_are_one_reply_and_a_hit_each(bench: Mapped) -> None:
    block = 32 << 10
    table, served = BlockTable(8), list[tuple[int, int]]()
    for at, number in ((5, 0), (2, 1), (3, 2)):
        table.insert(at, number)
    flags = bytes(8)
    found = table.blocks, table.buckets, table.chain
    bench.route = Route.by_table(
        *(bench.file, *found, table.shift, bytearray(b"\1" * 8)),
        dirty=flags,
        discarded=flags,
        nr_discard_bits=8,
        discard_shift=0,
        block_size=block,
        nr_blocks=8,
        begin=0,
        size=SIZE,
    )
    bench.route.can_read = True
    bench.route.was_served = lambda *counts: served.append(counts)
    assert bench.turn(request(READ, 0, 3 * block)) == DONE
    data = b"".join(bench.content[at * block :][:block] for at in (5, 2, 3))
    assert bench.replies() == data_chunk(0, data)
    assert bench.windows.nr_sent == 1
    assert served == [(3, 0)]


# ---- zeroes ----


def test_zeroes_are_a_hole_all_the_same(bench: Mapped) -> None:
    os.pwrite(bench.fd, bytes(LENGTH), 0)
    assert bench.turn(request(READ, 0, LENGTH)) == DONE
    assert len(bench.replies()) == 32  # an OFFSET_HOLE chunk


@pytest.mark.parametrize("at", [0, LENGTH - 4097, LENGTH - 1])
def test_one_byte_that_is_not_zero_is_data(bench: Mapped, at: int) -> None:
    data = bytearray(LENGTH)
    data[at] = 1
    os.pwrite(bench.fd, data, 0)
    assert bench.turn(request(READ, 0, LENGTH)) == DONE
    assert bench.replies() == data_chunk(0, data)


# ---- files that change ----


@pytest.mark.parametrize("size", [0, 4096, 20_000, LENGTH - 1])
@pytest.mark.parametrize("structured", [False, True])
def test_file_that_has_been_truncated_shows_no_zeroes(
    make: Callable[..., Mapped], size: int, structured: bool
) -> None:
    bench = make(structured=structured)
    bench.turn(request(READ, 0, LENGTH))
    bench.replies()
    os.ftruncate(bench.fd, size)
    assert bench.turn(request(READ, 0, LENGTH)) == SLOW
    assert bench.replies() == b""
    assert bench.windows.nr_sent == 1


def test_file_that_has_grown_is_read_through_the_same_window(bench: Mapped) -> None:
    bench.turn(request(READ, 0, LENGTH))
    os.ftruncate(bench.fd, 4096)
    os.pwrite(bench.fd, bench.content[:WINDOW], 0)
    bench.replies()
    assert bench.turn(request(READ, 0, LENGTH)) == DONE
    assert bench.replies() == data_chunk(0, bench.content[:LENGTH])
    assert (bench.windows.nr_sent, bench.windows.nr_mapped) == (2, 1)


def test_bytes_behind_the_end_of_the_device_are_not_mapped(bench: Mapped) -> None:
    bench.file.size = LENGTH
    assert bench.turn(request(READ, 1, LENGTH)) == SLOW
    assert bench.windows.nr_mapped == 0


def test_page_that_is_not_in_memory_takes_the_usual_way(bench: Mapped) -> None:
    os.fsync(bench.fd)
    os.posix_fadvise(bench.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.pread(bench.fd, 4096, LENGTH - 4096)
    os.posix_fadvise(bench.fd, 0, 4096, os.POSIX_FADV_DONTNEED)
    bench.file.read_flags = 0
    assert bench.turn(request(READ, 0, LENGTH)) == DONE
    assert bench.replies() == data_chunk(0, bench.content[:LENGTH])
    assert bench.windows.nr_sent == 0


# ---- what the socket or the kernel does not take ----


def test_nothing_that_waits_for_the_socket_is_in_a_window(bench: Mapped) -> None:
    filler = bench.stop_reading()
    before = bytes(bench.content[:LENGTH])
    bench.turn(request(READ, 0, LENGTH))
    assert bench.plane.out - bench.plane.base > 0
    os.pwrite(
        bench.fd, os.urandom(LENGTH), 0
    )  # after the turn: no reply may hold these bytes
    received = bench.replies() + bench.unsent()
    assert received == filler + data_chunk(0, before)


def test_part_that_the_socket_does_not_take_is_read_at_once(bench: Mapped) -> None:
    wire = b"".join(request(READ, nr << 16, LENGTH, cookie=nr) for nr in range(6))
    bench.turn(wire)
    assert 0 < bench.windows.nr_sent < 6
    os.pwrite(bench.fd, os.urandom(SIZE), 0)
    got, expected = bench.replies(), b""
    while bench.plane.out > bench.plane.base:
        got += bench.unsent()
        bench.plane.turn(bench.route, 0, True, bench.plane.begin, bench.plane.end, 0, 0)
        got += bench.replies()
    for nr in range(6):
        head = data_chunk(nr << 16, b"", nr)[:16]
        assert head in got
        expected += data_chunk(
            nr << 16, bench.content[nr << 16 : (nr << 16) + LENGTH], nr
        )
    # The replies of the first turn hold the bytes of that time.
    nr_first = bench.windows.nr_sent
    assert got[: nr_first * (LENGTH + 28)] == expected[: nr_first * (LENGTH + 28)]


@pytest.mark.parametrize("begin", [0, 4096, 32768, LENGTH - 4096])
@pytest.mark.parametrize("before", [0, 1])
def test_page_that_goes_away_is_read_with_pread(
    bench: Mapped, begin: int, before: int
) -> None:
    bench.turn(request(READ, 0, LENGTH))
    bench.replies()
    bench.take_away(begin, LENGTH)
    wire = request(READ, SIZE - 512, 512, cookie=1) * before
    assert bench.turn(wire + request(READ, 0, LENGTH)) == DONE
    first = data_chunk(SIZE - 512, bench.content[-512:], 1) * before
    assert bench.replies() == first + data_chunk(0, bench.content[:LENGTH])
    assert bench.windows.nr_sent == 1


@pytest.mark.parametrize("before", [0, 1])
def test_read_that_fails_before_its_first_byte_is_left_to_python(
    bench: Mapped, before: int
) -> None:
    bench.turn(request(READ, 0, LENGTH))
    bench.replies()
    bench.take_away(0, LENGTH)
    bench.file.fake_error = errnos.EIO
    wire = request(READ, SIZE - 512, 512, cookie=1) * before
    assert bench.turn(wire + request(READ, 0, LENGTH)) == SLOW
    plane = bench.plane
    assert bench.received[plane.begin : plane.end] == request(READ, 0, LENGTH)
    first = data_chunk(SIZE - 512, bench.content[-512:], 1) * before
    assert bench.replies() + bench.unsent() == first
    assert not plane.is_cut


def test_read_that_fails_when_a_part_has_left_ends_the_connection(
    bench: Mapped, tmp_path: Path
) -> None:
    failed: list[int] = []
    bench.file = FastFile(
        bench.fd, 0, lambda: None, lambda *_: None, read_failed=failed.append
    )
    bench.file.size = bench.file.read_max = SIZE
    bench.file.windows = bench.windows
    bench.file.fake_error = errnos.EIO
    bench.route = Route.flat(bench.file, 0, SIZE)
    bench.route.can_read = True
    wire = b"".join(request(READ, nr << 16, LENGTH, cookie=nr) for nr in range(6))
    assert bench.turn(wire) == FAILED
    assert bench.plane.is_cut
    assert bench.plane.error == errnos.EIO
    assert failed == [errnos.EIO]


def test_peer_that_has_gone_fails_with_the_errno(bench: Mapped) -> None:
    bench.peer.sendall(request(READ, 0, LENGTH))
    bench.peer.close()
    assert bench.turn() == FAILED
    assert bench.plane.error in (errnos.EPIPE, errnos.ECONNRESET)
    assert not bench.plane.is_cut


# ---- windows ----


def test_windows_are_bounded_and_the_one_not_used_for_longest_goes(
    bench: Mapped,
) -> None:
    small = Windows(4 * WINDOW, bench.sweep_wanted, WINDOW, LENGTH)
    bench.file.windows = small
    for nr in (0, 1, 2, 3, 0, 4, 5):
        assert bench.turn(request(READ, nr * WINDOW, LENGTH)) == DONE
        assert bench.replies() == data_chunk(
            nr * WINDOW, bench.content[nr * WINDOW :][:LENGTH]
        )
    assert small.nr_mapped == 4
    assert small.nr_sent == 7
    offsets = set()
    for begin, end, offset in mapped_ranges(bench.path):
        offsets |= set(range(offset, offset + end - begin, WINDOW))
    assert {at // WINDOW for at in offsets} == {0, 3, 4, 5}
    bench.file.windows = None
    assert not small.drop(bench.file.owner, 100)


def test_most_reads_of_more_windows_than_there_are_are_copied(bench: Mapped) -> None:
    """Mapping another window for each READ takes longer than copying it."""
    length, nr_rounds = 4096, 64
    small = Windows(4 * WINDOW, bench.sweep_wanted, WINDOW, length)
    bench.file.windows = small
    nr_windows = SIZE // WINDOW
    assert nr_windows >= 8
    for _ in range(nr_rounds):
        for nr in range(nr_windows):
            assert bench.turn(request(READ, nr * WINDOW, length)) == DONE
            data = bench.content[nr * WINDOW :][:length]
            assert bench.replies() == data_chunk(nr * WINDOW, data)
    nr_bytes = nr_rounds * nr_windows * length
    assert 4 < small.nr_made <= 4 + nr_bytes // (WINDOW // 2)
    assert nr_rounds < small.nr_sent < nr_rounds * nr_windows
    bench.file.windows = None
    assert not small.drop(bench.file.owner, 100)


def test_reads_one_after_the_other_of_a_large_file_have_windows(bench: Mapped) -> None:
    small = Windows(4 * WINDOW, bench.sweep_wanted, WINDOW, LENGTH)
    bench.file.windows = small
    for at in range(0, SIZE, LENGTH):
        assert bench.turn(request(READ, at, LENGTH)) == DONE
        bench.replies()
    assert small.nr_sent == SIZE // LENGTH
    assert small.nr_made == SIZE // WINDOW
    bench.file.windows = None
    assert not small.drop(bench.file.owner, 100)


def test_window_that_nothing_was_sent_from_is_swept(bench: Mapped) -> None:
    os.fsync(bench.fd)
    os.posix_fadvise(bench.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.pread(bench.fd, 4096, LENGTH - 4096)
    os.posix_fadvise(bench.fd, 0, 4096, os.POSIX_FADV_DONTNEED)
    bench.file.read_flags = 0
    assert bench.turn(request(READ, 0, LENGTH)) == DONE
    assert (bench.windows.nr_sent, bench.windows.nr_mapped) == (0, 1)
    assert bench.nr_wanted == 1


# ---- what takes long ----


def reads_until_sent(bench: Mapped) -> int:
    """READ until one is sent from a window; return how many were copied before it."""
    before, nr = bench.windows.nr_sent, 0
    while True:
        assert bench.turn(request(READ, 0, LENGTH)) == DONE
        assert bench.replies() == data_chunk(0, bench.content[:LENGTH])
        if bench.windows.nr_sent > before:
            return nr
        nr += 1


def test_after_sends_that_take_long_more_and_more_reads_are_copied(
    bench: Mapped,
) -> None:
    bench.file.fake_send_ns = 1_000_001
    copied = [reads_until_sent(bench) for _ in range(13)]
    assert copied == [0, *((2 << nr) - 1 for nr in range(10)), 1024, 1024]
    bench.file.fake_send_ns = 1_000_000
    assert [reads_until_sent(bench) for _ in range(4)] == [1024, 0, 0, 0]
    bench.file.fake_send_ns = 1_000_001
    # Four sends that did not take long have halved it four times.
    assert [reads_until_sent(bench) for _ in range(2)] == [0, 2 * 64 + 1]


def test_send_that_takes_long_counts_once_for_each_file_of_a_read(
    bench: Mapped, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(bench.content)
    with (tmp_path / "source").open("rb") as opened:
        other = FastFile(opened.fileno(), 0, lambda: None, lambda *_: None)
        other.size = other.read_max = SIZE
        other.windows = bench.windows
        bits = bitarray("01" * 32, endian="little")
        bench.route = Route.by_bitmap(bench.file, other, bits, 64, 14, 0, SIZE)
        bench.route.can_read = True
        length = 10 << 14  # five pieces of each file

        def copied_until_sent() -> int:
            before, nr = bench.windows.nr_sent, 0
            while True:
                assert bench.turn(request(READ, 0, length)) == DONE
                while bench.replies():
                    pass
                if bench.windows.nr_sent > before:
                    return nr
                nr += 1

        bench.file.fake_send_ns = 1
        other.fake_send_ns = 1_000_001
        assert [copied_until_sent() for _ in range(3)] == [0, 1, 3]
        bench.file.fake_send_ns, other.fake_send_ns = 1_000_001, 1
        assert [copied_until_sent() for _ in range(3)] == [7, 1, 3]
        bench.route.close()
        bench.windows.drop(other.owner, 100)


def test_file_that_cannot_be_mapped_now_is_mapped_later(bench: Mapped) -> None:
    limit = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size, limit[1]))
    try:
        stop = bench.turn(request(READ, 0, LENGTH))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert stop == DONE
    assert bench.replies() == data_chunk(0, bench.content[:LENGTH])
    assert (bench.windows.nr_sent, bench.windows.nr_mapped) == (0, 0)
    assert reads_until_sent(bench) == 1


def test_read_of_more_windows_than_there_are_is_copied(bench: Mapped) -> None:
    small = Windows(4 * 4096, bench.sweep_wanted, 4096, LENGTH)
    bench.file.windows = small
    assert bench.turn(request(READ, 0, LENGTH)) == DONE
    assert bench.replies() == data_chunk(0, bench.content[:LENGTH])
    assert small.nr_sent == 0
    assert small.nr_mapped == 4
    bench.file.windows = None
    small.drop(bench.file.owner, 100)


def test_less_than_four_windows_are_none(bench: Mapped) -> None:
    none = Windows(4 * WINDOW - 1, bench.sweep_wanted, WINDOW, LENGTH)
    assert not none.takes(bench.fd, SIZE)
    bench.file.windows = none
    assert bench.turn(request(READ, 0, LENGTH)) == DONE
    assert bench.replies() == data_chunk(0, bench.content[:LENGTH])
    assert none.nr_mapped == 0


def test_window_that_was_not_used_since_the_last_sweep_goes(bench: Mapped) -> None:
    for nr in range(4):
        bench.turn(request(READ, nr * WINDOW, LENGTH))
    assert bench.nr_wanted == 4
    assert not bench.windows.sweep(100)
    assert bench.windows.nr_mapped == 4
    bench.replies()
    bench.turn(request(READ, WINDOW, LENGTH))
    assert bench.windows.sweep(2)
    assert bench.windows.nr_mapped == 2
    assert not bench.windows.sweep(2)
    assert bench.windows.nr_mapped == 1
    assert not bench.windows.sweep(2)
    assert bench.windows.nr_mapped == 0
    assert mapped_ranges(bench.path) == []


def test_windows_that_are_dropped_are_no_longer_mapped(
    make: Callable[..., Mapped],
) -> None:
    first, second = make(), make()
    second.file.windows = first.windows
    for nr in range(3):
        first.turn(request(READ, nr * WINDOW, LENGTH))
        second.turn(request(READ, nr * WINDOW, LENGTH))
    assert first.windows.drop(first.file.owner, 2)
    assert not first.windows.drop(first.file.owner, 2)
    assert mapped_ranges(first.path) == []
    assert len(mapped_ranges(second.path)) > 0
    assert first.windows.nr_mapped == 3
    first.windows.drop(second.file.owner, 100)


def test_windows_go_with_their_table(bench: Mapped) -> None:
    bench.turn(request(READ, 0, LENGTH))
    bench.file.windows = None
    bench.windows = Windows(0, bench.sweep_wanted)
    assert mapped_ranges(bench.path) == []


def test_helpers_do_not_inherit_windows(bench: Mapped) -> None:
    bench.turn(request(READ, 0, LENGTH))
    ((begin, _, _),) = mapped_ranges(bench.path)
    smaps = Path("/proc/self/smaps").read_text()
    ours = smaps[smaps.index(f"{begin:x}-") :]
    flags = next(line for line in ours.splitlines() if line.startswith("VmFlags"))
    assert " dc" in flags


def test_window_is_a_number_of_pages(bench: Mapped) -> None:
    for size in (0, mmap.PAGESIZE + 1):
        with pytest.raises(ValueError, match="whole pages"):
            Windows(1 << 20, bench.sweep_wanted, size)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_file_of_which_mincore_does_not_tell_is_not_taken(bench: Mapped) -> None:
    program = (
        "import os, sys; from nbdtarget_map import Windows\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.setegid(65534); os.seteuid(65534)\n"
        "sys.exit(Windows(1 << 30, None).takes(fd, 1 << 20))\n"
    )
    bench.path.chmod(0o644)
    subprocess.run([sys.executable, "-c", program, str(bench.path)], check=True)
    bench.path.chmod(0o666)
    done = subprocess.run([sys.executable, "-c", program, str(bench.path)])
    assert done.returncode == 1
