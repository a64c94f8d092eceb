# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget export`: one line that serves one disk as it is."""

from typing import TYPE_CHECKING, Annotated

import typer

from nbdtarget.cli.common import Control, Json
from nbdtarget.cli.logs import NO_LOG, Log
from nbdtarget.cli.network import NO_NETWORK, Network
from nbdtarget.cli.service import NO_SERVICE, Run, Service, check_run, takes_service
from nbdtarget.devices.registry import scheme_list

if TYPE_CHECKING:
    from nbdtarget.porcelain.export import ExportOptions, ExportPlan

__all__ = ["register"]

Disk = Annotated[
    str,
    typer.Argument(
        metavar="DISK",
        help=f"Disk to serve: {scheme_list()}.",
    ),
]
ExportName = Annotated[
    str | None,
    typer.Option(
        "--name",
        metavar="EXPORT",
        help="Name of the export; default: the name of DISK without its suffix.",
    ),
]
ReadOnly = Annotated[
    bool,
    typer.Option(
        "--readonly",
        "-r",
        help="Serve it read-only; DISK is opened for reading only.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(takes_service(export))


def export(
    disk: Disk,
    name: ExportName = None,
    readonly: ReadOnly = False,
    service: Service = NO_SERVICE,
    run: Run = None,
    network: Network = NO_NETWORK,
    log: Log = NO_LOG,
    json: Json = False,
    control: Control = None,
) -> int:
    """Serve one disk over NBD, as it is.

    Writes go to DISK, and a flush of a client is a flush of DISK. Ctrl-C ends it.

    Example: nbdtarget export disk.img
    """
    check_run(run, json=json)
    from nbdtarget.porcelain.export import ExportOptions

    options = ExportOptions(
        disk=disk,
        name=name,
        read_only=readonly,
        listen=service.addresses,
        control=control,
        stop_timeout=service.stop_timeout,
        run=run,
        security=network.options(),
        sockets=service.sockets(),
        limits=service.limits(),
        metrics=service.metrics_options(),
    )
    return _run(options, log=log, json=json)


def _run(options: "ExportOptions", *, log: Log, json: bool) -> int:
    from nbdtarget.daemon.process import run
    from nbdtarget.porcelain.export import ExportJob

    log.start()
    reporter = _JsonReporter() if json else _Reporter(options)
    return run(lambda: ExportJob(options, reporter).run())


class _Reporter:
    """Prints how to attach."""

    def __init__(self, options: "ExportOptions") -> None:
        self._options = options

    def serving(self, plan: "ExportPlan", uris: list[str]) -> None:
        from nbdtarget.cli.progress.hints import print_attach

        how = "read-only" if self._options.read_only else "read-write"
        what = f"{self._options.disk} is served {how}"
        print_attach(what, plan.name, uris, self._options.security.tls)

    def stopping(self) -> None:
        """Print nothing."""


class _JsonReporter:
    """Prints one JSON object."""

    def serving(self, plan: "ExportPlan", uris: list[str]) -> None:
        from nbdtarget.cli.progress.common import print_event
        from nbdtarget.server.listener import export_uri

        print_event(
            event="serving",
            name=plan.name,
            size=plan.size,
            table=plan.table,
            uris=[export_uri(uri, plan.name) for uri in uris],
        )

    def stopping(self) -> None:
        """Print nothing."""
