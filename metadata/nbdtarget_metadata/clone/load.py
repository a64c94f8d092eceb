# SPDX-License-Identifier: Apache-2.0
"""Read all that a clone's superblock vouches for, and check it."""

from typing import Final

from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.clone.records import Record, apply_record, decode_record
from nbdtarget_metadata.clone.superblock import (
    NR_REGIONS_MAX,
    CloneSuperblock,
    check_device_size,
)
from nbdtarget_metadata.errors import CorruptMetadata
from nbdtarget_metadata.log.chain import read_chain
from nbdtarget_metadata.operations import Steps

__all__ = ["load_bitmap", "new_bitmap"]

# Touching a megabyte of bits for the first time takes a millisecond, counting four less.
STEP_REGIONS: Final = 1 << 23


def new_bitmap(nr_regions: int) -> Steps[bitarray]:
    """Return a bitmap of zeroes. In steps, as touching 32 MiB for the first time takes 20 ms."""
    bitmap = bitarray(endian="little")
    while len(bitmap) < nr_regions:
        bitmap.extend(zeros(min(STEP_REGIONS, nr_regions - len(bitmap)), "little"))
        yield ()
    return bitmap


def load_bitmap(superblock: CloneSuperblock, device_size: int) -> Steps[bitarray]:
    """Read and check everything that `superblock` vouches for; return the bitmap.

    Raises: CorruptMetadata, UnsupportedFormat; MetadataTooSmall: the device has shrunk.
    """
    check_device_size(superblock, device_size)
    if superblock.nr_regions > NR_REGIONS_MAX:
        raise CorruptMetadata("nr_regions", NR_REGIONS_MAX, superblock.nr_regions)
    hydrated = yield from new_bitmap(superblock.nr_regions)
    bits_begin_min: int | None = 0

    def apply(record: Record, where: str) -> None:
        nonlocal bits_begin_min
        bits_begin_min = apply_record(
            hydrated, record, where, bits_begin_min=bits_begin_min
        )

    digest = yield from read_chain(
        kind="snapshot",
        begin=superblock.snapshot_block,
        end=superblock.journal_block,
        digest=superblock.uuid,
        generation_max=superblock.generation,
        decode=decode_record,
        apply=apply,
    )
    _expect("digest of the snapshot", superblock.snapshot_digest, digest)
    bits_begin_min = None
    digest = yield from read_chain(
        kind="journal",
        begin=superblock.journal_block,
        end=superblock.journal_end,
        digest=digest,
        generation_max=superblock.generation,
        decode=decode_record,
        apply=apply,
    )
    _expect("digest of the journal", superblock.journal_digest, digest)
    nr_hydrated = 0
    for begin in range(0, superblock.nr_regions, STEP_REGIONS):
        end = min(begin + STEP_REGIONS, superblock.nr_regions)
        nr_hydrated += hydrated.count(1, begin, end)
        yield ()
    if nr_hydrated != superblock.nr_hydrated:
        raise CorruptMetadata(
            "number of hydrated regions", superblock.nr_hydrated, nr_hydrated
        )
    return hydrated


def _expect(where: str, expected: bytes, found: bytes) -> None:
    if expected != found:
        raise CorruptMetadata(where, expected.hex(), found.hex())
