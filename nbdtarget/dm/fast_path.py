# SPDX-License-Identifier: Apache-2.0
"""The fast path of a mapped device: a READ or WRITE goes to its only target after two comparisons.

Theory of operation. `FastPath.submit` runs once for each request, and it **is** the
`submit` of a mapped device. `op_max` and `end` tell what may take the fast path: READ is 0, WRITE is 1, and -1
sends everything to `slow`. The path is open while the device runs, its table has one target and has not failed,
and no I/O is counted in `nbdtarget.dm.statistics`; only a READ may take it if the table is read-only. Whatever
changes one of these calls `update`.

Stacks. Where a table is one `linear` on another mapped device whose table is one `linear`, and so on, a READ or
WRITE goes from the uppermost to the lowest in one step (`_Chain`), while all of them run. Whenever the fast path
of one changes, those that stand on it look anew (`_uppers`). A bio that does not end at once is in flight in each
device of the chain, so that each can be suspended, and waits for it.

Routes. While the path is open, and READs and WRITEs end in a file, `route` leads to that file: there the compiled fast path of
the server (`nbdtarget.fast`) carries out plain requests without making a bio. It does so while no Python code runs. Only
reads that wait for the disk last longer: they are counted in flight as a bio would be, in each device of a stack. When the path
closes, the route is closed too, and such reads go on.
"""

import errno as errnos
from collections.abc import Callable

from nbdtarget.bio import OP_READ, OP_WRITE, Bio
from nbdtarget.devices.base import Device
from nbdtarget.dm.in_flight import InFlight
from nbdtarget.dm.table import Table
from nbdtarget.fast.compiled import IS_COMPILED, Route
from nbdtarget.targets.base import KILL, REMAPPED

__all__ = ["FastPath", "HasFastPath", "end_with_eio"]


class HasFastPath(Device):
    """A device whose bios may take a fast path; what stands on it may take it, too."""

    fast_path: "FastPath"

    def maybe_route(self) -> Route | None:
        return self.fast_path.route


class _Chain:
    """The way through mapped devices that are one `linear` each. See *Stacks* above."""

    __slots__ = ("_delta", "_device", "_submit", "_through")

    def __init__(
        self, device: Device, delta: int, through: tuple[InFlight, ...]
    ) -> None:
        """Args: device: the lowest. delta: to its offsets. through: of the devices that are left out."""
        self._device = device
        self._submit = device.submit
        self._delta = delta
        self._through = through

    def map(self, bio: Bio) -> int:
        bio.device = self
        return REMAPPED

    def submit(self, bio: Bio) -> None:
        # hot: 0.1 us, where each device that is left out takes 0.2 us.
        bio.offset += self._delta
        bio.device = self._device
        self._submit(bio)
        if bio.status < 0:
            for in_flight in self._through:
                in_flight.enter(bio)


class FastPath:
    """See the module head.

    Args:
        table: the live table, if its fast path may be open now; else None.
        slow: takes what does not go down the fast path.
        failed: called in an except clause, with the bio on which the target raised.
        is_read_only: whether the device may not be written to.
    """

    __slots__ = (
        "_failed",
        "_in_flight",
        "_is_read_only",
        "_lower",
        "_map",
        "_remap",
        "_slow",
        "_table",
        "_through",
        "_uppers",
        "end",
        "op_max",
        "route",
    )

    def __init__(
        self,
        in_flight: InFlight,
        table: Callable[[], Table | None],
        slow: Callable[[Bio], None],
        failed: Callable[[Bio], None],
        is_read_only: Callable[[], bool],
    ) -> None:
        self._in_flight = in_flight
        self._table = table
        self._slow = slow
        self._failed = failed
        self._is_read_only = is_read_only
        self.op_max = -1
        self.end = 0
        self._map: Callable[[Bio], int] = _no_target
        # Where the fast path leads in the end, if to one device; and whom it leaves out.
        self._remap: tuple[Device, int] | None = None
        self._through: tuple[InFlight, ...] = ()
        self._lower: FastPath | None = None
        self._uppers: set[FastPath] = set()  # those that depend on this one
        self.route: Route | None = None

    def submit(self, bio: Bio) -> None:
        # hot: 0.4 us with linear, on top of a device that ends the bio inline (0.4 us).
        if bio.op > self.op_max or bio.offset + bio.length > self.end:
            self._slow(bio)
            return
        try:
            answer = self._map(bio)
        except Exception:
            self._failed(bio)
            return
        if answer == REMAPPED:
            bio.device.submit(bio)
        elif answer == KILL:
            bio.end(errnos.EIO)
        if bio.status < 0:
            self._in_flight.enter(bio)

    def update(self) -> None:
        """Open or close the path, after something has changed that decides about it."""
        table = self._table()
        if table is not None and len(table.targets) == 1:
            self._map = table.targets[0].map
            self.op_max = OP_READ if self._is_read_only() else OP_WRITE
            self.end = table.size
            self._remap = table.targets[0].maybe_remap()
        else:
            self.op_max = -1
            self.end = 0
            self._map = _no_target
            self._remap = None
        self._shorten()
        self._set_route(table)
        for upper in tuple(self._uppers):
            upper.update()

    def _set_route(self, table: Table | None) -> None:
        if self.route is not None:
            self.route.close()
            self.route = None
        if not IS_COMPILED or self.op_max < 0 or table is None:
            return
        if self._remap is None:
            self.route = table.targets[0].maybe_route()
        else:
            device, delta = self._remap
            file = device.maybe_fast_file()
            if file is not None:
                self.route = Route.flat(file, delta, self.end)
                self.route.can_read = self.route.can_write = True
                # A FLUSH goes the same way: to one target, and down to the same file.
                self.route.may_sync = _always
        if self.route is not None:
            self.route.is_read_only = self.op_max < OP_WRITE
            self.route.in_flight = (self._in_flight, *self._through)

    def close(self) -> None:
        """The device is removed: lead nowhere, and refer to nothing of it any more."""
        self._table = _no_table
        self._slow = self._failed = end_with_eio
        self._is_read_only = _read_only
        self.update()

    def _shorten(self) -> None:
        """Leave out the mapped devices below that only pass bios on, too."""
        self._through = ()
        if self._lower is not None:
            self._lower._uppers.discard(self)
            self._lower = None
        if self._remap is None:
            return
        device_below, delta = self._remap
        if not isinstance(device_below, HasFastPath):
            return
        lower = self._lower = device_below.fast_path
        lower._uppers.add(self)
        if (
            lower._remap is None
            or lower.op_max < self.op_max
            or lower.end < self.end + delta
        ):
            return
        device, more = lower._remap
        self._remap = device, delta + more
        self._through = (lower._in_flight, *lower._through)
        self._map = _Chain(device, delta + more, self._through).map


def end_with_eio(bio: Bio) -> None:
    """End a bio of a removed device with EIO."""
    bio.end(errnos.EIO)


def _no_table() -> Table | None:
    return None


def _always() -> bool:
    return True


def _read_only() -> bool:
    return True


def _no_target(bio: Bio) -> int:
    raise AssertionError(f"no fast path for {bio!r}")
