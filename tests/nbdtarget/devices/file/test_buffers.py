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


def test_what_nothing_has_needed_since_the_last_look_is_spare() -> None:
    pool = AlignedBuffers()
    taken = [pool.take(length) for length in (4096, 4096, 4096, 8192)]
    for buffer in taken:
        pool.give(buffer)
    assert pool.nr_kept_bytes == 5 * 4096
    assert pool.take_spare() == []  # all of them were needed since there is the pool
    pool.give(pool.take(4096))
    spare = pool.take_spare()
    assert sorted(map(id, spare)) == sorted(map(id, (taken[0], taken[1], taken[3])))
    assert pool.nr_kept_bytes == 4096
    assert pool.take(4096) is taken[2]
    assert pool.nr_kept_bytes == 0
    assert pool.take_spare() == []
