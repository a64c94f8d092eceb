# SPDX-License-Identifier: Apache-2.0
"""Zeroes in what a copy has read, for sources that cannot say where they have none but zeroes.

A web server does not know that an image is sparse, so a copy of it would take all of its size on the destination. A copy looks
for zeroes itself, in pieces of `ZERO_BYTES_MIN`: they are written as zeroes, which takes no space, and which replaces
what an older disk has left there. The kernel's clone copies zeroes as data; nbdcopy and qemu-img look for them, in pieces of 4 KiB.
Here a piece is as long as the shortest hole that a hydration skips (`nbdtarget.targets.clone.holes`).
"""

from mmap import mmap
from typing import Final

__all__ = ["ZERO_BYTES_MIN", "maybe_zero_runs"]

ZERO_BYTES_MIN: Final = 64 << 10
_ZEROES: Final = bytes(ZERO_BYTES_MIN)
_FIRST_ZEROES: Final = bytes(16)


def maybe_zero_runs(
    buffer: bytearray | mmap, length: int
) -> list[tuple[int, int, bool]] | None:
    """Cut the first `length` bytes of `buffer` into runs: begin, end, and whether it is zero.

    None: nothing of it is a whole piece of zeroes. The rest behind the last whole piece counts as data.
    """
    runs: list[tuple[int, int, bool]] = []
    has_zeroes = False
    for at in range(0, length, ZERO_BYTES_MIN):
        end = min(at + ZERO_BYTES_MIN, length)
        # A slice of a mapping is a copy. It is short, so it stays in the processor's cache; and most data does not begin with zeroes.
        is_zero = (
            end - at == ZERO_BYTES_MIN
            and buffer[at : at + len(_FIRST_ZEROES)] == _FIRST_ZEROES
            and buffer[at:end] == _ZEROES
        )
        has_zeroes |= is_zero
        if runs and runs[-1][2] == is_zero:
            runs[-1] = (runs[-1][0], end, is_zero)
        else:
            runs.append((at, end, is_zero))
    return runs if has_zeroes else None
