# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget access`: who may attach to which export of a running server."""

import errno as errnos
import sys
from typing import Annotated

import typer

from nbdtarget.cli.common import (
    Control,
    Json,
    address_for,
    addresses,
    ask,
    command_error,
    print_json,
)
from nbdtarget.common.errors import TableError
from nbdtarget.control import messages as m

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(access)


def access(
    export: Annotated[
        str | None,
        typer.Argument(metavar="[EXPORT]", help="Name of the export; default: all."),
    ] = None,
    rules: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RULE]...",
            help='Rules that hold from now on, for example "rw cert:alice" "ro uid:1000".',
        ),
    ] = None,
    clear: Annotated[
        bool,
        typer.Option(
            "--clear",
            help="Drop the rules that were set by this command: those of the file hold again.",
        ),
    ] = False,
    json: Json = False,
    control: Control = None,
) -> None:
    """Print or set who may attach to an export.

    Rules may be set before there is such an export; a line on stderr says so. If several servers run, the one that has
    EXPORT is asked.

    A rule is `rw', `ro' or `none', and conditions that must all hold: cert:GLOB, uid:USER, gid:GROUP,
    net:NETWORK, vsock:CID, tls, unix, vsock or any. The first rule that holds decides; if none does, the export does not exist
    for that client. Clients that are attached already stay.
    """
    if clear and (rules or export is None):
        raise typer.BadParameter("--clear takes the name of an export, and no rules")
    if export is None:
        answer = ask(control, "access", m.Access(), m.AccessAnswer)
        if json:
            print_json(answer)
            return
        for each in answer.exports:
            print(f"{each.name}: {_shown(each.rules)}")
        print(f"other exports: {_shown(answer.default)}")
        return
    name = export.removeprefix("/dev/mapper/")
    server = str(address_for(control, m.Remove(name)))
    if rules or clear:
        exists = _exists(server, name)
        if not (exists or len(addresses(control)) == 1):
            reason = "no server has an export of this name; for one to come, say where with --control"
            raise command_error("access", name, TableError(reason, errnos.ENXIO))
        request = m.SetAccess(name, None if clear else tuple(rules or ()))
        ask(server, "set_access", request, m.Done, about=name, command="access")
        if not (exists or clear):
            print(
                f"nbdtarget: access {name}: there is no such export; the rules hold for one that is made later",
                file=sys.stderr,
            )
        return
    answer = ask(server, "access", m.Access(), m.AccessAnswer, about=name)
    found = tuple(each for each in answer.exports if each.name == name)
    if not found:
        reason = "there is no such export, and there are no rules for it"
        raise command_error("access", name, TableError(reason, errnos.ENXIO))
    if json:
        print_json(m.AccessAnswer(found, answer.default))
    else:
        print(f"{name}: {_shown(found[0].rules)}")


def _exists(server: str, name: str) -> bool:
    """Whether the server has the export, which may be failed."""
    devices = ask(server, "info", m.Info(), m.InfoAnswer, command="access").devices
    return any(device.name == name for device in devices)


def _shown(rules: tuple[str, ...] | None) -> str:
    if rules is None:
        return "rw any"
    return "; ".join(rules) or "none any"
