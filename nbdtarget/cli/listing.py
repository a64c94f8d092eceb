# SPDX-License-Identifier: Apache-2.0
"""Commands that only show something: status, table, measure, info, ls, deps, targets, target-version, version.

They print exactly what dmsetup prints, because scripts read it.
"""

import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Annotated, Final, TypeVar

import typer

from nbdtarget import __version__
from nbdtarget.cli.columns import READ_AHEAD_SECTORS, describe_fields, report
from nbdtarget.cli.common import (
    Control,
    Json,
    Names,
    Uuid,
    addresses,
    ask,
    device_names,
    print_json,
)
from nbdtarget.cli.concise import ConciseDevice, format_concise
from nbdtarget.cli.health import describe_trouble, name_trouble
from nbdtarget.cli.names import BELOW_NAMES, name_below
from nbdtarget.cli.tree import OPTIONS, draw_tree
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control import messages as m
from nbdtarget.control.client import NoServerError
from nbdtarget.control.figures import Figures, FiguresAnswer

__all__ = ["register"]

NO_DEVICES = "No devices found"

Target = Annotated[
    str | None,
    typer.Option("--target", metavar="TYPE", help="Show only targets of this type."),
]
Columns = Annotated[
    bool,
    typer.Option(
        "--columns", "-c", "-C", help="Print one line for each device, in columns."
    ),
]
Fields = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--options",
        metavar="FIELDS",
        help="Columns to print, separated by commas. With a `+' before them they are added to the"
        " usual ones. `help' lists all columns.",
    ),
]
Sort = Annotated[
    str | None,
    typer.Option(
        "-O",
        "--sort",
        metavar="FIELDS",
        help="Columns to sort by, separated by commas; `-FIELD' sorts downwards.",
    ),
]
Select = Annotated[
    str | None,
    typer.Option(
        "-S",
        "--select",
        metavar="FIELD=VALUE",
        help="Print only devices for which this holds, for example `open>0'. Operators: = != > <"
        " >= <= and =~ for a regular expression. Commas join several conditions.",
    ),
]
NoHeadings = Annotated[
    bool,
    typer.Option("--noheadings", help="Print neither headings nor padding."),
]
NamePrefixes = Annotated[
    bool,
    typer.Option(
        "--nameprefixes", help="Print each value as DM_FIELD='value', for shells."
    ),
]
Separator = Annotated[
    str | None,
    typer.Option("--separator", help="Text between columns; it turns padding off."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (status, table, measure, info, ls, deps, targets, version):
        app.command()(command)
    app.command("target-version")(target_version)


def status(
    names: Names = None,
    target: Target = None,
    noflush: Annotated[
        bool,
        typer.Option("--noflush", help="Do not have the targets commit first."),
    ] = False,
    line: Annotated[
        bool,
        typer.Option("--line", help="Print lines also on a terminal."),
    ] = False,
    uuid: Uuid = None,
    json: Json = False,
    control: Control = None,
) -> None:
    """Print the status of the live tables.

    On a terminal this is a table with sizes, rates of the last second, and how far a clone or a cache is. Elsewhere it is a line for
    each target: START LENGTH TYPE, and what the target says, as dmsetup prints it.
    `--json' gives each value by name and with its unit.
    """
    wanted = device_names(names, uuid, control)
    if sys.stdout.isatty() and not (line or json or target or noflush):
        # Here: they import rich and asyncio, which take longer than a status line.
        from nbdtarget.cli import status_table
        from nbdtarget.common.clock import blocking_sleep

        asked = Figures(wanted)
        before = ask(control, "figures", asked, FiguresAnswer, about=_about(wanted))
        blocking_sleep(status_table.WINDOW_S)
        now = ask(control, "figures", asked, FiguresAnswer, about=_about(wanted))
        status_table.print_status(before, now)
        return
    request = m.Status(wanted, target, noflush)
    answer = ask(control, "status", request, m.LinesAnswer, about=_about(wanted))
    _print_lines(answer, wanted, target, json=json)


def table(
    names: Names = None,
    target: Target = None,
    inactive: Annotated[
        bool,
        typer.Option(
            "--inactive", help="Print the inactive tables, and not the live ones."
        ),
    ] = False,
    concise: Annotated[
        bool,
        typer.Option(
            "--concise", help="Print all of it on one line, for `create --concise'."
        ),
    ] = False,
    config: Annotated[
        bool,
        typer.Option(
            "--config", help="Print it as a configuration file for `serve --config'."
        ),
    ] = False,
    uuid: Uuid = None,
    json: Json = False,
    control: Control = None,
) -> None:
    """Print the live tables, so that they can be loaded again."""
    wanted = device_names(names, uuid, control)
    if config or concise:
        if json or inactive or target or (config and concise):
            raise typer.BadParameter("--config and --concise take no other options")
        devices = _tables(wanted, control)
        print(
            _as_config(devices, _listen(control))
            if config
            else format_concise(each for each, _ in devices)
        )
        return
    request = m.Table(wanted, target, inactive)
    answer = ask(control, "table", request, m.LinesAnswer, about=_about(wanted))
    _print_lines(answer, wanted, target, json=json)


def measure(
    names: Names = None,
    target: Target = None,
    inactive: Annotated[
        bool,
        typer.Option(
            "--inactive", help="Print the inactive tables, and not the live ones."
        ),
    ] = False,
    uuid: Uuid = None,
    json: Json = False,
    control: Control = None,
) -> None:
    """Print what the kernel would measure for IMA.

    As in the kernel, most types of targets measure nothing.
    """
    wanted = device_names(names, uuid, control)
    request = m.Measure(wanted, target, inactive)
    answer = ask(control, "measure", request, m.LinesAnswer, about=_about(wanted))
    _print_lines(answer, wanted, target, json=json)


def info(
    names: Names = None,
    columns: Columns = False,
    fields: Fields = None,
    sort: Sort = None,
    select: Select = None,
    noheadings: NoHeadings = False,
    nameprefixes: NamePrefixes = False,
    separator: Separator = None,
    uuid: Uuid = None,
    json: Json = False,
    control: Control = None,
) -> None:
    """Print state, tables, users and errors of devices."""
    if fields is not None and fields.strip() in ("help", "?"):
        print(describe_fields())
        return
    report_options = (fields, sort, select, noheadings, nameprefixes, separator)
    if any(report_options) and not columns:
        raise typer.BadParameter("These options are for columns: give -c, too")
    wanted = device_names(names, uuid, control)
    answer = ask(control, "info", m.Info(wanted), m.InfoAnswer, about=_about(wanted))
    if json:
        print_json(answer)
    elif not answer.devices:
        print(NO_DEVICES)
    elif columns:
        for line in report(
            answer.devices,
            fields=fields,
            sort=sort,
            select=select,
            headings=not noheadings,
            name_prefixes=nameprefixes,
            separator=separator,
        ):
            print(line)
    else:
        for device in _ordered(answer.devices, wanted):
            _print_info(device)


def ls(
    target: Target = None,
    tree: Annotated[
        bool,
        typer.Option("--tree", help="Show which device uses which, as a tree."),
    ] = False,
    options: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--options",
            metavar="OPTIONS",
            help="The form of each device: devno, devname or blkdevname. With --tree: "
            + ", ".join(OPTIONS)
            + ".",
        ),
    ] = None,
    exec_: Annotated[
        str | None,
        typer.Option(
            "--exec",
            metavar="COMMAND",
            help="Command to run for each device, with /dev/mapper/NAME as its last word.",
        ),
    ] = None,
    json: Json = False,
    control: Control = None,
) -> None:
    """List the devices."""
    answer = ask(control, "info", m.Info((), target), m.InfoAnswer)
    devices = _ordered(answer.devices, ())
    if json:
        print_json(answer)
    elif not devices:
        # There may be devices, and none with such a target: then there is nothing to print.
        if target is None or not ask(control, "info", m.Info(), m.InfoAnswer).devices:
            print(NO_DEVICES)
    elif exec_ is not None:
        _run_for_each(exec_, devices)
    elif tree:
        utf = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        words = options.split(",") if options else ()
        for line in draw_tree(devices, words, utf=utf):
            print(line)
    else:
        what = options or "devno"
        if what not in _NUMBERS:
            known = ", ".join(_NUMBERS)
            raise NbdTargetError(
                f"ls: Option not recognised: {what} (there are: {known})"
            )
        for device in devices:
            number = _NUMBERS[what](device)
            # As dmsetup: another form when only some devices are listed.
            if what == "devno" and target is not None:
                number = number.replace(":", ", ")
            failure = f" failed: {device.failure}" if device.failure else ""
            trouble = failure or name_trouble(device.below)
            print(f"{device.name}\t({number}){trouble}")


