# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget stats`: regions in which a device counts its I/O, as `dmsetup stats` (dmstats) has them.

Each command becomes messages `@stats_...` to the devices; see `nbdtarget.dm.statistics`. There are no
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
        help=f"Program whose regions are meant; default: {PROGRAM}.",
    ),
]
AllPrograms = Annotated[
    bool, typer.Option("--allprograms", help="Take the regions of every program.")
]
RegionId = Annotated[
    int | None,
    typer.Option("--regionid", metavar="NR", min=0, help="Number of one region."),
]
AllRegions = Annotated[
    bool, typer.Option("--allregions", help="Take every region of the program.")
]
AllDevices = Annotated[
    bool, typer.Option("--alldevices", help="Take every device of the server.")
]
NamesOrAll = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME]...",
        help="Names of mapped devices: at least one, or --alldevices.",
    ),
]
NoHeadings = Annotated[
    bool, typer.Option("--noheadings", help="Print neither headings nor padding.")
]
Sectors = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Number of sectors, or a size, for example 64k."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        help="Count I/O in regions of devices, as `dmsetup stats' does.",
    )
    for command in (create, delete, clear, print_, list_, report):
        group.command(command.__name__.rstrip("_"))(command)
    app.add_typer(group, name="stats")


class _Choice(NamedTuple):
    """Which regions of a device are meant. None: those of every program; every region."""

    program: str | None
    region: int | None = None


def create(
    names: NamesOrAll = None,
    start: Sectors = None,
    length: Sectors = None,
    areas: Annotated[
        int | None,
        typer.Option(
            "--areas", min=0, help="Number of areas to divide the region into."
        ),
    ] = None,
    areasize: Annotated[
        str | None,
        typer.Option("--areasize", metavar="SIZE", help="Size of each area."),
    ] = None,
    segments: Annotated[
        bool, typer.Option("--segments", help="Make one region for each target.")
    ] = False,
    programid: Annotated[
        str,
        typer.Option(
            "--programid", metavar="ID", help="Program to which the region belongs."
        ),
    ] = PROGRAM,
    userdata: Annotated[
        str, typer.Option("--userdata", help="Word to keep with the region.")
    ] = "-",
    bounds: Annotated[
        str | None,
        typer.Option(
            "--bounds",
            metavar="TIMES",
            help="Boundaries of a histogram of latencies, for example 100us,1ms,10ms; a number without"
            " a unit is nanoseconds.",
        ),
    ] = None,
    precise: Annotated[
        bool,
        typer.Option("--precise", help="Measure in nanoseconds, not milliseconds."),
    ] = False,
    alldevices: AllDevices = False,
    control: Control = None,
) -> None:
    """Make a region in which I/O is counted. Without options it is the whole device."""
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
    names: NamesOrAll = None,
    regionid: RegionId = None,
    allregions: AllRegions = False,
    programid: ProgramId = None,
    allprograms: AllPrograms = False,
    alldevices: AllDevices = False,
    control: Control = None,
) -> None:
    """Delete regions and their counters."""
    choice = _choose(programid, regionid, all_=allprograms, all_regions=allregions)
    _send_to_each("@stats_delete", names, choice, control, alldevices=alldevices)


def clear(
    names: NamesOrAll = None,
    regionid: RegionId = None,
    allregions: AllRegions = False,
    programid: ProgramId = None,
    allprograms: AllPrograms = False,
    alldevices: AllDevices = False,
    control: Control = None,
) -> None:
    """Set the counters of regions to 0."""
    choice = _choose(programid, regionid, all_=allprograms, all_regions=allregions)
    _send_to_each("@stats_clear", names, choice, control, alldevices=alldevices)


def print_(
    names: Names = None,
    regionid: RegionId = None,
    allregions: AllRegions = False,
    clear: Annotated[
        bool, typer.Option("--clear", help="Set the counters to 0 afterwards.")
    ] = False,
    programid: ProgramId = None,
    allprograms: AllPrograms = False,
    alldevices: AllDevices = False,
    control: Control = None,
) -> None:
    """Print the counters of regions.

    They are those of device-mapper's documentation. Each line: START+LENGTH of an area in sectors; reads, merged, sectors, ms; the same of
    writes; in flight, ms busy, weighted ms, ms reading, ms writing; the histogram.
    """
    choice = _choose(programid, regionid, all_=allprograms, all_regions=allregions)
    verb = "@stats_print_clear" if clear else "@stats_print"
    for region in _regions(names, choice, control):
        print(_send(region.device, [verb, str(region.number)], control))


def list_(
    names: Names = None,
    programid: ProgramId = None,
    allprograms: AllPrograms = False,
    histogram: Annotated[
        bool, typer.Option("--histogram", help="Print the boundaries of histograms.")
    ] = False,
    noheadings: NoHeadings = False,
    control: Control = None,
) -> None:
    """List the regions of devices."""
    choice = _Choice(_program(programid, allprograms=allprograms))
    regions = list(_regions(names, choice, control))
    for line in region_table(regions, histogram=histogram, headings=not noheadings):
        print(line)


def report(
    names: Names = None,
    programid: ProgramId = None,
    allprograms: AllPrograms = False,
    interval: Annotated[
        int,
        typer.Option(
            "--interval", metavar="SECONDS", min=1, help="Seconds between two reports."
        ),
    ] = 1,
    count: Annotated[
        int,
        typer.Option("--count", min=0, help="Number of reports; 0: without end."),
    ] = 1,
    noheadings: NoHeadings = False,
    control: Control = None,
) -> None:
    """Print rates, sizes and latencies of each area.

    The counters are set to 0. The rates assume that the counters were 0 one interval ago, as those of dmstats do. So the
    rates of the first report may be wrong.
    """
    choice = _Choice(_program(programid, allprograms=allprograms))
    nr_printed = 0
    while True:
        regions = list(_regions(names, choice, control))
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


def _choose(
    programid: str | None, regionid: int | None, *, all_: bool, all_regions: bool
) -> _Choice:
    """Return what the options of delete, clear and print choose. Raises: NbdTargetError."""
    program = _program(programid, allprograms=all_)
    if (regionid is None) == (not all_regions):
        raise NbdTargetError("Please specify a --regionid or use --allregions.")
    return _Choice(program, regionid)


def _send_to_each(
    verb: str,
    names: list[str] | None,
    choice: _Choice,
    control: str | None,
    *,
    alldevices: bool,
) -> None:
    """Send a message about each region that is chosen, on the devices that are named, or on all."""
    devices = _names(names, control, alldevices=alldevices)
    for region in _regions(devices, choice, control):
        _send(region.device, [verb, str(region.number)], control)


def _devices(
    names: list[str] | None, control: str | None, *, alldevices: bool
) -> list[m.InfoLine]:
    if not names and not alldevices:
        raise NbdTargetError("Please specify device(s) or use --alldevices.")
    request = m.Info(tuple(names or ()))
    about = " ".join(names or ())
    answer = ask(control, "info", request, m.InfoAnswer, about=about, command="stats")
    if names:
        return list(answer.devices)
    return sorted(answer.devices, key=lambda device: device.name)


def _names(
    names: list[str] | None, control: str | None, *, alldevices: bool
) -> list[str]:
    devices = _devices(names, control, alldevices=alldevices)
    return [device.name for device in devices]


def _regions(
    names: Sequence[str] | None, choice: _Choice, control: str | None
) -> Iterator[Region]:
    """Yield the regions that are chosen, on the devices that are named, or on all.

    Raises: NbdTargetError: a device does not have the region that was chosen.
    """
    for name in names or _names(None, control, alldevices=True):
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
    return next(_regions((name,), _Choice(None, number), control))


def _send(name: str, words: list[str], control: str | None) -> str:
    request = m.Message(name, 0, tuple(words))
    answer = ask(
        control, "message", request, m.MessageAnswer, about=name, command="stats"
    )
    return answer.text or ""


def _ranges(
    device: m.InfoLine,
    start: str | None,
    length: str | None,
    control: str | None,
    *,
    segments: bool,
) -> Iterator[str]:
    """Yield the ranges, in the form of `@stats_create`."""
    if segments:
        request = m.Table((device.name,))
        tables = ask(
            control,
            "table",
            request,
            m.LinesAnswer,
            about=device.name,
            command="stats",
        )
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
            f"stats: {text!r} is not a size: give a number of sectors, or for example 64k"
        ) from None
    if rest:
        raise NbdTargetError(f"stats: {text} is not a multiple of a sector (512 bytes)")
    return sectors


def _options(bounds: str | None, *, is_precise: bool) -> list[str]:
    """Return the options of `@stats_create`. Boundaries of less than a millisecond need precise times."""
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
        raise NbdTargetError(
            f"stats: {word!r} is not a time: give a number of nanoseconds, or for example 10ms"
        )
    return int(match[1]) * _TIMES_NS[match[2]]
