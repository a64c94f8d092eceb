# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget access`: who may attach to which export of a running server."""

from typing import Annotated

import typer

from nbdtarget.cli.common import Control, Json, ask, print_json
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

    A rule is `rw', `ro' or `none', and conditions that must all hold: cert:GLOB, uid:USER, gid:GROUP,
    net:NETWORK, vsock:CID, tls, unix, vsock or any. The first rule that holds decides; if none does, the export does not exist
    for that client. Clients that are attached already stay.
    """
    if clear and (rules or export is None):
        raise typer.BadParameter("--clear takes the name of an export, and no rules")
    if export is not None and (rules or clear):
        request = m.SetAccess(export, None if clear else tuple(rules or ()))
        ask(control, "set_access", request, m.Done, about=export)
        return
    answer = ask(control, "access", m.Access(), m.AccessAnswer)
    if json:
        print_json(answer)
        return
    wanted = [each for each in answer.exports if export in (None, each.name)]
    if export is not None and not wanted:
        print(f"{export}: {_shown(answer.default)}")
    for each in wanted:
        print(f"{each.name}: {_shown(each.rules)}")
    if export is None:
        print(f"other exports: {_shown(answer.default)}")


def _shown(rules: tuple[str, ...] | None) -> str:
    if rules is None:
        return "rw any"
    return "; ".join(rules) or "none any"
