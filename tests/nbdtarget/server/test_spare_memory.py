# SPDX-License-Identifier: Apache-2.0
"""Memory that clients have used is given back to the system when they do not need it any more."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from nbdtarget.common.heap import HEAP, Heap
from nbdtarget.devices.file.buffers import AlignedBuffers
from nbdtarget.server.buffers import Buffer, BufferPool
from nbdtarget.server.spare_memory import LOOK_S, QUIET_S, STEP_S, SpareMemory
from tests.support.clock import SimClock

KIB = 1 << 10
MIB = 1 << 20


class CountedHeap(Heap):
    """Counts what is done to it.

    Attributes:
        nr_trims: as a whole.
        nr_rounds: trimmed in steps; each has `nr_steps`.
        nr_left: steps of the last round that are to come.
    """

    def __init__(self) -> None:
        self.nr_trims = self.nr_rounds = self.nr_steps = self.nr_left = 0

    def steps(self) -> Iterator[None]:
        self.nr_rounds += 1
        self.nr_left = self.nr_steps
        while self.nr_left:
            self.nr_left -= 1
            yield

    def trim(self) -> None:
        self.nr_trims += 1


class Memory:
    """A pool that is looked after, and a heap."""

    def __init__(self) -> None:
        self.clock = SimClock()
        self.pool = BufferPool(32 * MIB)
        self.heap = CountedHeap()
        self.nr_batches = 0
        self.aligned = AlignedBuffers()
        self.spare = SpareMemory(
            self.clock,
            self.pool,
            self.heap,
            (self.aligned,),
            lambda: self.nr_batches,
        )

    @property
    def has_timer(self) -> bool:
        return any(not timer.cancelled for _, _, timer in self.clock._timers)

    @property
    def nr_trims(self) -> int:
        return self.heap.nr_trims

    def take(self, nr: int, length: int = 64 * KIB) -> list[Buffer]:
        half = nr // 2
        taken: list[Buffer] = [self.pool.take(length) for _ in range(half)]
        return taken + [self.pool.take_untouched(length) for _ in range(nr - half)]

    def give_back(self, buffers: list[Buffer]) -> None:
        for buffer in buffers:
            self.pool.give_back(buffer)


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.mark.parametrize("length", [64 * KIB, 256 * KIB, MIB])
def test_buffers_that_nothing_needs_go_back(memory: Memory, length: int) -> None:
    memory.give_back(memory.take(10, length))
    kept = memory.pool.nr_kept_bytes
    assert kept >= 10 * length
    memory.clock.advance(LOOK_S)
    assert memory.pool.nr_kept_bytes == kept  # it came after the last look
    memory.clock.advance(LOOK_S)
    assert memory.pool.nr_kept_bytes == 0
    memory.clock.advance(QUIET_S)
    assert memory.nr_trims == 1


def test_buffers_that_are_used_again_and_again_stay(memory: Memory) -> None:
    memory.give_back(memory.take(20))
    one = memory.pool.nr_kept_bytes // 20
    memory.clock.advance(LOOK_S)
    for _ in range(5):
        taken = memory.take(6)
        memory.give_back(taken)
        memory.clock.advance(LOOK_S)
        assert memory.pool.nr_kept_bytes == 6 * one
    assert {id(it) for it in memory.take(6)} == {id(it) for it in taken}


def test_ends_of_connections_trim_the_heap_once_in_a_while(memory: Memory) -> None:
    for _ in range(100):
        memory.spare.connection_ended()
    memory.clock.advance(LOOK_S / 2)
    assert memory.nr_trims == 0
    memory.clock.advance(LOOK_S)
    assert memory.nr_trims == 1
    memory.clock.advance(10 * LOOK_S)
    assert memory.nr_trims == 1
    memory.spare.connection_ended()
    memory.clock.advance(LOOK_S + QUIET_S)
    assert memory.nr_trims == 2


def test_heap_is_not_trimmed_while_requests_come(memory: Memory) -> None:
    memory.spare.connection_ended()
    for _ in range(5):
        memory.clock.advance(LOOK_S)
        memory.nr_batches += 1
        memory.clock.advance(QUIET_S)
        assert memory.nr_trims == 0
    memory.nr_batches += 1  # between two looks
    memory.clock.advance(LOOK_S)
    memory.clock.advance(QUIET_S)
    assert memory.nr_trims == 1
    assert not memory.has_timer


def test_heap_is_trimmed_in_steps_while_requests_come(memory: Memory) -> None:
    memory.heap.nr_steps = 5
    memory.spare.connection_ended()
    memory.clock.advance(LOOK_S)
    for left in (4, 3, 2, 1, 0, 0):
        assert memory.heap.nr_left == left  # one step at a time
        memory.nr_batches += 1
        memory.clock.advance(STEP_S)
    for _ in range(5):
        memory.nr_batches += 1
        memory.clock.advance(QUIET_S)
        memory.clock.advance(LOOK_S)
    assert memory.heap.nr_rounds == 1
    assert memory.nr_trims == 0
    memory.spare.connection_ended()
    memory.nr_batches += 1
    memory.clock.advance(QUIET_S)
    memory.clock.advance(LOOK_S)
    assert memory.heap.nr_rounds == 2


def test_client_that_ends_between_two_steps_is_looked_after(memory: Memory) -> None:
    memory.heap.nr_steps = 5
    memory.spare.connection_ended()
    memory.clock.advance(LOOK_S + 2 * STEP_S)
    memory.spare.connection_ended()
    memory.clock.advance(5 * STEP_S + QUIET_S)
    assert memory.nr_trims == 1
    memory.clock.advance(LOOK_S)
    assert memory.heap.nr_rounds == 2


def test_buffers_of_devices_go_back_while_requests_come(memory: Memory) -> None:
    for buffer in [memory.aligned.take(64 * KIB) for _ in range(100)]:
        memory.aligned.give(buffer)
    memory.spare.connection_ended()
    for _ in range(4):
        memory.nr_batches += 1
        memory.aligned.give(memory.aligned.take(64 * KIB))
        memory.clock.advance(LOOK_S)
        memory.nr_batches += 1
        memory.clock.advance(QUIET_S)
    assert memory.aligned.nr_kept_bytes == 64 * KIB
    assert memory.has_timer  # for as long as they are kept
    memory.clock.advance(3 * (LOOK_S + QUIET_S))
    assert memory.aligned.nr_kept_bytes == 0
    assert not memory.has_timer


def test_close_between_two_steps_ends_them(memory: Memory) -> None:
    memory.heap.nr_steps = 5
    memory.spare.connection_ended()
    memory.clock.advance(LOOK_S)
    memory.spare.close()
    assert not memory.has_timer
    memory.clock.advance(LOOK_S)
    assert memory.heap.nr_left == 4


# Requests come all the time. Each piece of 64 KiB that is freed has a small one behind it, which stays.
_BUSY = """
from itertools import count
from pathlib import Path
from nbdtarget.common.heap import HEAP
from nbdtarget.daemon.process import give_memory_back
from nbdtarget.devices.file.buffers import AlignedBuffers
from nbdtarget.server.buffers import BufferPool
from nbdtarget.server.spare_memory import LOOK_S, SpareMemory
from tests.support.clock import SimClock

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) // 256

