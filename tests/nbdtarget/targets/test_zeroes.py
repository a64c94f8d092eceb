# SPDX-License-Identifier: Apache-2.0
"""Runs of zeroes are found where they are whole pieces, and nowhere else."""

import random
from mmap import mmap

from nbdtarget.targets.zeroes import ZERO_BYTES_MIN as PIECE
from nbdtarget.targets.zeroes import maybe_zero_runs


def test_data_is_left_alone() -> None:
    data = bytearray(random.Random(1).randbytes(4 * PIECE))
    assert maybe_zero_runs(data, len(data)) is None
    assert maybe_zero_runs(data, 0) is None


def test_one_byte_makes_a_piece_data() -> None:
    for at in (0, 1, PIECE - 1):
        buffer = bytearray(PIECE)
        buffer[at] = 1
        assert maybe_zero_runs(buffer, PIECE) is None


def test_neighbours_are_joined() -> None:
    buffer = bytearray(6 * PIECE)
    buffer[2 * PIECE] = buffer[4 * PIECE - 1] = 7
    assert maybe_zero_runs(buffer, 6 * PIECE) == [
        (0, 2 * PIECE, True),
        (2 * PIECE, 4 * PIECE, False),
        (4 * PIECE, 6 * PIECE, True),
    ]


def test_rest_behind_the_last_piece_is_data() -> None:
    buffer = bytearray(2 * PIECE)
    assert maybe_zero_runs(buffer, PIECE - 1) is None
    assert maybe_zero_runs(buffer, PIECE + 512) == [
        (0, PIECE, True),
        (PIECE, PIECE + 512, False),
    ]


def test_what_lies_behind_the_length_is_not_looked_at() -> None:
    buffer = bytearray(PIECE) + b"x" * PIECE
    assert maybe_zero_runs(buffer, PIECE) == [(0, PIECE, True)]


def test_mappings_are_looked_through_as_well() -> None:
    buffer = mmap(-1, 3 * PIECE)
    assert maybe_zero_runs(buffer, 3 * PIECE) == [(0, 3 * PIECE, True)]
    buffer[PIECE] = buffer[3 * PIECE - 1] = (
        7  # the first byte of a piece, and the last one
    )
    assert maybe_zero_runs(buffer, 3 * PIECE) == [
        (0, PIECE, True),
        (PIECE, 3 * PIECE, False),
    ]