_NUMBERS: Final[dict[str, Callable[[m.InfoLine], str]]] = {
    "devno": lambda device: f"{device.major}:{device.minor}",
    "devname": lambda device: device.name,
    "blkdevname": lambda device: f"dm-{device.minor}",
}


def _run_for_each(command: str, devices: Iterable[m.InfoLine]) -> None:
    words = shlex.split(command)
    for device in devices:
        try:
            subprocess.run([*words, f"/dev/mapper/{device.name}"], check=False)
        except OSError as error:
            raise NbdTargetError(f"ls: {words[0]}: {error.strerror}") from None


def deps(
    names: Names = None,
    options: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--options",
            metavar="OPTION",
            help="How to print block devices: devno, devname or blkdevname. Files have only their"
            " path. Default: paths.",
        ),
    ] = None,
    uuid: Uuid = None,
    json: Json = False,
    control: Control = None,
) -> None:
    """Print the disks and devices that the live tables use."""
    if options is not None and options not in BELOW_NAMES:
        known = ", ".join(BELOW_NAMES)
        raise NbdTargetError(
            f"deps: Option not recognised: {options} (there are: {known})"
        )
    wanted = device_names(names, uuid, control)
    request = m.Deps(wanted)
    answer = ask(control, "deps", request, m.DevicesAnswer, about=_about(wanted))
    called: Callable[[str], str] = str
    if options is not None:
        everything = ask(control, "info", m.Info(), m.InfoAnswer).devices
        called = name_below(options, {device.name: device for device in everything})
    if json:
        print_json(answer)
    elif not answer.devices:
        print(NO_DEVICES)
    else:
        for device in _ordered(answer.devices, wanted):
            prefix = f"{device.name}: " if len(wanted) != 1 else ""
            below = "".join(f" ({called(name)})" for name in device.deps)
            print(f"{prefix}{len(device.deps)} dependencies\t:{below}")


