# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget sources`: how disks are named, and whether what that needs is there."""

from typing import TYPE_CHECKING

import msgspec
import typer

from nbdtarget.cli.common import Json
from nbdtarget.devices.registry import SCHEMES

if TYPE_CHECKING:
    from nbdtarget.devices.scheme import Scheme

__all__ = ["register"]


class Source(msgspec.Struct, frozen=True):
    """One kind of names.

    Attributes:
        missing: what has to be installed before it can be used; empty: nothing.
    """

    name: str
    meaning: str
    is_read_only: bool
    needs: tuple[str, ...]
    missing: tuple[str, ...]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(sources)


def sources(json: Json = False) -> int:
    """List what can be a disk: how it is named, and what that needs.

    Each of them can be the source of a clone and a disk of a table. A `-` stands before what cannot be used now, and the line after it says what to install.

    Example: nbdtarget sources
    """
    found = [_source(scheme) for scheme in SCHEMES.values()]
    if json:
        print(msgspec.json.encode(found).decode())
        return 0
    width = max(len(each.name) for each in found)
    for each in found:
        print(f"{'-' if each.missing else '+'} {each.name:{width}}  {each.meaning}")
        for reason in each.missing:
            print(f"  {'':{width}}  {reason}")
    return 0


def _source(scheme: "Scheme") -> Source:
    from importlib.util import find_spec

    from nbdtarget.devices.helper.programs import missing

    reasons = [reason for each in scheme.programs if (reason := missing(each))]
    reasons += [
        f"the Python package {each} is not installed: `pip install nbdtarget[objects]' installs it"
        for each in scheme.modules
        if find_spec(each) is None
    ]
    return Source(
        scheme.syntax,
        scheme.summary,
        scheme.is_read_only(scheme.syntax),
        (*scheme.programs, *scheme.modules),
        tuple(reasons),
    )
