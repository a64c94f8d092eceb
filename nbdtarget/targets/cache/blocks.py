# SPDX-License-Identifier: Apache-2.0
"""The state that the parts of one cache share: devices, geometry, the mappings, and the blocks that are held.

Offsets here are relative to the target, which is also where the bytes lie on the origin. A cache
block of number `cblock` lies at `cblock * block_size` on the cache device. Block sizes are
multiples of 32 KiB, not powers of two. The origin's tail, if it is no whole block, is never
cached: its bytes belong to no oblock.

Three objects hold a view of the same blocks, and the methods here keep them the same:

    metadata   which oblock is in which cblock, which are dirty: the truth, and what a crash leaves
    policy     the same, in its queues; it may know of a mapping a little longer than the metadata
               (a demotion until its commit is done), never of another one
    discards   which parts of the origin hold nothing that is needed
"""

import errno as errnos
import logging
from collections.abc import Callable
from typing import Final

from nbdtarget.bio import FUA, OP_READ, Bio
from nbdtarget.devices.base import Device
from nbdtarget.targets.base import TargetContext
from nbdtarget.targets.cache.constructor import Parts
from nbdtarget.targets.cache.failures import Failures
from nbdtarget.targets.cache.locks import BlockLock, BlockLocks
from nbdtarget.targets.cache.table import PASSTHROUGH, WRITEBACK
from nbdtarget.targets.cache.unflushed import OriginWrites
from nbdtarget.targets.committer import Committer
from nbdtarget_metadata.mode import Mode

__all__ = ["Blocks"]

log = logging.getLogger(__name__)


class Blocks:
    """The blocks of one cache target.

    Attributes:
        nr_oblocks: whole blocks of the origin.
        is_writeback, is_passthrough: of the mode's three; neither: writethrough.
        nr_promotions, nr_demotions, nr_written_back: since this table was constructed.
        nr_migrating: migrations under way, as far as they copy.
        distrusts_cache: the cache device has failed a flush that nothing rested on: see `Distrust`.
        origin_writes: counts what is written to the origin, for those that flush it.
        event: raises a device-mapper event.
        wake: tells the migrations that there may be something to do.
        failures: counts what has failed below.
        broken: takes an unexpected exception (a bug), after which nothing can be trusted.
        remap: takes a bio through the target from the beginning.
    """

    def __init__(
        self,
        ctx: TargetContext,
        parts: Parts,
        committer: Committer,
        *,
        remap: Callable[[Bio], None],
        broken: Callable[[BaseException], None],
    ) -> None:
        self.name = ctx.name
        self.origin = parts.origin
        self.cache = parts.cache
        self.metadata = parts.metadata
        self.policy = parts.policy
        self.committer = committer
        self.discards = parts.discards
        self.locks = BlockLocks()
        self.origin_writes = OriginWrites(
            lambda: not (self.locks.has_writers or self.nr_migrating)
        )
        committer.unflushed[parts.origin] = self.origin_writes
        self.block_size: Final = parts.block_size
        self.nr_oblocks: Final = ctx.length // parts.block_size
        self.options = parts.options
        self.is_writeback: Final = parts.options.mode == WRITEBACK
        self.is_passthrough: Final = parts.options.mode == PASSTHROUGH
        self.nr_promotions = 0
        self.nr_demotions = 0
        self.nr_written_back = 0
        self.nr_migrating = 0
        self.distrusts_cache = False
        self.event = ctx.event
        self.remap = remap
        self.broken = broken
        self.failures = Failures(ctx.name, ctx.clock)
        self.wake: Callable[[], None] = _do_nothing

    @property
    def is_writable(self) -> bool:
        """Whether mappings and dirty bits may change."""
        return self.metadata.mode is Mode.RW

    @property
    def has_origin_the_clean(self) -> bool:
        """Whether the origin surely has what clean blocks hold.

        After a failed commit this is in doubt: what was written back and not flushed may be lost, and the disk says dirty.
        """
        is_in_doubt = not self.is_writable and self.origin_writes.has_any
        return not is_in_doubt or self.metadata.is_recorded_complete

    @property
    def has_failed(self) -> bool:
        """Whether nothing can be said about any block any more."""
        return self.metadata.mode is Mode.FAIL

    def set_dirty(self, cblock: int) -> None:
        """The block's cached copy is about to become newer than the origin's.

        Called before the write is sent. Raises: MetadataError: it cannot be recorded.
        """
        if not self.metadata.dirty[cblock]:
            self.metadata.set_dirty(cblock)
            self.policy.set_dirty(cblock)
            if self.metadata.changed:
                # Writethrough, and the origin has failed: it has not everything any more.
                self.committer.note_change()

    def set_clean(self, cblock: int) -> None:
        """The origin has the block's data, or they are not needed any more. Raises: MetadataError."""
        metadata = self.metadata
        was_dirty = metadata.dirty[cblock]
        metadata.set_clean(cblock)
        if was_dirty:
            self.policy.clear_dirty(cblock)
            if not metadata.nr_dirty:
                self.event()
                if metadata.changed:
                    self.committer.note_change()  # that the origin has everything

    def submit(self, device: Device, bio: Bio) -> None:
        """Send a bio; with FUA not after a failed commit: it could not all be durable."""
        if bio.flags & FUA and self.committer.has_failed:
            bio.end(errnos.EIO)
        else:
            device.submit(bio)

    def submit_held(self, device: Device, bio: Bio, oblock: int) -> None:
        """Send a bio that holds its block until it ends."""
        self.submit(device, bio)
        if bio.status < 0:
            self.locks.hold(oblock, bio, is_write=bio.op != OP_READ)

    def unlock(self, lock: BlockLock) -> None:
        """Let a block go; the bios that were parked for it are mapped anew."""
        for parked in self.locks.unlock(lock):
            self.remap(parked)
        self.wake()


def _do_nothing(*_: object) -> None:
    """The part that is to be told is not made yet."""
