# SPDX-License-Identifier: Apache-2.0
"""One line for one job: `nbdtarget clone`, from the first look at the files to the last commit.

Theory of operation. A stranger trusts this with a disk, so it goes in three steps, and what
fails in one leaves the files as they were before it:

    plan     look at source, destination and metadata; refuse; change nothing
    prepare  make a missing destination, construct the table (which makes missing metadata),
             listen; if any of this fails, what was made is removed again
    serve    let I/O and hydration go, until hydrated or told to stop; then commit

What is refused, besides what the clone target refuses by itself:

    metadata   destination   verdict
    missing    missing       both are made
    missing    no data       metadata is made
    missing    holds data    refused, unless told to overwrite: it may be the wrong disk
    ours       missing       refused: its regions would count as copied
    ours       there         goes on where it was
    foreign    any           refused by the clone target, untouched

All-zero metadata counts as missing, for the clone target would format it. Two of the three
being one and the same file is refused by the registry, but only after a missing destination
would have been made, so it is looked at here too.

A crash between making the destination and making the metadata leaves an empty destination:
the same line starts anew. One after that goes on.
"""

import asyncio
import contextlib
import errno as errnos
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec

from nbdtarget.clock import timeout
from nbdtarget.control.paths import control_address, control_token
from nbdtarget.daemon import Daemon, default_listen, passed_sockets
from nbdtarget.devices import resolve
from nbdtarget.devices.base import EXTENT_DATA, Device
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.open_devices import absolute_name
from nbdtarget.dm.registry import check_name
from nbdtarget.dm.table import SECTOR
from nbdtarget.errors import ResolveError
from nbdtarget.words import join_words, split_words

__all__ = ["CloneJob", "CloneOptions", "ClonePlan", "CloneReporter", "plan_clone"]

_log = logging.getLogger(__name__)

HEAD_BYTES: Final = 16384  # the superblocks of a metadata device
SCAN_BYTES_MAX: Final = 256 << 20  # how much of a destination is read for data
SCAN_STEP: Final = 4 << 20
EXTENTS_STEP: Final = 1 << 40
PROGRESS_PERIOD_S: Final = 0.25
# What hydration keeps in flight, and copies at once: tuned for NBD sources over a unix socket.
IN_FLIGHT_BYTES: Final = 16 << 20
COPY_BYTES: Final = 4 << 20


class CloneOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for; names as they were written.

    Args:
        name: of the export; None: from the destination's name.
        metadata: None: beside the destination.
        region_size: bytes.
        listen: addresses; none: a unix socket in the runtime directory.
        control: path of the control socket; None: the usual one, if it is free.
        overwrite: the destination's data may go.
        hydrate_on_read: copy what clients read before the rest.
        hydration_rate: bytes a second that the background copies; 0: no bound.
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
    overwrite: bool = False
    hydrate_on_read: bool = False
    hydration_rate: int = 0
    then_linear: bool = False


class ClonePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What is going to be done."""

    name: str
    size: int
    table: str
    dest: str
    make_dest: bool


class CloneReporter(Protocol):
    """Who tells the user."""

    def serving(self, plan: ClonePlan, uris: list[str]) -> None:
        """Clients may come."""
        ...

    def progress(self, done: int, size: int) -> None:
        """So many bytes of the destination are hydrated."""
        ...

    def hydrated(self) -> None:
        """The destination alone is the disk, durably."""
        ...

    def failed(self, status: str) -> None:
        """The clone cannot record progress any more; `status` is its status line."""
        ...

    def stopping(self) -> None:
        """I/O in flight ends, the clone commits."""
        ...


async def plan_clone(options: CloneOptions, directory: str) -> ClonePlan:
    """Look at everything, change nothing.

    Args: directory: absolute; where relative paths are meant.
    Raises: NbdTargetError.
    """
    source = absolute_name(options.source, directory)
    dest = absolute_name(options.dest, directory)
    metadata = _metadata_name(options, dest, directory)
    name = options.name or _default_name(dest)
    check_name(name)
    _check_distinct(source=source, destination=dest, metadata=metadata)
    size = await _source_size(source)
    fresh = await _is_fresh(metadata)
    make_dest = resolve.may_create(dest)
    if make_dest and not fresh:
        raise ResolveError(
            metadata,
            f"belongs to a destination that is missing ({dest}): name it, or remove the"
            " metadata to start anew",
        )
    if not make_dest:
        await _check_dest(dest, size, fresh=fresh, options=options, metadata=metadata)
    return ClonePlan(
        name=name,
        size=size,
        table=_table_line(options, size, metadata, dest, source),
        dest=dest,
        make_dest=make_dest,
    )


def _metadata_name(options: CloneOptions, dest: str, directory: str) -> str:
    if options.metadata is not None:
        return absolute_name(options.metadata, directory)
    if not dest.startswith("/"):
        raise ResolveError(
            dest, "is not a file: say where its metadata is (--metadata)"
        )
    if dest.startswith("/dev/"):
        raise ResolveError(
            dest, "is a device: say in which file its metadata is (--metadata)"
        )
    return f"{dest}.nbdtarget"


def _default_name(dest: str) -> str:
    stem = Path(dest).stem if dest.startswith("/") else ""
    return stem if stem.isprintable() and stem not in ("", ".", "control") else "clone"


def _check_distinct(**names: str) -> None:
    seen: dict[object, str] = {}
    for role, name in names.items():
        other = seen.setdefault(resolve.identity(name), role)
        if other != role:
            raise ResolveError(name, f"is both {other} and {role}", errnos.EBUSY)


async def _source_size(source: str) -> int:
    device = await resolve.open_device(source, read_only=True)
    await device.close()
    if device.size == 0 or device.size % SECTOR:
        raise ResolveError(
            source, f"size {device.size} is not a multiple of {SECTOR} bytes"
        )
    return device.size


async def _is_fresh(metadata: str) -> bool:
    """Whether the metadata is missing or all zero at its head."""
    if resolve.may_create(metadata):
        return True
    device = await resolve.open_device(metadata, read_only=True)
    try:
        head = await device.read(0, min(HEAD_BYTES, device.size))
    finally:
        await device.close()
    return not any(head)


async def _check_dest(
    dest: str, size: int, *, fresh: bool, options: CloneOptions, metadata: str
) -> None:
    device = await resolve.open_device(dest, read_only=False)
    try:
        if device.size < size:
            raise ResolveError(
                dest, f"too small: {device.size} bytes, the source has {size}"
            )
        if fresh and not options.overwrite and await _holds_data(device):
            raise ResolveError(
                dest,
                f"holds data, but there is no clone metadata in {metadata}: give"
                " --metadata if it is elsewhere, --overwrite if the data may go",
            )
    finally:
        await device.close()


async def _holds_data(device: Device) -> bool:
    """Whether anything but zeroes is there, as far as that can be found out quickly."""
    at = scanned = 0
    while at < device.size:
        for extent in await device.extents(at, min(EXTENTS_STEP, device.size - at)):
            if extent.flags == EXTENT_DATA:
                budget = SCAN_BYTES_MAX - scanned
                if await _reads_other_than_zero(device, at, min(extent.length, budget)):
                    return True
                scanned += extent.length
                if scanned > SCAN_BYTES_MAX:
                    return True  # too much to tell: the safe answer
            at += extent.length
    return False


async def _reads_other_than_zero(device: Device, offset: int, length: int) -> bool:
    end = offset + length
    while offset < end:
        part = await device.read(offset, min(SCAN_STEP, end - offset))
        if part.tobytes().count(0) != len(part):
            return True
        offset += len(part)
    return False


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
    core = {
        "hydration_threshold": max(1, IN_FLIGHT_BYTES // region),
        "hydration_batch_size": max(1, COPY_BYTES // region),
    }
    if options.hydration_rate:
        core["hydration_rate"] = options.hydration_rate
    words.append(str(2 * len(core)))
    for key, value in core.items():
        words += [key, str(value)]
    return f"0 {size // SECTOR} clone {join_words(words)}"


class CloneJob:
    """Prepares, serves and ends one clone, in this process."""

    def __init__(self, options: CloneOptions, reporter: CloneReporter) -> None:
        self._options = options
        self._reporter = reporter
        self._daemon = Daemon()
        self._has_failed = False

    async def run(self) -> int:
        """Do the job; the exit status. Raises: NbdTargetError: nothing has changed."""
        self._daemon.catch_signals()
        try:
            begun = await self._daemon.until_stopped(self._begin())
            if begun is None:
                return 0  # told to stop before anybody was served: nothing has changed
            plan, device = begun
            watcher = asyncio.create_task(self._watch(device, plan))
            try:
                await self._daemon.wait_for_stop()
            finally:
                watcher.cancel()
                await asyncio.wait([watcher])
                self._reporter.stopping()
                self._daemon.release_signals()
                await self._daemon.close()
        finally:
            self._daemon.release_signals()
        if not watcher.cancelled() and watcher.exception() is not None:
            raise AssertionError("watching hydration failed") from watcher.exception()
        return 1 if self._has_failed else 0

    async def _begin(self) -> tuple[ClonePlan, MappedDevice]:
        plan = await plan_clone(self._options, os.getcwd())
        return plan, await self._prepare(plan)

    async def _prepare(self, plan: ClonePlan) -> MappedDevice:
        options = self._options
        daemon = self._daemon
        made: list[str] = []
        try:
            await daemon.open_control(
                control_address(options.control),
                token=control_token(),
                optional=options.control is None,
            )
            if plan.make_dest:
                dest = await resolve.create_device(plan.dest, plan.size, sparse=True)
                made.append(plan.dest)
                await dest.close()
            device = await daemon.registry.create(plan.name, None)
            made += await daemon.registry.load(plan.name, plan.table)
            # Clients may attach from here on, and their requests wait a moment.
            await device.activate()
            fds = passed_sockets()
            addresses = options.listen or (() if fds else (default_listen(plan.name),))
            await daemon.listen(addresses, fds)
            self._reporter.serving(plan, daemon.uris)
            await device.resume()
        except BaseException:
            await daemon.close()
            # Only what this very call has made: another process may have been faster.
            for path in made:
                with contextlib.suppress(FileNotFoundError):
                    await resolve.remove_created(path)
            raise
        return device

    async def _watch(self, device: MappedDevice, plan: ClonePlan) -> None:
        """Report progress; end the job when hydrated, if so asked, or when it cannot go on."""
        options = self._options
        is_hydrated = False
        event_nr = device.event_nr
        while True:
            done, is_stuck, line = await _progress(device, plan)
            self._report(self._reporter.progress, done, plan.size)
            if is_stuck and not self._has_failed:
                self._has_failed = True
                self._report(self._reporter.failed, line)
                if options.exit_when_hydrated:
                    self._daemon.stop.set()
            if done == plan.size and not is_hydrated and not is_stuck:
                await (
                    device.status()
                )  # commits: what we say next must survive a power cut
                _, is_stuck, _ = await _progress(device, plan)
                if not is_stuck:
                    is_hydrated = True
                    self._report(self._reporter.hydrated)
                    if options.exit_when_hydrated:
                        self._daemon.stop.set()
            # The event that ends hydration, or changes the mode, is not waited out.
            with contextlib.suppress(TimeoutError):
                async with timeout(PROGRESS_PERIOD_S):
                    event_nr = await device.events.wait(event_nr)

    def _report(self, tell: Callable[..., None], *words: object) -> None:
        """Tell the user; the disk goes on if nobody reads any more (`| head`)."""
        try:
            tell(*words)
        except OSError as error:
            _log.debug("cannot report: %s", error)


async def _progress(device: MappedDevice, plan: ClonePlan) -> tuple[int, bool, str]:
    """Bytes hydrated, whether no more can be recorded, and the status line."""
    size = plan.size
    lines = await device.status(noflush=True)
    if not lines or lines[0][2] != "clone":
        if _is_dest_alone(device, plan):
            return size, False, ""
        return 0, False, ""  # somebody loaded another table over the control socket
    words = lines[0][3].split()
    if len(words) < 4:
        return 0, True, lines[0][3]
    hydrated, total = (int(number) for number in words[3].split("/"))
    done = min(size, hydrated * int(words[2]) * SECTOR)
    return (size if hydrated == total else done), words[-1] != "rw", lines[0][3]


def _is_dest_alone(device: MappedDevice, plan: ClonePlan) -> bool:
    """Whether `then_linear` has been carried out."""
    lines = [(line[2], split_words(line[3])) for line in device.table()]
    return lines == [("linear", [plan.dest, "0"])]
