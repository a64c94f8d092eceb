# SPDX-License-Identifier: Apache-2.0
"""`Minutes`: what the clients of devices have asked for over the last five minutes, for those who look: what the server has kept
(`nbdtarget.monitor.history`), and what was seen since. `top` draws it; the page does the same in the browser.

Nothing heavy is imported here: commands use it.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import msgspec

from nbdtarget.control.figures import (
    DeviceFigures,
    FiguresAnswer,
    HistoryAnswer,
    OperationFigures,
)

__all__ = ["KEPT_OPERATIONS", "SPAN_S", "Minutes"]

KEPT_OPERATIONS: Final = ("read", "write", "flush", "discard")
SPAN_S: Final = 300.0
SEEN_MAX: Final = 2048  # of one device: five minutes of looks, five a second, and more
BEFORE_S: Final = 0.2  # so old must be what a first look is compared with
SAME_S: Final = 0.5  # what was kept so near to another moment was kept with it
_NOTHING: Final = OperationFigures()


class _Seen(NamedTuple):
    time_s: float
    operations: Mapping[str, OperationFigures]

    @property
    def nr(self) -> int:
        return sum(self.operations.get(each, _NOTHING).nr for each in KEPT_OPERATIONS)


class Minutes:
    """See the module head."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[_Seen]] = {}

    def recall(self, name: str, kept: HistoryAnswer) -> None:
        """Begin with what the server has kept of a device."""
        seen = [_Seen(each.time_s, each.operations) for each in kept.moments]
        self._seen[name] = deque(seen, maxlen=SEEN_MAX)

    def add(self, now: FiguresAnswer) -> None:
        """Look at all devices; those that are gone are forgotten."""
        old, self._seen = self._seen, {}
        for device in now.devices:
            seen = old.get(device.name, deque(maxlen=SEEN_MAX))
            new = _Seen(now.time_s, device.operations)
            if seen and seen[-1].nr > new.nr:
                seen.clear()  # the server was started anew
            seen.append(new)
            while seen[0].time_s < now.time_s - 2 * SPAN_S:
                seen.popleft()
            self._seen[device.name] = seen

    def per_s(self, name: str, nr_cells: int) -> list[float | None]:
        """Return the requests a second in equal parts of the last five minutes, the oldest first; None: of then nothing is known."""
        seen = self._seen.get(name)
        if not seen:
            return [None] * nr_cells
        width, end = SPAN_S / nr_cells, seen[-1].time_s
        edges = [end - width * nr for nr in range(nr_cells, -1, -1)]
        numbers = [_nr_at(seen, each) for each in edges]
        return [
            None if one is None or other is None else (other - one) / width
            for one, other in pairwise(numbers)
        ]

    def before(self, now: FiguresAnswer) -> FiguresAnswer | None:
        """Return figures of a few seconds ago, for the rates of a first look: of what was recalled; None: nothing was."""
        latest = {
            device.name: [
                each
                for each in self._seen.get(device.name, ())
                if each.time_s <= now.time_s - BEFORE_S
            ]
            for device in now.devices
        }
        times = [seen[-1].time_s for seen in latest.values() if seen]
        if not times:
            return None
        time_s = min(times)
        devices = tuple(
            _as_it_was(device, latest[device.name], time_s) for device in now.devices
        )
        return msgspec.structs.replace(now, time_s=time_s, devices=devices)


def _nr_at(seen: Sequence[_Seen], time_s: float) -> float | None:
    """How many requests there had been by then; between two moments they came evenly."""
    later: _Seen | None = None
    for each in reversed(seen):
        if each.time_s <= time_s:
            if later is None:
                return each.nr
            share = (time_s - each.time_s) / (later.time_s - each.time_s)
            return each.nr + share * (later.nr - each.nr)
        later = each
    return None


def _as_it_was(
    device: DeviceFigures, seen: Sequence[_Seen], time_s: float
) -> DeviceFigures:
    """Return the device with the numbers that it had then. A number of which that is not known is as it is now."""
    operations = dict(device.operations)
    for each in reversed(seen):
        if abs(each.time_s - time_s) <= SAME_S:
            for name in operations:
                if name in KEPT_OPERATIONS:
                    operations[name] = each.operations.get(name, _NOTHING)
            break
    return msgspec.structs.replace(device, operations=operations)
