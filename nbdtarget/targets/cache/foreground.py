# SPDX-License-Identifier: Apache-2.0
"""Clients' bios that `map` cannot pass on by itself.

Theory of operation. A bio is cut at block borders. Each piece lies in one block, or in
the origin's tail, which is never cached. Where it goes depends on the mode of the cache and on what the policy knows:

                 read hit   read miss   write hit, dirty   write hit, clean         write miss
    writeback    cache      origin      cache              mark dirty, cache        origin *
    writethrough cache      origin      cache              origin and cache         origin
    passthrough  origin     origin      there are none     invalidate, then origin  origin

`*` A WRITE of a whole block, or to a discarded one, needs nothing from the origin: the policy may have it sent
to a free cache block at once (an *overwrite*). The rest of a discarded block is filled with zeroes.

Writes to cached blocks are taken by `cached_writes`; the rest is here.

Why no acknowledged flush is lost
---------------------------------
1. *A write goes to one place at a time.* It holds its block (`BlockLocks`) until it has ended, unless it
   ends at once; and what changes where the block lives locks it first. A write which finds
   its block locked is parked and mapped anew, so it never goes where its block was.
2. *Marked before it is sent.* A write makes its block dirty before it reaches the cache device; with
   `dirty_log` that is on disk by then: the write waits for the commit, holding its block.
3. *FUA* to the cache waits until the mapping is committed: otherwise a crash would lose the mapping, and the data with it.
   An overwrite with FUA ends after the commit that has its mapping, which flushes the cache device.
   A miss needs no commit: no crash brings a mapping of its block back (rule 1: what removes a
   mapping keeps its lock until the removal is committed).
4. *A write through to both devices* that fails on one of them leaves two copies that differ. If the
   cache device failed, the origin counts: the block is given up, durably, before the write ends, and then it
   ends well. If the origin failed, the write fails, the block is marked dirty, and the cache counts. There is one
   exception: if the rest of the copy may be older than the origin, because the device is not trusted (`distrust`) or
   the block is being given up, then the block stays clean, and the origin counts. Writes to the same bytes go one
   after another: in two different orders they would leave two copies that differ, too.
5. *Invalidation* (passthrough): removed, committed, and only then written to the origin.
6. *Mode RO.* A write that would need something recorded is refused. Writes to dirty blocks whose mapping is on
   disk may go on. So may writes to blocks that are not cached, unless the removal of their mapping
   could not be committed: the next start would find the mapping, and an old copy. No write may go on while the disk
   says that the table was stopped cleanly (`target` sees to it): the next start would find disks that have changed while
   they were not in use, and blocks recorded as discarded that are not.

A DISCARD locks its range, so that it does not race with writes to it or with migrations; the bits are
set with the lock held. Cached blocks stay cached: any content is right for a block that was discarded.

No wait here is without an end: a parked bio waits for a lock, which waits for devices and commits only.
"""

import errno as errnos
from collections.abc import Callable
from typing import Final

from nbdtarget.bio import (
    FAST_ZERO,
    FUA,
    OP_CACHE,
    OP_DISCARD,
    OP_READ,
    OP_WRITE,
    Bio,
    split_bio,
)
from nbdtarget.policies.base import Work
from nbdtarget.targets.cache.bad_blocks import BadBlocks
from nbdtarget.targets.cache.blocks import Blocks
from nbdtarget.targets.cache.cached_writes import CachedWrites
from nbdtarget.targets.cache.locks import BlockLock
from nbdtarget.targets.cache.pieces import BYTES_AT_ONCE, PIECES_AT_ONCE, Pieces
from nbdtarget_metadata.errors import MetadataError

__all__ = ["Foreground"]

ZERO_FILL_BYTES_MAX: Final = (
    256 << 10
)  # of a block that is written as one, for a part of it
_PIECE: Final = "piece"  # Bio.private of what was cut here: it is not given back


