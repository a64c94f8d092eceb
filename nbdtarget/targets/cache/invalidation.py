# SPDX-License-Identifier: Apache-2.0
"""Give cached blocks up: the messages `invalidate_cblocks`, in passthrough mode, and `invalidate_all`.

Theory of operation. Writes to a block that is not cached go to the origin. So no block may count as not
cached before its removal is durable. Otherwise a crash would bring the mapping back, with old data that
hide what was written. Hence, for as many blocks as one commit should have:

    lock each  ->  remove the mappings  ->  commit  ->  tell the policy  ->  unlock

A block that is locked, for example by a DISCARD, is tried again later. A block that is dirty stays:
it is newer than the origin. (In passthrough mode none is dirty.)

Durable: the removals, when this returns.
"""

import asyncio
import errno as errnos
from collections.abc import Iterable
from typing import Final

from nbdtarget.common.clock import Clock
from nbdtarget.common.errors import TableError
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
    """Return those that were locked, and must be tried again."""
    metadata = blocks.metadata
    busy: list[int] = []
    locking: dict[int, asyncio.Future[BlockLock]] = {}
    clean: list[int] = []
    is_committed = False
    try:
        for cblock in cblocks:
            oblock = metadata.maybe_oblock(cblock)
            if oblock is None:
                continue
            granted = _lock(blocks, oblock)
            if granted is None:
                busy.append(cblock)
            else:
                locking[cblock] = granted
        for granted in locking.values():
            await granted
        if blocks.is_writable:
            clean = [cblock for cblock in locking if not metadata.is_dirty(cblock)]
            for cblock in clean:
                metadata.remove(cblock)
            is_committed = not clean or await blocks.committer.commit()
    except asyncio.CancelledError as error:
        if clean:
            blocks.broken(error)  # as in a migration: the policy still has the mappings
        raise
    finally:
        for cblock in clean if is_committed else ():
            blocks.policy.invalidate(cblock)
        for granted in locking.values():
            # A lock that is not granted yet, because this was cancelled, is released when it is granted.
            if not granted.cancel() and not granted.cancelled():
                blocks.unlock(granted.result())
    if not is_committed:
        raise TableError("Input/output error", errnos.EIO)
    return busy


def _lock(blocks: Blocks, oblock: int) -> asyncio.Future[BlockLock] | None:
    """Lock a block, unless it is locked or about to be; if the future is cancelled, it is unlocked again."""
    waiting: asyncio.Future[BlockLock] = asyncio.get_running_loop().create_future()

    def granted(lock: BlockLock) -> None:
        if waiting.done():
            blocks.unlock(lock)
        else:
            waiting.set_result(lock)

    return None if blocks.locks.maybe_lock(oblock, granted) is None else waiting
