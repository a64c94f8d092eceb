# SPDX-License-Identifier: Apache-2.0
"""A cache device that fails its flush, in a cache that does not write back.

What does a FLUSH promise then? Everything that a writethrough cache has acknowledged is on the origin, as long as
nothing is dirty. The cache device may hold older copies. But while the superblock says that the origin is
complete, a crash drops all mappings, so no copy is ever read again after a crash. So nothing rests on the cache
device's flush, and FLUSH need not fail. The same is true for a commit if its superblock still says so.

The device is not trusted from the first such failure on, or from the moment at which many blocks have been given up
(`BadBlocks`), until the table is loaded again:

    reads of clean blocks    go to the origin: a page that could not be written may read as it was before
    promotions, overwrites   are not made
    at the end               no clean shutdown is recorded, as it would vouch for the copies: the next
                             start, or table, drops all mappings

While a block is dirty, or in a cache that writes back, the flush is needed, and FLUSH fails with EIO. So it does if a
block has become dirty while the flush was under way. In a cache whose device is not trusted, no
block becomes dirty: if the origin fails a write, the write fails, and the origin counts all the same.
"""

import logging
from collections.abc import Callable, Sequence

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import Device
from nbdtarget.targets.cache.blocks import Blocks
from nbdtarget.targets.committer import Transaction
from nbdtarget_metadata.cache.encoding import CacheTaken
from nbdtarget_metadata.log.commit import Transaction as JournaledTransaction

__all__ = ["Distrust"]

log = logging.getLogger(__name__)


class Distrust:
    """See the module head.

    Args:
        changed: called when the device is trusted no more.
    """

    def __init__(self, blocks: Blocks, changed: Callable[[], None]) -> None:
        self._blocks = blocks
        self._changed = changed
        blocks.committer.can_do_without = self.maybe_let_go

    def maybe_let_go(
        self, device: Device, transaction: Transaction | None
    ) -> Callable[[DeviceError], None] | None:
        """Return what to call if the flush of `device` that begins now fails; None: the flush is needed."""
        blocks = self._blocks
        if device is not blocks.cache or not self._is_origin_complete:
            return None
        if transaction is not None and not _says_complete(transaction):
            return None
        return self._flush_failed

    def maybe_distrust(self, lost: Sequence[Device]) -> bool:
        """Devices may have lost what was not flushed. True: it is only the cache device, and that does not matter."""
        blocks = self._blocks
        if list(lost) != [blocks.cache] or not self._is_origin_complete:
            return False
        self._distrust("it may have lost what was not flushed")
        return True

    def many_given_up(self) -> None:
        """Block after block has been given up: do not try each of the others."""
        if self._is_origin_complete:
            self._distrust("it has failed for many blocks")

    @property
    def _is_origin_complete(self) -> bool:
        """Whether all that was acknowledged is on the origin, and a crash gives all mappings up."""
        metadata = self._blocks.metadata
        return metadata.is_recorded_complete and not metadata.nr_dirty

    def _flush_failed(self, error: DeviceError) -> None:
        """Raises: DeviceError: `error`; a block has become dirty since the flush began."""
        if not self._is_origin_complete:
            raise error
        self._blocks.failures.note("cache device", error)
        self._distrust(str(error))

    def _distrust(self, reason: str) -> None:
        blocks = self._blocks
        if blocks.distrusts_cache:
            return
        blocks.distrusts_cache = True
        blocks.metadata.is_distrusted = True
        log.error(
            "%s: cache device %s: %s: it is not read any more until the table is loaded"
            " again; the origin has everything",
            blocks.name,
            blocks.cache.name,
            reason,
        )
        if blocks.is_writable:
            blocks.policy.allow_migrations(False)
        self._changed()
        blocks.event()


def _says_complete(transaction: Transaction) -> bool:
    """Whether the superblock of a cache's transaction will say that the origin is complete."""
    assert isinstance(transaction, JournaledTransaction)
    taken = transaction.taken
    assert isinstance(taken, CacheTaken)
    return taken.says_complete
