# SPDX-License-Identifier: Apache-2.0
"""Commands that put a table into a device: create, load, clear, wipe_table."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from nbdtarget.cli.common import (
    AcceptOtherDisk,
    Control,
    Moved,
    Name,
    Timeout,
    ask,
    caller_directory,
)
from nbdtarget.cli.concise import parse_concise
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.permissions import Permission, permissions
from nbdtarget.control import messages as m

__all__ = ["register"]

TableOption = Annotated[
    list[str] | None,
    typer.Option(
        "--table",
        metavar="LINE",
        help="A line of the table: START LENGTH TYPE ARGUMENTS..., in sectors of 512 bytes; may be"
        " given more than once.",
    ),
]
TableFile = Annotated[
    str | None,
    typer.Argument(
        metavar="[FILE]",
        help="A file with the table. The table is read from stdin if this is '-', or if neither FILE"
        " nor --table is given.",
    ),
]
ReadOnly = Annotated[
    bool,
    typer.Option(
        "--readonly", "-r", help="Load the table read-only: clients may not write."
    ),
]
Rotational = Annotated[
    bool | None,
    typer.Option(
        "--rotational/--no-rotational",
        help="Tell clients that the disk is rotational, or that it is not. Default: as the disks below.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Make new metadata even though the disk holds data. The data is lost.",
    ),
]
Persist = Annotated[
    bool,
    typer.Option(
        "--persist",
        help="Have the device again after a restart of the server, with the table that it has then. The"
        " server must keep state: `serve --state'.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(create)
    app.command("load")(load)
    app.command("reload", help="Load a table: the same as `load'.")(load)
    app.command()(clear)
    app.command("wipe_table")(wipe_table)


def create(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="Name of the new device, and of its export."
        ),
    ] = None,
    file: TableFile = None,
    table: TableOption = None,
    notable: Annotated[
        bool,
        typer.Option("--notable", "-n", help="Create the device without a table."),
    ] = False,
    readonly: ReadOnly = False,
    uuid: Annotated[
        str,
        typer.Option("--uuid", "-u", metavar="UUID", help="UUID of the new device."),
    ] = "",
    minor: Annotated[
        int | None,
        typer.Option("--minor", "-m", help="Minor number of the new device."),
    ] = None,
    concise: Annotated[
        bool,
        typer.Option(
            "--concise",
            help="Create all devices that one argument, or stdin, describes:"
            " NAME,UUID,MINOR,FLAGS,TABLE[,TABLE...][;...]",
        ),
    ] = False,
    rotational: Rotational = None,
    persist: Persist = False,
    overwrite: Overwrite = False,
    moved: Moved = False,
    accept_other_disk: AcceptOtherDisk = False,
    control: Control = None,
) -> None:
    """Create a mapped device, load its table and resume it. It is an export at once.

    Example: nbdtarget create disk --table '0 2097152 linear /srv/disk.img 0'
    """
    allowed = permissions(
        overwrite=overwrite, moved=moved, accept_other_disk=accept_other_disk
    )
    if concise:
        is_alone = not (table or notable or readonly or uuid or file or persist)
        if not is_alone or minor is not None or rotational is not None:
            raise typer.BadParameter(
                "--concise takes one argument and no other options"
            )
        text = sys.stdin.read() if name is None else name
        _create_concise(text, allowed, control)
        return
    if name is None:
        raise typer.BadParameter("Missing argument 'NAME': name the new device")
    if notable and (table or file):
        raise typer.BadParameter("Give either --notable or a table, not both")
    request = m.Create(
        name=name,
        table=None if notable else _text(table, file),
        uuid=uuid,
        readonly=readonly,
        directory=caller_directory(),
        minor=minor,
        permissions=tuple(allowed),
        rotational=rotational,
        persist=persist,
    )
    ask(control, "create", request, m.Done, about=name)


def _create_concise(
    text: str, allowed: frozenset[Permission], control: str | None
) -> None:
    """Create the devices in order, up to the first that is refused."""
    for device in parse_concise(text):
        request = m.Create(
            name=device.name,
            table="\n".join(device.lines) or None,
            uuid=device.uuid,
            readonly=device.read_only,
            directory=caller_directory(),
            minor=device.minor,
            permissions=tuple(allowed),
        )
        ask(control, "create", request, m.Done, about=device.name)


def load(
    name: Name,
    file: TableFile = None,
    table: TableOption = None,
    readonly: ReadOnly = False,
    overwrite: Overwrite = False,
    moved: Moved = False,
    accept_other_disk: AcceptOtherDisk = False,
    control: Control = None,
) -> None:
    """Load a table into the inactive slot of a device. `resume' makes it live.

    Example: nbdtarget load disk --table '0 2097152 linear /srv/other.img 0'
    """
    request = m.Load(
        name=name,
        table=_text(table, file),
        readonly=readonly,
        directory=caller_directory(),
        permissions=tuple(
            permissions(
                overwrite=overwrite, moved=moved, accept_other_disk=accept_other_disk
            )
        ),
    )
    ask(control, "load", request, m.Done, about=name)


def clear(name: Name, control: Control = None) -> None:
    """Drop the inactive table of a device."""
    ask(control, "clear", m.Clear(name), m.Done, about=name)


def wipe_table(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...", help="Names of mapped devices: at least one."
        ),
    ],
    timeout: Timeout = None,
    control: Control = None,
) -> None:
    """Replace the tables of devices by tables that fail all I/O."""
    for name in names:
        ask(control, "wipe_table", m.WipeTable(name, timeout), m.Done, about=name)


def _text(lines: list[str] | None, file: str | None) -> str:
    if lines and file:
        raise typer.BadParameter(
            "Give the table either with --table or in a file, not both"
        )
    if lines:
        return "\n".join(lines)
    try:
        if file is None or file == "-":
            return sys.stdin.read()
        return Path(file).read_text()
    except OSError as error:
        raise NbdTargetError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise NbdTargetError(
            f"{file or 'stdin'}: is not a table: it is not UTF-8"
        ) from None