def targets(json: Json = False, control: Control = None) -> None:
    """List the types of targets, with their versions."""
    answer = ask(control, "targets", m.Targets(), m.TargetsAnswer)
    if json:
        print_json(answer)
        return
    for target in answer.targets:
        _print_target(target)


def target_version(
    names: Annotated[
        list[str], typer.Argument(metavar="TYPE...", help="Types of targets.")
    ],
    control: Control = None,
) -> None:
    """Print the versions of types of targets."""
    answer = ask(control, "targets", m.Targets(), m.TargetsAnswer)
    types = {target.name: target for target in answer.targets}
    for name in names:
        if name not in types:
            raise NbdTargetError(
                f"target-version: {name}: Invalid argument: there is no such type"
                f" (there are: {', '.join(types)})"
            )
        _print_target(types[name])


def _print_target(target: m.TargetType) -> None:
    major, minor, patch = target.version
    print(f"{target.name:<16} v{major}.{minor}.{patch}")


def version(json: Json = False, control: Control = None) -> None:
    """Print the versions, and where servers listen."""
    from nbdtarget.fast.compiled import IS_COMPILED, describe  # extension modules

    servers = []
    for address in addresses(control):
        with suppress(NoServerError):
            servers.append(ask(str(address), "version", m.Version(), m.VersionAnswer))
    if json:
        first = servers[0] if servers else None
        print_json(ProgramVersion(__version__, IS_COMPILED, first, tuple(servers)))
        return
    print(f"nbdtarget version: {__version__}, {describe()}")
    for server in servers:
        print(f"Server version:    {server.version} (process {server.pid})")
        for uri in server.uris:
            print(f"Listening:         {uri.replace('{name}', 'NAME')}")


class ProgramVersion(m.Answer):
    """`server` is the first of `servers`; None when none is running. `compiled`: with the compiled fast path."""

    version: str
    compiled: bool
    server: m.VersionAnswer | None
    servers: tuple[m.VersionAnswer, ...] = ()


