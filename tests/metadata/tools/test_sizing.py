# SPDX-License-Identifier: Apache-2.0
"""The sizes that are computed before a device exists are those that creation and formatting use."""

import pytest

from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.clone.superblock import NR_REGIONS_MAX
from nbdtarget_metadata.errors import MetadataTooSmall
from nbdtarget_metadata.tools.sizing import cache_sizes, clone_sizes, nr_regions_of
from tests.support.metadata.store import Store, drive


@pytest.mark.parametrize("nr_regions", [1, 8, 100, 32768, 4_161_536, 5_000_000])
def test_smallest_is_what_formatting_takes(nr_regions: int) -> None:
    sizes = clone_sizes(nr_regions)
    assert sizes.smallest < sizes.preferred
    assert sizes.preferred == CloneMetadata.device_size_for(nr_regions)

    def format_on(size: int) -> None:
        steps = CloneMetadata.format(
            device_size=size,
            region_size=4096,
            target_size=4096 * nr_regions,
            uuid=bytes(16),
        )
        drive(Store(size), steps)

    format_on(sizes.smallest)
    with pytest.raises(MetadataTooSmall):
        format_on(sizes.smallest - 4096)


def test_large_counts() -> None:
    # Two arenas of two snapshots of 256 MiB each.
    sizes = clone_sizes(NR_REGIONS_MAX)
    assert 1 << 30 < sizes.smallest < sizes.preferred < (1 << 30) + (16 << 20)


def test_last_region_may_be_short() -> None:
    assert nr_regions_of(8192, 4096) == 2
    assert nr_regions_of(8193, 4096) == 3


@pytest.mark.parametrize(
    "nr_cblocks", [1, 8, 1000, 65_025, pytest.param(5_000_000, marks=pytest.mark.slow)]
)
def test_smallest_of_a_cache_is_what_formatting_takes(nr_cblocks: int) -> None:
    sizes = cache_sizes(nr_cblocks)
    assert sizes.smallest < sizes.preferred
    assert sizes.preferred == CacheMetadata.device_size_for(nr_cblocks)

    def format_on(size: int) -> None:
        steps = CacheMetadata.format(
            device_size=size,
            block_size=32768,
            origin_size=1 << 30,
            nr_cblocks=nr_cblocks,
            uuid=bytes(16),
        )
        drive(Store(size), steps)

    format_on(sizes.smallest)
    with pytest.raises(MetadataTooSmall):
        format_on(sizes.smallest - 4096)
