# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget scratch`: many throw-away writable copies of one image, in one process.

Each copy is a `scratch` target on the image, which is only read, with a store of its own: a sparse file without a name, or
memory. The files are made in a directory and removed from it as soon as they are open, so that nothing of them is left
however this process ends. The size of a copy's store is bounded by `size_max`.

Nothing is durable here, so there is nothing to be continued by a second start. When commands have removed all copies, the process ends.
"""

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.heap import HEAP
from nbdtarget.common.permissions import permissions
from nbdtarget.common.turns import log_failure
from nbdtarget.common.units import SECTOR
from nbdtarget.common.unix_socket import SocketOptions
from nbdtarget.common.words import join_words
from nbdtarget.config.limits import with_limits
from nbdtarget.control.paths import (
    ControlAddress,
    control_address,
    job_control_path,
)
from nbdtarget.control.tokens import control_tokens
from nbdtarget.daemon.daemon import Daemon
from nbdtarget.daemon.metrics_options import MetricsOptions
from nbdtarget.daemon.security import Security, SecurityOptions
from nbdtarget.daemon.serve import default_listen
from nbdtarget.daemon.stop_bounds import StopBounds
from nbdtarget.dm.names import check_name
from nbdtarget.porcelain import look
from nbdtarget.porcelain.disk_name import disk_name
from nbdtarget.server.limits import Limits

__all__ = [
    "COPIES_MAX",
    "MEMORY",
    "ScratchJob",
    "ScratchOptions",
    "ScratchPlan",
    "plan_scratch",
    "scratch_table",
]

COPIES_MAX: Final = 1000
MEMORY: Final = "memory"  # as a store


class ScratchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the command.

    Args:
        image: what the copies are of.
        nr_copies: how many.
        name: the exports are called NAME-1, NAME-2, …; None: from the image's name.
        size_max: bytes that may be written to one copy; None: as many as the image has.
        store: directory for what is written, or MEMORY; None: the directory for temporary files.
        listen, control, stop_timeout, sockets, limits, metrics, security: as of the other jobs.
    """

    image: str
    nr_copies: int = 1
    name: str | None = None
    size_max: int | None = None
    store: str | None = None
    listen: tuple[str, ...] = ()
    control: str | None = None
    stop_timeout: float | None = None
    sockets: SocketOptions = SocketOptions()
    limits: dict[str, Any] = {}
    metrics: MetricsOptions = MetricsOptions()
    security: SecurityOptions = SecurityOptions()


class ScratchPlan(NamedTuple):
    """The plan of a job.

    Attributes:
        names: of the exports.
        size: of the image, in bytes.
        size_max: bytes that may be written to one copy.
        store: an absolute directory, or MEMORY.
        free: bytes that are free where the stores are; None: it is memory.
    """

    image: str
    names: tuple[str, ...]
    size: int
    size_max: int
    store: str
    free: int | None


async def plan_scratch(options: ScratchOptions, directory: str) -> ScratchPlan:
    """Look at everything, change nothing. Raises: NbdTargetError."""
    if not 1 <= options.nr_copies <= COPIES_MAX:
        raise NbdTargetError(
            f"{options.nr_copies} copies: must be from 1 to {COPIES_MAX}"
        )
    image = disk_name(options.image, directory)
    name = look.export_name(options.name, image, "scratch")
    names = tuple(f"{name}-{nr}" for nr in range(1, options.nr_copies + 1))
    check_name(names[-1])
    size = await look.disk_size(image, read_only=True)
    size_max = size if options.size_max is None else min(options.size_max, size)
    store, free = MEMORY, None
    if options.store != MEMORY:
        store, free = _directory(options.store or tempfile.gettempdir(), directory)
    return ScratchPlan(image, names, size, size_max - size_max % SECTOR, store, free)


def _directory(given: str, directory: str) -> tuple[str, int]:
    store = os.path.join(directory, given)
    try:
        found = os.statvfs(store)
    except OSError as error:
        raise NbdTargetError(f"{store}: {error.strerror or error}") from None
    if not os.path.isdir(store):
        raise NbdTargetError(f"{store}: is not a directory")
    return store, found.f_bavail * found.f_frsize


def _make_stores(plan: ScratchPlan) -> str:
    """Make a sparse file for each copy in a new directory; return that. Durable: nothing, on purpose.

    Raises: NbdTargetError.
    """
    try:
        directory = tempfile.mkdtemp(prefix="nbdtarget-scratch-", dir=plan.store)
        for name in plan.names:
            with open(os.path.join(directory, name), "xb") as store:
                store.truncate(plan.size)
    except OSError as error:
        raise NbdTargetError(f"{plan.store}: {error.strerror or error}") from None
    return directory


def scratch_table(image: str, size: int, store: str, size_max: int) -> str:
    """Return the table of one copy. Args: size, size_max: bytes."""
    words = [image, "0", store]
    if size_max < size:
        words += ["2", "max_sectors", str(size_max // SECTOR)]
    return f"0 {size // SECTOR} scratch {join_words(words)}"


class ScratchJob:
    """Makes the copies, serves and forgets them.

    Args: serving: called with the plan and the URIs when clients may attach.
    """

    def __init__(
        self,
        options: ScratchOptions,
        serving: Callable[[ScratchPlan, list[str]], None],
    ) -> None:
        self._options = options
        self._serving = serving
        self._daemon = Daemon(
            with_limits(Limits(), options.limits),
            bounds=StopBounds.of(options.stop_timeout),
            sockets=options.sockets,
            metrics=options.metrics,
            security=Security(options.security),
            heap=HEAP,
        )

    async def run(self) -> int:
        """Serve until a signal comes or commands have removed all copies, and return the exit status.

        Raises: NbdTargetError: nothing has changed.
        """
        daemon = self._daemon
        daemon.catch_signals()
        try:
            plan = await daemon.until_stopped(self._begin())
            if plan is not None:
                # The copies are served also if the output is not read.
                with contextlib.suppress(BrokenPipeError):
                    self._serving(plan, daemon.uris)
                daemon.tell_ready()
                await self._serve()
        finally:
            daemon.release_signals()
            await daemon.close()
        return daemon.exit_status(0)

    async def _serve(self) -> None:
        watcher = asyncio.create_task(self._daemon.stop_when_empty())
        log_failure(watcher, "waiting for the end of the last copy")
        try:
            await self._daemon.wait_for_stop()
        finally:
            watcher.cancel()

    async def _begin(self) -> ScratchPlan:
        options, daemon = self._options, self._daemon
        plan = await plan_scratch(options, os.getcwd())
        base = plan.names[0].removesuffix("-1")
        control: ControlAddress = job_control_path(base)
        if options.control is not None:
            control = control_address(options.control)
        await daemon.open_control(control, tokens=control_tokens())
        await daemon.open_metrics()
        await self._make_copies(plan)
        listen = options.listen or (default_listen(base, daemon.listen_access),)
        await daemon.listen(listen)
        return plan

    async def _make_copies(self, plan: ScratchPlan) -> None:
        directory = None if plan.store == MEMORY else _make_stores(plan)
        try:
            for name in plan.names:
                store = f"memory:{plan.size}"
                if directory is not None:
                    store = os.path.join(directory, name)
                table = scratch_table(plan.image, plan.size, store, plan.size_max)
                # The store is ours, and empty: to look for data in it would take longer than all the rest.
                await self._daemon.registry.create(
                    name, table, permissions=permissions(overwrite=True)
                )
        finally:
            if directory is not None:
                shutil.rmtree(directory)