class Foreground:
    """Carries out clients' bios that are not plain hits. Offsets are relative to the target.

    Args:
        writes: takes the writes to cached blocks.
        passdown: discards go on to the origin.
        missed: called for each miss.
        warm: takes the half-open oblocks that a client will read soon.
    """

    def __init__(
        self,
        blocks: Blocks,
        writes: CachedWrites,
        bad_blocks: BadBlocks,
        *,
        passdown: bool,
        missed: Callable[[], object],
        warm: Callable[[int, int], None],
    ) -> None:
        self._blocks = blocks
        self._locks = blocks.locks
        self._writes = writes
        self._bad_blocks = bad_blocks
        self._passdown = passdown
        self._missed = missed
        self._warm = warm

    def submit(self, bio: Bio) -> None:
        """Take anything but a FLUSH; ends it, now or later."""
        blocks = self._blocks
        block_size = blocks.block_size
        first = bio.offset // block_size
        if blocks.has_failed:
            bio.end(errnos.EIO)
        elif first >= blocks.nr_oblocks:
            self._submit_tail(bio)
        elif bio.op == OP_DISCARD:
            self._discard(bio)
        elif bio.op == OP_CACHE:
            self._warm(first, -(-(bio.offset + bio.length) // block_size))
            bio.end(0)
        elif first == (bio.offset + bio.length - 1) // block_size:
            self._submit_block(bio, first)
        else:
            self._submit_pieces(bio)

    def push_back(self) -> list[Bio]:
        """Forget, and return, the bios that have not begun, in the order they came."""
        return self._locks.take_parked(lambda bio: bio.private is not _PIECE)

    def _submit_pieces(self, bio: Bio) -> None:
        block_size = self._blocks.block_size
        # A FUA of each piece is its own affair.
        nr_pieces_max = bio.length // block_size + 2
        is_long = bio.payload is not None and bio.length > BYTES_AT_ONCE
        if is_long or nr_pieces_max > PIECES_AT_ONCE:
            Pieces(bio, block_size, _PIECE, self._blocks.remap).pump()
            return
        lengths = []
        at, end = bio.offset, bio.offset + bio.length
        while at < end:
            stop = min((at // block_size + 1) * block_size, end)
            lengths.append(stop - at)
            at = stop
        for piece in split_bio(bio, lengths):
            piece.private = _PIECE
            self.submit(piece)

    def _submit_tail(self, bio: Bio) -> None:
        """Behind the last whole block: always the origin's, and no block is held."""
        blocks = self._blocks
        writes = blocks.origin_writes
        writes.nr_sent += 1
        blocks.submit(blocks.origin, bio)
        if bio.status < 0:

            def ended(_: Bio) -> None:
                writes.nr_sent += 1

            bio.on_end(ended)

    def _submit_block(self, bio: Bio, oblock: int) -> None:
        blocks = self._blocks
        is_write = bio.op != OP_READ
        lock = self._locks.maybe_blocking(oblock, is_write=is_write)
        if lock is not None:
            # Rule 1. It is mapped anew when the lock is let go.
            bio.own()
            lock.parked.append(bio)
            return
        if is_write and blocks.is_writeback and self._is_optimisable(bio, oblock):
            cblock, work = blocks.policy.lookup_with_work(oblock, True)
            if work is not None:
                # The policy has set a free cache block aside for exactly this write.
                self._overwrite(bio, work)
                return
        else:
            cblock = blocks.policy.lookup(oblock, is_write)
        if cblock < 0:
            if is_write and self._may_come_back(oblock):
                bio.end(errnos.EIO)
            else:
                self.miss(bio, oblock)
        elif is_write:
            self._writes.start(bio, oblock, cblock)
        else:
            blocks.metadata.statistics.read_hits += 1
            if not blocks.is_passthrough and not (
                blocks.distrusts_cache and not blocks.metadata.dirty[cblock]
            ):
                bio.offset += (cblock - oblock) * blocks.block_size
                self._read_cached(bio, oblock, cblock)
            else:
                blocks.submit_held(blocks.origin, bio, oblock)

    def _may_come_back(self, oblock: int) -> bool:
        """Whether the next start may find an old copy of a block that is not cached: see rule 6."""
        blocks = self._blocks
        return not blocks.is_writable and blocks.metadata.may_come_back(oblock)

    def _is_optimisable(self, bio: Bio, oblock: int) -> bool:
        """Whether the block could be cached without reading the origin."""
        blocks = self._blocks
        if not blocks.is_writable:
            return False
        if bio.length == blocks.block_size:
            return True
        return (
            bio.op == OP_WRITE
            and blocks.block_size <= ZERO_FILL_BYTES_MAX
            and blocks.discards.is_discarded(oblock)
        )

    # ---- passing on ----

    def _read_cached(self, bio: Bio, oblock: int, cblock: int) -> None:
        cache = self._blocks.cache
        if cache.fails_inline:
            # The hook that sends the bio to the origin instead must be in place when `submit` fails it.
            self._locks.hold_cached(oblock, cblock, bio)
            cache.submit(bio)
        else:
            cache.submit(bio)
            if bio.status < 0:
                self._locks.hold_cached(oblock, cblock, bio)

    def miss(self, bio: Bio, oblock: int) -> None:
        """Send a READ or write of a block that is not cached to the origin."""
        blocks = self._blocks
        if bio.op == OP_READ:
            blocks.metadata.statistics.read_misses += 1
        else:
            blocks.metadata.statistics.write_misses += 1
            blocks.discards.clear(oblock)
            blocks.origin_writes.nr_sent += 1
        blocks.submit_held(blocks.origin, bio, oblock)
        self._missed()

    # ---- overwrites ----

    def _overwrite(self, bio: Bio, work: Work) -> None:
        """Carry out a promotion by writing the bio that it was made for to the cache block."""
        lock = self._locks.maybe_lock(
            work.oblock, lambda lock: self._overwrite_locked(bio, work, lock)
        )
        assert lock is not None, "the bio would have been parked"
        if bio.status < 0 and bio.borrowed:
            bio.own()  # the lock waits for older writes, longer than the payload is lent

    def _overwrite_locked(self, bio: Bio, work: Work, lock: BlockLock) -> None:
        assert lock.held
        blocks = self._blocks
        is_whole = bio.length == blocks.block_size
        # While we waited for older writes, one may have cleared the discard bit.
        is_possible = is_whole or blocks.discards.is_discarded(work.oblock)
        if (
            not blocks.is_writable
            or not is_possible
            or not blocks.metadata.may_insert(work.cblock)
        ):
            self._write_to_origin(bio, work, lock)
            return
        payload = bio.payload
        if not is_whole:
            # Of a discarded block only these bytes are needed: the rest is zeroes.
            assert payload is not None
            whole = memoryview(bytearray(blocks.block_size))
            at = bio.offset - work.oblock * blocks.block_size
            whole[at : at + bio.length] = payload
            payload = whole
        child = Bio(
            bio.op,
            work.cblock * blocks.block_size,
            blocks.block_size,
            payload,
            bio.flags
            & ~FUA,  # the commit that records the mapping flushes the cache device
            lambda child: self._overwritten(bio, work, lock, child),
            None,
            is_whole and bio.borrowed,
        )
        if bio.borrowed:
            bio.give_away()
        blocks.cache.submit(child)

    def _overwrite_failed(
        self, bio: Bio, work: Work, lock: BlockLock, child: Bio
    ) -> None:
        """The cache device has failed the overwrite: the origin takes the write instead."""
        blocks = self._blocks
        self._bad_blocks.note(child, child.status)
        if child.payload is not None:
            at = bio.offset - work.oblock * blocks.block_size
            # It was given away to the child.
            bio.payload = child.payload[at : at + bio.length]
            bio.borrowed = child.borrowed
        self._write_to_origin(bio, work, lock)

    def _write_to_origin(self, bio: Bio, work: Work, lock: BlockLock) -> None:
        """Do without the promotion: the bio goes to the origin, as an ordinary miss."""
        blocks = self._blocks
        blocks.policy.complete_background_work(work, False)
        if self._may_come_back(work.oblock):
            bio.end(errnos.EIO)
        else:
            blocks.metadata.statistics.write_misses += 1
            blocks.discards.clear(work.oblock)
            blocks.origin_writes.nr_sent += 1
            blocks.submit_held(blocks.origin, bio, work.oblock)
        blocks.unlock(lock)

    def _overwritten(self, bio: Bio, work: Work, lock: BlockLock, child: Bio) -> None:
        assert lock.held, (
            "the block must not be mapped while its cache block is written"
        )
        blocks = self._blocks
        errno = 0
        if child.status:
            self._overwrite_failed(bio, work, lock, child)
            return
        try:
            # Now, and not before: until the data are in the cache block, no commit may have the mapping.
            blocks.metadata.insert(work.cblock, work.oblock, dirty=True)
        except MetadataError:
            errno = errnos.EIO
        try:
            blocks.policy.complete_background_work(work, not errno)
            if not errno:
                blocks.policy.set_dirty(work.cblock)
                blocks.nr_promotions += 1
                blocks.discards.clear(work.oblock)
                blocks.committer.note_change()
        except Exception as error:
            # An unexpected exception, that is a bug. Above a device's completion there is no code that would end the bio.
            blocks.broken(error)
            errno = errnos.EIO
        if errno == 0 and bio.flags & FUA:
            blocks.committer.after_commit(bio.end)
        else:
            bio.end(errno)
        blocks.unlock(lock)

    # ---- discards ----

    def _discard(self, bio: Bio) -> None:
        blocks = self._blocks
        end = -(-(bio.offset + bio.length) // blocks.block_size)

        def locked(lock: BlockLock) -> None:
            # With the lock held: a write that comes later clears the bits again.
            blocks.discards.set_range(bio.offset, bio.length)
            if not self._passdown:
                bio.end(0)
                blocks.unlock(lock)
                return
            blocks.submit(blocks.origin, child)
            if child.status < 0:
                child.on_end(lambda _: blocks.unlock(lock))
            else:
                blocks.unlock(lock)

        child = Bio(
            OP_DISCARD,
            bio.offset,
            bio.length,
            None,
            bio.flags & ~FAST_ZERO,
            lambda child: bio.end(child.status),
        )
        first = bio.offset // blocks.block_size
        self._locks.lock_range(first, min(end, blocks.nr_oblocks), locked)
