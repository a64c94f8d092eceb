# SPDX-License-Identifier: Apache-2.0
"""Options that each command that serves has: its sockets, its metrics, how long a stop may take."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, TypeVar

import typer

from nbdtarget.cli.logs import takes_log
from nbdtarget.cli.network import takes_network
from nbdtarget.cli.option_group import takes_group

if TYPE_CHECKING:
    from nbdtarget.common.unix_socket import SocketOptions
    from nbdtarget.daemon.metrics_options import MetricsOptions

__all__ = ["NO_SERVICE", "Run", "Service", "check_run", "takes_service"]

C = TypeVar("C", bound=Callable[..., Any])

Listen = Annotated[
    list[str] | None,
    typer.Option(
        "--listen",
        metavar="ADDR",
        help="Address for NBD clients: unix:PATH, tcp:HOST:PORT or vsock:CID:PORT; may be given more than once."
        " TCP is neither encrypted nor asks for passwords without --tls. Default: a unix socket in the runtime directory.",
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
StopTimeout = Annotated[
    float | None,
    typer.Option(
        "--stop-timeout",
        metavar="SECONDS",
        min=0,
        help="Time that a stop waits for disks that do not answer. 0 waits for ever. Default: 60.",
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
Limit = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="NAME=VALUE",
        help="Bound of what clients may use, by its name in the section `limits' of the configuration file, for example"
        " connections_max=64 or export_bytes_max=64M. May be given more than once.",
    ),
]
_OPTIONS: Final[dict[str, tuple[Any, Any]]] = {
    "listen": (Listen, None),
    "limit": (Limit, None),
    "socket_mode": (SocketMode, None),
    "socket_owner": (SocketOwner, None),
    "socket_group": (SocketGroup, None),
    "control_mode": (ControlMode, None),
    "control_owner": (ControlOwner, None),
    "control_group": (ControlGroup, None),
    "stop_timeout": (StopTimeout, None),
    "metrics": (Metrics, None),
    "metrics_devices": (MetricsDevices, None),
}
Run = Annotated[
    str | None,
    typer.Option(
        "--run",
        metavar="COMMAND",
        help="Run a shell command as soon as clients can connect, and end when it ends, with its exit status. It"
        " finds $uri, $unixsocket, $port and $exportname in its environment. Nothing else is printed on stdout.",
    ),
]


class Service(NamedTuple):
    """The values of these options."""

    listen: list[str] | None = None
    limit: list[str] | None = None
    socket_mode: str | None = None
    socket_owner: str | None = None
    socket_group: str | None = None
    control_mode: str | None = None
    control_owner: str | None = None
    control_group: str | None = None
    stop_timeout: float | None = None
    metrics: str | None = None
    metrics_devices: bool | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses for NBD clients."""
        return tuple(self.listen or ())

    def limits(self) -> dict[str, Any]:
        """Return the bounds that were given, by name. Raises: NbdTargetError."""
        from nbdtarget.config.limits import parse_limits

        return parse_limits(self.limit or ())

    def sockets(self) -> "SocketOptions":
        """Return the modes, owners and groups."""
        # Here and below, because a command that only prints its help must start fast.
        from nbdtarget.common.unix_socket import SocketOptions

        return SocketOptions(
            *(self.socket_mode, self.socket_owner, self.socket_group),
            *(self.control_mode, self.control_owner, self.control_group),
        )

    def metrics_options(self) -> "MetricsOptions":
        """Return where metrics are told alone, and of what."""
        from nbdtarget.daemon.metrics_options import MetricsOptions

        return MetricsOptions(self.metrics, self.metrics_devices)


NO_SERVICE: Final = Service()


def takes_service(command: C) -> C:
    """Give a command these options, and those about network and log, in the place of its parameters `service`, `network` and `log`."""
    return takes_log(takes_network(takes_group(command, "service", _OPTIONS, Service)))


def check_run(run: str | None, *, json: bool) -> None:
    """Raises: typer.BadParameter: both --run and --json were given."""
    if run is not None and json:
        raise typer.BadParameter(
            "--run cannot be combined with --json: stdout belongs to the command"
        )
