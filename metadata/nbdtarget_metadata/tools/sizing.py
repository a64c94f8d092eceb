# SPDX-License-Identifier: Apache-2.0
"""How large the metadata device of a clone or a cache is, before there is one."""

from typing import NamedTuple

from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.cache.records import NR_CBLOCKS_MAX
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.clone.superblock import NR_REGIONS_MAX

__all__ = [
    "CacheSizes",
    "CloneSizes",
    "cache_sizes",
    "clone_sizes",
    "nr_regions_of",
]


class CloneSizes(NamedTuple):
    """Bytes. `preferred` is what is made where a metadata file is missing."""

    nr_regions: int
    smallest: int
    preferred: int


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


def cache_sizes(nr_cblocks: int) -> CacheSizes:
    """Return the sizes of a cache's metadata device."""
    assert 0 < nr_cblocks <= NR_CBLOCKS_MAX
    return CacheSizes(
        nr_cblocks,
        CacheMetadata.device_size_min(nr_cblocks),
        CacheMetadata.device_size_for(nr_cblocks),
    )
