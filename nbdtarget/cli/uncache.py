# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget uncache`: a cache is written back and removed, while clients go on."""

from typing import Annotated, TypeVar

import typer

from nbdtarget.cli.common import Control, Json, address_for, ask
from nbdtarget.control.messages import Answer, Remove, Request

__all__ = ["register"]

A = TypeVar("A", bound=Answer)

CacheName = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Name of a mapped device that is a cache."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(uncache)


def uncache(name: CacheName, json: Json = False, control: Control = None) -> int:
    """Write a cache back and remove it, while clients go on.

    The origin alone is the disk then. After Ctrl-C the cache stays in service: it writes back all dirty blocks and caches no new ones. Run
    uncache again to finish. The exit status is 130 then. If the cache is started again by the `cache'
    command instead, it is an ordinary cache again.
    """
    import asyncio

    from nbdtarget.cli.progress.uncache import uncache_reporter
    from nbdtarget.porcelain import uncache as job

    address = str(address_for(control, Remove(name)))

    def ask_server(verb: str, request: Request, answer_type: type[A]) -> A:
        return ask(address, verb, request, answer_type, about=name, command="uncache")

    with uncache_reporter(name, json=json) as reporter:
        return asyncio.run(job.uncache(name, ask_server, reporter))
