# SPDX-License-Identifier: Apache-2.0
"""The text that Prometheus reads (format 0.0.4), of the figures of one moment.

The families are those of `nbdtarget.monitor.families`, and of the process itself (`process_...`), which prometheus-client
reads from /proc. The lines of the former are written here, because prometheus-client takes 3 us for a line, and a server
of 1,000 devices has 20,000; a test holds what both write to be the same. Each family is written in one step, and between two the
loop serves everything else.

A family has one head with all lines of all devices behind it: Prometheus refuses a text in which a head comes twice.
There are no `_created` lines.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric

from nbdtarget.common.clock import sleep
from nbdtarget.control.figures import FiguresAnswer
from nbdtarget.monitor.families import DEVICE, SERVER, TARGET
from nbdtarget.monitor.family import Family, rows_of
from nbdtarget.monitor.groups import Groups, label_text

__all__ = ["FigureCollector", "exposition"]

LINES_AT_ONCE: Final = 1024


async def exposition(figures: FiguresAnswer, *, has_devices: bool = True) -> bytes:
    """Write everything. Args: has_devices: also the lines of single devices."""
    families = (*SERVER, *DEVICE, *TARGET) if has_devices else SERVER
    groups = Groups(figures)
    pieces = []
    for family in families:
        for piece in _texts(family, groups):
            pieces.append(piece)
            await sleep(0)
    return "".join(pieces).encode() + generate_latest(_process)


def _texts(family: Family, groups: Groups) -> Iterator[str]:
    """Return the head of a family, and its lines: in several parts, if there are many."""
    name = family.name
    head = f"# HELP {name} {family.help}\n# TYPE {name} {family.kind}\n"
    if family.column is None:
        lines = (_line(family, *row) for row in rows_of(family, groups))
    else:
        _, labels, values = family.column(groups)
        # `+ 0` makes a number of a truth.
        lines = (
            f"{name}{text} {value + 0}\n"
            for text, value in zip(labels, values, strict=True)
            if value is not None
        )
    yield head + "".join(islice(lines, LINES_AT_ONCE))
    while text := "".join(islice(lines, LINES_AT_ONCE)):
        yield text


def _line(family: Family, suffix: str, values: tuple[str, ...], value: float) -> str:
    # The label of a bucket comes after all others.
    names = (*family.labels, "le") if suffix == "_bucket" else family.labels
    labels = label_text(names, values) if values else ""
    return f"{family.name}{suffix}{labels} {value + 0}\n"


class FigureCollector:
    """The same for the registries of prometheus-client, which write other formats, or send the figures elsewhere.

    Args: figures: returns those of now.
    """

    def __init__(self, figures: Callable[[], FiguresAnswer]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        groups = Groups(self._figures())
        for family in (*SERVER, *DEVICE, *TARGET):
            # The library adds the suffix of a counter again.
            name = family.name.removesuffix("_total")
            metric = Metric(name, family.help, family.kind)
            for suffix, values, value in rows_of(family, groups):
                keys = (*family.labels, "le") if suffix == "_bucket" else family.labels
                labels = dict(zip(keys, values, strict=True))
                metric.add_sample(family.name + suffix, labels, value)
            yield metric


_process: Final = CollectorRegistry(auto_describe=False)
ProcessCollector(registry=_process)
