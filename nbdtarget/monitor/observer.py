# SPDX-License-Identifier: Apache-2.0
"""`Observer`: takes the figures of a running server.

Nothing is counted here: the numbers are those that the rooms below keep anyway. Of many devices they are taken in
parts, and in between the loop serves everything else.
"""

import asyncio
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from nbdtarget import __version__
from nbdtarget.common.clock import sleep, wall_clock_s
from nbdtarget.common.units import SECTOR
from nbdtarget.control.fields import Certificate
from nbdtarget.control.figures import (
    Bound,
    ClientFigures,
    DeviceFigures,
    Events,
    EventsAnswer,
    FiguresAnswer,
    Histogram,
    HistoryAnswer,
    MapAnswer,
    OperationFigures,
    TargetFigures,
)
from nbdtarget.control.verbs import below_lines
from nbdtarget.devices.base import Device
from nbdtarget.dm.mapped_device import MappedDevice, State
from nbdtarget.dm.registry import Registry
from nbdtarget.fast.compiled import IS_COMPILED
from nbdtarget.monitor.device_map import device_map
from nbdtarget.monitor.event_log import EventLog
from nbdtarget.monitor.history import History
from nbdtarget.monitor.loop_lag import BOUNDS_S, LoopLag
from nbdtarget.server.bounds import BOUNDS
from nbdtarget.server.listener import Listener
from nbdtarget.server.traffic import (
    BOUNDS_NS,
    NR_TOTALS,
    OPERATIONS,
    Counts,
    Traffic,
    sum_of,
)

__all__ = ["Observer"]

EXPOSITION: Final = "nbdtarget.monitor.exposition"
DEVICES_AT_ONCE: Final = 64
CONNECTIONS_AT_ONCE: Final = 64
TARGETS_MAX: Final = 64  # of one device; the rest of a longer table is left out
_NOTHING: Final = [0] * (NR_TOTALS + len(BOUNDS_NS) + 1)  # of an operation


