# SPDX-License-Identifier: Apache-2.0
"""Bugs that are planted into a cache, to see whether the invariants notice."""

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.policies.base import Work
from nbdtarget.targets import metadata_io
from nbdtarget.targets.cache.cached_writes import CachedWrite, CachedWrites
from nbdtarget.targets.cache.locks import BlockLock
from nbdtarget.targets.cache.migrations import Migrations
from nbdtarget.targets.committer import Committer, Transaction

__all__ = [
    "CACHED_WRITES",
    "MIGRATIONS",
    "commit_without_flushes",
    "demote_without_commit",
    "invalidate_after_the_write",
    "original_tick",
    "tick_with_io",
    "write_through_to_one",
]


async def commit_without_flushes(
    committer: Committer, transaction: Transaction
) -> None:
    """J1: vouches for mappings and removals whose data may still be lost."""
    await metadata_io.run(committer.device, transaction.journal())
    await metadata_io.run(committer.device, transaction.superblock())
    transaction.done()


async def demote_without_commit(
    migrations: Migrations, work: Work, lock: BlockLock
) -> bool:
    """J1: uses a cblock for another block while a crash would bring the old mapping back."""
    metadata = migrations._blocks.metadata
    await migrations._write_back(work.oblock, work.cblock)
    metadata.remove(work.cblock)
    metadata._changed[work.cblock] = 0
    return True


def invalidate_after_the_write(
    writes: CachedWrites, bio: Bio, oblock: int, cblock: int
) -> None:
    """J1: passthrough writes to the origin, and unmaps the block some time."""
    blocks = writes._blocks
    blocks.metadata.remove(cblock)
    blocks.policy.invalidate(cblock)
    blocks.submit_held(blocks.origin, bio, oblock)


def write_through_to_one(writes: CachedWrites, write: CachedWrite) -> None:
    """J4: a write through reaches the origin only."""
    writes._blocks.submit(writes._blocks.origin, write.bio)


def tick_with_io(migrations: Migrations) -> None:
    """J8: looks at the origin each second, to see whether it is there."""
    scratch = memoryview(bytearray(512))
    migrations._blocks.origin.submit(Bio(OP_READ, 0, 512, scratch, 0, lambda _: None))
    original_tick(migrations)


original_tick = Migrations._tick_and_wait
CACHED_WRITES = "nbdtarget.targets.cache.cached_writes.CachedWrites."
MIGRATIONS = "nbdtarget.targets.cache.migrations.Migrations."
