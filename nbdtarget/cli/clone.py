# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget clone`: one line that serves a writable copy of a source at once."""

import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer

from nbdtarget.cli.common import AcceptOtherDisk, Control, Json, Moved
from nbdtarget.cli.logs import NO_LOG, Log
from nbdtarget.cli.network import NO_NETWORK, Network
from nbdtarget.cli.service import (
    NO_SERVICE,
    Run,
    Service,
    check_run,
    takes_service,
)
from nbdtarget.cli.sizes import region_size_option, size_option
from nbdtarget.cli.source_options import (
    NO_SOURCE_OPTIONS,
    SourceSaid,
    takes_source_options,
)
from nbdtarget.devices.registry import scheme_list

if TYPE_CHECKING:
    from nbdtarget.porcelain.clone import CloneOptions

__all__ = ["register"]


RATE_WARNED_ABOUT: Final = (
    64 << 10
)  # bytes a second; less is probably a forgotten suffix
NEVER_HYDRATED: Final = "cannot be combined with --no-hydration: it would wait for ever"

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help=f"Disk to copy from: {scheme_list()}. It is only read, and is not needed any more when all"
        " is copied.",
    ),
]
Dest = Annotated[
    str,
    typer.Argument(
        metavar="DEST",
        help="Disk to copy to: a file, which is made if it is missing, or a block device.",
    ),
]
ExportName = Annotated[
    str | None,
    typer.Option(
        "--name",
        metavar="EXPORT",
        help="Name of the export; default: the name of DEST without its suffix.",
    ),
]
Metadata = Annotated[
    str | None,
    typer.Option(
        "--metadata",
        metavar="FILE",
        help="File that records what has been copied; it is made if it is missing. Default:"
        " DEST.nbdtarget.",
    ),
]
RegionSize = Annotated[
    str,
    typer.Option(
        "--region-size",
        metavar="SIZE",
        help="Size of the pieces that are copied and recorded: a power of two, 4K to 1G.",
    ),
]
NoHydration = Annotated[
    bool,
    typer.Option(
        "--no-hydration",
        help="Do not copy in the background; copy only regions that are written in part.",
    ),
]
ExitWhenHydrated = Annotated[
    bool,
    typer.Option(
        "--exit-when-hydrated",
        help="End when all is copied. DEST alone is the disk then; `nbdtarget export DEST' serves it.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Start even though DEST holds data. That data is lost."
    ),
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
        help="Most bytes a second that the background copies, for example 100M; default: no limit.",
    ),
]
ThenLinear = Annotated[
    bool,
    typer.Option(
        "--then-linear",
        help="Close SOURCE when all is copied, and serve DEST alone. Clients stay connected.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(takes_service(takes_source_options(clone)))


def clone(
    source: Source,
    dest: Dest,
    name: ExportName = None,
    metadata: Metadata = None,
    region_size: RegionSize = "64K",
    no_hydration: NoHydration = False,
    hydrate_on_read: HydrateOnRead = False,
    hydration_rate: HydrationRate = None,
    then_linear: ThenLinear = False,
    said: SourceSaid = NO_SOURCE_OPTIONS,
    exit_when_hydrated: ExitWhenHydrated = False,
    overwrite: Overwrite = False,
    moved: Moved = False,
    accept_other_disk: AcceptOtherDisk = False,
    service: Service = NO_SERVICE,
    run: Run = None,
    network: Network = NO_NETWORK,
    log: Log = NO_LOG,
    json: Json = False,
    control: Control = None,
) -> int:
    """Serve a writable copy of SOURCE at once.

    DEST is the copy; the data is copied to it in the background. Clients can read and write from the first moment. Ctrl-C stops it at any time; run the same command again
    to continue. When all is copied, DEST alone is the disk.

    Example: nbdtarget clone nbd://server/disk disk.img
    """
    region_bytes = region_size_option("--region-size", region_size)
    _check_end(run, is_hydrated=not no_hydration, exits=exit_when_hydrated)
    check_run(run, json=json)
    from nbdtarget.porcelain.clone import CloneOptions

    options = CloneOptions(
        source=source,
        dest=dest,
        name=name,
        metadata=metadata,
        region_size=region_bytes,
        listen=service.addresses,
        hydration=not no_hydration,
        exit_when_hydrated=exit_when_hydrated,
        control=control,
        stop_timeout=service.stop_timeout,
        run=run,
        security=network.options(),
        sockets=service.sockets(),
        limits=service.limits(),
        metrics=service.metrics_options(),
        overwrite=overwrite,
        moved=moved,
        accept_other_disk=accept_other_disk,
        hydrate_on_read=hydrate_on_read,
        hydration_rate=_rate(hydration_rate),
        then_linear=then_linear,
        url_command=said.url_words(source),
        record_trace=said.record_trace,
        hydrate_order=said.hydrate_order,
    )
    return _run(options, log=log, json=json)


def _check_end(run: str | None, *, is_hydrated: bool, exits: bool) -> None:
    """Refuse options that say in two ways when the server ends. Raises: typer.BadParameter."""
    if exits and not is_hydrated:
        raise typer.BadParameter(f"--exit-when-hydrated {NEVER_HYDRATED}")
    if exits and run is not None:
        raise typer.BadParameter(
            "--run cannot be combined with --exit-when-hydrated: the server ends with the command"
        )


def _run(options: "CloneOptions", *, log: Log, json: bool) -> int:
    from nbdtarget.cli.progress.clone import clone_reporter
    from nbdtarget.daemon.process import run
    from nbdtarget.porcelain.clone import CloneJob

    log.start()
    with clone_reporter(options, json=json) as reporter:
        return run(lambda: CloneJob(options, reporter).run())


def _rate(text: str | None) -> int:
    if text is None:
        return 0
    rate = size_option("--hydration-rate", text)
    if rate < RATE_WARNED_ABOUT:
        guess = f": did you mean {text}M?" if text.isdecimal() else ""
        print(
            f"nbdtarget: --hydration-rate {text} is only {rate} bytes a second{guess}",
            file=sys.stderr,
        )
    return rate
