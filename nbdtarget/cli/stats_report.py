# SPDX-License-Identifier: Apache-2.0
"""Tables of regions, and of what was counted in them, in the form of dmstats."""

import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.units import SECTOR

__all__ = ["Region", "parse_region", "region_table", "report_table"]

MS_NS: Final = 1_000_000
_LINE: Final = re.compile(
    r"(\d+): (\d+)\+(\d+) (\d+) (\S+) (.*?)( precise_timestamps)?"
    r"(?: histogram:([\d,]+))?"
)
NO_GROUP: Final = "-"
LEFT: Final = ("Name", "ObjType", "ProgID", "#Bins", "Histogram Bounds")


class Region(NamedTuple):
    """A line of `@stats_list`. Sectors; `bounds` in nanoseconds."""

    device: str
    number: int
    start: int
    length: int
    step: int
    program: str
    is_precise: bool
    bounds: tuple[int, ...]

    @property
    def nr_areas(self) -> int:
        return -(-self.length // self.step)

    @property
    def unit_ns(self) -> int:
        return 1 if self.is_precise else MS_NS


def parse_region(device: str, line: str) -> Region:
    """Parse a line of `@stats_list`. Raises: NbdTargetError: it cannot be read."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise NbdTargetError(f"stats: {device}: cannot read {line!r}")
    number, start, length, step = (int(match[each]) for each in range(1, 5))
    is_precise = match[7] is not None
    unit_ns = 1 if is_precise else MS_NS
    bounds = [int(word) * unit_ns for word in (match[8] or "").split(",") if word]
    return Region(
        device, number, start, length, step, match[5], is_precise, tuple(bounds)
    )


def region_table(
    regions: Iterable[Region], *, histogram: bool, headings: bool
) -> list[str]:
    """Return the lines of `stats list`."""
    head = ["Name", "GrpID", "RgID", "ObjType", "RgStart", "RgSize", "#Areas", "ArSize"]
    head += ["#Bins", "Histogram Bounds"] if histogram else ["ProgID"]
    rows = []
    for region in regions:
        row = [
            region.device,
            NO_GROUP,
            str(region.number),
            "region",
            _size(region.start * SECTOR),
            _size(region.length * SECTOR),
            str(region.nr_areas),
            _size(region.step * SECTOR),
        ]
        if histogram:
            bounds = ["0s", *map(_time, region.bounds)] if region.bounds else []
            row += [str(len(bounds)), ",".join(bounds)]
        else:
            row.append(region.program)
        rows.append(row)
    return _table(head, rows, headings=headings)


def report_table(
    counted: Iterable[tuple[Region, str]], interval_s: int, *, headings: bool
) -> list[str]:
    """Return the lines of `stats report`.

    Args: counted: regions, and what `@stats_print` said of each.
    """
    head = ["Name", "GrpID", "RgID", "ObjType", "ArID", "ArStart", "ArSize"]
    head += ["RMrg/s", "WMrg/s", "R/s", "W/s", "RSz/s", "WSz/s", "AvgRqSz"]
    head += ["QSize", "Util%", "AWait", "RdAWait", "WrAWait"]
    rows = [
        [
            region.device,
            NO_GROUP,
            str(region.number),
            "area",
            str(index),
            _size(index * region.step * SECTOR),
            _size(region.step * SECTOR),
            *_meaning(region, line, interval_s),
        ]
        for region, text in counted
        for index, line in enumerate(text.splitlines())
    ]
    return _table(head, rows, headings=headings)


def _meaning(region: Region, line: str, interval_s: int) -> list[str]:
    counters = [int(word) for word in line.split()[1:14]]
    reads, read_merged, read_sectors, read_time = counters[:4]
    writes, write_merged, write_sectors, write_time = counters[4:8]
    busy, queued = counters[9:11]
    unit_ms = region.unit_ns / MS_NS
    sectors, requests = read_sectors + write_sectors, reads + writes

    def rate(number: int) -> str:
        return f"{number / interval_s:.2f}"

    def wait(spent: int, nr: int) -> str:
        return f"{spent * unit_ms / nr if nr else 0:.2f}"

    return [
        *map(rate, (read_merged, write_merged, reads, writes)),
        _size(read_sectors * SECTOR // interval_s),
        _size(write_sectors * SECTOR // interval_s),
        _size(sectors * SECTOR // requests if requests else 0),
        f"{queued * unit_ms / (1000 * interval_s):.2f}",
        f"{busy * unit_ms / (10 * interval_s):.2f}",
        wait(read_time + write_time, requests),
        wait(read_time, reads),
        wait(write_time, writes),
    ]


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, headings: bool
) -> list[str]:
    """Return the lines of a table. Without rows there are none, not even headings, as with dmstats."""
    if not rows:
        return []
    if not headings:
        return [":".join(row) for row in rows]
    widths = [
        max(16 if title == "Name" else len(title), *(len(row[nr]) for row in rows))
        for nr, title in enumerate(head)
    ]
    lines = [" ".join(f"{title:<{w}}" for title, w in zip(head, widths, strict=True))]
    for row in rows:
        cells = [
            f"{cell:<{width}}" if title in LEFT else f"{cell:>{width}}"
            for title, cell, width in zip(head, row, widths, strict=True)
        ]
        lines.append(" ".join(cells))
    return lines


def _size(size: int) -> str:
    """Return bytes in the form of dmstats: 0, 512b, 3.50k, 63.48m."""
    if size < 1024:
        return f"{size}b" if size else "0"
    number = float(size)
    for unit in "bkmgt":
        if number < 1024 or unit == "t":
            break
        number /= 1024
    return f"{number:.2f}{unit}"


def _time(time_ns: int) -> str:
    """Return a boundary in the largest unit that divides it."""
    for unit, unit_ns in (("s", 1000 * MS_NS), ("ms", MS_NS), ("us", 1000)):
        if time_ns % unit_ns == 0:
            return f"{time_ns // unit_ns}{unit}"
    return f"{time_ns}ns"
