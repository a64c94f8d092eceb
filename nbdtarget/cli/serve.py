# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget serve`: the daemon that dmsetup's verbs talk to."""

from typing import Annotated

import typer

from nbdtarget.cli.common import Control

__all__ = [
    "ControlGroup",
    "ControlMode",
    "ControlOwner",
    "Listen",
    "SocketGroup",
    "SocketMode",
    "SocketOwner",
    "StopTimeout",
    "register",
]

Listen = Annotated[
    list[str] | None,
    typer.Option(
        "--listen",
        metavar="ADDR",
        help="unix:PATH or tcp:HOST:PORT; may be given more than once."
        " Default: a unix socket in the runtime directory.",
    ),
]
StopTimeout = Annotated[
    float | None,
    typer.Option(
        "--stop-timeout",
        metavar="SECONDS",
        min=0,
        help="How long a stop waits for devices that do not answer; default: 60, 0: for ever.",
    ),
]


SocketMode = Annotated[
    str | None,
    typer.Option(
        "--socket-mode",
        metavar="MODE",
        help="Mode of NBD sockets on unix:PATH, as 0660; default: 0600.",
    ),
]
SocketOwner = Annotated[
    str | None,
    typer.Option("--socket-owner", metavar="USER", help="Their owner."),
]
SocketGroup = Annotated[
    str | None,
    typer.Option("--socket-group", metavar="GROUP", help="Their group."),
]
ControlMode = Annotated[
    str | None,
    typer.Option(
        "--control-mode",
        metavar="MODE",
        help="Mode of the control socket; default: 0600.",
    ),
]
ControlOwner = Annotated[
    str | None,
    typer.Option("--control-owner", metavar="USER", help="Its owner."),
]
ControlGroup = Annotated[
    str | None,
    typer.Option("--control-group", metavar="GROUP", help="Its group."),
]
MaxConnections = Annotated[
    int | None,
    typer.Option(
        "--max-connections",
        metavar="N",
        min=1,
        help="Connections on TCP, and as many on unix sockets; more are closed at once."
        " Default: 256, or connections_max of the file.",
    ),
]
MaxConnectionsPerPeer = Annotated[
    int | None,
    typer.Option(
        "--max-connections-per-peer",
        metavar="N",
        min=1,
        help="Connections from one address. Default: 128, or peer_connections_max of the file.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(serve)


def serve(
    listen: Listen = None,
    control: Control = None,
    control_token_file: Annotated[
        str | None,
        typer.Option(
            "--control-token-file",
            metavar="FILE",
            help="Its first line is the token that control clients must have in"
            " $NBDTARGET_CONTROL_TOKEN; needed for --control tcp:HOST:PORT.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="A TOML file with listeners, limits and devices; SIGHUP reads it again.",
        ),
    ] = None,
    socket_mode: SocketMode = None,
    socket_owner: SocketOwner = None,
    socket_group: SocketGroup = None,
    control_mode: ControlMode = None,
    control_owner: ControlOwner = None,
    control_group: ControlGroup = None,
    stop_timeout: StopTimeout = None,
    max_connections: MaxConnections = None,
    max_connections_per_peer: MaxConnectionsPerPeer = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what happens to devices.")
    ] = False,
) -> int:
    """Serve mapped devices over NBD until told to stop."""
    from nbdtarget.cli.logs import start_logging
    from nbdtarget.common.unix_socket import SocketOptions
    from nbdtarget.daemon.daemon import ServeOptions, run, serve_until_stopped
    from nbdtarget.server.listener import export_uri

    start_logging(verbose=verbose)
    limits = {
        "connections_max": max_connections,
        "peer_connections_max": max_connections_per_peer,
    }
    options = ServeOptions(
        limits={key: value for key, value in limits.items() if value is not None},
        listen=tuple(listen or ()),
        control=control,
        control_token_file=control_token_file,
        config=config,
        stop_timeout=stop_timeout,
        sockets=SocketOptions(
            socket_mode,
            socket_owner,
            socket_group,
            control_mode,
            control_owner,
            control_group,
        ),
    )

    def ready(patterns: list[str]) -> None:
        for pattern in patterns:
            print(export_uri(pattern), flush=True)

    return run(lambda: serve_until_stopped(options, ready))
