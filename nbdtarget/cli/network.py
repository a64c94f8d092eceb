# SPDX-License-Identifier: Apache-2.0
"""Options about TLS and about who may attach, which each command that serves has."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, TypeVar

import typer

from nbdtarget.cli.option_group import takes_group

if TYPE_CHECKING:
    from nbdtarget.daemon.security import SecurityOptions

__all__ = ["NO_NETWORK", "Network", "takes_network"]

C = TypeVar("C", bound=Callable[..., Any])

Tls = Annotated[
    str | None,
    typer.Option(
        "--tls",
        metavar="off|on|require",
        help="Encryption: with `on' clients may use TLS, with `require' they must. Default: off, or require"
        " if --tls-certificates or --tls-psk is given.",
    ),
]
TlsCertificates = Annotated[
    str | None,
    typer.Option(
        "--tls-certificates",
        metavar="DIR",
        help="Directory with server-cert.pem and server-key.pem, and ca-cert.pem (and ca-crl.pem) to verify"
        " clients.",
    ),
]
TlsVerifyPeer = Annotated[
    bool,
    typer.Option(
        "--tls-verify-peer",
        help="Refuse clients that show no certificate of the authority in ca-cert.pem.",
    ),
]
TlsPsk = Annotated[
    str | None,
    typer.Option(
        "--tls-psk",
        metavar="FILE",
        help="File of pre-shared keys, NAME:KEY on each line, instead of certificates. Needs Python 3.13.",
    ),
]
AccessRule = Annotated[
    list[str] | None,
    typer.Option(
        "--access",
        metavar="RULE",
        help='Who may attach exports that have no rules of their own, for example "rw cert:alice" or'
        ' "ro net:192.0.2.0/24"; the first rule that holds decides. May be given more than once. Default:'
        " everybody who can connect.",
    ),
]

_OPTIONS: Final[dict[str, tuple[Any, Any]]] = {
    "tls": (Tls, None),
    "tls_certificates": (TlsCertificates, None),
    "tls_verify_peer": (TlsVerifyPeer, False),
    "tls_psk": (TlsPsk, None),
    "access": (AccessRule, None),
}


class Network(NamedTuple):
    """The values of these options."""

    tls: str | None = None
    tls_certificates: str | None = None
    tls_verify_peer: bool = False
    tls_psk: str | None = None
    access: list[str] | None = None

    def options(self) -> "SecurityOptions":
        """Return the options in the form that the server takes."""
        from nbdtarget.daemon.security import SecurityOptions
        from nbdtarget.server.tls import TlsOptions

        verify = self.tls_verify_peer or None
        return SecurityOptions(
            TlsOptions(self.tls, self.tls_certificates, verify, self.tls_psk),
            None if self.access is None else tuple(self.access),
        )


NO_NETWORK: Final = Network()


def takes_network(command: C) -> C:
    """Give a command these options, in the place of its parameter `network`, which gets them as a `Network`."""
    return takes_group(command, "network", _OPTIONS, Network)
