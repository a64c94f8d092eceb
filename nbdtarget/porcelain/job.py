# SPDX-License-Identifier: Apache-2.0
"""One mapped device, served in this process: what clone, cache and export have in common.

Theory of operation. A job goes in three steps. If one of them fails, it leaves the files as they
were before it:

    plan     look at everything; refuse; change nothing
    prepare  make a missing disk, construct the table (which makes missing metadata), listen,
             resume; if any of this fails, what was made is removed again
    serve    tell the user; let I/O go until told to stop; then commit

Nothing is removed any more once the device has been resumed, because clients may have written. The disk
is also served when what the job prints is not read any more.
"""

import asyncio
import contextlib
import errno as errnos
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.common.heap import HEAP
from nbdtarget.common.permissions import Permission
from nbdtarget.common.unix_socket import SocketOptions
from nbdtarget.config.limits import with_limits
from nbdtarget.control.paths import (
    NoSocketError,
    control_address,
    is_control_given,
    job_control_path,
)
from nbdtarget.control.sockets import SocketInUseError
from nbdtarget.control.tokens import control_tokens
from nbdtarget.daemon.activation import PassedSockets, passed_sockets
from nbdtarget.daemon.daemon import Daemon
from nbdtarget.daemon.handover.taker import Offer, maybe_offer
from nbdtarget.daemon.metrics_options import MetricsOptions
from nbdtarget.daemon.process import must_leave_at_once
from nbdtarget.daemon.security import Security, SecurityOptions
from nbdtarget.daemon.serve import default_listen
from nbdtarget.daemon.stop_bounds import StopBounds
from nbdtarget.devices import resolve
from nbdtarget.dm.mapped_device import MappedDevice, State
from nbdtarget.dm.table import Table
from nbdtarget.porcelain.kept import KeptSource
from nbdtarget.server.address import parse_address
from nbdtarget.server.limits import Limits

__all__ = ["Job", "Plan", "Reporter", "make_missing", "remove_made"]

log = logging.getLogger(__name__)


class Plan(Protocol):
    """The plan of a job.

    Attributes:
        name: of the export.
        table: one line.
        missing: path and size of a disk that is to be made, if there is one.
    """

    @property
    def name(self) -> str: ...

    @property
    def table(self) -> str: ...

    @property
    def missing(self) -> tuple[str, int] | None: ...


P = TypeVar("P", bound=Plan)
P_contra = TypeVar("P_contra", bound=Plan, contravariant=True)


class Reporter(Protocol[P_contra]):
    """Tells the user how the job goes."""

    def serving(self, plan: P_contra, uris: list[str]) -> None:
        """Clients can connect now."""
        ...

    def stopping(self) -> None:
        """The job ends: I/O in flight is finished, and the device commits."""
        ...


