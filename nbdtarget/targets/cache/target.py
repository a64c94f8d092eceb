# SPDX-License-Identifier: Apache-2.0
"""The `cache` target: a fast device in front of a slow origin.

Theory of operation. The origin is cut into blocks; some of them (*oblocks*) have a copy in a block of the
cache device (*cblock*). Three know about that, see `blocks`: metadata, policy, discards. `map` asks the
policy where a bio's block is, and passes the bio on:

    writeback     to the cache if it is cached, which makes the block dirty if it is written; else to the origin
    writethrough  reads as writeback; writes to both; so nothing becomes dirty
    passthrough   all to the origin; writes give the cached block up first

The plain hit, a READ, or a WRITE to a dirty block, inside one block and with no lock in sight, is done
in `map`. Everything else is `Foreground`'s, which tells why no acknowledged flush is lost. What moves
blocks in the background: `Migrations`. Where the commits come from: `nbdtarget.targets.committer`;
both devices are flushed before the superblock is written:

    a mapping is committed   after the flush of the cache device: its data are there
    a removal is committed   after the flush of the origin: what was written back is there; the cblock is used
                             for something else only after that
    clean is recorded        after both flushes

FLUSH always rides on a commit, or flushes both devices.

Life. The constructor loads no mappings, so that a table can be loaded while another one with the same
metadata runs; `Activation` does, at preresume, with all refusals. From there on the metadata on disk say "not
cleanly shut down", until postsuspend records dirty bits, the policy's hints, discards and statistics: the full sync.

Failure. When a commit fails the metadata become read-only in core, and no FLUSH succeeds any more. Reads go on, and those
writes that need nothing recorded; none if a stop stays recorded (`JournaledMetadata.is_sealed`). The disk holds the last commit, so a table that is loaded now, or a server
that is started again, goes on from there. Was it the metadata device that failed, the status line says
`needs_check`, as the kernel's does; nothing on the disk says so, for nothing there is in doubt. If the metadata device
cannot be read any more, either, the mode is Fail, and all I/O ends with EIO. What the cache device fails, while the
origin has everything, no client notices: `giving_up` for single blocks, `distrust` for the device.

What a crash leaves. In writeback mode, and as long as a block is dirty: every mapping that was committed, and its
data. All of them count as dirty, or with `dirty_log` those that may be. Else: the origin, which has everything; the
cache starts empty (`Activation`). Hints and discards are forgotten.
"""

import asyncio
import errno as errnos
import logging
from array import array
from collections.abc import Iterable, Sequence
from typing import Final

from nbdtarget.bio import OP_CACHE, OP_FLUSH, OP_READ, OP_WRITE, Bio
from nbdtarget.common.clock import sleep
from nbdtarget.common.errors import DeviceError, TableError
from nbdtarget.common.words import join_words
from nbdtarget.devices.base import Device, Extent, QueueLimits
from nbdtarget.policies.base import PolicyConfigError
from nbdtarget.targets.base import (
    KILL,
    SUBMITTED,
    StatusFields,
    Target,
    TargetContext,
)
from nbdtarget.targets.cache.activation import Activation
from nbdtarget.targets.cache.blocks import Blocks
from nbdtarget.targets.cache.constructor import Parts, construct
from nbdtarget.targets.cache.discards import DiscardBits
from nbdtarget.targets.cache.distrust import Distrust
from nbdtarget.targets.cache.extents import CACHE, base_extents, cache_extents
from nbdtarget.targets.cache.failures import Failures
from nbdtarget.targets.cache.foreground import Foreground
from nbdtarget.targets.cache.giving_up import GivingUp
from nbdtarget.targets.cache.invalidation import invalidate
from nbdtarget.targets.cache.migrations import Migrations
from nbdtarget.targets.cache.report import (
    measured_pairs,
    status_fields,
    status_line,
)
from nbdtarget.targets.cache.table import MESSAGES, parse_core_value, parse_ranges
from nbdtarget.targets.cache.wishes import Wishes
from nbdtarget.targets.committer import Committer
from nbdtarget.targets.disks import cache_samples, spread_ones
from nbdtarget.targets.measured import target_attributes
from nbdtarget_metadata.cache.superblock import PolicyIdentity
from nbdtarget_metadata.errors import MetadataError
from nbdtarget_metadata.mode import Mode

