# SPDX-License-Identifier: Apache-2.0
"""Writes to cached blocks: what each of them waits for, and where it goes.

Theory of operation. `CachedWrites` takes a write to one cached block, which nothing else has locked. One step,
`_advance`, asks these questions in this order. The first answer that applies counts, and a write that has waited
is asked all of them again.

    question                                              if so
    may nothing be recorded any more, and does the        EIO
    write need it?
    must be on disk first that the block may be dirty?    wait for the commit (`dirty_log`)
    would the cache count, FUA, mapping not committed?    wait for the commit
    does the cache count?                                 mark the block dirty, send to the cache
    is another write through on its way to these bytes?   wait for its end
    none of these                                         send to both devices

The cache counts in writeback mode, and for a block that is dirty in any mode. From its first wait on, or while it is in
flight, a write holds its block (`BlockLocks`), so the block stays where it is. In passthrough mode no step is
asked: the block is given up first (`_invalidate`).

Why no acknowledged flush is lost by this: rules 2 to 6 of `foreground`.
"""

import errno as errnos
from collections.abc import Callable
from functools import partial

from nbdtarget.bio import FUA, Bio
from nbdtarget.devices.base import Device
from nbdtarget.targets.cache.bad_blocks import BadBlocks
from nbdtarget.targets.cache.blocks import Blocks
from nbdtarget.targets.cache.locks import BlockLock
from nbdtarget_metadata.errors import MetadataError
from nbdtarget_metadata.mode import Mode

__all__ = ["CachedWrite", "CachedWrites"]


class WriteThrough:
    """One write on its way to both devices.

    Attributes:
        begin, end: bytes, on the origin.
        waiting: what to call when it has ended: of later writes to some of these bytes, which
            would otherwise reach the two devices in different orders.
    """

    __slots__ = (
        "_ended",
        "_failed",
        "_left",
        "begin",
        "bio",
        "cache_error",
        "end",
        "origin_error",
        "waiting",
    )

    def __init__(
        self, bio: Bio, ended: Callable[[], None], failed: Callable[[Bio, int], None]
    ) -> None:
        self.bio = bio
        self._failed = failed
        self.begin = bio.offset
        self.end = bio.offset + bio.length
        self.waiting: list[Callable[[], None]] = []
        self.origin_error = 0
        self.cache_error = 0
        self._left = 2
        self._ended = ended

    def origin_ended(self, child: Bio) -> None:
        self.origin_error = child.status
        self._one_ended()

    def cache_ended(self, child: Bio) -> None:
        self.cache_error = child.status
        if child.status:
            self._failed(child, child.status)
        self._one_ended()

    def _one_ended(self) -> None:
        self._left -= 1
        if not self._left:
            self._ended()


class CachedWrite:
    """One write to a cached block, until it is sent.

    Attributes:
        is_held: the write holds its block.
    """

    __slots__ = ("bio", "cblock", "is_held", "oblock")

    def __init__(self, bio: Bio, oblock: int, cblock: int) -> None:
        self.bio = bio
        self.oblock = oblock
        self.cblock = cblock
        self.is_held = False


