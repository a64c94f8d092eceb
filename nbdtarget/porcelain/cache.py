# SPDX-License-Identifier: Apache-2.0
"""One line for one job: `nbdtarget cache`, from the first look at the files to the last commit.

How the job goes, and how it is undone, is in job.py. What is refused, besides what the cache target
refuses by itself:

    metadata            cache       verdict
    missing             missing     both are made, if the size is given
    missing             no data     metadata is made
    missing             holds data  refused by the target, unless told to overwrite: it may be
                                    the wrong disk
    ours                missing     refused if anything may be dirty: what only the cache had would be
                                    lost. Else the cache is made anew, as large as it was
    ours                there       continues where it was
    ours, of another    there       refused, and both are named: another block size, or another size of
    shape                           origin or cache, unless --resize is given
    ours, and dirty     there       refused in passthrough, as the target would refuse it; the error says
                                    what to do
    foreign             any         refused

Metadata that is all zero counts as missing, because the cache target would format it. A cache or metadata in
memory is missing at each start. A writeback cache would lose what clients wrote, so neither may be
in memory for it. An origin in memory would be another disk at each start.

An origin of another size may be another disk, and dirty blocks would be written over it. The target refuses another
origin or cache of the same size, because the metadata identifies the disks.

Defaults. In writethrough mode the origin has everything at any time, so losing the cache or the metadata loses
no data. A writeback cache has a dirty log: without it every cached block counts as dirty after a crash, and
all of them are written back. `migration_threshold` has room for eight blocks, because
the kernel's default never writes back blocks above 1 MiB.

At the end the newest superblock says how much is only in the cache, and whether the shutdown was clean.
"""

import contextlib
import os
from typing import Any, Final, Protocol

import msgspec

from nbdtarget.common.clock import timeout
from nbdtarget.common.errors import NbdTargetError, ResolveError
from nbdtarget.common.permissions import permissions
from nbdtarget.common.units import SECTOR
from nbdtarget.common.unix_socket import SocketOptions
from nbdtarget.common.words import join_words, split_words
from nbdtarget.daemon.metrics_options import MetricsOptions
from nbdtarget.daemon.security import SecurityOptions
from nbdtarget.devices import resolve
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.names import check_name
from nbdtarget.policies.registry import policy_type
from nbdtarget.porcelain import job, look
from nbdtarget.porcelain.disk_name import disk_name
from nbdtarget.targets import metadata_io
from nbdtarget.targets.base import StatusFields, count
from nbdtarget.targets.cache.table import PASSTHROUGH, WRITEBACK, WRITETHROUGH
from nbdtarget.targets.metadata_faults import explain
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.cache.superblock import CACHE, DIRTY_LOG, CacheSuperblock
from nbdtarget_metadata.disks import decode_disks
from nbdtarget_metadata.errors import MetadataError, NotFormatted
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN, read_superblock

__all__ = [
    "CacheJob",
    "CacheOptions",
    "CachePlan",
    "CacheReporter",
    "CacheStatus",
    "plan_cache",
]

STATUS_PERIOD_S: Final = 1.0
THRESHOLD_SECTORS_MIN: Final = 2048  # the kernel's default
THRESHOLD_BLOCKS_MIN: Final = 8


class CacheOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the command; names as they were written. Sizes are in bytes.

    Args:
        name: the name of the export; None: from the origin's name.
        metadata: None: beside the cache, or in memory if the cache is.
        cache_size: the size of a cache that is missing, and is made.
        mode: writethrough, writeback or passthrough.
        dirty_log: None: only in a writeback cache.
        migration_rate: bytes a second; 0: no bound.
        migration_threshold: None: the size of eight blocks, or the kernel's default if that is more.
        listen: addresses; none: a unix socket in the runtime directory.
        control: path of the control socket; None: the one called after the export.
        stop_timeout: seconds that a stop may take; 0: for ever; None: the default.
        sockets: modes, owners and groups.
        limits: bounds of the server, by name.
        metrics: where metrics are told alone.
        run: a shell command that runs while the disk is served; its end is the end of the server.
        security: TLS, and who may attach.
        overwrite: the data of the cache may be lost.
        moved: the disks are those that the metadata names, under other names.
        accept_other_disk: a disk may be another one than the metadata names.
        resize: origin and cache may have other sizes than the metadata knows.
    """

    origin: str
    cache: str
    name: str | None = None
    metadata: str | None = None
    cache_size: int | None = None
    mode: str = WRITETHROUGH
    policy: str = "smq"
    block_size: int = 64 << 10
    dirty_log: bool | None = None
    sorted_writeback: bool = False
    migration_rate: int = 0
    migration_threshold: int | None = None
    listen: tuple[str, ...] = ()
    control: str | None = None
    stop_timeout: float | None = None
    sockets: SocketOptions = SocketOptions()
    limits: dict[str, Any] = {}
    metrics: MetricsOptions = MetricsOptions()
    run: str | None = None
    security: SecurityOptions = SecurityOptions()
    overwrite: bool = False
    moved: bool = False
    accept_other_disk: bool = False
    resize: bool = False


class CachePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of a job.

    Args:
        size: the size of the origin.
        missing: the cache and its size, if it is to be made.
        was_clean: the record of dirty blocks is exact.
        nr_given_up: cached blocks that are not used any more: after a crash the origin is read instead.
    """

    name: str
    size: int
    table: str
    origin: str
    metadata: str
    missing: tuple[str, int] | None
    was_clean: bool
    nr_given_up: int = 0


class CacheStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The figures that the user is shown while the cache runs. `hit_ratio` is None before the first access."""

    used_blocks: int
    total_blocks: int
    dirty_blocks: int
    dirty_bytes: int
    hit_ratio: float | None
    promotions: int
    demotions: int


class CacheReporter(job.Reporter[CachePlan], Protocol):
    """Tells the user how the job goes."""

    def unclean(self, nr_dirty: int, nr_bytes: int) -> None:
        """The last shutdown was not clean: these blocks count as dirty and will be written back."""
        ...

    def given_up(self, nr_blocks: int) -> None:
        """The last shutdown was not clean, and the origin has everything: the cache starts empty."""
        ...

    def status(self, status: CacheStatus) -> None:
        """The state of the cache has changed. Called now and then."""
        ...

    def uncached(self) -> None:
        """The origin alone is the disk, durably: `nbdtarget uncache` has done its work."""
        ...

    def failed(self, line: str) -> None:
        """The cache cannot record anything any more; `line` is its status line."""
        ...

    def stopped(self, nr_dirty: int, nr_bytes: int) -> None:
        """The job has ended in order; these blocks are in the cache only."""
        ...

    def not_clean(self, reason: str) -> None:
        """The job has ended, but could not record which blocks are dirty."""
        ...


async def plan_cache(options: CacheOptions, directory: str) -> CachePlan:
    """Look at everything, change nothing.

    Args: directory: absolute; where relative paths are meant.
    Raises: NbdTargetError.
    """
    origin = disk_name(options.origin, directory)
    cache = resolve.absolute_name(options.cache, directory)
    policy_type(options.policy)
    name = look.export_name(options.name, origin, "cache")
    check_name(name)
    is_read_only = resolve.is_read_only(origin)
    if is_read_only and options.mode != WRITETHROUGH:
        raise ResolveError(
            origin, "can only be read: its cache must have the mode writethrough"
        )
    size = await look.disk_size(origin, read_only=is_read_only)
    look.check_directory(cache)
    is_missing = resolve.may_create(cache)
    if is_missing and options.cache_size is None:
        options = await _sized_as_before(options, cache, directory)
    cache_size = await _cache_size(cache, options, is_missing=is_missing)
    metadata = _metadata_name(options, cache, cache_size, directory)
    look.check_distinct(origin=origin, cache=cache, metadata=metadata)
    _check_volatile(options, origin, cache, metadata)
    known = await _superblock(metadata)
    if known is not None:
        if is_missing or resolve.is_volatile(cache):
            _check_nothing_lost(known, cache, metadata)
        _check_shape(known, options, metadata, size, cache_size)
        _check_may_pass_through(known, options, cache)
    return CachePlan(
        name=name,
        size=size,
        table=_table_line(options, size, metadata, cache, origin),
        origin=origin,
        metadata=metadata,
        missing=(cache, cache_size) if is_missing else None,
        was_clean=known is None
        or known.gives_up_mappings
        or bool(known.flags & CLEAN_SHUTDOWN),
        nr_given_up=known.nr_mapped if known and known.gives_up_mappings else 0,
    )


async def _sized_as_before(
    options: CacheOptions, cache: str, directory: str
) -> CacheOptions:
    """Give a missing cache the size that its metadata records, if there is metadata."""
    if options.metadata is None and (resolve.path_of(cache) or "").startswith("/dev/"):
        return options
    metadata = look.metadata_name(options.metadata, cache, directory)
    known = await _superblock(metadata)
    if known is None:
        return options
    size = known.nr_cblocks * known.block_size
    return msgspec.structs.replace(options, cache_size=size)


async def _cache_size(cache: str, options: CacheOptions, *, is_missing: bool) -> int:
    wanted = options.cache_size
    if is_missing:
        if wanted is None:
            raise ResolveError(
                cache,
                "is missing: say how large it is to be, for example with --cache-size 10G",
            )
        size = wanted
        if size % SECTOR:
            raise ResolveError(cache, f"{size} bytes is not a multiple of {SECTOR}")
    else:
        size = await look.disk_size(cache, read_only=False)
        if wanted is not None and wanted != size:
            raise ResolveError(
                cache,
                f"exists and has {size} bytes, not the {wanted} of --cache-size: omit"
                " --cache-size (a cache grows with its file or device, and --resize)",
            )
    if size < options.block_size:
        raise ResolveError(
            cache,
            f"{size} bytes is too small for one block of {options.block_size} bytes",
        )
    return size


def _metadata_name(
    options: CacheOptions, cache: str, cache_size: int, directory: str
) -> str:
    if options.metadata is None and resolve.is_volatile(cache):
        nr_cblocks = cache_size // options.block_size
        return f"memory:{CacheMetadata.device_size_for(nr_cblocks)}"
    return look.metadata_name(options.metadata, cache, directory)


def _check_volatile(
    options: CacheOptions, origin: str, cache: str, metadata: str
) -> None:
    if resolve.is_volatile(origin):
        raise ResolveError(
            origin, "is lost when the server ends, so it cannot be an origin"
        )
    for name in (cache, metadata):
        if options.mode == WRITEBACK and resolve.is_volatile(name):
            raise ResolveError(
                name,
                "is lost when the server ends, and with it what a writeback cache holds: give a"
                " file or a device, or --mode writethrough",
            )


async def _superblock(metadata: str) -> CacheSuperblock | None:
    """Read the superblock; None if there is no metadata yet.

    Raises: NbdTargetError: the metadata is not ours, or damaged.
    """
    if await look.is_fresh(metadata):
        return None
    device = await resolve.open_device(metadata, read_only=True)
    try:
        found = await metadata_io.run(device, read_superblock(CACHE, device.size))
    except NotFormatted:
        return None
    except MetadataError as error:
        raise NbdTargetError(explain(error, metadata)) from error
    finally:
        await device.close()
    return found.superblock


def _check_nothing_lost(known: CacheSuperblock, cache: str, metadata: str) -> None:
    if not known.nr_mapped or known.gives_up_mappings:
        return
    if nr_dirty := _nr_maybe_dirty(known):
        lost = (
            f"up to {nr_dirty} blocks ({nr_dirty * known.block_size} bytes) that"
            " clients wrote are nowhere else: give the right CACHE"
        )
    elif any(disk.role == "cache" for disk in decode_disks(known.disks)):
        return  # the target sees that this is another disk, and believes no mapping
    else:
        lost = "the origin has everything, so remove the metadata to start with an empty cache"
    raise ResolveError(
        metadata, f"belongs to the cache {cache}, which is missing: {lost}"
    )


def _nr_maybe_dirty(known: CacheSuperblock) -> int:
    if known.gives_up_mappings:
        return 0
    if known.flags & CLEAN_SHUTDOWN:
        return known.nr_dirty
    return known.nr_logged if known.incompat & DIRTY_LOG else known.nr_mapped


def _check_shape(
    known: CacheSuperblock,
    options: CacheOptions,
    metadata: str,
    size: int,
    cache_size: int,
) -> None:
    block_size = options.block_size
    if known.block_size != block_size:
        raise ResolveError(
            metadata,
            f"belongs to a cache with blocks of {known.block_size >> 10} KiB, not"
            f" {block_size >> 10} KiB: give --block-size {known.block_size >> 10}K",
        )
    shapes = (
        ("origin", "bytes", known.origin_size, size),
        ("cache", "blocks", known.nr_cblocks, cache_size // block_size),
    )
    for what, unit, stored, given in shapes:
        if stored != given and not options.resize:
            raise ResolveError(
                metadata,
                f"belongs to a cache whose {what} has {stored} {unit}, not {given}: give the"
                f" right {what}, or --resize if it has been resized",
            )


def _check_may_pass_through(
    known: CacheSuperblock, options: CacheOptions, cache: str
) -> None:
    """Refuse what the target would refuse a little later, and say what to do."""
    if options.mode != PASSTHROUGH:
        return
    is_exact = (
        known.flags & CLEAN_SHUTDOWN
        or known.incompat & DIRTY_LOG
        or known.gives_up_mappings
    )
    nr_dirty = _nr_maybe_dirty(known)
    if is_exact and not nr_dirty:
        return
    if is_exact:
        reason = "cannot enter passthrough mode unless all blocks are clean"
    else:
        reason = "unable to resume into passthrough mode after unclean shutdown"
    raise ResolveError(
        cache,
        f"{reason}: {nr_dirty} blocks may be dirty; first serve it with --mode writethrough"
        " --policy cleaner until no block is dirty, and stop it",
    )


def _table_line(
    options: CacheOptions, size: int, metadata: str, cache: str, origin: str
) -> str:
    block_sectors = options.block_size // SECTOR
    dirty_log = options.dirty_log
    if dirty_log is None:
        dirty_log = options.mode == WRITEBACK
    features = [options.mode]
    features += ["dirty_log"] if dirty_log else []
    features += ["sorted_writeback"] if options.sorted_writeback else []
    core = {"migration_threshold": _threshold_sectors(options, block_sectors)}
    if options.migration_rate:
        core["migration_rate"] = options.migration_rate
    words = [metadata, cache, origin, str(block_sectors)]
    words += [str(len(features)), *features, options.policy, str(2 * len(core))]
    for key, value in core.items():
        words += [key, str(value)]
    return f"0 {size // SECTOR} cache {join_words(words)}"


def _threshold_sectors(options: CacheOptions, block_sectors: int) -> int:
    if options.migration_threshold is not None:
        return -(-options.migration_threshold // SECTOR)
    return max(THRESHOLD_SECTORS_MIN, THRESHOLD_BLOCKS_MIN * block_sectors)


class CacheJob(job.Job[CachePlan]):
    """Prepares, serves and ends one cache, in this process."""

    plan_type = CachePlan

    def __init__(self, options: CacheOptions, reporter: CacheReporter) -> None:
        super().__init__(
            reporter,
            listen=options.listen,
            control=options.control,
            stop_timeout=options.stop_timeout,
            sockets=options.sockets,
            limits=options.limits,
            metrics=options.metrics,
            command=options.run,
            security=options.security,
            permissions=permissions(
                overwrite=options.overwrite,
                moved=options.moved,
                accept_other_disk=options.accept_other_disk,
            ),
            read_only=resolve.is_read_only(options.origin),
        )
        self._options = options
        self._reporter = reporter
        self._is_cache = True

    async def _plan(self) -> CachePlan:
        return await plan_cache(self._options, os.getcwd())

    async def _watch(self, device: MappedDevice, plan: CachePlan) -> None:
        """Report the state of the cache. Never commits: an idle cache does no I/O."""
        event_nr = device.event_nr
        is_first = not self._took_over
        while not device.events.is_closed:
            await self._look(device, plan, is_first=is_first)
            is_first = False
            with contextlib.suppress(TimeoutError):
                async with timeout(STATUS_PERIOD_S):
                    event_nr = await device.events.wait(event_nr)

    async def _look(
        self, device: MappedDevice, plan: CachePlan, *, is_first: bool
    ) -> None:
        lines = await device.status_by_name(noflush=True)
        if not lines or lines[0][0][2] != "cache":
            if self._is_cache and _is_origin_alone(device, plan):
                self._is_cache = False
                self._report(self._reporter.uncached)
            return  # another table may have been loaded over the control socket
        self._is_cache = True
        (_, _, _, line), fields = lines[0]
        if fields.get("mode") != "rw":
            if not self._has_failed:
                self._has_failed = True
                self._report(self._reporter.failed, line)
            return
        status = _status(fields)
        if is_first and plan.nr_given_up:
            self._report(self._reporter.given_up, plan.nr_given_up)
        if is_first and not plan.was_clean:
            self._report(
                self._reporter.unclean, status.dirty_blocks, status.dirty_bytes
            )
        self._report(self._reporter.status, status)

    async def _ending(self, device: MappedDevice, plan: CachePlan) -> None:
        await self._look(
            device, plan, is_first=False
        )  # for `_ended`: is it a cache still?

    async def _ended(self, plan: CachePlan) -> None:
        if not self._is_cache or resolve.is_volatile(plan.metadata):
            return
        try:
            known = await _superblock(plan.metadata)
        except NbdTargetError as error:
            known, reason = None, str(error)
        else:
            reason = (
                f"{plan.metadata}: the last changes could not be recorded; what was recorded"
                " before is not damaged, and the same command continues from there when the"
                " disks work again"
            )
        if known is not None and known.flags & CLEAN_SHUTDOWN:
            nr_bytes = known.nr_dirty * known.block_size
            self._report(self._reporter.stopped, known.nr_dirty, nr_bytes)
        else:
            self._has_failed = True
            self._report(self._reporter.not_clean, reason)


def _status(fields: StatusFields) -> CacheStatus:
    ratio = fields["hit_ratio"]
    return CacheStatus(
        used_blocks=count(fields, "cache_blocks_used"),
        total_blocks=count(fields, "cache_blocks_total"),
        dirty_blocks=count(fields, "dirty_blocks"),
        dirty_bytes=count(fields, "dirty_bytes"),
        hit_ratio=ratio if isinstance(ratio, float) else None,
        promotions=count(fields, "promotions"),
        demotions=count(fields, "demotions"),
    )


def _is_origin_alone(device: MappedDevice, plan: CachePlan) -> bool:
    lines = [(line[2], split_words(line[3])) for line in device.table()]
    return lines == [("linear", [plan.origin, "0"])]
