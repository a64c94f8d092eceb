# SPDX-License-Identifier: Apache-2.0
"""Free pages in the middle of the heap."""

import logging
import subprocess
import sys
import threading

import pytest

from nbdtarget.common import heap

# Each piece that is freed has a small one behind it, which stays.
_MEMORY = """
import threading
from pathlib import Path
from nbdtarget.common.heap import trim_heap
from nbdtarget.daemon.process import give_memory_back

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) // 256

give_memory_back()
pieces = [(bytearray(b"x" * (64 << 10)), bytearray(1000)) for _ in range(640)]
pieces = [small for _, small in pieces]
high = resident_mib()
trim_heap()
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join()
print(high - resident_mib())
"""


@pytest.mark.skipif(heap._malloc_trim is None, reason="the C library is not glibc")
def test_free_pages_between_used_ones_go_back_to_the_system() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) >= 30


def test_other_libraries_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_malloc_trim", None)
    heap.trim_heap()


def test_process_that_gets_no_more_threads_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(heap, "_malloc_trim", lambda _: 0)
    monkeypatch.setattr(threading.Thread, "start", fail)
    heap.trim_heap()
    assert "the heap is not trimmed: can't start new thread" in caplog.text
