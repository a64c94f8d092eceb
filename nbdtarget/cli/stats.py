# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget stats`: regions in which a device counts its I/O, as `dmsetup stats` (dmstats) has them.

A person's words become the messages `@stats_…` to the devices; see `nbdtarget.dm.statistics`. There are no
groups of regions here: `create --segments` makes one region for each target, and no group of them.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Final, NamedTuple

import typer

from nbdtarget.cli.common import Control, Names, ask
from nbdtarget.cli.stats_report import (
    Region,
    parse_region,
    region_table,
    report_table,
)
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.units import SECTOR, parse_sectors
from nbdtarget.control import messages as m

__all__ = ["register"]

PROGRAM: Final = "dmstats"
MS_NS: Final = 1_000_000
_TIME: Final = re.compile(r"(\d{1,18})(ns|us|ms|s|)", re.ASCII)
_TIMES_NS: Final = {"": 1, "ns": 1, "us": 1000, "ms": MS_NS, "s": 1000 * MS_NS}

ProgramId = Annotated[
    str | None,
    typer.Option(
        "--programid",
        metavar="ID",
        help=f"Regions that were made with this ID. Default: {PROGRAM}.",
    ),
]
AllPrograms = Annotated[
    bool, typer.Option("--allprograms", help="Regions of every program.")
]
RegionId = Annotated[
    int | None, typer.Option("--regionid", metavar="NR", min=0, help="This region.")
]
AllRegions = Annotated[
    bool, typer.Option("--allregions", help="Every region of the program.")
]
AllDevices = Annotated[bool, typer.Option("--alldevices", help="Every device.")]
NoHeadings = Annotated[
    bool, typer.Option("--noheadings", help="No headings, no padding.")
]
Sectors = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Sectors, or as in 64k.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        help="Count I/O in regions of devices, as `dmsetup stats' does."
    )
    for command in (create, delete, clear, print_, list_, report):
        group.command(command.__name__.rstrip("_"))(command)
    app.add_typer(group, name="stats")


class _Choice(NamedTuple):
    """Which regions are meant, of the devices that are."""

    names: Sequence[str]
    program: str | None
    region: int | None = None


def create(
    names: Names = None,
    start: Sectors = None,
    length: Sectors = None,
    areas: Annotated[
        int | None, typer.Option("--areas", min=0, help="Cut it into so many areas.")
    ] = None,
    areasize: Annotated[
        str | None, typer.Option("--areasize", metavar="SIZE", help="Of each area.")
    ] = None,
    segments: Annotated[
        bool, typer.Option("--segments", help="A region for each target.")
    ] = False,
    programid: Annotated[str, typer.Option("--programid", metavar="ID")] = PROGRAM,
    userdata: Annotated[
        str, typer.Option("--userdata", help="A word to be kept with the region.")
    ] = "-",
    bounds: Annotated[
        str | None,
        typer.Option(
            "--bounds",
            metavar="TIMES",
            help="Count latencies between these: 100us,1ms,10ms. Without a unit: ns.",
        ),
    ] = None,
    precise: Annotated[
        bool, typer.Option("--precise", help="Times in nanoseconds, not milliseconds.")
    ] = False,
    alldevices: AllDevices = False,
    control: Control = None,
) -> None:
    """Make a region in which I/O is counted; the whole device if nothing is said."""
    if areas is not None and areasize is not None:
        raise NbdTargetError("Please specify one of --areas and --areasize.")
    if segments and (start or length):
        raise NbdTargetError("Please specify --segments, or --start and --length.")
    # As dmstats: none and 0 are one area.
    step = f"/{areas or 1}"
    if areasize is not None and _sectors(areasize):
        step = str(_sectors(areasize))
    options = _options(bounds, is_precise=precise)
    tail = [step, str(len(options)), *options, programid, userdata]
    for device in _devices(names, control, alldevices=alldevices):
        for range_ in _ranges(device, start, length, control, segments=segments):
            number = _send(device.name, ["@stats_create", range_, *tail], control)
            region = _find(device.name, int(number), control)
            print(
                f"{device.name}: Created new region with {region.nr_areas} area(s)"
                f" as region ID {number}"
            )


