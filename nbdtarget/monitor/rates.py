# SPDX-License-Identifier: Apache-2.0
"""Rates between two moments: what `status` and `top` print of the figures of a server. The page does the same in the browser.

Nothing heavy is imported here: commands use it.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from nbdtarget.common.units import SECTOR
from nbdtarget.control.figures import (
    DeviceFigures,
    FiguresAnswer,
    OperationFigures,
    TargetFigures,
)

__all__ = ["Progress", "Rate", "devices_of", "field", "progress_of", "rates_of"]

_NONE: Final = OperationFigures()


class Rate(NamedTuple):
    """One operation between two moments.

    Attributes:
        per_s, bytes_per_s: requests and bytes a second.
        mean_s: how long a request took on average; None: there was none.
    """

    per_s: float
    bytes_per_s: float
    mean_s: float | None


class Progress(NamedTuple):
    """How far a clone is.

    Attributes:
        done, total: bytes.
        bytes_per_s: copied between the two moments.
        left_s: if it goes on like this; None: it does not, or is complete.
    """

    done: int
    total: int
    bytes_per_s: float
    left_s: float | None


def rates_of(
    device: DeviceFigures, before: DeviceFigures | None, seconds: float
) -> Mapping[str, Rate]:
    """Return the rates by operation. Args: before: the same device `seconds` ago; None: it was not there."""
    rates = {}
    for name, now in device.operations.items():
        then = _NONE if before is None else before.operations.get(name, _NONE)
        nr = now.nr - then.nr
        if nr < 0 or seconds <= 0:
            continue  # the server was started anew meanwhile
        mean_s = (now.time_s - then.time_s) / nr if nr else None
        rates[name] = Rate(
            nr / seconds, (now.nr_bytes - then.nr_bytes) / seconds, mean_s
        )
    return rates


def field(target: TargetFigures, name: str) -> int:
    """Return a number of the target's status; 0: it has none of this name."""
    value = target.fields.get(name)
    return int(value) if isinstance(value, int | float) else 0


def _hydrated(target: TargetFigures) -> int:
    size = field(target, "regions_hydrated") * field(target, "region_size_bytes")
    return min(size, target.length * SECTOR)


def progress_of(
    target: TargetFigures, before: TargetFigures | None, seconds: float
) -> Progress | None:
    """Return how far a clone is; None: it is no clone. Args: as for `rates_of`."""
    if target.type != "clone":
        return None
    done, total = _hydrated(target), target.length * SECTOR
    copied = 0
    if before is not None and before.type == "clone":
        copied = max(0, done - _hydrated(before))
    rate = copied / seconds if seconds > 0 else 0.0
    left_s = (total - done) / rate if rate and done < total else None
    return Progress(done, total, rate, left_s)


def devices_of(figures: FiguresAnswer | None) -> dict[str, DeviceFigures]:
    """Return the devices by name."""
    return {} if figures is None else {each.name: each for each in figures.devices}
