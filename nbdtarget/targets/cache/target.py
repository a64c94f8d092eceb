# SPDX-License-Identifier: Apache-2.0
"""The `cache` target: a fast device in front of a slow origin.

Theory of operation. The origin is cut into blocks; some of them (*oblocks*) have a copy in a block of the
cache device (*cblock*). Metadata, policy and discards keep track of that: see `blocks`. `map` asks the
policy where a bio's block is, and passes the bio on:

    writeback     to the cache if it is cached, which makes the block dirty if it is written; else to the origin
    writethrough  reads as writeback; writes to both; so nothing becomes dirty
    passthrough   all to the origin; writes give the cached block up first

`map` does the plain hit itself: a READ, or a WRITE to a dirty block, inside one block, while no lock is asked for. All
other bios go to `Foreground`, whose head tells why no acknowledged flush is lost. `Migrations` moves
blocks in the background. `nbdtarget.targets.committer` commits the metadata. It flushes
both devices before it writes the superblock:

    a mapping is committed   after the flush of the cache device: its data are there
    a removal is committed   after the flush of the origin: what was written back is there; the cblock is used
                             for another block only after that
    clean is recorded        after both flushes

A FLUSH is answered by a commit, or, if there is nothing to commit, by a flush of both devices.

Life. The constructor loads no mappings, so that a table can be loaded while another one with the same
metadata runs. `Activation` loads them at preresume, and refuses what cannot be used. From there on the metadata on disk say "not
cleanly shut down", until postsuspend records dirty bits, the policy's hints, discards and statistics: the full sync.

Failure. When a commit fails the metadata becomes read-only in core, and no FLUSH succeeds any more. Reads go on. So do
those writes that need nothing recorded, unless the disk says that the table was stopped (`JournaledMetadata.is_sealed`).
The disk holds the last commit, so a table that is loaded now, or a server
that is started again, goes on from there. If it was the metadata device that failed, the status line says
`needs_check`, as the kernel's does; the disk does not say so, because nothing there is in doubt. If the metadata device
cannot be read any more, either, the mode is Fail, and all I/O ends with EIO. While the origin has everything, clients
do not notice what the cache device fails: `bad_blocks` for single blocks, `distrust` for the device.

What a crash leaves. In writeback mode, and as long as a block is dirty: every mapping that was committed, and its
data. All of them count as dirty, or with `dirty_log` those that may be. Else: the origin, which has everything; the
cache starts empty (`Activation`). Hints and discards are forgotten.
"""

import errno as errnos
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from nbdtarget.bio import OP_CACHE, OP_FLUSH, OP_READ, OP_WRITE, Bio
from nbdtarget.common.turns import Soon
from nbdtarget.devices.base import Device, Extent
from nbdtarget.fast.compiled import Route
from nbdtarget.targets.base import (
    KILL,
    SUBMITTED,
    StatusFields,
    TargetContext,
)
from nbdtarget.targets.cache.activation import Activation
from nbdtarget.targets.cache.bad_blocks import BadBlocks
from nbdtarget.targets.cache.blocks import Blocks
from nbdtarget.targets.cache.cached_writes import CachedWrites
from nbdtarget.targets.cache.constructor import Parts, construct
from nbdtarget.targets.cache.distrust import Distrust
from nbdtarget.targets.cache.extents import CACHE, base_extents, cache_extents
from nbdtarget.targets.cache.foreground import Foreground
from nbdtarget.targets.cache.messages import Messages
from nbdtarget.targets.cache.migrations import Migrations
from nbdtarget.targets.cache.report import (
    measured_pairs,
    status_fields,
    status_line,
)
from nbdtarget.targets.cache.table import MESSAGES, check_words
from nbdtarget.targets.disks import ORIGIN_ROLE, cache_samples, spread_ones
from nbdtarget.targets.mapping import MappingTarget
from nbdtarget.targets.measured import target_attributes
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.errors import MetadataError

__all__ = ["CacheTarget"]