def delete(
    names: Names = None,
    regionid: RegionId = None,
    allregions: AllRegions = False,
    programid: ProgramId = None,
    allprograms: AllPrograms = False,
    alldevices: AllDevices = False,
    control: Control = None,
) -> None:
    """Delete regions: their counters are gone, and counting costs nothing any more."""
    program = _program(programid, allprograms=allprograms)
    _check_choice(regionid, all_regions=allregions)
    devices = _names(names, control, alldevices=alldevices)
    for region in _regions(_Choice(devices, program, regionid), control):
        _send(region.device, ["@stats_delete", str(region.number)], control)


def clear(
    names: Names = None,
    regionid: RegionId = None,
    allregions: AllRegions = False,
    programid: ProgramId = None,
    allprograms: AllPrograms = False,
    alldevices: AllDevices = False,
    control: Control = None,
) -> None:
    """Set the counters of regions to 0."""
    program = _program(programid, allprograms=allprograms)
    _check_choice(regionid, all_regions=allregions)
    devices = _names(names, control, alldevices=alldevices)
    for region in _regions(_Choice(devices, program, regionid), control):
        _send(region.device, ["@stats_clear", str(region.number)], control)


def print_(
    names: Names = None,
    regionid: RegionId = None,
    allregions: AllRegions = False,
    clear: Annotated[
        bool, typer.Option("--clear", help="And set the counters to 0.")
    ] = False,
    programid: ProgramId = None,
    allprograms: AllPrograms = False,
    alldevices: AllDevices = False,
    control: Control = None,
) -> None:
    """Print the counters of regions as device-mapper's documentation describes them.

    Each line: START+LENGTH of an area in sectors; reads, merged, sectors, ms; the same of
    writes; in flight, ms busy, weighted ms, ms reading, ms writing; the histogram.
    """
    program = _program(programid, allprograms=allprograms)
    _check_choice(regionid, all_regions=allregions)
    verb = "@stats_print_clear" if clear else "@stats_print"
    for region in _regions(_Choice(names or (), program, regionid), control):
        print(_send(region.device, [verb, str(region.number)], control))


def list_(
    names: Names = None,
    programid: ProgramId = None,
    allprograms: AllPrograms = False,
    histogram: Annotated[
        bool, typer.Option("--histogram", help="The boundaries of histograms.")
    ] = False,
    noheadings: NoHeadings = False,
    control: Control = None,
) -> None:
    """List the regions; of all devices if none is named."""
    program = _program(programid, allprograms=allprograms)
    regions = list(_regions(_Choice(names or (), program), control))
    for line in region_table(regions, histogram=histogram, headings=not noheadings):
        print(line)


def report(
    names: Names = None,
    programid: ProgramId = None,
    allprograms: AllPrograms = False,
    interval: Annotated[int, typer.Option("--interval", metavar="SECONDS", min=1)] = 1,
    count: Annotated[
        int,
        typer.Option("--count", min=0, help="Reports, one an interval; 0: endless."),
    ] = 1,
    noheadings: NoHeadings = False,
    control: Control = None,
) -> None:
    """Print what the counters of each area mean, and set them to 0.

    Rates take it that the counters were at 0 one interval ago, as dmstats: the first report may not
    be of one interval.
    """
    program = _program(programid, allprograms=allprograms)
    nr_printed = 0
    while True:
        regions = list(_regions(_Choice(names or (), program), control))
        counted = [
            (
                region,
                _send(
                    region.device, ["@stats_print_clear", str(region.number)], control
                ),
            )
            for region in regions
        ]
        if nr_printed and counted:
            print()
        for line in report_table(counted, interval, headings=not noheadings):
            print(line, flush=True)
        nr_printed += 1
        if nr_printed == count:
            break
        _wait(interval)


def _wait(seconds: int) -> None:
    import asyncio  # here: the other commands are quick

    from nbdtarget.common.clock import sleep

    asyncio.run(sleep(seconds))


