# SPDX-License-Identifier: Apache-2.0
"""The `clone` target: a read-only source that becomes, at once, a writable disk.

Theory of operation. The target is cut into regions; metadata holds one bit for each.

    bit  read from    a write goes
    0    source       a whole region: to the destination, then the bit is set; a part: the
                      rest of the region is brought from the source first
    1    destination  to the destination

`map` looks at **ranges, not regions**: if all of a bio's range is in one state, it is passed on as
it is; else a read is cut into runs, and a write is taken over by `Foreground`. When
everything is hydrated *and committed*, a request costs one attribute test here.

What may touch what, and why no read returns garbage
----------------------------------------------------
Only what hydrates holds regions (`Prison`): copies, overwrites, discards. Reads never wait, nor do
writes to hydrated regions, and they hold nothing, though they may be under way in a worker thread
long after `map` returned. What could such a *plain* write collide with?

1. *A copy into its region.* Copies go only into regions that are locked and were unhydrated when
   the lock was granted. A plain write saw its region hydrated when it was mapped. Bits go from
   1 to 0 only when a commit fails, and from that moment (mode RO) no region is hydrated any more:
   `is_writable` is tested with the lock held, in the same step in which the work is begun. Work that
   had begun before has held its lock over an unhydrated region all along, so no plain write
   to it was mapped since the lock was granted; and none was under way when it was granted, as one
   that saw the bit set must have seen it before a failed commit, and then there is no RW.
2. *An overwrite or partial write of the same region*: as 1; it is an unhydrated region's.
3. *A discard passed down*: it covers the write's range only if the client sent both at once, and
   then their order is the client's to choose. A discard never reaches beyond what was asked.
4. *A failed commit that reverts its bit*: reads go to the source again, as after a power cut; the
   kernel does the same. The write was not flushed, and no flush can promise it any more.
5. *A commit*: it flushes the destination, which covers the write or does not; the bit
   it commits vouches only for the data with which the region was hydrated, and that write
   ended before the bit was set, so before `pre_commit`, so before the flush.
6. *A suspend*: the mapped device waits for every bio in flight before `postsuspend`.

And reads: one that was sent to the source stays right even if its region is hydrated and written while it is
under way (it then returns what was there before, and the source never changes).

Inline I/O takes no lock because the event loop is one thread: between `map`'s look at the bitmap and the
device's answer nothing else runs.

Discards mark whole regions as hydrated and copy nothing. Nothing is promised about what they
read afterwards; partial regions at either end, and a short last region, are left alone.

A short last region that is written to its end counts as overwritten (the kernel copies it first).

CACHE hydrates its range (`CacheRequests`). Where nothing can be recorded any more it is only
passed on to the device that holds the data.

Durability, and the answer to FLUSH and FUA: `nbdtarget.targets.committer`. The events: when the last
region is durably hydrated (once), when the metadata's mode changes, when copies fail (`Hydrator`).

The end. With `then_linear`, a clone that is durably hydrated asks for a `linear` on its destination in
its place (`TargetContext.request_replacement`), after the event. It asks again when it is resumed, in
case it was suspended in between. A table that a user loads has precedence: then nothing is
replaced until the message `then_linear` asks once more.

What a crash leaves: the bits of the last commit, and on the destination all that they vouch for.
Everything else is as in the source, or as an ordinary disk leaves it.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from nbdtarget.bio import (
    FUA,
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    Bio,
    split_bio,
)
from nbdtarget.common.errors import ResolveError, TableError
from nbdtarget.common.redaction import redacted
from nbdtarget.devices.base import Device, Extent
from nbdtarget.fast.compiled import Route
from nbdtarget.targets.base import (
    KILL,
    REMAPPED,
    SUBMITTED,
    StatusFields,
    TargetContext,
)
from nbdtarget.targets.clone.constructor import Parts, construct
from nbdtarget.targets.clone.extents import (
    HYDRATION,
    clone_extents,
    hydration_extents,
)
from nbdtarget.targets.clone.foreground import Foreground
from nbdtarget.targets.clone.hydration import Hydration
from nbdtarget.targets.clone.hydrator import Hydrator
from nbdtarget.targets.clone.prefetch import CacheRequests
from nbdtarget.targets.clone.regions import Regions
from nbdtarget.targets.clone.report import status_fields, status_line
from nbdtarget.targets.clone.table import (
    MESSAGES,
    NUMBERS,
    check_words,
    describe_value,
    parse_value,
)
from nbdtarget.targets.clone.trace import Trace
from nbdtarget.targets.disks import DESTINATION_ROLE, spread_ones
from nbdtarget.targets.mapping import MappingTarget
from nbdtarget.targets.opening import refuse_stale
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.disks import SAMPLE_BYTES
from nbdtarget_metadata.mode import Mode

__all__ = ["CloneTarget"]

_READS: Final = (OP_READ, OP_CACHE)

log = logging.getLogger(__name__)


class CloneTarget(MappingTarget[CloneMetadata]):
    """`<metadata dev> <destination dev> <source dev> <region size> …`

    Source: drivers/md/dm-clone-target.c for the interface, not for the inside.
    """

    type_name = "clone"
    version = (1, 0, 0)
    messages = MESSAGES
    context = HYDRATION

    def __init__(self, ctx: TargetContext, parts: Parts) -> None:
        super().__init__(
            ctx,
            words=parts.words,
            devices=(parts.metadata_device, parts.destination, parts.source),
            backing=(parts.destination,),
            metadata=parts.metadata,
            disks=parts.disks,
            block_size=parts.region_size,
        )
        self._parts = parts
        self._source = parts.source
        self._destination = parts.destination
        self._bits = parts.metadata.hydrated
        self._regions = Regions(parts, ctx.length, self._committer, self._broken)
        self._shift = self._regions.shift
        self._foreground = Foreground(self._regions)
        self._hydrator = Hydrator(
            self._regions,
            ctx.clock,
            event_after_errors=parts.options.event_after_errors,
            event=ctx.event,
        )
        self._hydration = Hydration(
            self._regions, self._hydrator, ctx.clock, parts.options
        )
        self._cache_requests = CacheRequests(
            self._regions, self._hydrator, give_back=self._give_back
        )
        self._then_linear = parts.options.then_linear
        if parts.options.discard_passdown:
            self._pass_down(DESTINATION_ROLE, parts.destination)
        # All regions are hydrated, and durably so: from here on we only pass bios on.
        self._is_hydrated = False
        self._has_failed = False
        self._route: Route | None = None
        self._trace: Trace | None = None
        self._is_plain = False  # hydrated, and nothing is recorded
        self._is_sealed = False  # nothing may be written: see `JournaledMetadata`

    def _own_parts(self) -> Sequence[object]:
        return (
            self._regions,
            self._foreground,
            self._hydrator,
            self._hydration,
            self._cache_requests,
        )

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "CloneTarget":
        return cls(ctx, await construct(ctx, args))

    @classmethod
    def check_words(cls, args: Sequence[str]) -> None:
        check_words(args)

    # ---- I/O ----

    def maybe_route(self) -> Route | None:
        file = self._destination.maybe_fast_file()
        if file is None or self._bits.endian != "little":
            return None
        self._route = Route.by_bitmap(
            file,
            self._source.maybe_fast_file(),
            self._bits,
            self._regions.nr_regions,
            self._shift,
            self.begin,
            self.begin + self.length,
        )
        self._route.may_sync = self._may_sync
        self._open_route()
        return self._route

    def record_reads(self, before: Iterable[tuple[int, int]] = ()) -> Trace:
        """Record what clients read from now on, in the order of first reading. Reads are a little slower then.

        Args: before: what was recorded already, begin and end half-open.
        """
        self._trace = Trace(self._regions.length, self._shift)
        for begin, end in before:
            self._trace.note(begin, end - begin)
        self._open_route()
        return self._trace

    def hydrate_first(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Hydrate these bytes, begin and end half-open, before all others, in this order."""
        shift = self._shift
        self._hydration.hydrate_first(
            (begin >> shift, ((end - 1) >> shift) + 1)
            for begin, end in ranges
            if begin < end
        )

    def _open_route(self) -> None:
        """Let the compiled fast path do what `map` does without further checks."""
        self._is_plain = self._is_hydrated and self._trace is None
        if self._route is not None:
            self._route.can_read = not self._has_failed and self._trace is None
            is_writable = self._is_hydrated or not self._is_sealed
            self._route.can_write = is_writable and not self._has_failed
            # A hydrated clone has nothing that gives way to clients.
            is_told = not self._is_hydrated
            self._route.was_served = self._was_served if is_told else None
            # With `hydrate_on_read`, reads of the source by clients must be noted.
            self._route.can_read_other = not self._hydration.hydrate_on_read
            if self._trace is not None:
                self._route.can_read_other = False

    def _may_sync(self) -> bool:
        """Whether a FLUSH needs no commit: see `_map_flush`."""
        return self._committer.is_clean

    def _was_served(self, nr_reads: int, nr_writes: int) -> None:
        self._regions.nr_bios += nr_reads + nr_writes

    def map(self, bio: Bio) -> int:
        if self._is_plain and bio.op < OP_FLUSH:
            # hot: the hydrated READ and WRITE.
            bio.device = self._destination
            bio.offset -= self.begin
            return REMAPPED
        if self._has_failed:
            return KILL
        op = bio.op
        if op == OP_FLUSH:
            return self._map_flush(bio)
        if self._is_sealed and op not in _READS:
            return KILL
        self._regions.nr_bios += 1
        bio.offset -= self.begin
        if self._trace is not None and op == OP_READ:
            self._trace.note(bio.offset, bio.length)
        if op == OP_DISCARD:
            return self._map_discard(bio)
        # hot: 0.4 us for a bio inside one region. The bitmap itself is asked: a call costs more.
        first = bio.offset >> self._shift
        last = ((bio.offset + bio.length - 1) >> self._shift) + 1
        bits = self._bits
        if bits[first] if last - first == 1 else bits.find(0, first, last) < 0:
            if bio.flags & FUA and op not in _READS and not self._committer.is_clean:
                return self._map_fua(bio)
            bio.device = self._destination
            return REMAPPED
        if op in _READS:
            return self._map_unhydrated_read(bio, first, last)
        if not self._regions.is_writable:
            return KILL
        self._foreground.write(bio)
        return SUBMITTED

    def _map_flush(self, bio: Bio) -> int:
        committer = self._committer
        if committer.is_clean:
            bio.device = self._destination
            return REMAPPED
        if committer.has_failed:
            return KILL
        committer.flush(bio)
        return SUBMITTED

    def _map_fua(self, bio: Bio) -> int:
        """A WRITE, WRITE_ZEROES or DISCARD of hydrated regions that must be durable."""
        if self._committer.has_failed:
            return KILL
        self._foreground.write_hydrated(bio)
        return SUBMITTED

    def _map_unhydrated_read(self, bio: Bio, first: int, last: int) -> int:
        """A READ or CACHE of regions that are not all hydrated: each part where it lies."""
        if bio.op == OP_CACHE:
            if self._regions.is_writable:
                self._cache_requests.take(bio)
                return SUBMITTED
        elif self._hydration.hydrate_on_read:
            self._hydration.note_read(first, last)
        if last - first == 1 or self._bits.find(1, first, last) < 0:
            bio.device = self._source
            return REMAPPED
        end = bio.offset + bio.length
        at = bio.offset
        lengths, devices = [], []
        for _, run_end, hydrated in self._metadata.runs(first, last):
            stop = min(run_end << self._shift, end)
            lengths.append(stop - at)
            devices.append(self._destination if hydrated else self._source)
            at = stop
        children = zip(devices, split_bio(bio, lengths), strict=True)
        self._foreground.submit_children(list(children))
        return SUBMITTED

    def _map_discard(self, bio: Bio) -> int:
        size = self._regions.region_size
        first = -(-bio.offset // size)
        # Rounded down: a short last region is never discarded.
        last = (bio.offset + bio.length) >> self._shift
        if first >= last:
            bio.end(0)
            return SUBMITTED
        if not self._metadata.all_hydrated(first, last):
            if self._regions.is_writable:
                self._foreground.discard(bio, first, last, passdown=self._passdown)
            else:
                bio.end(0)  # a discard promises nothing
            return SUBMITTED
        if not self._passdown:
            bio.end(0)
            return SUBMITTED
        begin, end = first << self._shift, last << self._shift
        if bio.flags & FUA and self._committer.has_failed:
            return KILL
        child = Bio(
            OP_DISCARD,
            begin,
            end - begin,
            None,
            bio.flags,
            lambda child: bio.end(child.status),
        )
        self._foreground.write_hydrated(child)
        return SUBMITTED

    # ---- life ----

    async def _get_ready(self) -> None:
        """Record, durably, which disks these are, and that they are in use.

        If the metadata were just opened, the two commits that it takes rewrite both superblock slots:
        what was read of them may be in a page cache only. The first of them changes nothing
        (metadata/nbdtarget_metadata/log/commit.py).
        """
        refuse_stale(self._metadata)
        if self._committer.has_failed or not self._regions.is_writable:
            return
        if self._metadata.needs_rewrite and not await self._committer.commit():
            return  # it is in mode RO now, which `resume` looks at
        await self._disks.prepare()
        is_recorded = self._disks.is_recorded
        if is_recorded and not self._metadata.needs_rewrite:
            return
        if await self._committer.commit() and not is_recorded:
            await self._disks.confirm()

    def resume(self) -> None:
        super().resume()
        self._cache_requests.resume()
        self._hydration.resume()
        self._maybe_become_linear()

    def _held_back(self) -> list[Bio]:
        return [*self._foreground.push_back(), *self._cache_requests.push_back()]

    def presuspend(self) -> None:
        self._hydration.presuspend()
        self._cache_requests.presuspend()

    async def quiesce(self) -> None:
        await self._hydration.quiesce()
        await self._cache_requests.quiesce()

    def presuspend_undo(self) -> None:
        self._cache_requests.resume()
        self._hydration.resume()

    async def _record_stop(self) -> None:
        if not self._committer.has_failed and not self._regions.has_failed:
            await self._note_stop(self._samples)
            await self._committer.commit(clean_shutdown=True)

    def _samples(self) -> Mapping[str, Sequence[int]]:
        """Some of the hydrated regions: the next start looks whether they are still what they were."""
        size = self._regions.region_size
        last = (self._parts.destination.size - SAMPLE_BYTES) // size
        regions = spread_ones(self._bits, min(last + 1, self._metadata.nr_regions))
        return {DESTINATION_ROLE: [region_nr * size for region_nr in regions]}

    def _rests_on_unflushed(self, lost: Sequence[Device]) -> bool:
        """Regions that are hydrated in core alone may be lost, and one that is being copied."""
        return self._metadata.changed or self._regions.prison.nr_held > 0

    def _committed(self) -> None:
        if not self._is_hydrated and self._metadata.hydration_done:
            self._is_hydrated = True
            self._open_route()
            log.info("%s: hydrated", self.ctx.name)
            self.ctx.event()
            self._maybe_become_linear()

    def _maybe_become_linear(self) -> None:
        is_sound = self._is_hydrated and not self._committer.has_failed
        if self._then_linear and is_sound and not self._is_suspended:
            destination = self._destination
            self.ctx.request_replacement(
                "linear", (destination.name, "0"), (destination,)
            )

    def _look_at_mode(self) -> None:
        self._has_failed = self._metadata.mode is Mode.FAIL
        self._is_sealed = self._metadata.is_sealed
        self._is_hydrated = not self._has_failed and self._metadata.hydration_done
        self._open_route()

    # ---- words ----

    def _status_line(self) -> str:
        return status_line(
            self._regions,
            self._hydration,
            self._hydrator,
            discard_passdown=self._passdown,
            then_linear=self._then_linear,
        )

    def status_fields(self) -> StatusFields:
        fields = status_fields(
            self._regions,
            self._hydration,
            self._hydrator,
            discard_passdown=self._passdown,
            then_linear=self._then_linear,
        )
        fields["source_open"] = self._parts.has_source
        return fields

    async def message(self, words: Sequence[str]) -> str | None:
        hydration = self._hydration
        match [words[0].lower(), *words[1:]]:
            case ["enable_hydration", *_]:
                hydration.enabled = True
            case ["disable_hydration", *_]:
                hydration.enabled = False
            case ["enable_hydrate_on_read", *_]:
                hydration.hydrate_on_read = True
                self._open_route()
            case ["disable_hydrate_on_read", *_]:
                hydration.hydrate_on_read = False
                self._open_route()
                hydration.forget_reads()
            case ["then_linear", *_]:
                self._then_linear = True
                self._maybe_become_linear()
            case ["disable_then_linear", *_]:
                self._then_linear = False
            case ["source_url", url]:
                await self._use_source(url)
            case [key, word] if key in NUMBERS:
                number = parse_value(key, word)
                if number is None:
                    raise TableError("Invalid argument", hint=describe_value(key, word))
                self._set_number(key, number)
            case _:
                word = redacted(words[0])
                log.error("%s: Unsupported message `%s'", self.ctx.name, word)
                raise self.unknown_message(words)
        hydration.wake()
        return None

    async def _use_source(self, url: str) -> None:
        try:
            await self._source.use_name(url)
        except ResolveError as error:
            raise TableError(str(error), error.errno) from error

    def _set_number(self, key: str, number: int) -> None:
        match key:
            case "hydration_threshold":
                self._hydration.threshold = number
            case "hydration_batch_size":
                self._hydration.batch_size = number
            case "hydration_rate":
                self._hydration.rate.set(number)
            case "event_after_errors":
                self._hydrator.event_after_errors = number
            case _:
                raise AssertionError(key)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await clone_extents(self._regions, offset - self.begin, length)

    def _describe(self, offset: int, length: int) -> list[Extent]:
        return hydration_extents(self._regions, offset, length)

    def iterate_devices(self) -> Iterable[Device]:
        # A source that was not opened is named in the table line all the same.
        return self._devices if self._parts.has_source else self._devices[:2]

    @property
    def is_rotational(self) -> bool:
        return self._destination.is_rotational or self._source.is_rotational

    def data_devices(self) -> Iterable[Device]:
        return (self._destination,)

    def exclusive_devices(self) -> Iterable[Device]:
        # Another clone of this table would believe our bits, or write over our regions.
        return self._parts.metadata_device, self._destination
