# SPDX-License-Identifier: Apache-2.0
"""`Family`: one metric, and how its lines are made of the figures of a server."""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from nbdtarget.control.figures import DeviceFigures, FiguresAnswer, TargetFigures

__all__ = ["COUNTER", "GAUGE", "HISTOGRAM", "Family", "Row", "Rows"]

COUNTER: Final = "counter"
GAUGE: Final = "gauge"
HISTOGRAM: Final = "histogram"

# What stands behind the name of the family, the values of the labels, and the value. Only histograms have a suffix.
Row = tuple[str, tuple[str, ...], float]
Rows = Iterator[Row]


class Family(NamedTuple):
    """One metric.

    Attributes:
        name: as it is printed, but for the suffixes of a histogram.
        labels: their names. Those of a bucket (`le`) come last.
        rows: of the server.
        of_device: the value, of one device; None: it has none.
        of_target: the value, of one target whose type is `target`.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    rows: Callable[[FiguresAnswer], Rows] | None = None
    of_device: Callable[[DeviceFigures], Rows] | None = None
    target: str = ""
    of_target: Callable[[TargetFigures], float | None] | None = None
