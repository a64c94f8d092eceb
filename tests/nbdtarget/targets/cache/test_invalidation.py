# SPDX-License-Identifier: Apache-2.0
"""Invalidation by number: the client that asked for it may go away at any moment."""

import asyncio

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE
from nbdtarget.targets.cache.invalidation import invalidate
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle


@pytest.mark.parametrize("nr_turns", range(6))
async def test_cancelled_invalidation_leaves_no_block_locked(
    lab: CacheLab, nr_turns: int
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean(range(4))
    await lab.reload("1 passthrough smq 0")
    lab.hold("o", OP_WRITE)
    write = lab.submit(OP_WRITE, 20 * BLOCK, 512)
    held = lab.submit(OP_READ, 0, 512)
    lab.metadata.hold = True
    await settle()
    # A write to one of the blocks, which is under way: its lock is not granted at once.
    oblocks = [lab.core.maybe_oblock(cblock) for cblock in range(4)]
    writer = lab.submit(OP_WRITE, 20 * BLOCK + 512, 512)
    assert None not in oblocks
    lab.target._locks.hold(oblocks[2] or 0, writer, is_write=True)
    task = asyncio.ensure_future(invalidate(lab.target._blocks, range(4), lab.clock))
    for _ in range(nr_turns):
        await asyncio.sleep(0)
    task.cancel()
    await settle()
    lab.metadata.let_go()
    lab.origin.let_go()
    await settle()
    assert task.cancelled()
    assert not lab.target._locks.locked
    assert (write.status, held.status, writer.status) == (0, 0, 0)
    late = [lab.submit(OP_WRITE, (oblock or 0) * BLOCK, 512) for oblock in oblocks]
    await settle()
    assert [bio.status for bio in late] == [0] * 4
