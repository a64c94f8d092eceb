# SPDX-License-Identifier: Apache-2.0
"""One line for one job: `nbdtarget clone`, from the first look at the files to the last commit.

How it goes, and how it is undone: job.py.

What is refused, here or by the clone target itself:

    metadata   destination   verdict
    missing    missing       both are made
    missing    no data       metadata is made
    missing    holds data    refused by the target, unless told to overwrite: it may be the wrong disk
    ours       missing       refused: its regions would count as copied
    ours       there         goes on where it was
    foreign    any           refused by the clone target, untouched

Metadata that is all zero counts as missing, because the clone target would format it. The registry refuses one
file in two roles, but only after a missing destination would have been made, so that is checked here too.

When everything has been copied, SOURCE is not even opened: its server may be gone for good, and must not
delay the start. The size of the disk is the recorded one then.

A crash between making the destination and making the metadata leaves an empty destination, and
the same command starts again from the beginning. After a later crash it continues.
"""

import contextlib
import os
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from nbdtarget.common.clock import timeout
from nbdtarget.common.errors import ResolveError
from nbdtarget.common.permissions import permissions
from nbdtarget.common.units import SECTOR
from nbdtarget.common.unix_socket import SocketOptions
from nbdtarget.common.words import join_words, split_words
from nbdtarget.daemon.metrics_options import MetricsOptions
from nbdtarget.daemon.security import SecurityOptions
from nbdtarget.devices import resolve
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.names import check_name
from nbdtarget.porcelain import job, look
from nbdtarget.porcelain.disk_name import disk_name
from nbdtarget.porcelain.kept import KeptSource
from nbdtarget.porcelain.trace_file import (
    TraceRecorder,
    check_writable,
    maybe_clone,
    read_trace,
)
from nbdtarget.targets import metadata_io
from nbdtarget.targets.base import count
from nbdtarget.targets.clone.trace import grouped
from nbdtarget_metadata.clone.superblock import CLONE, CloneSuperblock
from nbdtarget_metadata.errors import MetadataError
from nbdtarget_metadata.log.superblock import read_superblock

__all__ = ["CloneJob", "CloneOptions", "ClonePlan", "CloneReporter", "plan_clone"]

PROGRESS_PERIOD_S: Final = 0.25


class CloneOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the command; names as they were written.

    Args:
        name: the name of the export; None: from the destination's name.
        metadata: None: beside the destination.
        region_size: bytes.
        listen: addresses; none: a unix socket in the runtime directory.
        control: path of the control socket; None: the one called after the export.
        stop_timeout: seconds that a stop may take; 0: for ever; None: the default.
        sockets: modes, owners and groups.
        limits: bounds of the server, by name.
        metrics: where metrics are told alone.
        run: a shell command that runs while the disk is served; its end is the end of the server.
        security: TLS, and who may attach.
        overwrite: the data of the destination may be lost.
        moved: the disks are those that the metadata names, under other names.
        accept_other_disk: a disk may be another one than the metadata names.
        hydrate_on_read: copy what clients read before the rest.
        hydration_rate: bytes a second that the background copies; 0: no bound.
        url_command: words of a command that prints the URL of the source anew; empty: there is none.
        record_trace: file in which the order of clients' first reads is recorded; None: it is not.
        hydrate_order: such a file; what it names is hydrated first.
        then_linear: when all is hydrated, clients are served by the destination alone.
    """

    source: str
    dest: str
    name: str | None = None
    metadata: str | None = None
    region_size: int = 64 << 10
    listen: tuple[str, ...] = ()
    hydration: bool = True
    exit_when_hydrated: bool = False
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
    hydrate_on_read: bool = False
    hydration_rate: int = 0
    then_linear: bool = False
    url_command: tuple[str, ...] = ()
    record_trace: str | None = None
    hydrate_order: str | None = None


class ClonePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of a job.

    Attributes:
        order: what is hydrated first, begin and end in bytes, half-open.
        recorded: what was read first, likewise, when another process takes the job over.
    """

    name: str
    size: int
    table: str
    dest: str
    make_dest: bool
    order: tuple[tuple[int, int], ...] = ()
    recorded: tuple[tuple[int, int], ...] = ()

    @property
    def missing(self) -> tuple[str, int] | None:
        """The destination and its size, if it is to be made."""
        return (self.dest, self.size) if self.make_dest else None


