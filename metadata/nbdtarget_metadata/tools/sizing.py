# SPDX-License-Identifier: Apache-2.0
"""How large the metadata device of a clone or a cache is, before there is one."""

from typing import NamedTuple

from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.cache.records import NR_CBLOCKS_MAX
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.clone.superblock import NR_REGIONS_MAX
from nbdtarget_metadata.units import (
    BLOCK_SIZE_MAX,
    BLOCK_SIZE_MIN,
    REGION_SIZE_MAX,
    REGION_SIZE_MIN,
)

__all__ = [
    "CacheSizes",
    "CloneSizes",
    "block_size_fault",
    "cache_sizes",
    "clone_sizes",
    "nr_regions_of",
    "region_size_fault",
]


class CloneSizes(NamedTuple):
    """Bytes. `preferred` is what is made where a metadata file is missing."""

    nr_regions: int
    smallest: int
    preferred: int


def region_size_fault(region_size: int) -> str:
    """Say in the kernel's words why no clone has regions of so many bytes; empty if one may."""
    if not REGION_SIZE_MIN <= region_size <= REGION_SIZE_MAX:
        return "Invalid region size: it must be a power of two from 4K to 1G"
    if region_size & (region_size - 1):
        return "Region size is not a power of 2: it must be one from 4K to 1G"
    return ""


def nr_regions_of(target_size: int, region_size: int) -> int:
    """Return how many regions a target has; the last may be short."""
    return -(-target_size // region_size)


def clone_sizes(nr_regions: int) -> CloneSizes:
    """Return the sizes of a clone's metadata device."""
    assert 0 < nr_regions <= NR_REGIONS_MAX
    return CloneSizes(
        nr_regions,
        CloneMetadata.device_size_min(nr_regions),
        CloneMetadata.device_size_for(nr_regions),
    )


# A cache's


class CacheSizes(NamedTuple):
    """Bytes. `preferred` is what is made where a metadata file is missing."""

    nr_cblocks: int
    smallest: int
    preferred: int


def block_size_fault(block_size: int) -> str:
    """Say in the kernel's words why no cache has blocks of so many bytes; empty if one may."""
    if (
        not BLOCK_SIZE_MIN <= block_size <= BLOCK_SIZE_MAX
        or block_size % BLOCK_SIZE_MIN
    ):
        return "Invalid data block size: it must be a multiple of 32K up to 1G"
    return ""


def cache_sizes(nr_cblocks: int) -> CacheSizes:
    """Return the sizes of a cache's metadata device."""
    assert 0 < nr_cblocks <= NR_CBLOCKS_MAX
    return CacheSizes(
        nr_cblocks,
        CacheMetadata.device_size_min(nr_cblocks),
        CacheMetadata.device_size_for(nr_cblocks),
    )
