# SPDX-License-Identifier: Apache-2.0
"""A life with the version before metadata recorded which disks belong to them: what an upgrade finds.

While `older_version` is in force, superblocks are written as that version wrote them: without the last
field (`disks`), so that nothing tells which disks belong together, and without the flag
`origin_complete`, so that after a crash all that a cache maps counts as dirty. The number of fields is that of
the fixtures which that version has left (`tests/sim/test_older.py`).

An upgrade goes one way: once a newer version has lived, no older one does. Its first start records what
the disks are (`check_recorded`), and needs no word for that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from unittest import mock

import msgspec

from nbdtarget.targets.disks import DiskRecords
from nbdtarget_metadata.cache.blocks import CacheBlocks
from nbdtarget_metadata.cache.superblock import CACHE
from nbdtarget_metadata.clone.superblock import CLONE
from nbdtarget_metadata.log import superblock as superblocks
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.superblock import SUPERBLOCK_BLOCKS, choose_superblock
from nbdtarget_metadata.operations import Write
from tests.sim.rigs import Disk

__all__ = ["NR_FIELDS", "check_recorded", "older_version"]

# Of a superblock's array, its tag included.
NR_FIELDS: Final = {"clone": 19, "cache": 35}

_write = superblocks._write


def _write_older(slot: int, copy: int, body: bytes, disks: bytes) -> Write:
    fields = msgspec.msgpack.decode(body)
    assert not disks, "an older version records no disks"
    older = fields[: NR_FIELDS[fields[0]]]
    assert fields[len(older) :] == [b""], "fields are appended, and one has been"
    return _write(slot, copy, msgspec.msgpack.encode(older), b"")


@contextmanager
def older_version(*, lives: bool = True) -> Iterator[None]:
    """Let the older version run inside this block, if `lives`; otherwise change nothing."""
    if not lives:
        yield
        return
    with (
        mock.patch.object(superblocks, "_write", _write_older),
        mock.patch.object(CacheBlocks, "is_complete", False),
        mock.patch.object(DiskRecords, "_record", return_value=None),
    ):
        yield


def check_recorded(disk: Disk, image: bytes) -> None:
    """Hold what a newer version has left of a disk of metadata. Raises: AssertionError."""
    area = memoryview(image)[: SUPERBLOCK_BLOCKS * BLOCK_SIZE]
    if disk.is_cache:
        recorded = choose_superblock(CACHE, area, admit_needs_check=True).superblock
        assert recorded.disks, f"{disk.name}: it does not say which disks belong to it"
        return
    clone = choose_superblock(CLONE, area, admit_needs_check=True).superblock
    is_hydrated = (
        clone.nr_hydrated == clone.nr_regions
    )  # it may be linear from the start
    assert clone.disks or is_hydrated, (
        f"{disk.name}: it does not say which disks belong to it"
    )
