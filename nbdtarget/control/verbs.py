# SPDX-License-Identifier: Apache-2.0
"""The verbs of the control socket: one method each, carried out on a registry."""

import errno as errnos
import os
from collections.abc import (
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from typing import Any, Final, Protocol

from nbdtarget import __version__
from nbdtarget.common.access import AccessRules, Rule, parse_rules
from nbdtarget.common.clock import sleep
from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.common.redaction import redacted
from nbdtarget.control import messages as m
from nbdtarget.control.bodies import LINES_AT_ONCE
from nbdtarget.control.fields import Remote
from nbdtarget.control.figures import (
    Events,
    EventsAnswer,
    Figures,
    FiguresAnswer,
    History,
    HistoryAnswer,
    Map,
    MapAnswer,
)
from nbdtarget.control.uncaching import Uncaching
from nbdtarget.devices.base import Device
from nbdtarget.dm.geometry import Geometry
from nbdtarget.dm.mapped_device import MappedDevice, State
from nbdtarget.dm.registry import MAJOR, SUSPEND_S_MAX, Registry
from nbdtarget.targets.base import StatusFields, Target

__all__ = ["DeviceState", "Monitor", "Verbs", "below_lines"]


class Monitor(Protocol):
    """Has the figures of the server; see `nbdtarget.monitor`."""

    async def figures(self, names: Sequence[str]) -> FiguresAnswer:
        """Return the figures of these devices, none: of all. Raises: TableError: there is no such device."""
        ...

    async def events(self, request: Events) -> EventsAnswer:
        """Return what has happened, or wait until something happens."""
        ...

    async def map(self, name: str, nr_cells: int) -> MapAnswer:
        """Return the map of a device. Raises: TableError: it has none now."""
        ...

    async def history(self, name: str) -> HistoryAnswer:
        """Return the last minutes of a device. Raises: TableError: there is no such device."""
        ...

    async def metrics(self) -> bytes:
        """Return all figures as the text that Prometheus reads."""
        ...


# Those that change which devices there are, or their live tables.
SAVED_VERBS: Final = frozenset(
    {"create", "remove", "remove_all", "rename", "resume", "set_uuid", "wipe_table"}
)


class DeviceState(Protocol):
    """Where a server keeps devices that survive it; see `nbdtarget.config.state`."""

    async def keep(self, device: MappedDevice) -> None:
        """Keep a device from now on. Raises: TableError: it is not kept."""

    async def save(self) -> None:
        """Write down what a verb has changed. Raises: TableError: it could not be written."""


class _NoState:
    """The state of a server that was not told where to keep devices."""

    async def keep(self, device: MappedDevice) -> None:
        raise TableError(
            f"this server keeps no state, so {device.dm_name} would not survive it: start the server with"
            " `serve --state DIRECTORY', or put the device into its configuration file",
            errnos.EOPNOTSUPP,
        )

    async def save(self) -> None:
        """Do nothing: this server keeps no devices."""


class Verbs:
    """Each method takes its verb's request and returns its answer.

    Args:
        uris: returns the addresses of the exports; called each time.
        hand_over: hands over to another program, see `upgrade`; None: that is impossible here.
        rules: who may attach to what.
        certificates: returns the files of those in use, and until when each is valid (Unix time); called each time.
        monitor: has the figures of the server; None: nothing has.
    Attributes:
        held: why nothing may be changed now; "": it may.
        state: where devices are kept that survive the server.
        tcp_starts_programs: tables that come over TCP may name disks which a program opens.
    Raises (all methods): TableError, ConstructorError, ResolveError.
    """

    def __init__(
        self,
        registry: Registry,
        uris: Callable[[], Iterable[str]] = tuple,
        hand_over: Callable[[], Awaitable[int]] | None = None,
        rules: AccessRules | None = None,
        certificates: Callable[[], Mapping[str, float]] = dict,
        monitor: Monitor | None = None,
    ) -> None:
        self.monitor = monitor
        self._registry = registry
        self._uris = uris
        self._rules = rules or AccessRules()
        self._certificates = certificates
        self.hand_over = hand_over
        self._changing: list[str] = []
        self._uncaching = Uncaching(self.carry_out)
        self.held = ""
        self.state: DeviceState = _NoState()
        self.tcp_starts_programs = False

    @contextmanager
    def _running(self, verb: str) -> Iterator[None]:
        """Meanwhile `verb` is carried out. Raises: TableError, EBUSY: it would change something, and is held back."""
        if verb in m.LOOKING_VERBS or verb == "upgrade":
            yield
            return
        if self.held:
            raise TableError(f"Device or resource busy: {self.held}", errnos.EBUSY)
        self._changing.append(verb)
        try:
            yield
        finally:
            self._changing.remove(verb)

    async def carry_out(self, verb: str, request: m.Request) -> m.Answer:
        """Carry out a verb by its name, and write down what it has changed of the devices that survive the server.

        Raises: NbdTargetError.
        """
        # Any: each verb takes its own request.
        call: Callable[[Any], Awaitable[m.Answer]] = getattr(self, verb)
        with self._running(verb):
            try:
                answer = await call(request)
            except NbdTargetError:
                # A table that was refused in the end may have been written down.
                await self._save_state(verb)
                raise
            await self._save_state(verb)
            return answer

    async def _save_state(self, verb: str) -> None:
        if verb in SAVED_VERBS:
            await self.state.save()

    async def uncache(self, request: m.Uncache) -> m.UncacheAnswer:
        """Write a cache back and remove it, while clients go on; or stop that."""
        if request.stop:
            return self._uncaching.stop(request.name)
        return await self._uncaching.start(request.name)

    async def upgrade(self, _: m.Upgrade) -> m.UpgradeAnswer:
        """Hand over to a new process, which serves the same devices to the same clients.

        Raises: TableError: everything goes on in this process.
        """
        if self.hand_over is None:
            raise TableError("this server cannot hand over", errnos.EOPNOTSUPP)
        if self._changing:
            raise TableError(
                f"Device or resource busy: {self._changing[0]} is being carried out",
                errnos.EBUSY,
            )
        return m.UpgradeAnswer(await self.hand_over())

    async def create(self, request: m.Create) -> m.Done:
        """Create a device; with a table, load and resume it in one go.

        Durable: with `persist`, that it exists.
        """
        device = await self._registry.create(
            request.name,
            request.table,
            uuid=request.uuid,
            minor=request.minor,
            directory=_absolute(request.directory),
            read_only=request.readonly,
            permissions=frozenset(request.permissions),
            rotational=request.rotational,
        )
        if request.persist:
            try:
                await self.state.keep(device)
            except TableError as error:
                try:
                    await self._registry.remove(device.dm_name)
                except TableError as second:  # a client was faster
                    raise TableError(
                        f"{error}; the device is there and is not kept ({second})",
                        error.errno,
                    ) from error
                raise
        return m.Done()

    async def load(self, request: m.Load) -> m.Done:
        """Construct a table into the inactive slot."""
        await self._registry.load(
            request.name,
            request.table,
            directory=_absolute(request.directory),
            read_only=request.readonly,
            permissions=frozenset(request.permissions),
            keep_open=request.keep_open,
        )
        return m.Done()

    async def clear(self, request: m.Clear) -> m.Done:
        """Drop the inactive table."""
        await self._registry.clear(request.name)
        return m.Done()

    async def suspend(self, request: m.Suspend) -> m.Done:
        """Suspend a device: hold back new requests, finish those in flight, then commit."""
        await self._registry.suspend(
            request.name,
            noflush=request.noflush,
            within_s=_within_s(request.timeout_s),
        )
        return m.Done()

    async def resume(self, request: m.Resume) -> m.Done:
        """Resume a device; an inactive table, if there is one, becomes live first."""
        await self._registry.resume(request.name, within_s=_within_s(request.timeout_s))
        return m.Done()

    async def remove(self, request: m.Remove) -> m.Done:
        """Commit, and remove a device that is not open."""
        await self._registry.remove(
            request.name,
            force=request.force,
            deferred=request.deferred,
            within_s=_within_s(request.timeout_s),
        )
        return m.Done()

    async def remove_all(self, request: m.RemoveAll) -> m.Done:
        """Remove every device that is not open."""
        left = await self._registry.remove_all(
            force=request.force, within_s=_within_s(request.timeout_s)
        )
        return m.Done(tuple(left))

    async def wipe_table(self, request: m.WipeTable) -> m.Done:
        """Replace the table by one that fails all I/O."""
        await self._registry.wipe_table(
            request.name, within_s=_within_s(request.timeout_s)
        )
        return m.Done()

    async def access(self, request: m.Access) -> m.AccessAnswer:
        """Return who may attach to what."""
        rules = self._rules
        names = dict.fromkeys(name for name, _ in self._registry.names())
        names |= dict.fromkeys([*rules.by_export, *rules.by_command])
        exports = tuple(m.ExportAccess(name, _texts(rules.of(name))) for name in names)
        return m.AccessAnswer(exports, _texts(rules.default))

    async def set_access(self, request: m.SetAccess) -> m.Done:
        """Set who may attach to an export from now on."""
        if request.rules is None:
            self._rules.by_command.pop(request.name, None)
            return m.Done()
        try:
            self._rules.by_command[request.name] = parse_rules(request.rules)
        except NbdTargetError as error:
            raise TableError(str(error)) from None
        return m.Done()

    async def set_geometry(self, request: m.SetGeometry) -> m.Done:
        """Set the disk geometry of a device, which `info` shows."""
        geometry = Geometry(
            request.cylinders, request.heads, request.sectors, request.start
        )
        device = self._registry.get(request.name)
        geometry.check()
        device.geometry = geometry
        return m.Done()

    async def set_uuid(self, request: m.SetUuid) -> m.Done:
        """Set the UUID of a device that has none."""
        self._registry.set_uuid(request.name, request.uuid)
        return m.Done()

    async def rename(self, request: m.Rename) -> m.Done:
        """Rename a device."""
        self._registry.rename(request.name, request.new_name)
        self._rules.renamed(request.name, request.new_name)
        return m.Done()

    async def message(self, request: m.Message) -> m.MessageAnswer:
        """Send a message to the target at a sector."""
        device = self._registry.get(request.name)
        return m.MessageAnswer(await device.message(request.sector, request.words))

    async def wait(self, request: m.Wait) -> m.WaitAnswer:
        """Wait until the event number of a device is not `event_nr`."""
        device = self._registry.get(request.name)
        return m.WaitAnswer(await device.events.wait(request.event_nr))

    async def status(self, request: m.Status) -> m.LinesAnswer:
        """Return the status of the live tables."""
        found = []
        for device in self._devices(request.names):
            lines = await device.status_by_name(
                noflush=request.noflush, within_s=SUSPEND_S_MAX
            )
            found.append(await _lines(device, lines, request.target, has_health=True))
        certificates = self._certificates().items()
        return m.LinesAnswer(
            tuple(found), tuple(m.Certificate(*each) for each in certificates)
        )

    async def events(self, request: Events) -> EventsAnswer:
        """Return what has happened, or wait until something happens."""
        if self.monitor is None:
            raise TableError("this server keeps no events", errnos.EOPNOTSUPP)
        return await self.monitor.events(request)

    async def map(self, request: Map) -> MapAnswer:
        """Return what of a clone is copied, or what of a disk is cached."""
        if self.monitor is None:
            raise TableError("this server has no maps", errnos.EOPNOTSUPP)
        return await self.monitor.map(request.name, request.cells)

    async def history(self, request: History) -> HistoryAnswer:
        """Return the last minutes of a device."""
        if self.monitor is None:
            raise TableError("this server keeps no history", errnos.EOPNOTSUPP)
        return await self.monitor.history(request.name)

    async def figures(self, request: Figures) -> FiguresAnswer:
        """Return all numbers of devices, clients and the server."""
        if self.monitor is None:
            raise TableError("this server has no figures", errnos.EOPNOTSUPP)
        figures = await self.monitor.figures(request.names)
        for device in figures.devices:
            device.uncaching = self._uncaching.is_under_way(device.name)
        return figures

    async def table(self, request: m.Table) -> m.LinesAnswer:
        """Return the live tables in the form in which they can be loaded again, but for the secrets of URLs."""
        return await self._tables(request, lambda target: target.table_words())

    async def measure(self, request: m.Measure) -> m.LinesAnswer:
        """Return what the kernel would measure of the live tables for IMA."""
        return await self._tables(request, lambda target: target.measured_words())

    async def _tables(
        self, request: m.Table | m.Measure, words: Callable[[Target], str]
    ) -> m.LinesAnswer:
        found = []
        for device in self._devices(request.names):
            table = device.inactive if request.inactive else device.active
            lines: list[tuple[tuple[int, int, str, str], StatusFields]] = []
            if table is not None:
                lines = [
                    ((*line[:3], redacted(line[3])), {})
                    for line in await table.lines_in_turns(words)
                ]
            found.append(await _lines(device, lines, request.target))
        return m.LinesAnswer(tuple(found))

    async def info(self, request: m.Info) -> m.InfoAnswer:
        """Return state, tables, users and errors of devices."""
        used_by = self._used_by()
        return m.InfoAnswer(
            tuple(
                _info(device, self._registry.deps(device), used_by)
                for device in self._devices(request.names)
                if request.target is None or _has_target(device, request.target)
            )
        )

    async def deps(self, request: m.Deps) -> m.DevicesAnswer:
        """Return the disks and devices that the live tables use."""
        return m.DevicesAnswer(
            tuple(
                m.DeviceDeps(device.dm_name, tuple(self._registry.deps(device)))
                for device in self._devices(request.names)
            )
        )

    async def targets(self, request: m.Targets) -> m.TargetsAnswer:
        """Return the types of targets that the server has."""
        return m.TargetsAnswer(
            tuple(
                m.TargetType(name, target_type.version)
                for name, target_type in self._registry.types.items()
            )
        )

    async def version(self, request: m.Version) -> m.VersionAnswer:
        """Return the version of the server, and where clients connect."""
        return m.VersionAnswer(__version__, os.getpid(), tuple(self._uris()))

    def _used_by(self) -> dict[str, list[str]]:
        """Return the mapped devices that use each device, by its path."""
        used_by: dict[str, list[str]] = {}
        for device in self._registry.devices():
            for below in self._registry.deps(device):
                used_by.setdefault(below, []).append(device.dm_name)
        return used_by

    def _devices(self, names: tuple[str, ...]) -> list[MappedDevice]:
        if not names:
            return self._registry.devices()
        return [self._registry.get(name) for name in names]


def _within_s(timeout_s: float | None) -> float | None:
    """Return the bound as the registry takes it: None is for ever."""
    if timeout_s is None:
        return SUSPEND_S_MAX
    if timeout_s < 0:
        raise TableError("timeout_s must be 0 or more")
    return timeout_s or None


def _absolute(directory: str) -> str:
    if not directory.startswith("/"):
        raise TableError("the caller's directory must be absolute")
    return directory


async def _lines(
    device: MappedDevice,
    lines: Sequence[tuple[tuple[int, int, str, str], StatusFields]],
    target: str | None,
    *,
    has_health: bool = False,
) -> m.DeviceLines:
    """The answer about one device. If it has many lines, the loop has its turns in between."""
    found: list[m.TableLine] = []
    for at in range(0, len(lines), LINES_AT_ONCE):
        if at:
            await sleep(0)
        found += [
            m.TableLine(*line, fields)
            for line, fields in lines[at : at + LINES_AT_ONCE]
            if target is None or line[2] == target
        ]
    return m.DeviceLines(
        device.dm_name,
        tuple(found),
        _failure(device),
        below_lines(device) if has_health else (),
        device.losses if has_health else 0,
    )


def below_lines(device: MappedDevice) -> tuple[m.BelowLine, ...]:
    """Return the state of the disks that the live table uses."""
    return tuple(
        m.BelowLine(
            name=below.name,
            state=below.health.state.value,
            errno=below.health.errno,
            since_s=below.health.since_s,
            errors=dict(below.health.errors),
            last_error=below.health.last_error,
            losses=below.losses,
            remote=_remote(below),
        )
        for below in device.devices_below()
    )


def _remote(below: Device) -> Remote | None:
    traffic = below.traffic
    if traffic is None:
        return None
    return Remote(
        requests=traffic.requests,
        retries=traffic.retries,
        received_bytes=traffic.bytes_received,
        away_s=traffic.away_s,
    )


def _failure(device: MappedDevice) -> str:
    return "" if device.has_table else device.failure


def _has_target(device: MappedDevice, type_name: str) -> bool:
    return device.active is not None and any(
        target.type_name == type_name for target in device.active.targets
    )


def _info(
    device: MappedDevice, deps: list[str], used_by: dict[str, list[str]]
) -> m.InfoLine:
    active = device.active
    mapped = () if active is None else active.devices()
    return m.InfoLine(
        name=device.dm_name,
        uuid=device.uuid,
        state="ACTIVE" if device.state is State.ACTIVE else "SUSPENDED",
        read_only=device.read_only,
        failed=active is not None and active.failed,
        live=active is not None,
        inactive=device.inactive is not None,
        open_count=device.open_count,
        event_nr=device.event_nr,
        major=MAJOR,
        minor=device.minor,
        nr_targets=0 if active is None else len(active.targets),
        size=device.size,
        deps=tuple(deps),
        mapped_deps=tuple(
            dict.fromkeys(d.dm_name for d in mapped if isinstance(d, MappedDevice))
        ),
        used_by=tuple(used_by.get(device.name, ())),
        deferred_remove=device.deferred_remove,
        failure=_failure(device),
        below=below_lines(device),
        losses=device.losses,
        rotational=device.is_rotational,
        said_rotational=device.said_rotational,
        geometry=device.geometry,
    )


def _texts(rules: Sequence[Rule] | None) -> tuple[str, ...] | None:
    return None if rules is None else tuple(rule.text for rule in rules)
