# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget doctor`: what this machine can do, and what is missing for what."""

from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer

from nbdtarget.cli.common import Json

if TYPE_CHECKING:
    from nbdtarget.tools.doctor import DoctorAnswer

__all__ = ["register"]

MARKS: Final = {"yes": "+", "no": "-", "trouble": "!"}
NAMED_TOGETHER: Final = ("clients", "packages")  # those that are there, in one line


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


def doctor(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="Folder for disks, whose file system is looked at, too.",
        ),
    ] = ".",
    json: Json = False,
) -> int:
    """Show what this machine can do for nbdtarget, and what is missing for what.

    In the list `+` is there, `-` is missing, and `!` makes servers fail. It looks at the program, the kernel, the file system of FOLDER, limits, clients and optional packages. Nothing is changed. The exit
    status is 1 if there is a `!`.

    Example: nbdtarget doctor /srv
    """
    from nbdtarget.tools.doctor import examine

    answer = examine(folder)
    if json:
        print(msgspec.json.encode(answer).decode())
    else:
        _print(answer)
    return 1 if answer.has_trouble else 0


def _print(answer: "DoctorAnswer") -> None:
    print(
        f"nbdtarget {answer.version}, Python {answer.python}, Linux {answer.kernel};"
        f" disks in {answer.folder}"
    )
    width = max(len(each.what) for each in answer.findings)
    for about, group in groupby(answer.findings, lambda each: each.about):
        print(f"{about}:")
        findings = list(group)
        if about in NAMED_TOGETHER:
            there = [each.what for each in findings if each.state == "yes"]
            print(f"  + {', '.join(there) or 'none of these'}")
            findings = [each for each in findings if each.state != "yes"]
        for each in findings:
            print(f"  {MARKS[each.state]} {each.what:{width}}  {each.detail}")
            if each.state != "yes":
                print(f"    {'':{width}}  is for {each.needed_for}")
            if each.advice:
                print(f"    {'':{width}}  {each.advice}")
