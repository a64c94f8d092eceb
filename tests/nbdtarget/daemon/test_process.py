# SPDX-License-Identifier: Apache-2.0
"""The event loop of a server process."""

import ctypes
import gc
import subprocess
import sys

import pytest

from nbdtarget.daemon import process


def test_full_collections_leave_out_what_was_imported() -> None:
    # Otherwise each of them would stop the loop for milliseconds.
    frozen: list[int] = []

    async def main() -> None:
        frozen.append(gc.get_freeze_count())

    process.run(main)
    assert frozen[0] > 10_000
    assert gc.get_freeze_count() < frozen[0]


# Each large piece has a small one behind it in the heap; the first to be freed teaches glibc to keep the next ones there.
_MEMORY = """
from pathlib import Path
from nbdtarget.daemon.process import give_memory_back

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) // 256

give_memory_back()
for _ in range(2):
    pieces = []
    for _ in range(40):
        pieces.append((bytearray(b"x" * (3 << 19)), bytearray(100_000)))
    high = resident_mib()
    pieces = [small for _, small in pieces]
print(high - resident_mib())
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)
def test_large_pieces_of_memory_go_back_to_the_kernel() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) >= 55
