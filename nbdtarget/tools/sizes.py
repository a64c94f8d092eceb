# SPDX-License-Identifier: Apache-2.0
"""How large the metadata of a clone or of a cache is, before there is one: `nbdtarget metadata size`."""

from typing import Final

import msgspec

from nbdtarget.common.errors import NbdTargetError
from nbdtarget_metadata.cache.records import NR_CBLOCKS_MAX
from nbdtarget_metadata.clone.superblock import NR_REGIONS_MAX
from nbdtarget_metadata.tools.sizing import cache_sizes, clone_sizes, nr_regions_of
from nbdtarget_metadata.units import block_size_fault, region_size_fault

__all__ = [
    "UNITS",
    "UNIT_LETTERS",
    "CacheSizeAnswer",
    "CloneSizeAnswer",
    "SizeAnswer",
    "cache_size",
    "clone_size",
]

# The units of `size`; as in the tools for the kernel's caches.
UNITS: Final = {
    "bytes": 1,
    "sectors": 512,
    "kibibytes": 1 << 10,
    "mebibytes": 1 << 20,
    "gibibytes": 1 << 30,
    "tebibytes": 1 << 40,
    "kilobytes": 10**3,
    "megabytes": 10**6,
    "gigabytes": 10**9,
    "terabytes": 10**12,
}
UNIT_LETTERS: Final = {
    "b": "bytes",
    "s": "sectors",
    "k": "kibibytes",
    "m": "mebibytes",
    "g": "gibibytes",
    "t": "tebibytes",
    "K": "kilobytes",
    "M": "megabytes",
    "G": "gigabytes",
    "T": "terabytes",
}


class SizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How large metadata is, in bytes."""

    smallest: int
    preferred: int


class CloneSizeAnswer(SizeAnswer, frozen=True, kw_only=True):
    """The sizes of a clone's metadata."""

    nr_regions: int


class CacheSizeAnswer(SizeAnswer, frozen=True, kw_only=True):
    """The sizes of a cache's metadata."""

    nr_cblocks: int


def clone_size(
    *, device_size: int | None, region_size: int | None, nr_regions: int | None
) -> CloneSizeAnswer:
    """Tell how large the metadata of a clone is: of a device, or of so many regions.

    Raises: NbdTargetError: there can be no such clone.
    """
    if nr_regions is None:
        assert device_size is not None
        assert region_size is not None
        fault = region_size_fault(region_size)
        if fault:
            raise NbdTargetError(f"region size {region_size}: {fault}")
        nr_regions = nr_regions_of(device_size, region_size)
    if nr_regions < 1:
        raise NbdTargetError("a clone has at least one region")
    if nr_regions > NR_REGIONS_MAX:
        raise NbdTargetError(
            f"{nr_regions} regions: Too many regions. Consider increasing the region size"
        )
    sizes = clone_sizes(nr_regions)
    return CloneSizeAnswer(
        nr_regions=sizes.nr_regions,
        smallest=sizes.smallest,
        preferred=sizes.preferred,
    )


def cache_size(
    *, device_size: int | None, block_size: int | None, nr_blocks: int | None
) -> CacheSizeAnswer:
    """Tell how large the metadata of a cache is: of a cache device, or of so many cache blocks.

    Raises: NbdTargetError: there can be no such cache.
    """
    if nr_blocks is None:
        assert device_size is not None
        assert block_size is not None
        fault = block_size_fault(block_size)
        if fault:
            raise NbdTargetError(f"block size {block_size}: {fault}")
        nr_blocks = device_size // block_size
    if nr_blocks < 1:
        raise NbdTargetError("a cache has at least one block")
    if nr_blocks > NR_CBLOCKS_MAX:
        raise NbdTargetError(
            f"{nr_blocks} cache blocks: at most {NR_CBLOCKS_MAX} are possible; use"
            " larger blocks"
        )
    sizes = cache_sizes(nr_blocks)
    return CacheSizeAnswer(
        nr_cblocks=sizes.nr_cblocks,
        smallest=sizes.smallest,
        preferred=sizes.preferred,
    )
