# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget scratch` and `nbdtarget reset`: throw-away copies of an image, and how they become pristine again."""

from typing import TYPE_CHECKING, Annotated

import typer

from nbdtarget.cli.common import (
    Control,
    Json,
    NamesNeeded,
    Uuid,
    ask,
    device_names,
)
from nbdtarget.cli.logs import NO_LOG, Log
from nbdtarget.cli.network import NO_NETWORK, Network
from nbdtarget.cli.service import NO_SERVICE, Service, takes_service
from nbdtarget.cli.sizes import maybe_size_option
from nbdtarget.common.units import SECTOR
from nbdtarget.control import messages as m

if TYPE_CHECKING:
    from nbdtarget.porcelain.scratch import ScratchPlan

__all__ = ["register"]

SHOWN_MAX = 5  # URIs on a terminal: the others differ in the number only

Image = Annotated[
    str,
    typer.Argument(metavar="IMAGE", help="Disk to make copies of; it is only read."),
]
Number = Annotated[
    int,
    typer.Option("--number", "-n", metavar="NUMBER", help="Number of copies."),
]
CopyName = Annotated[
    str | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="The exports are called NAME-1, NAME-2, and so on; default: the name of IMAGE without its"
        " suffix.",
    ),
]
Max = Annotated[
    str | None,
    typer.Option(
        "--max",
        metavar="SIZE",
        help="Most bytes that may be written to one copy; more ends with ENOSPC. Default: the size of"
        " IMAGE.",
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="DIR|memory",
        help="Directory for what is written, in files without a name; or memory. Default: the directory"
        " for temporary files.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(takes_service(scratch))
    app.command()(reset)


def scratch(
    image: Image,
    number: Number = 1,
    name: CopyName = None,
    size_max: Max = None,
    store: Store = None,
    service: Service = NO_SERVICE,
    network: Network = NO_NETWORK,
    log: Log = NO_LOG,
    json: Json = False,
    control: Control = None,
) -> int:
    """Serve throw-away writable copies of an image.

    They are there at once and take no space until they are written to. `nbdtarget reset NAME` makes one pristine again
    while clients are attached. Nothing is durable: all is forgotten at a reset and at the end. Ctrl-C ends it.

    Example: nbdtarget scratch golden.img -n 20
    """
    bound = maybe_size_option("--max", size_max, size_min=SECTOR)
    from nbdtarget.daemon.process import run
    from nbdtarget.porcelain.scratch import ScratchJob, ScratchOptions

    options = ScratchOptions(
        image=image,
        nr_copies=number,
        name=name,
        size_max=bound,
        store=store,
        listen=service.addresses,
        control=control,
        stop_timeout=service.stop_timeout,
        sockets=service.sockets(),
        limits=service.limits(),
        metrics=service.metrics_options(),
        security=network.options(),
    )
    log.start()
    serving = _print_json if json else _print
    return run(lambda: ScratchJob(options, serving).run())


def reset(
    names: NamesNeeded = None, uuid: Uuid = None, control: Control = None
) -> None:
    """Make scratch copies pristine again, while clients stay attached.

    All written data is forgotten. A file system on the copy must not be mounted: it would not notice.

    Example: nbdtarget reset golden-3
    """
    found = device_names(names, uuid, control)
    if not found:
        raise typer.BadParameter(
            "Missing argument 'NAME...': name a device, or give --uuid"
        )
    for each in found:
        request = m.Message(each, 0, ("reset",))
        ask(control, "message", request, m.MessageAnswer, about=each, command="reset")


def _uris(plan: "ScratchPlan", uris: list[str]) -> list[list[str]]:
    from nbdtarget.server.listener import export_uri

    return [[export_uri(uri, name) for uri in uris] for name in plan.names]


def _print(plan: "ScratchPlan", uris: list[str]) -> None:
    from nbdtarget.porcelain.scratch import MEMORY

    nr = len(plan.names)
    print(f"{plan.image}: {nr} scratch {'copy' if nr == 1 else 'copies'}: attach to")
    for shown in _uris(plan, uris)[:SHOWN_MAX]:
        print(f"  {shown[0]}")
    if nr > SHOWN_MAX:
        print(f"  … and so on up to {plan.names[-1]}")
    where = (
        "memory" if plan.store == MEMORY else f"files without a name in {plan.store}"
    )
    free = "" if plan.free is None else f", where {_mib(plan.free)} are free"
    print(
        f"Each may take up to {_mib(plan.size_max)}, together {_mib(nr * plan.size_max)}, of {where}{free}."
    )
    print(f"`nbdtarget reset {plan.names[0]}' makes one pristine again.", flush=True)


def _print_json(plan: "ScratchPlan", uris: list[str]) -> None:
    from nbdtarget.cli.progress.common import print_event

    print_event(
        event="serving",
        image=plan.image,
        size=plan.size,
        size_max=plan.size_max,
        store=plan.store,
        copies=[
            {"name": name, "uris": found}
            for name, found in zip(plan.names, _uris(plan, uris), strict=True)
        ],
    )


def _mib(nr_bytes: int) -> str:
    return f"{nr_bytes / (1 << 20):,.0f} MiB"
