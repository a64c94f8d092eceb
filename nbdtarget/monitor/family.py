# SPDX-License-Identifier: Apache-2.0
"""`Family`: one metric, and how its lines are made of the figures of a server."""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from nbdtarget.monitor.groups import Column, Groups

__all__ = ["COUNTER", "GAUGE", "HISTOGRAM", "Family", "Row", "Rows", "rows_of"]

COUNTER: Final = "counter"
GAUGE: Final = "gauge"
HISTOGRAM: Final = "histogram"

# A sample: the suffix of the family's name (only histograms have one), the values of the labels, and the value.
Row = tuple[str, tuple[str, ...], float]
Rows = Iterator[Row]


class Family(NamedTuple):
    """One metric.

    Attributes:
        name: as it is printed, but for the suffixes of a histogram.
        labels: their names. Those of a bucket (`le`) come last.
        rows, column: one of them is None. Few metrics have lines of their own making, the others a line for each thing of a group.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    rows: Callable[[Groups], Rows] | None = None
    column: Callable[[Groups], Column] | None = None


def rows_of(family: Family, groups: Groups) -> Rows:
    """Return the lines of a family: a suffix of its name, the values of its labels, its value."""
    if family.rows is not None:
        yield from family.rows(groups)
    elif family.column is not None:
        keys, _, values = family.column(groups)
        for key, value in zip(keys, values, strict=True):
            if value is not None:
                yield "", key, value
