# SPDX-License-Identifier: Apache-2.0
"""Tables of the compiled fast path, which say where the blocks of a cache lie: one block, several of them, and what is left to Python."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from bitarray.util import zeros

from nbdtarget.fast import compiled
from nbdtarget.policies.smq.block_table import BlockTable
from tests.support.plane import SIZE, Bench, data_chunk, request, simple

pytestmark = pytest.mark.skipif(
    not compiled.IS_COMPILED, reason=f"{compiled.describe()}"
)
if compiled.IS_COMPILED:
    from nbdtarget_fast import DONE, SLOW, UNFINISHED, Route

READ, WRITE = 0, 1


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "disk")
    yield made
    made.close()


class Cached:
    """A cache of eight blocks of 64 KiB in the bench's file, found by a `BlockTable`."""

    BLOCK = 1 << 16

    def __init__(self, bench: Bench) -> None:
        self.table = BlockTable(8)
        self.is_hit = bytearray(8)
        self.dirty = zeros(8, "little")
        self.discarded = zeros(16, "little")
        self.bench = bench
        table = self.table
        bench.route = Route.by_table(
            bench.file,
            table.blocks,
            table.buckets,
            table.chain,
            table.shift,
            self.is_hit,
            self.dirty,
            self.discarded,
            16,
            1,
            self.BLOCK,
            15,
            0,
            SIZE,
        )
        bench.route.can_read = bench.route.can_write = True


def test_table_finds_the_cache_block(bench: Bench) -> None:
    cached = Cached(bench)
    cached.table.insert(3, 11)
    cached.is_hit[3] = 1
    offset = 11 * Cached.BLOCK + 512
    assert bench.turn(request(READ, offset, 512)) == DONE
    at = 3 * Cached.BLOCK + 512
    assert bench.replies() == data_chunk(offset, bench.content[at : at + 512])


def test_table_follows_its_chains(bench: Bench) -> None:
    cached = Cached(bench)
    for entry in range(8):
        cached.table.insert(entry, entry + 5)
        cached.is_hit[entry] = 1
    for entry in range(8):
        offset = (entry + 5) * Cached.BLOCK
        assert bench.turn(request(READ, offset, 512)) == DONE
        at = entry * Cached.BLOCK
        assert bench.replies() == data_chunk(offset, bench.content[at : at + 512])


@pytest.mark.parametrize(
    ("command", "offset", "length", "dirty", "is_hit", "discarded"),
    [
        (READ, 12 << 16, 512, True, True, False),  # not cached
        (READ, 11 << 16, 512, True, False, False),  # the first hit of the period
        (READ, (11 << 16) + 65000, 1024, True, True, False),  # of two blocks
        (READ, 15 << 16, 512, True, True, False),  # behind the last whole block
        (WRITE, 11 << 16, 512, False, True, False),  # clean
        (WRITE, 11 << 16, 512, True, True, True),  # discarded
        (WRITE, (11 << 16) + 65000, 1024, True, True, False),  # of two blocks
    ],
)
def test_what_a_table_cannot_tell_is_left(
    bench: Bench,
    command: int,
    offset: int,
    length: int,
    dirty: bool,
    is_hit: bool,
    discarded: bool,
) -> None:
    cached = Cached(bench)
    cached.table.insert(3, 11)
    cached.is_hit[3] = is_hit
    cached.dirty[3] = dirty
    cached.discarded[11 >> 1] = discarded
    payload = bytes(length) if command == WRITE and length < 60_000 else b""
    assert bench.turn(request(command, offset, length, payload)) == SLOW
    assert bench.on_disk() == bench.content


def test_write_to_a_dirty_cache_block_goes_into_it(bench: Bench) -> None:
    cached = Cached(bench)
    cached.table.insert(3, 11)
    cached.is_hit[3] = 1
    cached.dirty[3] = 1
    assert bench.turn(request(WRITE, 11 << 16, 512, b"w" * 512)) == DONE
    assert bench.on_disk()[3 << 16 : (3 << 16) + 512] == b"w" * 512


def cached_in(bench: Bench, entries: dict[int, int]) -> Cached:
    """Cache these blocks, by their entries; all of them are hit and dirty."""
    cached = Cached(bench)
    for entry, block in entries.items():
        cached.table.insert(entry, block)
        cached.is_hit[entry] = cached.dirty[entry] = 1
    return cached


