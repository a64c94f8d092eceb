# SPDX-License-Identifier: Apache-2.0
"""AlignedBuffers: aligned, used again, bounded."""

import ctypes
import mmap

import pytest

from nbdtarget.devices.file import buffers
from nbdtarget.devices.file.buffers import AlignedBuffers


@pytest.mark.parametrize("length", [1, 4096, 4097, 1 << 20])
def test_buffers_are_aligned_and_large_enough(length: int) -> None:
    buffer = AlignedBuffers().take(length)
    assert len(buffer) >= length
    place = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    assert place % mmap.PAGESIZE == 0


def test_what_was_given_is_taken_again() -> None:
    pool = AlignedBuffers()
    first = pool.take(5000)
    pool.give(first)
    assert pool.take(8192) is first
    assert pool.take(8192) is not first


def test_no_more_than_so_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "KEPT_MAX", 3 * 4096)
    pool = AlignedBuffers()
    taken = [pool.take(4096) for _ in range(5)]
    for buffer in taken:
        pool.give(buffer)
    again = [pool.take(4096) for _ in range(5)]
    assert sum(any(buffer is old for old in taken) for buffer in again) == 3
