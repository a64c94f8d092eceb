# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in a cache: each breaks one of J1 to J8, and the check of that invariant must fail.

They are tried on the workloads of the crash matrix and what its cuts leave, then on random walks.
"""

from typing import Any

import pytest

from nbdtarget.bio import Bio
from nbdtarget.policies.base import PROMOTE, Work
from nbdtarget.policies.smq.policy import Smq
from nbdtarget.targets.cache.activation import Activation
from nbdtarget.targets.cache.blocks import Blocks
from nbdtarget.targets.cache.cached_writes import CachedWrites
from nbdtarget.targets.cache.migrations import Migrations
from nbdtarget_metadata.cache.metadata import CacheMetadata
from tests.support.crash import cache_matrix as matrix
from tests.support.crash.cache_bugs import (
    CACHED_WRITES,
    MIGRATIONS,
    commit_without_flushes,
    demote_without_commit,
    invalidate_after_the_write,
    tick_with_io,
    write_through_to_one,
)
from tests.support.crash.cache_matrix import small_blocks_that_take_their_time
from tests.support.crash.cache_rigs import PassthroughRig
from tests.support.crash.cache_walks import draw_cache_walk, walk
from tests.support.crash.invariants import Broken

__all__ = ["small_blocks_that_take_their_time"]

WALKS_MAX = 6
IMAGES_MAX = 30


def forget_promotion(policy: Smq, work: Work, success: bool) -> None:
    """J2: the policy does not learn of a mapping, and may give its cblock to another block."""
    original_complete(policy, work, success and work.op != PROMOTE)


def passthrough_caches(writes: CachedWrites, bio: Bio, *_: int) -> None:
    """J3: passthrough writes to the cache device."""
    writes._blocks.submit(writes._blocks.cache, bio)


async def promote_something(migrations: Migrations, work: Work) -> bool:
    """J4: promotes another block's data."""
    blocks = migrations._blocks
    size = blocks.block_size
    if not blocks.metadata.may_insert(work.cblock):
        return False
    other = (work.oblock + 1) % blocks.nr_oblocks
    await migrations._promoter.copy(other * size, size, work.cblock * size)
    blocks.metadata.insert(work.cblock, work.oblock, dirty=False)
    return True


async def start_later(activation: Activation) -> None:
    """J5: admits I/O while the metadata on disk still say that the shutdown was clean."""
    activation._parts.metadata.may_change = True


def trust_dirty_bits(
    metadata: CacheMetadata, superblock: Any, loaded: Any, **more: Any
) -> None:
    """J6: after an unclean stop, all blocks count as clean, although that is not known."""
    loaded.dirty.setall(0)
    original_init(metadata, superblock=superblock, loaded=loaded, **more)


def clean_silently(blocks: Blocks, cblock: int) -> None:
    """J7: tells the policy alone that a block is clean."""
    was_dirty = blocks.metadata.dirty[cblock]
    blocks.metadata.set_clean(cblock)
    if was_dirty:
        blocks.policy.clear_dirty(cblock)


def dirty_in_policy_only(blocks: Blocks, cblock: int) -> None:
    """J7: the policy does not learn that a block is dirty."""
    blocks.metadata.set_dirty(cblock)


original_init = CacheMetadata.__init__
original_complete = Smq.complete_background_work


def try_all() -> None:
    """Doing nothing; the matrix, with what the cuts of its shorter workloads leave; walks."""
    walk(matrix.IdleCacheRig, 0, [("quiet", 0, 0, False)])
    for inline in (1.0, 0.0):
        for rig, workload, _, images in matrix.MATRIX:
            if images <= IMAGES_MAX:
                matrix.cuts_of(rig, workload, inline, 0).verify()
            else:
                matrix.cuts_of(rig, workload, inline, 0)
    for seed in range(WALKS_MAX):
        walk(PassthroughRig, seed, draw_cache_walk(seed))
        walk(matrix.IdleCacheRig, seed, draw_cache_walk(seed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "bug", "name"),
    [
        (
            "nbdtarget.targets.committer.Committer._commit_transaction",
            commit_without_flushes,
            "J1",
        ),
        pytest.param(
            MIGRATIONS + "_demote",
            demote_without_commit,
            "J1",
            marks=pytest.mark.long,
        ),
        pytest.param(
            CACHED_WRITES + "_invalidate",
            invalidate_after_the_write,
            "J1",
            marks=pytest.mark.long,
        ),
        (
            "nbdtarget.policies.smq.policy.Smq.complete_background_work",
            forget_promotion,
            "J2",
        ),
        (CACHED_WRITES + "_invalidate", passthrough_caches, "J3"),
        pytest.param(
            CACHED_WRITES + "_write_through",
            write_through_to_one,
            "J4",
            marks=pytest.mark.long,
        ),
        (MIGRATIONS + "_promote", promote_something, "J4"),
        (
            "nbdtarget.targets.cache.activation.Activation._start",
            start_later,
            "J5",
        ),
        (
            "nbdtarget_metadata.cache.metadata.CacheMetadata.__init__",
            trust_dirty_bits,
            "J6",
        ),
        ("nbdtarget.targets.cache.blocks.Blocks.set_clean", clean_silently, "J7"),
        pytest.param(
            "nbdtarget.targets.cache.blocks.Blocks.set_dirty",
            dirty_in_policy_only,
            "J7",
            marks=pytest.mark.long,
        ),
        (MIGRATIONS + "_tick_and_wait", tick_with_io, "J8"),
    ],
)
def test_invariant_catches(
    where: str, bug: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, bug)
    with pytest.raises(Broken, match=name):
        try_all()