@pytest.mark.parametrize("entries", [(3, 4, 5), (3, 6, 1), (3, 6, 7)])
def test_request_of_several_cached_blocks_is_served_from_all_of_them(
    tmp_path: Path, entries: tuple[int, ...]
) -> None:
    bench = Bench(tmp_path / "disk", received=1 << 18)
    cached_in(bench, dict(zip(entries, (10, 11, 12), strict=True)))
    counts: list[tuple[int, int]] = []
    bench.route.was_served = lambda reads, writes: counts.append((reads, writes))
    offset, length = (10 << 16) + 512, 2 << 16
    first, second, third = (
        slice((entry << 16) + begin, (entry << 16) + end)
        for entry, begin, end in zip(
            entries, (512, 0, 0), (1 << 16, 1 << 16, 512), strict=True
        )
    )
    assert bench.turn(request(READ, offset, length)) == DONE
    content = bench.content
    data = content[first] + content[second] + content[third]
    assert bench.replies() == data_chunk(offset, data)
    payload = bytes(reversed(data))
    assert bench.turn(request(WRITE, offset, length, payload)) == DONE
    assert bench.replies() == simple()
    expected = bytearray(content)
    expected[first], expected[second], expected[third] = (
        payload[: 65536 - 512],
        payload[65536 - 512 : -512],
        payload[-512:],
    )
    assert bench.on_disk() == expected
    assert counts == [(3, 0), (0, 3)]  # a hit for each block, as in Python
    bench.close()


def test_write_of_a_whole_dirty_block_goes_into_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "disk", received=1 << 18)
    cached_in(bench, {3: 11})
    assert bench.turn(request(WRITE, 11 << 16, 1 << 16, b"w" * 65536)) == DONE
    assert bench.on_disk()[3 << 16 : 4 << 16] == b"w" * 65536
    bench.close()


@pytest.mark.parametrize("what", ["clean", "locked", "not hit", "discarded"])
def test_write_of_several_blocks_is_left_whole_if_one_of_them_is(
    bench: Bench, what: str
) -> None:
    cached = cached_in(bench, {3: 10, 5: 11})
    if what == "clean":
        cached.dirty[5] = 0
    elif what == "locked":
        bench.route.locked = {11: "a lock"}
    elif what == "not hit":
        cached.is_hit[5] = 0
    else:
        cached.discarded[11 >> 1] = 1
    one = request(WRITE, (10 << 16) + 65024, 1024, b"w" * 1024)
    assert bench.turn(one) == SLOW
    assert bench.on_disk() == bench.content


def test_write_of_several_blocks_tells_how_many_came_before_the_one_that_failed(
    bench: Bench,
) -> None:
    cached_in(bench, {3: 10, 15 - 8: 11})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    at = 7 << 16
    resource.setrlimit(resource.RLIMIT_FSIZE, (at + 256, before[1]))
    try:
        stop = bench.turn(request(WRITE, (11 << 16) - 512, 1024, b"w" * 1024))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stop == UNFINISHED
    assert bench.told == [f"unfinished {(at, 512, 256, 0, 1)}"]
    assert bench.plane.end - bench.plane.begin == 28 + 1024


def test_read_of_several_blocks_of_which_the_page_cache_has_not_all_is_left(
    bench: Bench,
) -> None:
    cached_in(bench, {3: 10, 5: 11})
    bench.file.fake_misses = 0xFFFFFFFF
    assert bench.turn(request(READ, (11 << 16) - 512, 1024)) == SLOW
    assert bench.plane.out == 0


def test_locked_blocks_are_left_and_others_served(bench: Bench) -> None:
    cached = Cached(bench)
    for entry, block in ((3, 11), (4, 12)):
        cached.table.insert(entry, block)
        cached.is_hit[entry] = 1
    locked: dict[int, object] = {11: "a lock"}
    bench.route.locked = locked
    assert bench.turn(request(READ, 12 << 16, 512)) == DONE
    assert bench.turn(request(READ, 11 << 16, 512)) == SLOW
    locked.clear()
    begin, end = bench.plane.begin, bench.plane.end
    assert bench.plane.turn(bench.route, 0, True, begin, end, 0, 0) == DONE


@pytest.mark.parametrize(
    "locked", [{-5: "a range"}, dict.fromkeys(range(100, 165), "many")]
)
def test_locks_that_are_not_few_blocks_leave_everything(
    bench: Bench, locked: dict[int, object]
) -> None:
    cached = Cached(bench)
    cached.table.insert(3, 11)
    cached.is_hit[3] = 1
    bench.route.locked = locked
    assert bench.turn(request(READ, 11 << 16, 512)) == SLOW
    assert bench.plane.end == 0  # nothing was received


def test_table_with_nonsense_in_it_is_left(bench: Bench) -> None:
    cached = Cached(bench)
    cached.table.buckets[:] = type(cached.table.buckets)("I", [99] * 8)
    assert bench.turn(request(READ, 0, 512)) == SLOW
    for entry in range(8):
        cached.table.buckets[entry] = 0
        cached.table.chain[0] = 0  # a circle
    assert bench.turn() == SLOW
    assert bench.plane.begin == 0


def test_tables_that_do_not_fit_are_refused(bench: Bench) -> None:
    table = BlockTable(8)
    with pytest.raises(ValueError, match="do not fit"):
        Route.by_table(
            bench.file,
            table.blocks,
            table.buckets,
            table.chain,
            table.shift,
            bytearray(7),
            zeros(8, "little"),
            zeros(8, "little"),
            8,
            0,
            1 << 16,
            8,
            0,
            SIZE,
        )