__all__ = ["CacheTarget"]

INVALIDATED_AT_ONCE: Final = 1024  # by one commit
STEP_CBLOCKS: Final = 4096  # between two turns of the loop: a millisecond or so

log = logging.getLogger(__name__)


class CacheTarget(Target):
    """`<metadata dev> <cache dev> <origin dev> <block size> …`

    Source: drivers/md/dm-cache-target.c for the interface, not for the inside.
    """

    type_name = "cache"
    version = (2, 4, 0)
    messages = MESSAGES
    can_discard = True

    def __init__(self, ctx: TargetContext, parts: Parts) -> None:
        super().__init__(ctx)
        self._parts = parts
        self._metadata = parts.metadata
        self._policy = parts.policy
        devices = parts.cache, parts.origin
        self.can_write_zeroes = all(device.can_write_zeroes for device in devices)
        self.can_fast_zero = all(device.can_fast_zero for device in devices)
        self._committer = Committer(
            ctx.name,
            parts.metadata,
            parts.metadata_device,
            devices,
            ctx.clock,
            committed=self._committed,
            failed=self._failed,
            rests_on_unflushed=self._rests_on_unflushed,
            metadata_failed=parts.metadata.blame,
            aborts_on_loss=True,
        )
        self._discards = DiscardBits(parts.block_size, ctx.length)
        self._blocks = Blocks(
            name=ctx.name,
            origin=parts.origin,
            cache=parts.cache,
            metadata=parts.metadata,
            policy=parts.policy,
            committer=self._committer,
            discards=self._discards,
            length=ctx.length,
            options=parts.options,
            event=ctx.event,
            broken=self._broken,
            failures=Failures(ctx.name, ctx.clock),
        )
        self._blocks.remap = self._remap
        self._committer.unflushed[parts.origin] = self._blocks.origin_writes
        self._distrust = Distrust(self._blocks, self._look_at_mode)
        self._committer.can_do_without = self._distrust.maybe_let_go
        self._passdown = _passes_down(ctx.name, parts)
        self._wishes = Wishes(self._blocks)
        self._migrations = Migrations(self._blocks, self._wishes, ctx.clock)
        self._giving_up = GivingUp(self._blocks, ctx.clock, self._migrations.spawn)
        self._giving_up.too_many = self._distrust.many_given_up
        self._foreground = Foreground(
            self._blocks,
            self._giving_up,
            passdown=self._passdown,
            missed=self._missed,
            warm=self._wishes.advise,
        )
        self._activation = Activation(ctx, parts, self._committer, self._discards)
        self._is_active = False  # preresume has not refused
        self._is_suspended = True
        self._is_stopped = True  # from presuspend to resume
        self._changing = asyncio.Lock()  # who changes metadata by message
        self._is_tick_due = False
        # hot: what `map` asks for each bio.
        self._fast_op_max = -1
        self._is_sealed = False  # nothing may be written: see `JournaledMetadata`
        self._block_size: Final = parts.block_size
        self._nr_oblocks: Final = ctx.length // parts.block_size
        self._locks = self._blocks.locks
        self._locked = self._blocks.locks.locked
        self._lookup = parts.policy.lookup
        self._cache = parts.cache
        self._statistics = parts.metadata.statistics
        self._dirty = parts.metadata.dirty

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "CacheTarget":
        return cls(ctx, await construct(ctx, args))

    async def dtr(self) -> None:
        assert self._is_suspended
        for device in self.iterate_devices():
            await self.ctx.close_device(device)

    # I/O

    def map(self, bio: Bio) -> int:
        # hot: a hit that ends at once takes 0.65 us, of which the policy's look-up is 0.22;
        # nothing is allocated. In flight it is held, by a closure and an entry in a dictionary.
        op = bio.op
        if op > self._fast_op_max or bio.flags:
            return self._map_slow(bio)
        size = self._block_size
        offset = bio.offset - self.begin
        oblock = offset // size
        at = offset - oblock * size
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
            self._foreground.miss(bio, oblock, cblock)
        elif op == OP_READ:
            self._statistics.read_hits += 1
            bio.offset = cblock * size + at
            self._cache.submit(bio)
            if bio.status < 0:
                self._locks.hold_cached(oblock, cblock, bio)
        elif self._dirty[cblock]:
            self._statistics.write_hits += 1
            bio.offset = cblock * size + at
            self._cache.submit(bio)
            if bio.status < 0:
                self._locks.hold(oblock, bio, is_write=True)
        else:
            bio.offset = offset
            self._foreground.write_hit(bio, oblock, cblock)
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
        self._foreground.take(bio)
        return SUBMITTED

    def _remap(self, bio: Bio) -> None:
        """A parked bio's block is free again."""
        try:
            self._foreground.take(bio)
        except Exception as error:
            self._broken(error)
            if bio.status < 0:
                bio.end(errnos.EIO)

    def _missed(self, is_work_likely: bool) -> None:
        """Time passes for the policy with each turn of the loop that had a miss."""
        if not self._is_tick_due:
            self._is_tick_due = True
            asyncio.get_running_loop().call_soon(self._tick)

    def _tick(self) -> None:
        self._is_tick_due = False
        if not self._is_suspended:
            self._migrations.tick()
            self._migrations.wake()

    # Life

    async def preresume(self) -> None:
        self._is_active = False
        policy = await self._activation.preresume()
        self._policy = self._blocks.policy = policy
        self._lookup = policy.lookup
        self._is_active = True

    def resume(self) -> None:
        self._is_suspended = self._is_stopped = False
        self._committer.watch()
        if not self._blocks.is_writable:
            # The table before had a commit fail: no FLUSH or FUA can be promised here, either.
            self._committer.has_failed = True
        self._look_at_mode()
        if self._metadata.changed and self._blocks.is_writable:
            self._committer.note_change()
        self._migrations.resume()

    def push_back(self) -> list[Bio]:
        bios = self._foreground.push_back()
        for bio in bios:
            bio.offset += self.begin
        return bios

    def presuspend(self) -> None:
        self._is_stopped = True
        self._migrations.presuspend()

    async def quiesce(self) -> None:
        await self._migrations.quiesce()

    def presuspend_undo(self) -> None:
        self._is_stopped = False
        self._migrations.resume()

    async def postsuspend(self) -> None:
        self.presuspend()
        await self.quiesce()
        try:
            async with self._changing:
                # Of copies that nobody trusts nothing may be recorded as clean.
                is_sound = self._is_active and not self._blocks.distrusts_cache
                if is_sound and self._blocks.is_writable:
                    await self._sync()
        except MetadataError as error:
            log.error("%s: full sync: %s", self.ctx.name, error)
        await self._committer.quiesce()
        self._committer.unwatch()
        self._is_suspended = True

    async def _sync(self) -> None:
        """Record all that a crash would forget, and what the disks are like."""
        policy, metadata = self._policy, self._metadata
        await self._note_stop()
        hints: array[int] | None = None
        if policy.hint_size:
            hints = array("I")
            nr_cblocks = metadata.nr_cblocks
            for begin in range(0, nr_cblocks, STEP_CBLOCKS):
                end = min(begin + STEP_CBLOCKS, nr_cblocks)
                hints.extend(map(policy.get_hint, range(begin, end)))
                await sleep(0)
        metadata.prepare_shutdown(
            policy=PolicyIdentity(policy.name, policy.version, policy.hint_size),
            hints=hints,
            discarded=self._discards.as_recorded(),
        )
        await self._committer.commit(clean_shutdown=True)

    async def _note_stop(self) -> None:
        """Have the last commit record what the disks are like."""
        disks = self._parts.disks
        # What is marked with a generation must say all that is recorded with it.
        if not (disks.are_known and await self._committer.commit()):
            return
        dirty = spread_ones(self._metadata.dirty, self._metadata.nr_cblocks)
        samples = cache_samples(dirty, self._block_size, self._parts.origin)
        await disks.note_stop(samples)

    def _rests_on_unflushed(self, lost: Sequence[Device]) -> bool:
        """What was copied may be lost: a block that is clean in core may be dirty.

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
        self._look_at_mode()
        self.ctx.event()

    def _broken(self, error: BaseException) -> None:
        log.critical("%s: switching to fail mode", self.ctx.name, exc_info=error)
        self._metadata.fail()
        self._committer.has_failed = True
        self._failed()

    def _look_at_mode(self) -> None:
        blocks = self._blocks
        self._is_sealed = self._metadata.is_sealed
        self._fast_op_max = -1
        if blocks.is_writable and not blocks.is_passthrough:
            if not (blocks.cache.fails_inline or blocks.distrusts_cache):
                self._fast_op_max = OP_WRITE
        elif not blocks.is_writable:
            self._policy.allow_migrations(False)  # else it takes blocks for them

    # Words

    async def status(self, *, noflush: bool = False) -> str:
        if self._blocks.has_failed:
            return "Fail"
        if not (noflush or self._is_suspended or self._committer.has_failed):
            await self._committer.commit()
        if self._metadata.mode is Mode.FAIL:
            return "Error"
        return status_line(self._blocks, discard_passdown=self._passdown)

    def status_fields(self) -> StatusFields:
        fields = status_fields(self._blocks, discard_passdown=self._passdown)
        failures = self._blocks.failures
        fields["errors"] = failures.nr_errors
        fields["last_error"] = failures.last_error or self._committer.last_error
        fields["distrusts_cache_device"] = self._blocks.distrusts_cache
        fields["blocks_given_up"] = self._giving_up.nr_given_up
        return fields

    def table_words(self) -> str:
        # As the kernel shows major:minor for whatever name was given: one that means the same
        # device in every directory, and today. The other words stay as they were typed.
        names = [device.name for device in self.iterate_devices()]
        return join_words((*names, *self._parts.words[len(names) :]))

    def measured_words(self) -> str:
        return target_attributes(
            self,
            measured_pairs(
                self._blocks, self.iterate_devices(), discard_passdown=self._passdown
            ),
        )

    async def message(self, words: Sequence[str]) -> str | None:
        if [word.lower() for word in words] == ["flush_origin"]:
            await self._flush_origin()
            return None
        if not self._blocks.is_writable:
            raise TableError(
                "unable to service cache target messages in READ_ONLY or FAIL mode",
                errnos.EOPNOTSUPP,
            )
        nr_oblocks = self._nr_oblocks
        match [words[0].lower(), *words[1:]]:
            case ["invalidate_cblocks", *ranges]:
                await self._invalidate(ranges)
            case ["invalidate_all"]:
                await self._invalidate_all()
            case ["clean_now"]:
                self._migrations.clean_now()
            case ["pin" | "warm" | "unpin" as verb]:
                raise TableError("Invalid argument", hint=f"`{verb}' needs a block")
            case ["pin", *ranges]:
                self._wishes.add(parse_ranges(ranges, nr_oblocks, "oblock"), pin=True)
            case ["warm", *ranges]:
                self._wishes.add(parse_ranges(ranges, nr_oblocks, "oblock"), pin=False)
            case ["unpin", *ranges]:
                await self._wishes.unpin(parse_ranges(ranges, nr_oblocks, "oblock"))
            case [_, value]:
                self._set_value(words[0], value)
            case _:
                raise self.unknown_message(words)
        return None

    async def _flush_origin(self) -> None:
        """Tell whether the origin takes a flush now; commits nothing. Raises: TableError."""
        try:
            await self._parts.origin.flush()
        except DeviceError as error:
            raise TableError(str(error), error.errno) from error

    def _set_value(self, key: str, value: str) -> None:
        options = self._blocks.options
        try:
            match key.lower():
                case "migration_threshold":
                    options.migration_threshold = parse_core_value(key, value)
                case "migration_rate":
                    options.migration_rate = parse_core_value(key, value)
                    self._migrations.rate.set(options.migration_rate)
                case _:
                    warning = self._policy.set_config_value(key, value)
                    if warning:
                        log.warning("%s: %s", self.ctx.name, warning)
        except PolicyConfigError as error:
            raise self.unknown_message([key, value], str(error)) from error
        self._migrations.wake()

    async def _invalidate(self, ranges: Sequence[str]) -> None:
        if not self._blocks.is_passthrough:
            reason = "cache has to be in passthrough mode for invalidation"
            raise TableError(reason, errnos.EPERM)
        for begin, end in parse_ranges(ranges, self._metadata.nr_cblocks):
            await self._invalidate_range(begin, end)

    async def _invalidate_range(self, begin: int, end: int) -> None:
        for at in range(begin, end, INVALIDATED_AT_ONCE):
            cblocks = range(at, min(at + INVALIDATED_AT_ONCE, end))
            async with self._changing:
                if self._is_stopped:
                    raise TableError("cache is suspended", errnos.EBUSY)
                await invalidate(self._blocks, cblocks, self.ctx.clock)

    async def _invalidate_all(self) -> None:
        """Give up what is cached: the origin has been changed without us, and cannot tell."""
        self._discards.load(None)  # nor is it known what nobody needs there
        await self._invalidate_range(0, self._metadata.nr_cblocks)
        nr_dirty = self._metadata.nr_dirty
        if nr_dirty:
            raise TableError(
                f"{nr_dirty} dirty blocks stay cached: they are newer than the origin",
                errnos.EBUSY,
            )

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await base_extents(self._blocks, offset - self.begin, length)

    @property
    def contexts(self) -> tuple[str, ...]:
        return (CACHE,)

    async def context_extents(
        self, context: str, offset: int, length: int
    ) -> list[Extent]:
        if context != CACHE:
            return await super().context_extents(context, offset, length)
        return cache_extents(self._blocks, offset - self.begin, length)

    def io_hints(self, limits: QueueLimits) -> QueueLimits:
        size = self._block_size
        if not self._passdown:
            limits = limits._replace(discard_granularity=self._discards.dblock_size)
        if limits.io_opt < size or limits.io_opt % size:
            limits = limits._replace(io_min=size, io_opt=size)
        return limits

    def iterate_devices(self) -> Iterable[Device]:
        parts = self._parts
        return parts.metadata_device, parts.cache, parts.origin

    @property
    def is_rotational(self) -> bool:
        return any(device.is_rotational for device in self.data_devices())

    def data_devices(self) -> Iterable[Device]:
        return self._parts.cache, self._parts.origin

    def has_lost_writes(self) -> bool:
        return self._committer.has_failed

    def exclusive_devices(self) -> Iterable[Device]:
        return self.iterate_devices()


def _passes_down(name: str, parts: Parts) -> bool:
    """Whether discards go on to the origin."""
    if not parts.options.discard_passdown:
        return False
    if not parts.origin.can_discard:
        log.warning(
            "%s: origin %s does not support discards: no passdown",
            name,
            parts.origin.name,
        )
    return parts.origin.can_discard
