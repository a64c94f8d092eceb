# SPDX-License-Identifier: Apache-2.0
"""Sizes that device-mapper prescribes, in bytes.

Nothing is imported here: the command line asks before it is known what else is needed.
"""

from typing import Final

__all__ = [
    "BLOCK_SIZE_MAX",
    "BLOCK_SIZE_MIN",
    "REGION_SIZE_MAX",
    "REGION_SIZE_MIN",
    "SECTOR",
    "block_size_fault",
    "region_size_fault",
]

SECTOR: Final = 512

# Of a clone, and a power of two: 8 to 2097152 sectors.
REGION_SIZE_MIN: Final = 4 << 10
REGION_SIZE_MAX: Final = 1 << 30

# Of a cache, and a multiple of the least: 64 to 2097152 sectors.
BLOCK_SIZE_MIN: Final = 32 << 10
BLOCK_SIZE_MAX: Final = 1 << 30


def region_size_fault(region_size: int) -> str:
    """Say in the kernel's words why no clone has regions of so many bytes; empty if one may."""
    if not REGION_SIZE_MIN <= region_size <= REGION_SIZE_MAX:
        return "Invalid region size: it must be a power of two from 4K to 1G"
    if region_size & (region_size - 1):
        return "Region size is not a power of 2: it must be one from 4K to 1G"
    return ""


def block_size_fault(block_size: int) -> str:
    """Say in the kernel's words why no cache has blocks of so many bytes; empty if one may."""
    if (
        not BLOCK_SIZE_MIN <= block_size <= BLOCK_SIZE_MAX
        or block_size % BLOCK_SIZE_MIN
    ):
        return "Invalid data block size: it must be a multiple of 32K up to 1G"
    return ""
