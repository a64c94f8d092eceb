# SPDX-License-Identifier: Apache-2.0
"""Looking for zeroes."""

from collections.abc import Callable
from mmap import mmap

import pytest

from nbdtarget.server.zeroes import is_zero

LENGTH = (2 << 20) + 5


Memory = Callable[[int], bytearray | mmap]


def mapping(length: int) -> mmap:
    return mmap(-1, length)


@pytest.mark.parametrize("make", [bytearray, mapping])
def test_zeroes(make: Memory) -> None:
    memory = make(LENGTH + 2)
    memory[0] = memory[LENGTH + 1] = 1
    assert is_zero(memory, 1, LENGTH)


@pytest.mark.parametrize("make", [bytearray, mapping])
@pytest.mark.parametrize("at", [0, 1, 1 << 16, 1 << 20, (2 << 20) - 1, LENGTH - 1])
def test_one_byte_that_is_not(make: Memory, at: int) -> None:
    memory = make(LENGTH)
    memory[at] = 1
    assert not is_zero(memory, 0, LENGTH)


@pytest.mark.parametrize("memory", [bytes(9), memoryview(bytes(9)), None])
def test_nothing_is_known_of_other_memory(memory: object) -> None:
    assert not is_zero(memory, 0, 9)


@pytest.mark.parametrize("make", [bytearray, mapping])
def test_never_looks_behind_the_end(make: Memory) -> None:
    assert not is_zero(make(9), 1, 9)