class CloneReporter(job.Reporter[ClonePlan], Protocol):
    """Tells the user how the job goes."""

    def progress(self, done: int, size: int) -> None:
        """`done` of `size` bytes of the destination are hydrated."""
        ...

    def hydrated(self) -> None:
        """The destination alone is the disk, durably."""
        ...

    def failed(self, status: str) -> None:
        """The clone cannot record progress any more; `status` is its status line."""
        ...

    def source_changed(self, reason: str) -> None:
        """The source has become another image, so nothing more is copied from it."""
        ...


async def plan_clone(
    options: CloneOptions, directory: str, kept: KeptSource | None = None
) -> ClonePlan:
    """Look at everything, change nothing.

    Args:
        directory: absolute; where relative paths are meant.
        kept: may keep the source open, for the table that is loaded next.
    Raises: NbdTargetError.
    """
    source = disk_name(options.source, directory)
    dest = resolve.absolute_name(options.dest, directory)
    metadata = look.metadata_name(options.metadata, dest, directory)
    name = look.export_name(options.name, dest, "clone")
    check_name(name)
    look.check_distinct(source=source, destination=dest, metadata=metadata)
    look.check_directory(dest)
    fresh = await look.is_fresh(metadata)
    known = None if fresh else await _maybe_superblock(metadata)
    size = await _size(source, known, kept)
    make_dest = resolve.may_create(dest)
    if make_dest and not fresh:
        raise ResolveError(
            metadata,
            f"belongs to the destination {dest}, which is missing: give the right destination,"
            " or remove the metadata to copy everything again",
        )
    if not make_dest:
        await _check_dest(dest, size)
    return ClonePlan(
        name=name,
        size=size,
        table=_table_line(options, size, metadata, dest, source),
        dest=dest,
        make_dest=make_dest,
    )


async def _maybe_superblock(metadata: str) -> CloneSuperblock | None:
    """Read the superblock; None if it cannot be read, and then the target says why."""
    device = await resolve.open_device(metadata, read_only=True)
    try:
        found = await metadata_io.run(device, read_superblock(CLONE, device.size))
    except MetadataError:
        return None
    finally:
        await device.close()
    return found.superblock


async def _size(
    source: str, known: CloneSuperblock | None, kept: KeptSource | None
) -> int:
    """Return the size of the source, or the recorded size if the source is not needed any more.

    Raises: ResolveError.
    """
    nr_left = 0 if known is None else known.nr_regions - known.nr_hydrated
    if known is not None and not nr_left:
        return known.target_size
    try:
        return await look.disk_size(source, read_only=True, kept=kept)
    except ResolveError as error:
        if known is None or nr_left == known.nr_regions:
            raise
        raise ResolveError(
            source,
            f"{error.reason}; {nr_left} of {known.nr_regions} regions"
            f" ({nr_left * known.region_size >> 10} KiB) must still be copied from it",
            error.errno,
        ) from error


async def _check_dest(dest: str, size: int) -> None:
    device = await resolve.open_device(dest, read_only=False)
    await device.close()
    if device.size < size:
        raise ResolveError(
            dest,
            f"is too small: it has {device.size} bytes, and the source has {size};"
            f" `truncate -s {size} {dest}` makes a file large enough",
        )


