# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget clone`: one line that makes a disk out of a source."""

from typing import TYPE_CHECKING, Annotated

import typer

from nbdtarget.cli.common import AcceptOtherDisk, Control, Json, Moved
from nbdtarget.cli.serve import (
    ControlGroup,
    ControlMode,
    ControlOwner,
    Listen,
    SocketGroup,
    SocketMode,
    SocketOwner,
    StopTimeout,
)
from nbdtarget.cli.sizes import maybe_size_option, region_size_option
from nbdtarget.devices.registry import scheme_list

if TYPE_CHECKING:
    from nbdtarget.porcelain.clone import CloneOptions

__all__ = ["register"]


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help=f"Disk to copy from: {scheme_list()}. It is only ever read.",
    ),
]
Dest = Annotated[
    str,
    typer.Argument(
        metavar="DEST", help="What becomes the disk; a missing file is made."
    ),
]
ExportName = Annotated[
    str | None,
    typer.Option("--name", metavar="N", help="Export name; default: from DEST."),
]
Metadata = Annotated[
    str | None,
    typer.Option(
        "--metadata",
        metavar="FILE",
        help="What is copied already; default: DEST.nbdtarget. Made if missing.",
    ),
]
RegionSize = Annotated[
    str, typer.Option("--region-size", metavar="SIZE", help="4K to 1G.")
]
NoHydration = Annotated[
    bool, typer.Option("--no-hydration", help="Copy only what writes make necessary.")
]
ExitWhenHydrated = Annotated[
    bool,
    typer.Option("--exit-when-hydrated", help="End when DEST alone is the disk."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start anew over data that DEST holds.")
]
HydrateOnRead = Annotated[
    bool,
    typer.Option("--hydrate-on-read", help="Copy what clients read before the rest."),
]
HydrationRate = Annotated[
    str | None,
    typer.Option(
        "--hydration-rate",
        metavar="SIZE",
        help="Bytes a second that the background copies at most, as 100M.",
    ),
]
ThenLinear = Annotated[
    bool,
    typer.Option(
        "--then-linear",
        help="When all is copied, serve DEST alone, and let SOURCE go; clients notice nothing.",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(clone)


def clone(
    source: Source,
    dest: Dest,
    name: ExportName = None,
    metadata: Metadata = None,
    region_size: RegionSize = "64K",
    listen: Listen = None,
    no_hydration: NoHydration = False,
    hydrate_on_read: HydrateOnRead = False,
    hydration_rate: HydrationRate = None,
    then_linear: ThenLinear = False,
    exit_when_hydrated: ExitWhenHydrated = False,
    overwrite: Overwrite = False,
    moved: Moved = False,
    accept_other_disk: AcceptOtherDisk = False,
    socket_mode: SocketMode = None,
    socket_owner: SocketOwner = None,
    socket_group: SocketGroup = None,
    control_mode: ControlMode = None,
    control_owner: ControlOwner = None,
    control_group: ControlGroup = None,
    stop_timeout: StopTimeout = None,
    verbose: Verbose = False,
    json: Json = False,
    control: Control = None,
) -> int:
    """Serve DEST as a copy of SOURCE at once, and copy it in the background.

    Stop it at any time; the same line goes on where it was.
    """
    region_bytes = region_size_option("--region-size", region_size)
    rate = maybe_size_option("--hydration-rate", hydration_rate) or 0
    if no_hydration and exit_when_hydrated:
        raise typer.BadParameter("--exit-when-hydrated would wait for ever")
    from nbdtarget.common.unix_socket import SocketOptions
    from nbdtarget.porcelain.clone import CloneOptions

    options = CloneOptions(
        source=source,
        dest=dest,
        name=name,
        metadata=metadata,
        region_size=region_bytes,
        listen=tuple(listen or ()),
        hydration=not no_hydration,
        exit_when_hydrated=exit_when_hydrated,
        control=control,
        stop_timeout=stop_timeout,
        sockets=SocketOptions(
            socket_mode,
            socket_owner,
            socket_group,
            control_mode,
            control_owner,
            control_group,
        ),
        overwrite=overwrite,
        moved=moved,
        accept_other_disk=accept_other_disk,
        hydrate_on_read=hydrate_on_read,
        hydration_rate=rate,
        then_linear=then_linear,
    )
    return _run(options, verbose=verbose, json=json)


def _run(options: "CloneOptions", *, verbose: bool, json: bool) -> int:
    from nbdtarget.cli.logs import start_logging
    from nbdtarget.cli.progress.clone import clone_reporter
    from nbdtarget.daemon.daemon import run
    from nbdtarget.porcelain.clone import CloneJob

    start_logging(verbose=verbose)
    with clone_reporter(options, json=json) as reporter:
        return run(lambda: CloneJob(options, reporter).run())
