# SPDX-License-Identifier: Apache-2.0
"""Sizes that device-mapper prescribes, in bytes."""

from typing import Final

__all__ = [
    "BLOCK_SIZE_MAX",
    "BLOCK_SIZE_MIN",
    "REGION_SIZE_MAX",
    "REGION_SIZE_MIN",
    "SECTOR",
]

SECTOR: Final = 512

# Of a clone, and a power of two: 8 to 2097152 sectors.
REGION_SIZE_MIN: Final = 4 << 10
REGION_SIZE_MAX: Final = 1 << 30

# Of a cache, and a multiple of the least: 64 to 2097152 sectors.
BLOCK_SIZE_MIN: Final = 32 << 10
BLOCK_SIZE_MAX: Final = 1 << 30
