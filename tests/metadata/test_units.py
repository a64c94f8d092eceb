# SPDX-License-Identifier: Apache-2.0
"""Sizes of regions and blocks are the kernel's."""

import pytest

from nbdtarget_metadata.units import block_size_fault, region_size_fault


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


@pytest.mark.parametrize(
    ("block_size", "may"),
    [
        (32 << 10, True),
        (96 << 10, True),
        (1 << 30, True),
        (0, False),
        (16 << 10, False),
        (48 << 10, False),
        ((1 << 30) + (32 << 10), False),
    ],
)
def test_block_sizes_are_the_kernels(block_size: int, may: bool) -> None:
    assert (block_size_fault(block_size) == "") == may