STEP_CBLOCKS: Final = 4096  # between two turns of the loop: a millisecond or so

log = logging.getLogger(__name__)


class CacheTarget(MappingTarget[CacheMetadata]):
    """`<metadata dev> <cache dev> <origin dev> <block size> …`

    Source: drivers/md/dm-cache-target.c for the interface, not for the inside.
    """

    type_name = "cache"
    version = (2, 4, 0)
    messages = MESSAGES
    context = CACHE

    def __init__(self, ctx: TargetContext, parts: Parts) -> None:
        super().__init__(
            ctx,
            words=parts.words,
            devices=(parts.metadata_device, parts.cache, parts.origin),
            backing=(parts.cache, parts.origin),
            metadata=parts.metadata,
            disks=parts.disks,
            block_size=parts.block_size,
            metadata_failed=parts.metadata.blame,
            aborts_on_loss=True,
        )
        self._parts = parts
        if parts.options.discard_passdown:
            self._pass_down(ORIGIN_ROLE, parts.origin)
        self._discards = parts.discards
        self._discard_granularity = parts.discards.dblock_size
        self._blocks = Blocks(
            ctx,
            parts,
            self._committer,
            remap=self._remap,
            broken=self._broken,
        )
        self._activation = Activation(ctx, parts, self._committer)
        self._distrust = Distrust(self._blocks, self._look_at_mode)
        self._migrations = Migrations(self._blocks, ctx.clock)
        self._bad_blocks = BadBlocks(
            self._blocks,
            ctx.clock,
            self._migrations.spawn,
            too_many=self._distrust.many_given_up,
        )
        self._writes = CachedWrites(self._blocks, self._bad_blocks)
        self._foreground = Foreground(
            self._blocks,
            self._writes,
            self._bad_blocks,
            passdown=self._passdown,
            # Time passes for the policy in each turn of the loop that had a miss.
            missed=Soon(self._tick).ask,
            warm=self._migrations.requests.advise,
        )
        self._messages = Messages(
            self._blocks,
            self._migrations,
            ctx.clock,
            self.unknown_message,
        )
        self._is_active = False  # preresume has not refused
        self._is_sealed = False  # nothing may be written: see `JournaledMetadata`
        self._prepare_map(parts)

    def _own_parts(self) -> Sequence[object]:
        return (
            self._blocks,
            self._activation,
            self._distrust,
            self._migrations,
            self._bad_blocks,
            self._writes,
            self._foreground,
            self._messages,
        )

    def _prepare_map(self, parts: Parts) -> None:
        """Keep at hand what `map` asks for each bio."""
        self._fast_op_max = -1
        self._route: Route | None = None
        self._nr_oblocks = self.length // parts.block_size
        self._locks = self._blocks.locks
        self._locked = self._blocks.locks.locked
        self._lookup = parts.policy.lookup
        self._cache = parts.cache
        self._statistics = parts.metadata.statistics
        self._dirty = parts.metadata.dirty

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "CacheTarget":
        return cls(ctx, await construct(ctx, args))

    @classmethod
    def check_words(cls, args: Sequence[str]) -> None:
        check_words(args)

    # ---- I/O ----

    def maybe_route(self) -> Route | None:
        file = self._cache.maybe_fast_file()
        tables = self._blocks.policy.hit_tables()
        discarded = self._discards.bits
        endings = {self._dirty.endian, discarded.endian}
        if file is None or tables is None or endings != {"little"}:
            return None
        dblock_blocks = self._discards.dblock_size // self._block_size
        self._route = Route.by_table(
            file,
            tables.blocks,
            tables.buckets,
            tables.chain,
            tables.shift,
            tables.is_hit,
            self._dirty,
            discarded,
            len(discarded),
            dblock_blocks.bit_length() - 1,
            self._block_size,
            self._nr_oblocks,
            self.begin,
            self.begin + self.length,
        )
        self._route.locked = self._locked
        self._route.note_hit = self._note_hit
        # A READ that waits for the disk holds its block, as `map` has it.
        self._route.hold = self._locks.hold_read
        self._route.let_go = self._locks.end_read
        self._route.was_served = self._was_served
        self._open_route()
        return self._route

    def _open_route(self) -> None:
        if self._route is not None:
            is_open = self._fast_op_max == OP_WRITE
            self._route.can_read = self._route.can_write = is_open

    def _note_hit(self, oblock: int) -> None:
        """A READ hit the block on the compiled fast path; it may be the first hit of a period."""
        self._lookup(oblock, False)

    def _was_served(self, nr_reads: int, nr_writes: int) -> None:
        self._statistics.read_hits += nr_reads
        self._statistics.write_hits += nr_writes

    def map(self, bio: Bio) -> int:
        # hot: a hit that ends at once takes 0.65 us, of which the policy's look-up is 0.22;
        # nothing is allocated. In flight it is held, by a closure and an entry in a dictionary.
        #
        # A hit is submitted here, and not REMAPPED as by a clone: only after `submit` is it known whether the
        # bio is in flight, and must hold its block.
        op = bio.op
        if op > self._fast_op_max or bio.flags:
            return self._map_slow(bio)
        size = self._block_size
        offset = bio.offset - self.begin
        oblock = offset // size
        at = offset - oblock * size
        # Not for this path: more than one block, the origin's tail, a write of a whole or a discarded block
        # (which may be an overwrite), and a block that may be locked.
        if (
            at + bio.length > size
            or oblock >= self._nr_oblocks
            or (op and (bio.length == size or self._discards.is_discarded(oblock)))
            or (self._locked and self._locks.is_locked(oblock))
        ):
            return self._map_slow(bio)
        cblock = self._lookup(oblock, op == OP_WRITE)
        if cblock < 0:
            bio.offset = offset
            self._foreground.miss(bio, oblock)
        elif op == OP_READ:
            self._statistics.read_hits += 1
            bio.offset = cblock * size + at
            self._cache.submit(bio)
            if bio.status < 0:
                self._locks.hold_cached(oblock, cblock, bio)
        elif self._dirty[cblock]:
            # Nothing has to be recorded: it is dirty already, and not FUA.
            self._statistics.write_hits += 1
            bio.offset = cblock * size + at
            self._cache.submit(bio)
            if bio.status < 0:
                self._locks.hold(oblock, bio, is_write=True)
        else:
            bio.offset = offset
            self._writes.start(bio, oblock, cblock)
        return SUBMITTED

    def _map_slow(self, bio: Bio) -> int:
        if bio.op == OP_FLUSH:
            if self._committer.has_failed:
                return KILL
            self._committer.flush(bio)
            return SUBMITTED
        if self._is_sealed and bio.op not in (OP_READ, OP_CACHE):
            return KILL
        bio.offset -= self.begin
        self._foreground.submit(bio)
        return SUBMITTED

    def _remap(self, bio: Bio) -> None:
        """A parked bio's block is free again."""
        try:
            self._foreground.submit(bio)
        except Exception as error:
            self._broken(error)
            if bio.status < 0:
                bio.end(errnos.EIO)

    def _tick(self) -> None:
        if not self._is_suspended:
            self._migrations.tick()
            self._migrations.wake()

    # ---- life ----

    async def _get_ready(self) -> None:
        self._is_active = False
        policy = await self._activation.preresume()
        self._blocks.policy = policy
        self._lookup = policy.lookup
        self._is_active = True

    def resume(self) -> None:
        self._messages.is_stopped = False
        if not self._blocks.is_writable:
            # The table before had a commit fail: no FLUSH or FUA can be promised here, either.
            self._committer.has_failed = True
        super().resume()
        self._migrations.resume()

    def _held_back(self) -> list[Bio]:
        return self._foreground.push_back()

    def presuspend(self) -> None:
        self._messages.is_stopped = True
        self._migrations.presuspend()

    async def quiesce(self) -> None:
        await self._migrations.quiesce()

    def presuspend_undo(self) -> None:
        self._messages.is_stopped = False
        self._migrations.resume()

    async def _record_stop(self) -> None:
        try:
            async with self._messages.changing:
                # Nothing may be recorded as clean of copies that are not trusted.
                is_sound = self._is_active and not self._blocks.distrusts_cache
                if is_sound and self._blocks.is_writable:
                    # Record all that a crash would forget, and what the disks are like.
                    await self._note_stop(self._samples)
                    await self._activation.prepare_stop()
                    await self._committer.commit(clean_shutdown=True)
        except MetadataError as error:
            log.error("%s: full sync: %s", self.ctx.name, error)

    def _samples(self) -> Mapping[str, Sequence[int]]:
        """Some blocks of the origin: the next start looks whether they are still what they were."""
        dirty = spread_ones(self._metadata.dirty, self._metadata.nr_cblocks)
        samples = cache_samples(dirty, self._block_size, self._parts.origin)
        if self._parts.origin in self._committer.unflushable:
            del samples[ORIGIN_ROLE]  # a power cut may take back what is read now
        return samples

    def _rests_on_unflushed(self, lost: Sequence[Device]) -> bool:
        """Return whether the cache must stop because copied data may be lost: a block that is clean in core may be dirty.

        A block that is mapped in core alone may hold anything by now, so it must not even be read.
        """
        if not self._blocks.origin_writes.has_any:
            # The origin had nothing of ours that a flush had not covered: it lost nothing.
            lost = [device for device in lost if device is not self._parts.origin]
        if not lost or self._distrust.maybe_distrust(lost):
            return False
        if self._parts.cache in lost and self._metadata.changed:
            self._metadata.fail()
        return True

    def _committed(self) -> None:
        if self._metadata.changed:  # more than one commit takes
            self._committer.note_change()

    def _failed(self) -> None:
        log.error(
            "%s: switching cache to %s mode",
            self.ctx.name,
            "fail" if self._blocks.has_failed else "read-only",
        )
        super()._failed()

    def _look_at_mode(self) -> None:
        blocks = self._blocks
        self._is_sealed = self._metadata.is_sealed
        self._fast_op_max = -1
        if blocks.is_writable and not blocks.is_passthrough:
            if not (blocks.cache.fails_inline or blocks.distrusts_cache):
                self._fast_op_max = OP_WRITE
        elif not blocks.is_writable:
            blocks.policy.allow_migrations(
                False
            )  # otherwise it would set blocks aside for them
        self._open_route()

    # ---- words ----

    def _status_line(self) -> str:
        return status_line(self._blocks, discard_passdown=self._passdown)

    def status_fields(self) -> StatusFields:
        fields = status_fields(self._blocks, discard_passdown=self._passdown)
        failures = self._blocks.failures
        fields["errors"] = failures.nr_errors
        fields["last_error"] = failures.last_error or self._committer.last_error
        fields["commits"] = self._committer.nr_commits
        fields["commit_time_s"] = self._committer.commits_ns / 1e9
        fields["distrusts_cache_device"] = self._blocks.distrusts_cache
        fields["blocks_given_up"] = self._bad_blocks.nr_given_up
        return fields

    def measured_words(self) -> str:
        return target_attributes(
            self,
            measured_pairs(
                self._blocks, self.iterate_devices(), discard_passdown=self._passdown
            ),
        )

    async def message(self, words: Sequence[str]) -> str | None:
        await self._messages.carry_out(words)
        return None

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await base_extents(self._blocks, offset - self.begin, length)

    def _describe(self, offset: int, length: int) -> list[Extent]:
        return cache_extents(self._blocks, offset, length)

    @property
    def is_rotational(self) -> bool:
        return any(device.is_rotational for device in self.data_devices())

    def data_devices(self) -> Iterable[Device]:
        return self._parts.cache, self._parts.origin

    def exclusive_devices(self) -> Iterable[Device]:
        return self.iterate_devices()