def _table_line(
    options: CloneOptions, size: int, metadata: str, dest: str, source: str
) -> str:
    region = options.region_size
    words = [metadata, dest, source, str(region // SECTOR)]
    features = {
        "no_hydration": not options.hydration,
        "hydrate_on_read": options.hydrate_on_read,
        "then_linear": options.then_linear,
    }
    is_set = [word for word, there in features.items() if there]
    words += [str(len(is_set)), *is_set]
    copy_bytes, in_flight_bytes = resolve.copy_sizes(source)
    core = {
        "hydration_threshold": max(1, in_flight_bytes // region),
        "hydration_batch_size": max(1, copy_bytes // region),
    }
    if options.hydration_rate:
        core["hydration_rate"] = options.hydration_rate
    words.append(str(2 * len(core)))
    for key, value in core.items():
        words += [key, str(value)]
    return f"0 {size // SECTOR} clone {join_words(words)}"


class CloneJob(job.Job[ClonePlan]):
    """Prepares, serves and ends one clone, in this process."""

    plan_type = ClonePlan

    def __init__(self, options: CloneOptions, reporter: CloneReporter) -> None:
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
        )
        self._options = options
        self._reporter = reporter
        self._order: tuple[tuple[int, int], ...] = ()
        self._recorder = (
            TraceRecorder(options.record_trace)
            if options.record_trace is not None
            else None
        )

    def _enter(self) -> None:
        if self._options.url_command:
            from nbdtarget.devices.helper.words import container_of
            from nbdtarget.devices.http.url_command import set_url_commands

            url = container_of(self._options.source)
            set_url_commands({url: self._options.url_command})

    async def _plan(self) -> ClonePlan:
        if self._options.hydrate_order is not None:
            self._order = tuple(grouped(read_trace(self._options.hydrate_order)))
        if self._options.record_trace is not None:
            check_writable(self._options.record_trace)
        return await plan_clone(self._options, os.getcwd(), self._kept)

    def _plan_now(self, plan: ClonePlan) -> ClonePlan:
        recorded = () if self._recorder is None else tuple(self._recorder.trace.ranges)
        return msgspec.structs.replace(plan, order=self._order, recorded=recorded)

    def _taken_over(self, plan: ClonePlan) -> None:
        self._order = plan.order
        if self._recorder is not None:
            self._recorder.trace.ranges = list(plan.recorded)

    def _loaded(self, device: MappedDevice) -> None:
        target = maybe_clone(device)
        if target is None:
            return
        target.hydrate_first(self._order)
        if self._recorder is not None:
            self._recorder.trace = target.record_reads(self._recorder.trace.ranges)

    async def _ending(self, device: MappedDevice, plan: ClonePlan) -> None:
        if self._recorder is not None:
            await self._recorder.save()

    def _unwatched(self) -> None:
        if self._options.exit_when_hydrated:
            self._daemon.stop.set()

    async def _watch(self, device: MappedDevice, plan: ClonePlan) -> None:
        """Report progress. End the job when all is hydrated, if that is wanted, or when it is stuck."""
        options = self._options
        is_hydrated = False
        event_nr = device.event_nr
        while not device.events.is_closed:
            done, is_stuck, line, changed = await _progress(device, plan)
            self._report(self._reporter.progress, done, plan.size)
            if (is_stuck or changed) and not self._has_failed:
                self._has_failed = True
                if changed:
                    self._report(self._reporter.source_changed, changed)
                else:
                    self._report(self._reporter.failed, line)
                if options.exit_when_hydrated:
                    self._daemon.stop.set()
            if done == plan.size and not is_hydrated and not is_stuck:
                # `status` commits: what is reported next must survive a power cut.
                await device.status()
                if not (await _progress(device, plan)).is_stuck:
                    is_hydrated = True
                    self._report(self._reporter.hydrated)
                    if options.exit_when_hydrated:
                        self._daemon.stop.set()
            if self._recorder is not None:
                await self._recorder.save_now_and_then()
            # An event, for example the end of hydration, ends the wait early.
            with contextlib.suppress(TimeoutError):
                async with timeout(PROGRESS_PERIOD_S):
                    event_nr = await device.events.wait(event_nr)


class _Progress(NamedTuple):
    """How far the clone is.

    Attributes:
        done: bytes hydrated.
        is_stuck: progress cannot be recorded any more.
        line: the status line.
        source_changed: how it was noticed that the source is another image now; empty: it is not.
    """

    done: int
    is_stuck: bool
    line: str
    source_changed: str = ""


async def _progress(device: MappedDevice, plan: ClonePlan) -> _Progress:
    size = plan.size
    lines = await device.status_by_name(noflush=True)
    if not lines or lines[0][0][2] != "clone":
        # Another table was loaded over the control socket, or `then_linear` has been carried out.
        return _Progress(size if _is_dest_alone(device, plan) else 0, False, "")
    (_, _, _, line), fields = lines[0]
    if not fields:
        return _Progress(0, True, line)  # the whole table has failed
    nr_hydrated = count(fields, "regions_hydrated")
    done = min(size, nr_hydrated * count(fields, "region_size_bytes"))
    if nr_hydrated == count(fields, "regions_total"):
        done = size  # the last region may be a short one
    changed = fields.get("source_changed") or ""
    return _Progress(done, fields["mode"] != "rw", line, str(changed))


def _is_dest_alone(device: MappedDevice, plan: ClonePlan) -> bool:
    """Whether `then_linear` has been carried out."""
    lines = [(line[2], split_words(line[3])) for line in device.table()]
    return lines == [("linear", [plan.dest, "0"])]