class CachedWrites:
    """The writes to cached blocks of one target. See the module head."""

    def __init__(self, blocks: Blocks, bad_blocks: BadBlocks) -> None:
        self._blocks = blocks
        self._locks = blocks.locks
        self._bad_blocks = bad_blocks
        self._through: dict[int, list[WriteThrough]] = {}  # by oblock

    def start(self, bio: Bio, oblock: int, cblock: int) -> None:
        """Take a write to a cached block that is not locked; ends it, now or later."""
        blocks = self._blocks
        blocks.metadata.statistics.write_hits += 1
        if blocks.is_passthrough:
            self._invalidate(bio, oblock, cblock)
            return
        blocks.discards.clear(oblock)
        self._advance(CachedWrite(bio, oblock, cblock))

    def _advance(self, write: CachedWrite) -> None:
        """Send a write to a cached block, or have it wait for what must come first.

        Each wait ends with another call, which asks everything again: while the write waited, another
        one may have made the block dirty, or clean, and a commit may have failed.
        """
        blocks = self._blocks
        metadata = blocks.metadata
        bio, oblock, cblock = write.bio, write.oblock, write.cblock
        is_dirty = metadata.dirty[cblock]
        is_for_cache = blocks.is_writeback or is_dirty
        if metadata.mode is not Mode.RW and not self._is_all_recorded(cblock):
            bio.end(errnos.EIO)  # rule 6
        elif not (is_dirty or metadata.may_dirty(cblock)):
            # Rule 2, with `dirty_log`: that the block may be dirty must be on disk first.
            self._advance_after_log(write)
        elif is_for_cache and bio.flags & FUA and not metadata.mapping_survives(cblock):
            # Rule 3: a crash would forget the mapping, and with it what was written.
            self._advance_after_commit(write)
        elif is_for_cache:
            # Rule 2: dirty before it is sent, so that no crash finds the block clean and written to.
            blocks.set_dirty(cblock)
            bio.offset += (cblock - oblock) * blocks.block_size
            blocks.submit(blocks.cache, bio)
            if bio.status < 0 and not write.is_held:
                self._hold(write)
        elif oblock in self._through and (other := self._maybe_overlapping(write)):
            # Rule 4: in two orders they would leave two copies that differ.
            bio.own()
            self._hold(write)
            other.waiting.append(partial(self._advance, write))
        else:
            self._hold(write)
            self._write_through(write)

    def _advance_after_log(self, write: CachedWrite) -> None:
        """Go on with a write when it is on disk that its block may be dirty."""
        self._blocks.metadata.log_dirty(write.cblock)
        self._advance_after_commit(write)

    def _advance_after_commit(self, write: CachedWrite) -> None:
        """Go on with a write when all that is changed now is committed. It holds its block meanwhile."""
        bio = write.bio
        bio.own()
        self._hold(write)

        def committed(errno: int) -> None:
            if errno:
                bio.end(errno)
            else:
                self._advance(write)

        self._blocks.committer.after_commit(committed)

    def _hold(self, write: CachedWrite) -> None:
        """Hold the block until the write ends, unless the write holds it already."""
        if not write.is_held:
            write.is_held = True
            self._locks.hold(write.oblock, write.bio, is_write=True)

    def _is_all_recorded(self, cblock: int) -> bool:
        """Whether the disk has all that a write to a cached block needs recorded: mode RO."""
        metadata = self._blocks.metadata
        return (
            not self._blocks.has_failed
            and bool(metadata.dirty[cblock])
            and metadata.mapping_survives(cblock)
        )

    def _maybe_overlapping(self, write: CachedWrite) -> WriteThrough | None:
        """Return a write that is on its way to both devices, and to some of the same bytes."""
        bio = write.bio
        for other in self._through[write.oblock]:
            if other.begin < bio.offset + bio.length and bio.offset < other.end:
                return other
        return None

    def _write_through(self, write: CachedWrite) -> None:
        """Send a held write to both devices."""
        assert write.is_held, "a promotion or demotion must wait for both halves"
        bio, oblock, cblock = write.bio, write.oblock, write.cblock
        self._blocks.metadata.begin_write_through(cblock)
        self._blocks.origin_writes.nr_sent += 1
        through = WriteThrough(
            bio,
            lambda: self._written_through(through, oblock, cblock),
            self._bad_blocks.note,
        )
        self._through.setdefault(oblock, []).append(through)
        offset = bio.offset
        payload, borrowed = bio.payload, bio.borrowed
        if borrowed:
            bio.give_away()

        def submit(device: Device, offset: int, endio: Callable[[Bio], None]) -> None:
            child = Bio(
                bio.op, offset, bio.length, payload, bio.flags, endio, None, borrowed
            )
            device.submit(child)

        submit(self._blocks.origin, offset, through.origin_ended)
        offset += (cblock - oblock) * self._blocks.block_size
        submit(self._blocks.cache, offset, through.cache_ended)

    def _written_through(
        self, through: "WriteThrough", oblock: int, cblock: int
    ) -> None:
        """Both have ended: see rule 4 of the module head."""
        blocks = self._blocks
        bio = through.bio
        error = through.origin_error
        assert self._locks.nr_writers(oblock), "a write through holds its block"
        try:
            if through.cache_error:
                # If it is dirty, because the origin failed another write, the cache counts.
                error = error or (errnos.EIO if blocks.metadata.dirty[cblock] else 0)
            elif through.origin_error:
                if self._has_whole_copy(oblock):
                    blocks.set_dirty(cblock)
            elif self._locks.nr_writers(oblock) == 1:
                # This is the last one: both copies of the block are the same again.
                blocks.metadata.end_write_through(cblock)
        except MetadataError:
            error = error or errnos.EIO
        others = self._through[oblock]
        others.remove(through)
        if not others:
            del self._through[oblock]
        if through.cache_error and not error:
            # It does no more I/O, and giving the block up locks it: that lock must not wait for this write.
            self._locks.let_go(bio)
            self._bad_blocks.drop(oblock, cblock, bio.end)
        else:
            bio.end(error)
        for send in through.waiting:
            send()
        if through.cache_error and error:
            # The client was told; a clean copy that could not be written must not be read any more, either.
            self._bad_blocks.drop(oblock, cblock, _ignore)

    def _has_whole_copy(self, oblock: int) -> bool:
        """Whether the cached copy of a clean block is known to hold all that the origin does."""
        return not (
            self._blocks.distrusts_cache or self._bad_blocks.is_dropping(oblock)
        )

    def _invalidate(self, bio: Bio, oblock: int, cblock: int) -> None:
        """Passthrough: a write to a cached block. Durably unmapped, it goes to the origin."""
        blocks = self._blocks
        bio.own()
        if not blocks.is_writable:
            bio.end(errnos.EIO)  # the removal could not be recorded
            return

        def locked(lock: BlockLock) -> None:
            try:
                if blocks.metadata.maybe_oblock(cblock) is not None:
                    blocks.metadata.remove(cblock)
            except MetadataError:
                removed(lock, errnos.EIO)
                return
            blocks.committer.after_commit(lambda errno: removed(lock, errno))

        def removed(lock: BlockLock, errno: int) -> None:
            if errno:
                bio.end(errnos.EIO)
            else:
                blocks.policy.invalidate(cblock)
                blocks.nr_demotions += 1
                blocks.discards.clear(oblock)
                blocks.origin_writes.nr_sent += 1
                blocks.submit_held(blocks.origin, bio, oblock)
            blocks.unlock(lock)

        lock = self._locks.maybe_lock(oblock, locked)
        assert lock is not None, "the bio would have been parked"


def _ignore(_: int) -> None:
    """Ignore the result, for which no caller waits."""
