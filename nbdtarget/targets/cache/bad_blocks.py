# SPDX-License-Identifier: Apache-2.0
"""Gives up blocks whose copy in the cache the cache device cannot read or write any more.

Theory of operation. The origin has everything that a clean block holds. So when the cache device fails, clients need
not notice:

    a READ                    is sent to the origin                 (`CachedRead`, before it would end)
    a write through           whose origin's half went well ends well, once the block is given up durably
    an overwrite              goes to the origin instead
    a promotion               has not taken place

and the block is given up: its mapping is removed and the removal committed, so that no crash brings back a copy
that is older than the origin. A write through ends only after that. Until then the write is not acknowledged, so
reads may return either content, and a FLUSH promises nothing about it; that is why FLUSH needs no care of its own.
A write that has let go of its block waits for the commit alone, never for a lock that waits for it.

The cache device has the only copy of a dirty block. If it cannot be read, the request ends with EIO. So it does if the block was
written back, and the origin may have lost that: a commit has failed, and no flush of the origin has covered it.

No wait here is without an end: a block that is locked is tried again later, and what locks a block
waits for devices and commits only. When the metadata cannot record the removal any more, the write ends with EIO.
"""

import asyncio
import errno as errnos
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

from nbdtarget.bio import OP_NAMES, Bio
from nbdtarget.common.clock import Clock
from nbdtarget.common.errors import DeviceError
from nbdtarget.targets.cache.blocks import Blocks
from nbdtarget.targets.cache.locks import BlockLock
from nbdtarget_metadata.errors import MetadataError

__all__ = ["BadBlocks"]

RETRY_S: Final = 0.01
GIVEN_UP_MAX: Final = 16  # blocks, before the device itself is in doubt

log = logging.getLogger(__name__)


class BadBlocks:
    """Gives blocks up. See the module head.

    Args:
        spawn: runs a coroutine that a suspend waits for.
        too_many: called when many blocks have been given up: each of them costs a failed try and a commit.

    Attributes:
        nr_given_up: blocks, since this table was constructed.
    """

    def __init__(
        self,
        blocks: Blocks,
        clock: Clock,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        *,
        too_many: Callable[[], object],
    ) -> None:
        self._blocks = blocks
        self._clock = clock
        self._spawn = spawn
        self._under_way: dict[int, list[Callable[[int], None]]] = {}  # by oblock
        self.nr_given_up = 0
        self._too_many = too_many
        blocks.locks.rescue = self.rescue_read

    def rescue_read(self, bio: Bio, errno: int, oblock: int, cblock: int) -> bool:
        """A READ of a cached block has failed: send it to the origin, if that has everything."""
        blocks = self._blocks
        self.note(bio, errno)
        metadata = blocks.metadata
        if blocks.has_failed or metadata.dirty[cblock]:
            return False
        if not blocks.has_origin_the_clean:
            return False
        bio.offset += (oblock - cblock) * blocks.block_size
        self.drop(oblock, cblock, _ignore)
        blocks.origin.submit(bio)
        return True

    def note(self, bio: Bio, errno: int) -> None:
        """The cache device has failed this bio."""
        blocks = self._blocks
        error = DeviceError(
            errno, blocks.cache.name, OP_NAMES[bio.op], bio.offset, bio.length
        )
        blocks.failures.note("cache device", error)

    def drop(self, oblock: int, cblock: int, ended: Callable[[int], None]) -> None:
        """Remove a clean mapping; `ended(errno)` is called when that is durable, or cannot be.

        0 also if it was removed for another reason. EIO if the block is dirty by then.
        """
        waiting = self._under_way.get(oblock)
        if waiting is not None:
            waiting.append(ended)
            return
        self._under_way[oblock] = [ended]
        self._spawn(self._give_up(oblock, cblock))

    def is_dropping(self, oblock: int) -> bool:
        """Whether the cached copy of a block is known to be bad, and is about to go."""
        return oblock in self._under_way

    async def _give_up(self, oblock: int, cblock: int) -> None:
        errno = errnos.EIO
        try:
            while not await self._is_settled(oblock, cblock):
                await self._clock.sleep(RETRY_S)
            metadata = self._blocks.metadata
            if self._blocks.is_writable and metadata.maybe_cblock(oblock) != cblock:
                errno = 0
        except MetadataError as error:
            log.error("%s: block %d: %s", self._blocks.name, oblock, error)
        finally:
            for ended in self._under_way.pop(oblock):
                ended(errno)

    async def _is_settled(self, oblock: int, cblock: int) -> bool:
        """Try once; whether there is nothing more to be done. Raises: MetadataError."""
        blocks = self._blocks
        metadata = blocks.metadata
        if not blocks.is_writable:
            return True
        if metadata.maybe_cblock(oblock) != cblock:
            # It was removed for another reason, but perhaps not yet durably.
            await blocks.committer.commit()
            return True
        if metadata.dirty[cblock]:
            return True
        granted: asyncio.Future[BlockLock] = asyncio.get_running_loop().create_future()
        if blocks.locks.maybe_lock(oblock, granted.set_result) is None:
            return False
        lock = await granted
        # While the lock was waited for, all of this may have changed.
        try:
            if (
                not blocks.is_writable
                or metadata.maybe_cblock(oblock) != cblock
                or metadata.dirty[cblock]
            ):
                return False
            assert lock.held, "no write may go to a block that is being removed"
            metadata.remove(cblock)
            if await blocks.committer.commit():
                unread: asyncio.Future[BlockLock]
                unread = asyncio.get_running_loop().create_future()
                blocks.locks.raise_level(lock, unread.set_result)
                await unread
                blocks.policy.invalidate(cblock)
                self._tell(oblock)
        except asyncio.CancelledError as error:
            blocks.broken(
                error
            )  # as in a migration: the policy may still have the mapping
            raise
        finally:
            blocks.unlock(lock)
        return True

    def _tell(self, oblock: int) -> None:
        blocks = self._blocks
        self.nr_given_up += 1
        blocks.failures.say(
            f"origin block {oblock} is not cached any more, as its copy in"
            f" {blocks.cache.name} cannot be used; the origin has it"
            f" ({self.nr_given_up} blocks so far)"
        )
        blocks.event()
        if self.nr_given_up == GIVEN_UP_MAX:
            self._too_many()


def _ignore(_: int) -> None:
    """Ignore the result, for which no caller waits."""
