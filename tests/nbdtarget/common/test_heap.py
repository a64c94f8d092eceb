# SPDX-License-Identifier: Apache-2.0
"""Free pages in the middle of the heap."""

import logging
import subprocess
import sys
import threading

import pytest

from nbdtarget.common import heap
from nbdtarget.common.heap import HEAP, LEFT_ALONE

# Each piece that is freed has a small one behind it, which stays.
_HOLES = """
import sys
import threading
from pathlib import Path
from nbdtarget.common.heap import HEAP
from nbdtarget.daemon.process import give_memory_back

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) // 256

def used_bytes():
    return HEAP._maybe_mallinfo().uordblks

give_memory_back()
length, nr = (int(word) for word in sys.argv[1:])
pieces = [(bytearray(b"x" * length), bytearray(1000)) for _ in range(nr)]
pieces = [small for _, small in pieces]
high = resident_mib()
"""

_TRIMMED = """
HEAP.trim()
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join()
print(high - resident_mib())
"""

# What it holds on the way, and in the end, beside what was used before.
_STEPS = """
before = used_bytes()
nr_steps, held = 0, 0
for _ in HEAP.steps():
    nr_steps, held = nr_steps + 1, max(held, used_bytes() - before)
print(high - resident_mib(), nr_steps, held, used_bytes() - before)
"""

_CLOSED = """
before = used_bytes()
steps = HEAP.steps()
for _ in range(10):
    next(steps)
held = used_bytes() - before
steps.close()
print(held, used_bytes() - before)
"""

needs_glibc = pytest.mark.skipif(
    HEAP._maybe_mallinfo is None, reason="the C library is not glibc, or before 2.33"
)
KIB = 1 << 10
MIB = 1 << 20
A_LITTLE = 128 * KIB  # of Python objects that come and go


def printed(program: str, length: int, nr: int) -> list[int]:
    """Run `program` in a process whose heap has `nr` holes of `length` bytes; return the numbers that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", _HOLES + program, str(length), str(nr)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in done.stdout.split()]


@needs_glibc
def test_free_pages_between_used_ones_go_back_to_the_system() -> None:
    assert printed(_TRIMMED, 64 * KIB, 640)[0] >= 30


@needs_glibc
@pytest.mark.parametrize("length", [20_000, 64 * KIB, 100_000])
def test_free_pages_go_back_in_steps(length: int) -> None:
    returned_mib, nr_steps, held, after = printed(_STEPS, length, 40 * MIB // length)
    assert returned_mib >= 30
    assert nr_steps >= 5
    assert held >= 30 * MIB
    assert after < A_LITTLE


@needs_glibc
def test_steps_that_end_early_free_what_they_held() -> None:
    held, after = printed(_CLOSED, 64 * KIB, 640)
    assert held >= 5 * MIB
    assert after < A_LITTLE


@needs_glibc
def test_heap_with_little_that_is_free_has_no_steps() -> None:
    assert printed(_STEPS, 64 * KIB, 30)[1] == 0


def test_library_without_figures_of_its_heap_has_no_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(HEAP, "_maybe_mallinfo", None)
    assert list(HEAP.steps()) == []


def test_heap_that_is_not_ours_is_left_alone() -> None:
    assert list(LEFT_ALONE.steps()) == []
    LEFT_ALONE.trim()


def test_other_libraries_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_malloc_trim", None)
    HEAP.trim()


def test_process_that_gets_no_more_threads_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(heap, "_malloc_trim", lambda _: 0)
    monkeypatch.setattr(threading.Thread, "start", fail)
    HEAP.trim()
    assert "the heap is not trimmed: can't start new thread" in caplog.text
