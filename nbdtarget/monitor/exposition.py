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
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric

from nbdtarget.common.clock import sleep
from nbdtarget.control.figures import FiguresAnswer
from nbdtarget.monitor.families import DEVICE, SERVER, TARGET
from nbdtarget.monitor.family import Family, Row

__all__ = ["FigureCollector", "exposition", "rows_of"]

_ESCAPES: Final = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def rows_of(family: Family, figures: FiguresAnswer) -> Iterator[Row]:
    """Return the lines of a family: a suffix of its name, the values of its labels, its value."""
    if family.rows is not None:
        yield from family.rows(figures)
    elif family.of_device is not None:
        for device in figures.devices:
            yield from family.of_device(device)
    elif family.of_target is not None:
        types = family.target.split()
        for device in figures.devices:
            for target in device.targets:
                if target.type in types:
                    value = family.of_target(target)
                    if value is not None:
                        yield "", (device.name, str(target.start)), value


async def exposition(figures: FiguresAnswer, *, has_devices: bool = True) -> bytes:
    """Write everything. Args: has_devices: also the lines of single devices."""
    families = (*SERVER, *DEVICE, *TARGET) if has_devices else SERVER
    pieces = []
    # What the labels look like, by their names and values: most families have those of all devices.
    texts: dict[tuple[str, ...], dict[tuple[str, ...], str]] = {}
    for family in families:
        pieces.append(_text(family, figures, texts.setdefault(family.labels, {})))
        await sleep(0)
    return "".join(pieces).encode() + generate_latest(_process)


def _text(
    family: Family, figures: FiguresAnswer, texts: dict[tuple[str, ...], str]
) -> str:
    name = family.name
    lines = [f"# HELP {name} {family.help}\n# TYPE {name} {family.kind}\n"]
    for suffix, values, value in rows_of(family, figures):
        if not values:
            labels = ""
        elif suffix == "_bucket":  # its label comes after all others
            labels = _labels((*family.labels, "le"), values)
        elif (known := texts.get(values)) is None:
            labels = texts[values] = _labels(family.labels, values)
        else:
            labels = known
        number = repr(value) if isinstance(value, float) else f"{value:d}"
        lines.append(f"{name}{suffix}{labels} {number}\n")
    return "".join(lines)


def _labels(keys: tuple[str, ...], values: tuple[str, ...]) -> str:
    pairs = zip(keys, values, strict=True)
    text = ",".join(f'{key}="{value.translate(_ESCAPES)}"' for key, value in pairs)
    return f"{{{text}}}"


class FigureCollector:
    """The same for the registries of prometheus-client, which write other formats, or send the figures elsewhere.

    Args: figures: returns those of now.
    """

    def __init__(self, figures: Callable[[], FiguresAnswer]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        figures = self._figures()
        for family in (*SERVER, *DEVICE, *TARGET):
            # The library adds the suffix of a counter again.
            name = family.name.removesuffix("_total")
            metric = Metric(name, family.help, family.kind)
            for suffix, values, value in rows_of(family, figures):
                keys = (*family.labels, "le") if suffix == "_bucket" else family.labels
                labels = dict(zip(keys, values, strict=True))
                metric.add_sample(family.name + suffix, labels, value)
            yield metric


_process: Final = CollectorRegistry(auto_describe=False)
ProcessCollector(registry=_process)
