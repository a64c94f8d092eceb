# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget serve`: the server that dmsetup's verbs talk to."""

from typing import Annotated

import typer

from nbdtarget.cli.common import Control
from nbdtarget.cli.logs import NO_LOG, Log
from nbdtarget.cli.network import NO_NETWORK, Network
from nbdtarget.cli.service import NO_SERVICE, Run, Service, takes_service

__all__ = ["register"]

ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="TOML file with listeners, limits and devices. SIGHUP has it read again.",
    ),
]
MaxConnections = Annotated[
    int | None,
    typer.Option(
        "--max-connections",
        metavar="N",
        min=1,
        help="Most connections on TCP, and as many more on unix sockets. One more is closed at once."
        " Default: 256, or connections_max of the configuration file.",
    ),
]
MaxConnectionsPerPeer = Annotated[
    int | None,
    typer.Option(
        "--max-connections-per-peer",
        metavar="N",
        min=1,
        help="Most connections from one address. Default: 128, or peer_connections_max of the"
        " configuration file.",
    ),
]
State = Annotated[
    str | None,
    typer.Option(
        "--state",
        metavar="DIRECTORY",
        help="Where the devices of `create --persist' are kept: they are there again after a restart."
        " Default: state of the configuration file, or $STATE_DIRECTORY, or nowhere.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(takes_service(serve))


def serve(
    control: Control = None,
    control_token_file: Annotated[
        str | None,
        typer.Option(
            "--control-token-file",
            metavar="FILE",
            help="File whose first line is the token that control clients must have in"
            " $NBDTARGET_CONTROL_TOKEN. --control tcp:HOST:PORT needs one.",
        ),
    ] = None,
    control_read_token_file: Annotated[
        str | None,
        typer.Option(
            "--control-read-token-file",
            metavar="FILE",
            help="File whose first line is the token of control clients that may look (status, metrics, events, the page), and"
            " change nothing.",
        ),
    ] = None,
    config: ConfigFile = None,
    state: State = None,
    service: Service = NO_SERVICE,
    run: Run = None,
    network: Network = NO_NETWORK,
    max_connections: MaxConnections = None,
    max_connections_per_peer: MaxConnectionsPerPeer = None,
    log: Log = NO_LOG,
) -> int:
    """Serve mapped devices over NBD until SIGTERM or Ctrl-C.

    Devices come from --config, or are made by `create' and the other commands while the server runs. The
    control socket is control.sock in the runtime directory unless --control names another one.
    """
    from nbdtarget.daemon import process
    from nbdtarget.daemon.activation import passed_sockets
    from nbdtarget.daemon.serve import ServeOptions, serve_until_stopped
    from nbdtarget.server.listener import export_uri

    log.start()
    limits = {
        "connections_max": max_connections,
        "peer_connections_max": max_connections_per_peer,
    }
    options = ServeOptions(
        limits={key: value for key, value in limits.items() if value is not None}
        | service.limits(),
        listen=service.addresses,
        control=control,
        control_token_file=control_token_file,
        control_read_token_file=control_read_token_file,
        config=config,
        stop_timeout=service.stop_timeout,
        run=run,
        metrics=service.metrics_options(),
        state=state,
        security=network.options(),
        sockets=service.sockets(),
    )

    def ready(patterns: list[str]) -> None:
        # With a command, or with a socket that another program passed, stdout is not ours.
        is_told = run is None and not passed_sockets().nbd
        for pattern in patterns if is_told else ():
            print(export_uri(pattern), flush=True)

    return process.run(lambda: serve_until_stopped(options, ready))
