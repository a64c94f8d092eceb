# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget serve`: the server that dmsetup's verbs talk to."""

from typing import Annotated

import typer

from nbdtarget.cli.common import Control
from nbdtarget.cli.logs import NO_LOG, Log, takes_log
from nbdtarget.cli.network import NO_NETWORK, Network, takes_network

__all__ = [
    "ControlGroup",
    "ControlMode",
    "ControlOwner",
    "Listen",
    "Run",
    "SocketGroup",
    "SocketMode",
    "SocketOwner",
    "StopTimeout",
    "check_run",
    "register",
]

Listen = Annotated[
    list[str] | None,
    typer.Option(
        "--listen",
        metavar="ADDR",
        help="Address for NBD clients: unix:PATH, tcp:HOST:PORT or vsock:CID:PORT; may be given more than once."
        " TCP is neither encrypted nor asks for passwords without --tls. Default: a unix socket in the runtime directory.",
    ),
]
StopTimeout = Annotated[
    float | None,
    typer.Option(
        "--stop-timeout",
        metavar="SECONDS",
        min=0,
        help="Time that a stop waits for disks that do not answer. 0 waits for ever. Default: 60.",
    ),
]


Run = Annotated[
    str | None,
    typer.Option(
        "--run",
        metavar="COMMAND",
        help="Run a shell command as soon as clients can connect, and end when it ends, with its exit status. It"
        " finds $uri, $unixsocket, $port and $exportname in its environment. Nothing else is printed on stdout.",
    ),
]
SocketMode = Annotated[
    str | None,
    typer.Option(
        "--socket-mode",
        metavar="MODE",
        help="Mode of the unix sockets for NBD, for example 0660; default: 0600.",
    ),
]
SocketOwner = Annotated[
    str | None,
    typer.Option(
        "--socket-owner", metavar="USER", help="Owner of the unix sockets for NBD."
    ),
]
SocketGroup = Annotated[
    str | None,
    typer.Option(
        "--socket-group", metavar="GROUP", help="Group of the unix sockets for NBD."
    ),
]
ControlMode = Annotated[
    str | None,
    typer.Option(
        "--control-mode",
        metavar="MODE",
        help="Mode of the control socket, for example 0660; default: 0600.",
    ),
]
ControlOwner = Annotated[
    str | None,
    typer.Option(
        "--control-owner", metavar="USER", help="Owner of the control socket."
    ),
]
ControlGroup = Annotated[
    str | None,
    typer.Option(
        "--control-group", metavar="GROUP", help="Group of the control socket."
    ),
]
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="TOML file with listeners, limits and devices. SIGHUP has it read again.",
    ),
]
Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="ADDR",
        help="Address for Prometheus: tcp:HOST:PORT or a path. Only /metrics is there, and no token is needed. The"
        " control socket has /metrics, too.",
    ),
]
MetricsDevices = Annotated[
    bool | None,
    typer.Option(
        "--metrics-devices/--no-metrics-devices",
        help="Metrics of each device, or only of all of them together. Default: of each.",
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


def check_run(command: str | None, *, json: bool) -> None:
    """Raises: typer.BadParameter: both --run and --json were given."""
    if command is not None and json:
        raise typer.BadParameter(
            "--run cannot be combined with --json: stdout belongs to the command"
        )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(takes_log(takes_network(serve)))


def serve(
    listen: Listen = None,
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
    socket_mode: SocketMode = None,
    socket_owner: SocketOwner = None,
    socket_group: SocketGroup = None,
    control_mode: ControlMode = None,
    control_owner: ControlOwner = None,
    control_group: ControlGroup = None,
    stop_timeout: StopTimeout = None,
    run: Run = None,
    network: Network = NO_NETWORK,
    metrics: Metrics = None,
    metrics_devices: MetricsDevices = None,
    max_connections: MaxConnections = None,
    max_connections_per_peer: MaxConnectionsPerPeer = None,
    log: Log = NO_LOG,
) -> int:
    """Serve mapped devices over NBD until SIGTERM or Ctrl-C.

    Devices come from --config, or are made by `create' and the other commands while the server runs. The
    control socket is control.sock in the runtime directory unless --control names another one.
    """
    from nbdtarget.common.unix_socket import SocketOptions
    from nbdtarget.daemon import process
    from nbdtarget.daemon.serve import ServeOptions, serve_until_stopped
    from nbdtarget.server.listener import export_uri

    log.start()
    limits = {
        "connections_max": max_connections,
        "peer_connections_max": max_connections_per_peer,
    }
    nbd_access = (socket_mode, socket_owner, socket_group)
    control_access = (control_mode, control_owner, control_group)
    options = ServeOptions(
        limits={key: value for key, value in limits.items() if value is not None},
        listen=tuple(listen or ()),
        control=control,
        control_token_file=control_token_file,
        control_read_token_file=control_read_token_file,
        config=config,
        stop_timeout=stop_timeout,
        run=run,
        metrics=(metrics, metrics_devices),
        state=state,
        security=network.options(),
        sockets=SocketOptions(*nbd_access, *control_access),
    )

    def ready(patterns: list[str]) -> None:
        for pattern in patterns if run is None else ():
            print(export_uri(pattern), flush=True)

    return process.run(lambda: serve_until_stopped(options, ready))