def _about(names: Iterable[str]) -> str:
    return " ".join(names)


D = TypeVar("D", m.InfoLine, m.DeviceLines, m.DeviceDeps)


def _ordered(devices: Iterable[D], wanted: tuple[str, ...]) -> list[D]:
    """Return them in the order in which they were named, or all of them by name."""
    if wanted:
        return list(devices)
    return sorted(devices, key=lambda device: device.name)


def _tables(
    names: tuple[str, ...], control: str | None
) -> list[tuple[ConciseDevice, m.InfoLine]]:
    about = _about(names)
    tables = ask(control, "table", m.Table(names), m.LinesAnswer, about=about)
    infos = ask(control, "info", m.Info(names), m.InfoAnswer, about=about)
    lines = {device.name: device.lines for device in tables.devices}
    for info in infos.devices:
        if info.failure:
            print(
                f"nbdtarget: table: {info.name} could not be opened, so its table is missing"
                f" here: {info.failure}",
                file=sys.stderr,
            )
    return [
        (
            ConciseDevice(
                info.name,
                info.uuid,
                info.minor,
                info.read_only,
                tuple(
                    f"{line.start} {line.length} {line.type} {line.params}"
                    for line in lines.get(info.name, ())
                ),
            ),
            info,
        )
        for info in _ordered(infos.devices, names)
    ]


def _listen(control: str | None) -> list[str]:
    """Where the server listens; nothing if there are several, as each of them listens somewhere else."""
    from nbdtarget.config.render import listen_address

    servers = addresses(control)
    if len(servers) != 1:
        return []
    answer = ask(str(servers[0]), "version", m.Version(), m.VersionAnswer)
    return [listen_address(uri) for uri in answer.uris]


def _as_config(
    devices: Iterable[tuple[ConciseDevice, m.InfoLine]], listen: list[str]
) -> str:
    from nbdtarget.config.file import DeviceConfig  # here: the other commands are quick
    from nbdtarget.config.render import render_config

    configs = [
        DeviceConfig(
            device.name,
            "\n".join(line.rstrip() for line in device.lines),
            (),
            device.uuid,
            device.read_only,
            info.said_rotational,
        )
        for device, info in devices
    ]
    return render_config(configs, listen).removesuffix("\n")


def _print_lines(
    answer: m.LinesAnswer, wanted: tuple[str, ...], target: str | None, *, json: bool
) -> None:
    if json:
        print_json(answer)
        return
    if not answer.devices:
        print(NO_DEVICES)
    for device in _ordered(answer.devices, wanted):
        before = f"{device.name}: " if len(wanted) != 1 else ""
        for line in device.lines:
            print(f"{before}{line.start} {line.length} {line.type} {line.params}")
        if target is not None:
            continue  # a device without such a target has no line at all
        if device.failure:
            print(f"{before}failed: {device.failure}")
        elif not device.lines:
            print(before)


def _print_info(device: m.InfoLine) -> None:
    notes = ["SUSPENDED" if device.state != "ACTIVE" else "ACTIVE"]
    notes += ["(READ-ONLY)"] if device.read_only else []
    notes += ["(DEFERRED REMOVE)"] if device.deferred_remove else []
    notes += ["(FAILED)"] if device.failed else []
    slots = [
        word
        for word, there in (("LIVE", device.live), ("INACTIVE", device.inactive))
        if there
    ]
    rows = [
        ("Name", device.name),
        ("State", " ".join(notes)),
        ("Read Ahead", str(READ_AHEAD_SECTORS)),
        ("Tables present", " & ".join(slots) or "None"),
        ("Open count", str(device.open_count)),
        ("Event number", str(device.event_nr)),
        ("Major, minor", f"{device.major}, {device.minor}"),
        ("Number of targets", str(device.nr_targets)),
    ]
    rows += [("Failure", device.failure)] if device.failure else []
    rows += [("Below", line) for line in describe_trouble(device.below)]
    if device.losses:
        rows.append(
            ("Losses", f"unflushed writes may have been lost {device.losses} times")
        )
    for key, value in rows:
        print(f"{key + ':':<18} {value}")
    if device.uuid:
        print(f"UUID: {device.uuid}")
    print()
