# SPDX-License-Identifier: Apache-2.0
"""Looking for zeroes."""

import pytest

from nbdtarget.server.zeroes import is_zero

LENGTH = (2 << 20) + 5


def test_zeroes() -> None:
    assert is_zero(bytearray(b"x" + bytes(LENGTH) + b"x"), 1, LENGTH)


@pytest.mark.parametrize("at", [0, 1, 1 << 20, (2 << 20) - 1, LENGTH - 1])
def test_one_byte_that_is_not(at: int) -> None:
    memory = bytearray(LENGTH)
    memory[at] = 1
    assert not is_zero(memory, 0, LENGTH)


@pytest.mark.parametrize("memory", [bytes(9), memoryview(bytes(9)), None])
def test_nothing_is_known_of_other_memory(memory: object) -> None:
    assert not is_zero(memory, 0, 9)


def test_never_looks_behind_the_end() -> None:
    assert not is_zero(bytearray(9), 1, 9)