class Observer:
    """See the module head.

    Args: certificates: returns the files of those in use, and until when each is valid (Unix time).
    Attributes: has_device_metrics: metrics tell of each device; with thousands of devices that may be too many lines.
    """

    def __init__(
        self,
        registry: Registry,
        listener: Listener,
        certificates: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self._registry = registry
        self._listener = listener
        self._certificates = certificates
        self.loop_lag = LoopLag(registry.clock)
        self.has_device_metrics = True
        self.event_log = EventLog(registry.clock)
        self._history = History(registry.clock, self._kept_devices, listener.accounts)

    def start(self) -> None:
        """Keep events, and the last minutes of each device, from now on. Must be called on the loop."""
        self.event_log.start()
        self._history.start()

    def stop(self) -> None:
        """The server ends: keep nothing any more, and look at the loop no more."""
        self._history.stop()
        self.loop_lag.stop()
        self.event_log.stop()

    async def figures(self, names: Sequence[str] = ()) -> FiguresAnswer:
        """Take the figures of these devices, none: of all, and of the server.

        Raises: TableError: there is no such device.
        """
        self.loop_lag.start()
        registry, listener = self._registry, self._listener
        devices = [registry.get(name) for name in names] or registry.devices()
        found = []
        for nr, device in enumerate(devices, 1):
            if device.state is not State.REMOVED:  # meanwhile
                found.append(self._device(device))
            if not nr % DEVICES_AT_ONCE:
                await sleep(0)
        counts = await self._all()
        return FiguresAnswer(
            time_s=wall_clock_s(),
            version=__version__,
            fast_path=IS_COMPILED,
            pid=os.getpid(),
            devices=tuple(found),
            clients=tuple(self._clients()),
            bounds=self._bounds(),
            waiting=0 if listener.budget is None else listener.budget.nr_waiters,
            refused=listener.nr_refused,
            refusals=dict(listener.refusals.counts),
            operations=_operations(counts),
            latencies=_latencies(counts),
            latency_bounds_s=tuple(bound / 1e9 for bound in BOUNDS_NS),
            loop_lag=Histogram(tuple(self.loop_lag.counts), self.loop_lag.sum_s),
            loop_lag_bounds_s=BOUNDS_S,
            certificates=tuple(
                Certificate(*each) for each in self._certificates().items()
            ),
        )

    async def events(self, request: Events) -> EventsAnswer:
        """Return what has happened, or wait until something happens."""
        return await self.event_log.after(request.since, request.wait_s)

    async def history(self, name: str) -> HistoryAnswer:
        """Return the last minutes of a device. Raises: TableError: there is no such device."""
        return self._history.of(self._registry.get(name))

    async def map(self, name: str, nr_cells: int) -> MapAnswer:
        """Return the map of a device. Raises: TableError: it has none now."""
        return await device_map(self._registry.get(name), nr_cells)

    async def metrics(self) -> bytes:
        """Return all figures as the text that Prometheus reads."""
        # Here, and in a thread: prometheus-client takes 150 ms to import.
        module = await asyncio.to_thread(importlib.import_module, EXPOSITION)
        text: bytes = await module.exposition(
            await self.figures(), has_devices=self.has_device_metrics
        )
        return text

    def _kept_devices(self) -> list[Device]:
        return list(self._registry.devices())

    async def _all(self) -> Mapping[int, Counts]:
        """Return the requests of all clients."""
        total = Traffic()
        parts = self._listener.accounts.all.parts()
        for at in range(0, len(parts), CONNECTIONS_AT_ONCE):
            some = parts[at : at + CONNECTIONS_AT_ONCE]
            total.add(sum_of(each.counts() for each in some))
            await sleep(0)
        return total.counts()

    def _device(self, device: MappedDevice) -> DeviceFigures:
        active = device.active
        failure = "" if device.has_table else device.failure
        share = self._listener.share_of(device)
        account = self._listener.accounts.of(device)
        return DeviceFigures(
            name=device.dm_name,
            uuid=device.uuid,
            size=device.size,
            suspended=device.state is not State.ACTIVE,
            failed=bool(failure) or (active is not None and active.failed),
            failure=failure,
            event_nr=device.event_nr,
            connections=0 if share is None else share.nr_connections,
            in_flight=0 if share is None else share.nr_requests,
            bytes_in_flight=0 if share is None else share.nr_bytes,
            operations={} if account is None else _operations(account.counts()),
            targets=_targets(device),
            deps=tuple(self._registry.deps(device)),
            below=below_lines(device),
            losses=device.losses,
        )

    def _clients(self) -> "list[ClientFigures]":
        return [
            ClientFigures(
                peer=each.peer,
                device=_name(each.device),
                identity=str(each.identity),
                in_flight=each.in_flight,
                operations={}
                if each.traffic is None
                else _operations(each.traffic.counts()),
            )
            for each in self._listener.clients()
        ]

    def _bounds(self) -> tuple[Bound, ...]:
        limits, budget = self._listener.limits, self._listener.budget
        used = self._listener.used()
        met = {} if budget is None else budget.bounds_met.counts
        return tuple(
            Bound(name, getattr(limits, name), used.get(name), met.get(name))
            for name in BOUNDS
        )


def _name(device: Device | None) -> str:
    return device.dm_name if isinstance(device, MappedDevice) else ""


def _operations(counts: Mapping[int, Counts]) -> dict[str, OperationFigures]:
    found: dict[str, OperationFigures] = {}
    for command, name in OPERATIONS.items():
        numbers = counts.get(command)
        if numbers is not None:
            nr, nr_bytes, taken_ns, nr_failed = numbers[:NR_TOTALS]
            if nr or nr_failed:
                found[name] = OperationFigures(nr, nr_bytes, taken_ns / 1e9, nr_failed)
    return found


def _latencies(counts: Mapping[int, Counts]) -> dict[str, Histogram]:
    found = {}
    for command, name in OPERATIONS.items():
        _, _, taken_ns, _, *buckets = counts.get(command, _NOTHING)
        found[name] = Histogram(tuple(buckets), taken_ns / 1e9)
    return found


def _targets(device: MappedDevice) -> tuple[TargetFigures, ...]:
    table = device.active
    if table is None:
        return ()
    return tuple(
        TargetFigures(
            target.begin // SECTOR,
            target.length // SECTOR,
            target.type_name,
            {} if table.failed else target.status_fields(),
        )
        for target in table.targets[:TARGETS_MAX]
    )
