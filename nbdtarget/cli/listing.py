# SPDX-License-Identifier: Apache-2.0
"""Commands that tell: status, table, info, ls, deps, targets, version.

What they print is what dmsetup prints, to the blank: scripts read it.
"""

from collections.abc import Iterable
from typing import Annotated

import typer

from nbdtarget import __version__
from nbdtarget.cli.common import Control, Json, Names, ask, print_json
from nbdtarget.control import messages as m
from nbdtarget.control.client import NoServerError

__all__ = ["register"]

NO_DEVICES = "No devices found"
READ_AHEAD_SECTORS = 256  # what the kernel shows for a disk; nothing here reads ahead

Target = Annotated[
    str | None,
    typer.Option("--target", metavar="TYPE", help="Only targets of this type."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (status, table, info, ls, deps, targets, version):
        app.command()(command)


def status(
    names: Names = None,
    target: Target = None,
    noflush: Annotated[
        bool, typer.Option("--noflush", help="Do not commit first.")
    ] = False,
    json: Json = False,
    control: Control = None,
) -> None:
    """Print the status of the live tables."""
    request = m.Status(tuple(names or ()), target, noflush)
    answer = ask(control, "status", request, m.LinesAnswer, about=_about(names))
    _print_lines(answer, json=json, prefix=len(names or ()) != 1)


def table(
    names: Names = None,
    target: Target = None,
    inactive: Annotated[
        bool, typer.Option("--inactive", help="The inactive tables instead.")
    ] = False,
    config: Annotated[
        bool,
        typer.Option("--config", help="As a configuration file for `serve --config'."),
    ] = False,
    json: Json = False,
    control: Control = None,
) -> None:
    """Print the live tables, as they can be loaded again."""
    if config:
        if json or inactive or target:
            raise typer.BadParameter("--config goes alone")
        _print_config(names, control)
        return
    request = m.Table(tuple(names or ()), target, inactive)
    answer = ask(control, "table", request, m.LinesAnswer, about=_about(names))
    _print_lines(answer, json=json, prefix=len(names or ()) != 1)


def info(
    names: Names = None,
    columns: Annotated[
        bool, typer.Option("--columns", "-c", "-C", help="One line a device.")
    ] = False,
    json: Json = False,
    control: Control = None,
) -> None:
    """Print what is known about devices."""
    request = m.Info(tuple(names or ()))
    answer = ask(control, "info", request, m.InfoAnswer, about=_about(names))
    if json:
        print_json(answer)
    elif not answer.devices:
        print(NO_DEVICES)
    elif columns:
        _print_columns(answer.devices)
    else:
        for device in answer.devices:
            _print_info(device)


def ls(
    target: Target = None,
    tree: Annotated[bool, typer.Option("--tree", help="What stands on what.")] = False,
    json: Json = False,
    control: Control = None,
) -> None:
    """List the devices."""
    answer = ask(control, "info", m.Info((), target), m.InfoAnswer)
    if json:
        print_json(answer)
    elif not answer.devices:
        print(NO_DEVICES)
    elif tree:
        _print_tree(answer.devices, ask(control, "deps", m.Deps(), m.DevicesAnswer))
    else:
        for device in answer.devices:
            print(f"{device.name}\t({device.major}:{device.minor})")


def deps(names: Names = None, json: Json = False, control: Control = None) -> None:
    """Print the devices that the live tables stand on."""
    request = m.Deps(tuple(names or ()))
    answer = ask(control, "deps", request, m.DevicesAnswer, about=_about(names))
    if json:
        print_json(answer)
    elif not answer.devices:
        print(NO_DEVICES)
    else:
        for device in answer.devices:
            prefix = f"{device.name}: " if len(names or ()) != 1 else ""
            below = "".join(f" ({name})" for name in device.deps)
            print(f"{prefix}{len(device.deps)} dependencies\t:{below}")


def targets(json: Json = False, control: Control = None) -> None:
    """List the target types of the server."""
    answer = ask(control, "targets", m.Targets(), m.TargetsAnswer)
    if json:
        print_json(answer)
        return
    for target in answer.targets:
        major, minor, patch = target.version
        print(f"{target.name:<16} v{major}.{minor}.{patch}")


def version(json: Json = False, control: Control = None) -> None:
    """Print the version of this program, and of the server if one is running."""
    try:
        server = ask(control, "version", m.Version(), m.VersionAnswer)
    except NoServerError:
        server = None
    if json:
        print_json(ProgramVersion(__version__, server))
        return
    print(f"nbdtarget version: {__version__}")
    if server is not None:
        print(f"Server version:    {server.version} (process {server.pid})")
        for uri in server.uris:
            print(f"Listening:         {uri.replace('{name}', 'NAME')}")


class ProgramVersion(m.Answer):
    """`server` is None when none is running."""

    version: str
    server: m.VersionAnswer | None


def _about(names: list[str] | None) -> str:
    return " ".join(names or ())


def _print_config(names: list[str] | None, control: str | None) -> None:
    from nbdtarget.config.file import DeviceConfig  # here: the other commands are quick
    from nbdtarget.config.render import render_devices

    about, wanted = _about(names), tuple(names or ())
    tables = ask(control, "table", m.Table(wanted), m.LinesAnswer, about=about)
    infos = ask(control, "info", m.Info(wanted), m.InfoAnswer, about=about)
    lines = {device.name: device.lines for device in tables.devices}
    devices = [
        DeviceConfig(
            info.name,
            "\n".join(
                f"{line.start} {line.length} {line.type} {line.params}".rstrip()
                for line in lines.get(info.name, ())
            ),
            (),
            info.uuid,
            info.read_only,
        )
        for info in infos.devices
    ]
    print(render_devices(devices), end="")


def _print_lines(answer: m.LinesAnswer, *, json: bool, prefix: bool) -> None:
    if json:
        print_json(answer)
        return
    if not answer.devices:
        print(NO_DEVICES)
    for device in answer.devices:
        before = f"{device.name}: " if prefix else ""
        for line in device.lines:
            print(f"{before}{line.start} {line.length} {line.type} {line.params}")
        if not device.lines:
            print(before)


def _print_info(device: m.InfoLine) -> None:
    notes = ["SUSPENDED" if device.state != "ACTIVE" else "ACTIVE"]
    notes += ["(READ-ONLY)"] if device.read_only else []
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
    if device.uuid:
        rows.append(("UUID", device.uuid))
    for key, value in rows:
        print(f"{key + ':':<18} {value}")
    print()


def _print_columns(devices: Iterable[m.InfoLine]) -> None:
    print(
        f"{'Name':<16} {'Maj':>3} {'Min':>3} {'Stat':<4} {'Open':>4} {'Targ':>4}"
        f" {'Event':>6}  UUID"
    )
    for device in devices:
        stat = (
            ("L" if device.live else "-")
            + ("I" if device.inactive else "-")
            + ("s" if device.state != "ACTIVE" else "-")
            + ("r" if device.read_only else "w")
        )
        print(
            f"{device.name:<16} {device.major:>3} {device.minor:>3} {stat:<4}"
            f" {device.open_count:>4} {device.nr_targets:>4} {device.event_nr:>6}"
            f"  {device.uuid}"
        )


def _print_tree(devices: Iterable[m.InfoLine], answer: m.DevicesAnswer) -> None:
    below = {device.name: device.deps for device in answer.devices}
    numbers = {device.name: f"({device.major}:{device.minor})" for device in devices}
    mapper = "/dev/mapper/"
    held = {
        name.removeprefix(mapper)
        for names in below.values()
        for name in names
        if name.startswith(mapper)
    }

    def show(name: str, before: str) -> None:
        for index, dep in enumerate(below.get(name, ())):
            is_last = index == len(below[name]) - 1
            inner = dep.removeprefix(mapper)
            is_mapped = dep.startswith(mapper) and inner in numbers
            text = f"{inner} {numbers[inner]}" if is_mapped else f"({dep})"
            print(f"{before} {'└' if is_last else '├'}─{text}")
            if is_mapped:
                show(inner, before + ("   " if is_last else " │ "))

    for name, number in numbers.items():
        if name not in held:
            print(f"{name} {number}")
            show(name, "")