def _program(programid: str | None, *, allprograms: bool) -> str | None:
    if allprograms and programid is not None:
        raise NbdTargetError("Please supply one of --programid and --allprograms.")
    return None if allprograms else programid or PROGRAM


def _check_choice(regionid: int | None, *, all_regions: bool) -> None:
    if (regionid is None) == (not all_regions):
        raise NbdTargetError("Please specify a --regionid or use --allregions.")


def _devices(
    names: list[str] | None, control: str | None, *, alldevices: bool
) -> list[m.InfoLine]:
    if not names and not alldevices:
        raise NbdTargetError("Please specify device(s) or use --alldevices.")
    request = m.Info(tuple(names or ()))
    about = " ".join(names or ())
    answer = ask(control, "info", request, m.InfoAnswer, about=about)
    if names:
        return list(answer.devices)
    return sorted(answer.devices, key=lambda device: device.name)


def _names(
    names: list[str] | None, control: str | None, *, alldevices: bool
) -> list[str]:
    devices = _devices(names, control, alldevices=alldevices)
    return [device.name for device in devices]


def _regions(choice: _Choice, control: str | None) -> Iterator[Region]:
    """Raises: NbdTargetError: a device does not have the region that was chosen."""
    names = list(choice.names) or _names(None, control, alldevices=True)
    for name in names:
        words = ["@stats_list", *([] if choice.program is None else [choice.program])]
        listed = _send(name, words, control)
        found = [parse_region(name, line) for line in listed.splitlines()]
        if choice.region is not None:
            found = [each for each in found if each.number == choice.region]
            if not found:
                raise NbdTargetError(
                    f"stats: {name}: Region ID {choice.region} does not exist"
                )
        yield from found


def _find(name: str, number: int, control: str | None) -> Region:
    return next(_regions(_Choice((name,), None, number), control))


def _send(name: str, words: list[str], control: str | None) -> str:
    request = m.Message(name, 0, tuple(words))
    answer = ask(control, "message", request, m.MessageAnswer, about=name)
    return answer.text or ""


def _ranges(
    device: m.InfoLine,
    start: str | None,
    length: str | None,
    control: str | None,
    *,
    segments: bool,
) -> Iterator[str]:
    """What `@stats_create` is told."""
    if segments:
        request = m.Table((device.name,))
        tables = ask(control, "table", request, m.LinesAnswer, about=device.name)
        for line in tables.devices[0].lines:
            yield f"{line.start}+{line.length}"
    elif start is None and length is None:
        yield "-"
    else:
        begin = 0 if start is None else _sectors(start)
        rest = device.size // SECTOR - begin
        yield f"{begin}+{rest if length is None else _sectors(length)}"


def _sectors(text: str) -> int:
    try:
        sectors, rest = divmod(parse_sectors(text), SECTOR)
    except ValueError:
        raise NbdTargetError(
            f"stats: {text!r} is no size: sectors, or as in 64k"
        ) from None
    if rest:
        raise NbdTargetError(f"stats: {text} is not whole sectors of 512 bytes")
    return sectors


def _options(bounds: str | None, *, is_precise: bool) -> list[str]:
    """The options of `@stats_create`. Boundaries that are not whole milliseconds need precise times."""
    histogram = []
    if bounds is not None:
        times_ns = [_time_ns(word) for word in bounds.split(",")]
        is_precise = is_precise or any(each % MS_NS for each in times_ns)
        unit_ns = 1 if is_precise else MS_NS
        numbers = ",".join(str(each // unit_ns) for each in times_ns)
        histogram = [f"histogram:{numbers}"]
    return (["precise_timestamps"] if is_precise else []) + histogram


def _time_ns(word: str) -> int:
    match = _TIME.fullmatch(word.strip())
    if match is None:
        raise NbdTargetError(f"stats: {word!r} is no time: nanoseconds, or as in 10ms")
    return int(match[1]) * _TIMES_NS[match[2]]
