# SPDX-License-Identifier: Apache-2.0
"""Sizes before there is a device are those that creation and formatting go by."""

import pytest

from metadata.arena import NR_REGIONS_MAX
from metadata.clone import CloneMetadata
from metadata.errors import MetadataTooSmall
from metadata.sizing import clone_sizes, nr_regions_of, region_size_fault
from tests.metadata.store import Store, drive


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
    ("region_size", "fault"),
    [
        (4096, ""),
        (1 << 30, ""),
        (2048, "Invalid region size"),
        (1 << 31, "Invalid region size"),
        (12288, "not a power of 2"),
    ],
)
def test_region_sizes_are_the_kernels(region_size: int, fault: str) -> None:
    assert fault in region_size_fault(region_size)
    assert bool(fault) == bool(region_size_fault(region_size))