give_memory_back()
clock = SimClock()
spare = SpareMemory(clock, BufferPool(0), HEAP, (), count().__next__)
pieces = [(bytearray(b"x" * (64 << 10)), bytearray(1000)) for _ in range(640)]
pieces = [small for _, small in pieces]
high = resident_mib()
spare.connection_ended()
clock.advance(2 * LOOK_S)
print(high - resident_mib())
"""


@pytest.mark.skipif(HEAP._maybe_mallinfo is None, reason="the C library is not glibc")
def test_busy_server_gives_free_pages_of_its_heap_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BUSY], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) >= 30


def test_client_that_ends_while_we_wait_for_quiet_is_looked_after(
    memory: Memory,
) -> None:
    memory.spare.connection_ended()
    memory.clock.advance(LOOK_S)
    memory.spare.connection_ended()
    memory.clock.advance(QUIET_S)
    assert memory.nr_trims == 1
    memory.clock.advance(LOOK_S + QUIET_S)
    assert memory.nr_trims == 2


def test_pool_is_looked_after_though_the_heap_cannot_be_trimmed(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(memory.heap, "trim", fail)
    memory.spare.connection_ended()
    memory.give_back(memory.take(3))
    memory.clock.advance(LOOK_S)
    memory.pool.give_back(memory.pool.take(64 * KIB))
    with pytest.raises(RuntimeError, match="thread"):
        memory.clock.advance(QUIET_S)
    assert memory.has_timer


def test_idle_server_has_no_timer(memory: Memory) -> None:
    assert not memory.has_timer
    memory.give_back(memory.take(3))
    memory.spare.connection_ended()
    assert memory.has_timer
    memory.clock.advance(3 * LOOK_S)
    assert not memory.has_timer


def test_closed_one_looks_no_more(memory: Memory) -> None:
    memory.give_back(memory.take(3))
    memory.spare.close()
    memory.spare.close()
    assert not memory.has_timer
    memory.give_back(memory.take(30))
    assert not memory.has_timer
    assert memory.nr_trims == 0
