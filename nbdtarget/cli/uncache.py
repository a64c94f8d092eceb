# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget uncache`: a cache is flushed and goes away, while clients go on."""

from typing import Annotated, TypeVar

import typer

from nbdtarget.cli.common import Control, Json, address_for, ask
from nbdtarget.control.messages import Answer, Remove, Request

__all__ = ["register"]

A = TypeVar("A", bound=Answer)

CacheName = Annotated[
    str, typer.Argument(metavar="NAME", help="A mapped device that is a cache.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(uncache)


def uncache(name: CacheName, json: Json = False, control: Control = None) -> int:
    """Write back what is dirty, then let the origin alone be the disk; clients notice nothing.

    Ctrl-C leaves a cache that only writes back; the same command goes on. Exit 130 then.
    """
    import asyncio

    from nbdtarget.cli.progress.uncache import uncache_reporter
    from nbdtarget.porcelain.uncache import UncacheJob

    address = str(address_for(control, Remove(name)))

    def ask_server(verb: str, request: Request, answer_type: type[A]) -> A:
        return ask(address, verb, request, answer_type, about=name)

    with uncache_reporter(name, json=json) as reporter:
        return asyncio.run(UncacheJob(name, ask_server, reporter).run())
