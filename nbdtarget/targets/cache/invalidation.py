# SPDX-License-Identifier: Apache-2.0
"""Give cached blocks up: the messages `invalidate_cblocks`, in passthrough mode, and `invalidate_all`.

Theory of operation. Writes to a block that is not cached go to the origin. So nobody may take a block
for one before its removal is durable, or a crash brings the mapping back, with old data that
hide what was written. Hence, for as many blocks as one commit should have:

    lock each  ->  remove the mappings  ->  commit  ->  tell the policy  ->  unlock

One that somebody else has locked, a client's write or a DISCARD, is come back to. One that is dirty stays:
it is newer than the origin. (In passthrough mode none is.)

Durable: the removals, when this returns.
"""

import asyncio
import errno as errnos
from collections.abc import Iterable
from typing import Final

from nbdtarget.clock import Clock
from nbdtarget.errors import TableError
from nbdtarget.targets.cache.blocks import Blocks
from nbdtarget.targets.cache.locks import BlockLock

__all__ = ["invalidate"]

RETRY_S: Final = 0.01


async def invalidate(blocks: Blocks, cblocks: Iterable[int], clock: Clock) -> None:
    """Unmap these cache blocks; those that are not mapped are fine, and dirty ones stay.

    Raises: TableError: a commit has failed, the cache is read-only now.
    """
    left = list(cblocks)
    while left := await _invalidate_some(blocks, left):
        await clock.sleep(RETRY_S)


async def _invalidate_some(blocks: Blocks, cblocks: list[int]) -> list[int]:
    """Return those whose blocks were locked by somebody."""
    metadata = blocks.metadata
    loop = asyncio.get_running_loop()
    busy: list[int] = []
    locking: list[tuple[int, asyncio.Future[BlockLock]]] = []
    for cblock in cblocks:
        oblock = metadata.maybe_oblock(cblock)
        if oblock is None:
            continue
        granted: asyncio.Future[BlockLock] = loop.create_future()
        if blocks.locks.maybe_lock(oblock, granted.set_result) is None:
            busy.append(cblock)
        else:
            locking.append((cblock, granted))
    locks = [(cblock, await granted) for cblock, granted in locking]
    is_committed = False
    clean: list[int] = []
    try:
        if blocks.is_writable:
            clean = [cblock for cblock, _ in locks if not metadata.is_dirty(cblock)]
            for cblock in clean:
                metadata.remove(cblock)
            is_committed = not clean or await blocks.committer.commit()
    finally:
        for cblock in clean if is_committed else ():
            blocks.policy.invalidate(cblock)
        for _, lock in locks:
            for bio in blocks.locks.unlock(lock):
                blocks.remap(bio)
    if not is_committed:
        raise TableError("Input/output error", errnos.EIO)
    return busy
