# SPDX-License-Identifier: Apache-2.0
"""One mapped device, served in this process: what clone and cache have in common.

Theory of operation. A stranger trusts this with a disk, so it goes in three steps, and what
fails in one leaves the files as they were before it:

    plan     look at everything; refuse; change nothing
    prepare  make a missing disk, construct the table (which makes missing metadata), listen,
             resume; if any of this fails, what was made is removed again
    serve    tell the user; let I/O go until told to stop; then commit

Nothing is removed any more once the device has been resumed: clients may have written. Nor does
the disk go away because nobody reads what is printed.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.permissions import Permission
from nbdtarget.common.unix_socket import SocketOptions
from nbdtarget.control.paths import (
    NoSocketError,
    control_address,
    control_token,
    is_control_given,
    job_control_path,
)
from nbdtarget.control.sockets import SocketInUseError
from nbdtarget.daemon.daemon import (
    Daemon,
    StopBounds,
    default_listen,
    must_leave_at_once,
    passed_sockets,
)
from nbdtarget.devices import resolve
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.table import Table

__all__ = ["Job", "Plan", "Reporter"]

log = logging.getLogger(__name__)


class Plan(Protocol):
    """What is going to be done.

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
    """Who tells the user."""

    def serving(self, plan: P_contra, uris: list[str]) -> None:
        """Clients may come."""
        ...

    def stopping(self) -> None:
        """I/O in flight ends, the device commits."""
        ...


class Job(Generic[P]):
    """Prepares, serves and ends one mapped device. Subclasses plan and watch.

    Args:
        listen: addresses; none: a unix socket in the runtime directory.
        control: address of the control socket; None: the one called after the export.
        sockets: modes, owners and groups.
        stop_timeout: seconds, see `StopBounds.of`.
        permissions: what the user allows, see `nbdtarget.common.permissions`.
    """

    def __init__(
        self,
        reporter: Reporter[P],
        *,
        listen: tuple[str, ...],
        control: str | None,
        sockets: SocketOptions,
        stop_timeout: float | None,
        permissions: frozenset[Permission],
    ) -> None:
        self._served = reporter
        self._listen = listen
        self._control = control
        self._permissions = permissions
        self._daemon = Daemon(bounds=StopBounds.of(stop_timeout), sockets=sockets)
        self._has_failed = False

    async def _plan(self) -> P:
        """Look at everything, change nothing. Raises: NbdTargetError."""
        raise NotImplementedError

    async def _watch(self, device: MappedDevice, plan: P) -> None:
        """Report progress until cancelled; may set the daemon's `stop`."""
        raise NotImplementedError

    async def _ending(self, device: MappedDevice, plan: P) -> None:
        """Told to stop, and still there: nobody watches any more."""

    async def _ended(self, plan: P) -> None:
        """Everything is closed. Not called if something hangs, and was not waited for."""

    async def run(self) -> int:
        """Do the job; the exit status. Raises: NbdTargetError: nothing has changed."""
        self._daemon.catch_signals()
        try:
            begun = await self._daemon.until_stopped(self._begin())
            if begun is None:
                # Told to stop before anybody was served: nothing has changed.
                return 1 if must_leave_at_once() else 0
            plan, device = begun
            watcher = asyncio.create_task(self._watch(device, plan))
            table: Table | None = None
            try:
                await self._daemon.wait_for_stop()
            finally:
                watcher.cancel()
                await asyncio.wait([watcher])
                try:
                    await self._ending(device, plan)
                finally:
                    self._served.stopping()
                    self._daemon.release_signals()
                    table = device.active
                    await self._daemon.close()
        finally:
            self._daemon.release_signals()
        if not watcher.cancelled() and watcher.exception() is not None:
            raise AssertionError("watching has failed") from watcher.exception()
        if table is not None and _has_lost_any(device, table):
            self._has_failed = True
        if must_leave_at_once():
            # What hangs would hang again, whatever is asked of it.
            return 0 if self._daemon.is_committed and not self._has_failed else 1
        await self._ended(plan)
        return 1 if self._has_failed else 0

    async def _begin(self) -> tuple[P, MappedDevice]:
        plan = await self._plan()
        device = await self._prepare(plan)
        self._report(self._served.serving, plan, self._daemon.uris)
        self._daemon.tell_ready()
        return plan, device

    async def _prepare(self, plan: P) -> MappedDevice:
        daemon = self._daemon
        made: list[str] = []
        try:
            await self._open_control(plan.name)
            if plan.missing is not None:
                path, size = plan.missing
                disk = await resolve.create_device(path, size, sparse=True)
                made.append(path)
                await disk.close()
            device = await daemon.registry.create(plan.name, None)
            made += await daemon.registry.load(
                plan.name, plan.table, permissions=self._permissions
            )
            # Clients may attach from here on, and their requests wait a moment.
            await device.activate()
            fds = passed_sockets()
            addresses = self._listen or (
                () if fds else (self._default_listen(plan.name),)
            )
            await daemon.listen(addresses, fds)
            await device.resume()
        except BaseException:
            await daemon.close()
            # Only what this very call has made: another process may have been faster.
            for path in made:
                with contextlib.suppress(FileNotFoundError):
                    await resolve.remove_created(path)
            raise
        return device

    def _default_listen(self, name: str) -> str:
        return default_listen(name, self._daemon.listen_access)

    async def _open_control(self, name: str) -> None:
        """Open the socket that was named, or that of the export's name.

        Raises: NbdTargetError: it is taken; for that of the name: by another job that serves it.
        """
        daemon, token = self._daemon, control_token()
        if self._control is not None:
            await daemon.open_control(control_address(self._control), token=token)
            return
        if is_control_given(None):
            try:
                await daemon.open_control(control_address(None), token=token)
            except (SocketInUseError, NoSocketError) as error:
                log.warning(
                    "%s; %s has the control socket of its name instead", error, name
                )
            else:
                return
        try:
            await daemon.open_control(job_control_path(name))
        except SocketInUseError:
            raise NbdTargetError(
                f"{name}: is being served already, by the server with the control socket"
                f" {job_control_path(name)}: give another --name"
            ) from None
        except NoSocketError as error:
            if not self._listen:
                raise
            log.warning(
                "no control socket: %s: no command will find %s; give --control PATH",
                error,
                name,
            )

    def _report(self, tell: Callable[..., None], *words: object) -> None:
        """Tell the user; the disk goes on if nobody reads any more (`| head`)."""
        try:
            tell(*words)
        except OSError as error:
            log.debug("cannot report: %s", error)


def _has_lost_any(device: MappedDevice, table: Table) -> bool:
    """Whether the last flush or commit of a device that is closed has failed; the log says why."""
    if table.failed or any(target.has_lost_writes() for target in table.targets):
        return True
    return not (table.read_only or device.is_flushed)