class Job(Generic[P]):
    """Prepares, serves and ends one mapped device. Subclasses plan and watch.

    A job can be handed over to another process (`nbdtarget.daemon.handover`), which gets the plan: `plan_type` is its type.

    Args:
        listen: addresses; none: a unix socket in the runtime directory.
        control: address of the control socket; None: the one called after the export.
        sockets: modes, owners and groups.
        limits: bounds of the server, by name.
        metrics: where metrics are told alone.
        stop_timeout: seconds, see `StopBounds.of`.
        permissions: what the user allows, see `nbdtarget.common.permissions`.
        read_only: the table is loaded read-only, and clients may not write.
        command: a shell command that runs while the disk is served, see `ClientCommand`.
        security: TLS, and who may attach.
    """

    def __init__(
        self,
        reporter: Reporter[P],
        *,
        listen: tuple[str, ...],
        control: str | None,
        sockets: SocketOptions,
        limits: Mapping[str, Any],
        metrics: MetricsOptions,
        stop_timeout: float | None,
        permissions: frozenset[Permission],
        read_only: bool = False,
        command: str | None = None,
        security: SecurityOptions | None = None,
    ) -> None:
        self._served = reporter
        self._kept = KeptSource()
        self._command = command
        self._took_over = False
        self._passed = PassedSockets()
        self._read_only = read_only
        self._listen = listen
        self._control = control
        self._permissions = permissions
        self._daemon = Daemon(
            with_limits(Limits(), limits),
            bounds=StopBounds.of(stop_timeout),
            sockets=sockets,
            metrics=metrics,
            security=Security(security),
            heap=HEAP,
        )
        self._has_failed = False

    plan_type: type[P]

    def _enter(self) -> None:
        """Set what the process needs before it opens disks: its own, or those of the process that it takes over. Raises: NbdTargetError."""

    async def _plan(self) -> P:
        """Look at everything, change nothing. Raises: NbdTargetError."""
        raise NotImplementedError

    def _loaded(self, device: MappedDevice) -> None:
        """Called when the table is loaded, before it is resumed and before a client may attach. Again, if an upgrade has failed."""

    def _plan_now(self, plan: P) -> P:
        """Return the plan for the process that takes this job over, with what was found since. Nothing is under way."""
        return plan

    def _taken_over(self, plan: P) -> None:
        """This process has taken a job over: take what `_plan_now` has added. `_loaded` is called next."""

    async def _watch(self, device: MappedDevice, plan: P) -> None:
        """Report progress until cancelled, or until the device is removed; may set the daemon's `stop`."""
        raise NotImplementedError

    async def _watch_to_the_end(self, device: MappedDevice, plan: P) -> None:
        """Watch; when a command has removed the device, end the job, with the last of other devices that were made in its server."""
        try:
            await self._watch(device, plan)
        except Exception:
            # A bug of ours. Clients need not lose their disk because of it.
            self._has_failed = True
            log.exception(
                "%s: the command cannot watch its disk any more: it reports nothing more, and its exit status"
                " will be 1",
                device.dm_name,
            )
            self._unwatched()
        event_nr = device.event_nr
        while not device.events.is_closed:
            event_nr = await device.events.wait(event_nr)
        if self._daemon.registry.devices():
            log.warning(
                "%s was removed; other devices are served on, until the last one is removed",
                device.dm_name,
            )
            await self._daemon.stop_when_empty()
        else:
            log.warning(
                "%s was removed, and no device is left to serve", device.dm_name
            )
            self._daemon.stop.set()

    def _unwatched(self) -> None:
        """`_watch` has failed in a way that is not expected, and what it would have done later is not done."""

    async def _ending(self, device: MappedDevice, plan: P) -> None:
        """Called after the stop signal while the device is still up; `_watch` has been cancelled."""

    async def _ended(self, plan: P) -> None:
        """Called when everything is closed; not if something hangs and was left behind."""

    async def run(self) -> int:
        """Do the job and return the exit status. Raises: NbdTargetError: nothing has changed."""
        self._daemon.catch_signals()
        try:
            begun = await self._daemon.until_stopped(self._begin())
            if begun is None:
                # The stop signal came before the first client: nothing has changed.
                return 1 if must_leave_at_once() else 0
            plan, device = begun
            watcher = asyncio.create_task(self._watch_to_the_end(device, plan))
            table: Table | None = None
            try:
                if self._command is not None:
                    await self._daemon.start_command(self._command, plan.name)
                await self._daemon.wait_for_stop()
            finally:
                watcher.cancel()
                await asyncio.wait([watcher])
                try:
                    if not self._daemon.has_handed_over:
                        await self._ending(device, plan)
                finally:
                    if not self._daemon.has_handed_over:
                        self._served.stopping()
                    self._daemon.release_signals()
                    table = device.active
                    await self._daemon.close()
        finally:
            self._daemon.release_signals()
        if not watcher.cancelled():
            watcher.result()
        if _has_lost_any(device, table):
            self._has_failed = True
        if must_leave_at_once():
            # A device that hangs does not answer `_ended` either.
            has_failed = self._has_failed or not self._daemon.is_committed
        else:
            await self._ended(plan)
            has_failed = self._has_failed
        return self._daemon.exit_status(1 if has_failed else 0)

    async def _begin(self) -> tuple[P, MappedDevice]:
        self._enter()
        if (offer := maybe_offer()) is not None:
            return await self._take_over(offer)
        # A mistake in an address is found before anything is made.
        for address in self._listen:
            parse_address(address)
        self._passed = passed_sockets()
        self._daemon.registry.opens.opener = self._kept
        is_served = False
        try:
            try:
                plan = await self._plan()
                device = await self._prepare(plan)
                is_served = True
            finally:
                await self._kept.close()
            self._expect_upgrade(plan, device)
            # With a command, stdout is the command's alone.
            if self._command is None:
                self._report(self._served.serving, plan, self._daemon.uris)
            self._daemon.tell_ready()
        except BaseException:
            if is_served:  # also when the stop signal came just now
                await self._daemon.close()
            raise
        return plan, device

    async def _take_over(self, offer: Offer) -> tuple[P, MappedDevice]:
        """Go on where another process was; nothing is printed again."""
        moved = await self._daemon.take_over(offer)
        plan: P = msgspec.msgpack.decode(moved.plan, type=self.plan_type)
        device = self._daemon.registry.get(plan.name)
        self._taken_over(plan)
        self._loaded(device)
        await self._daemon.go_on(offer)
        self._expect_upgrade(plan, device)
        self._took_over = True
        self._daemon.tell_ready()
        return plan, device

    def _expect_upgrade(self, plan: P, device: MappedDevice) -> None:
        self._daemon.plan = lambda: self._plan_to_hand_over(plan, device)
        self._daemon.reopened = partial(self._loaded, device)

    def _plan_to_hand_over(self, plan: P, device: MappedDevice) -> bytes:
        """Raises: TableError: this job's device was removed; only others are left."""
        if device.state is State.REMOVED:
            raise TableError(
                f"{device.dm_name} was removed, and it is what this command serves",
                errnos.ENXIO,
            )
        now = self._plan_now(plan)
        assert isinstance(now, msgspec.Struct)
        # The other process finds the device by its name, which `rename` may have changed.
        return msgspec.msgpack.encode(msgspec.structs.replace(now, name=device.dm_name))

    async def _prepare(self, plan: P) -> MappedDevice:
        daemon = self._daemon
        made: list[str] = []
        try:
            await self._open_control(plan.name)
            await daemon.open_metrics(self._passed.metrics)
            made += await make_missing(plan)
            device = await daemon.registry.create(plan.name, None)
            made += await daemon.registry.load(
                plan.name,
                plan.table,
                permissions=self._permissions,
                read_only=self._read_only,
            )
            self._loaded(device)
            # Clients may attach from here on, and their requests wait a moment.
            await device.activate()
            fds = self._passed.nbd
            addresses = self._listen or (
                () if fds else (self._default_listen(plan.name),)
            )
            await daemon.listen(addresses, fds)
            await device.resume()
        except BaseException:
            await daemon.close(has_served=False)
            await remove_made(made)
            raise
        return device

    def _default_listen(self, name: str) -> str:
        return default_listen(name, self._daemon.listen_access)

    async def _open_control(self, name: str) -> None:
        """Open the socket that was named, or that of the export's name.

        Raises: NbdTargetError: it is taken; for that of the name: by another job that serves it.
        """
        daemon, tokens = self._daemon, control_tokens()
        passed = self._passed.control
        if passed is not None:
            address = control_address(self._control)
            await daemon.open_control(address, tokens=tokens, passed=passed)
            return
        if self._control is not None:
            await daemon.open_control(control_address(self._control), tokens=tokens)
            return
        if is_control_given(None):
            try:
                await daemon.open_control(control_address(None), tokens=tokens)
            except (SocketInUseError, NoSocketError) as error:
                log.warning(
                    "%s; commands find %s by the control socket of its name instead",
                    error,
                    name,
                )
            else:
                return
        try:
            await daemon.open_control(job_control_path(name))
        except SocketInUseError:
            raise NbdTargetError(
                f"{name}: another server with the control socket {job_control_path(name)}"
                " serves this name already: give another --name"
            ) from None
        except NoSocketError as error:
            if not self._listen:
                raise
            log.warning(
                "%s: there is no control socket, so no command will find %s; to have one, give"
                " --control PATH",
                error,
                name,
            )

    def _report(self, tell: Callable[..., None], *words: object) -> None:
        """Tell the user. The disk is served on if the output is not read any more (`| head`)."""
        try:
            tell(*words)
        except OSError as error:
            log.debug("cannot report: %s", error)


async def make_missing(plan: Plan) -> list[str]:
    """Make the disk that is missing, if there is one; return its path. Raises: ResolveError."""
    if plan.missing is None:
        return []
    path, size = plan.missing
    disk = await resolve.create_device(path, size, sparse=True)
    await disk.close()
    return [path]


async def remove_made(paths: Sequence[str]) -> None:
    """Remove only what this very call has made: another process may have been faster."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            await resolve.remove_created(path)


def _has_lost_any(device: MappedDevice, table: Table | None) -> bool:
    """Whether the last flush or commit of a device has failed. The log says why.

    Args: table: its last one; None: a command has removed the device, or has taken its table away. The targets of a
        removed device answer nothing any more.
    """
    is_removed = device.state is State.REMOVED
    if table is None:
        return device.has_lost_writes or device.is_uncommitted
    if device.has_lost_writes or (not is_removed and table.has_lost_writes()):
        return True
    return not (table.read_only or device.is_flushed)
