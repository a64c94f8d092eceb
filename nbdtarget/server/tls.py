# SPDX-License-Identifier: Apache-2.0
"""`ListenerTls`: what a listener says to STARTTLS, and its certificates, which can be changed while it serves."""

import os
import ssl
from dataclasses import dataclass, replace
from typing import Final

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.tls_context import (
    CA_CERT,
    CA_CRL,
    SERVER_CERT,
    server_context,
)
from nbdtarget.common.x509 import End, earliest_end
from nbdtarget_protocol.handshake import TlsMode

__all__ = [
    "NO_TLS",
    "TLS_UNSAID",
    "VERIFIES_WITHOUT_TLS",
    "ListenerTls",
    "TlsOptions",
]

VERIFIES_WITHOUT_TLS: Final = (
    "tls: clients are to show a certificate (--tls-verify-peer, tls_verify_peer), but without TLS they show none:"
    " give --tls-certificates DIR, and not `--tls off'"
)


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """The TLS options of one listener. None: the option was not given, and `or_else` takes it from elsewhere.

    Args:
        mode: "off", "on" or "require".
        certificates: directory, see `nbdtarget.common.tls_context`.
        verify_peer: clients must show a certificate of ca-cert.pem.
        psk: file of pre-shared keys, instead of certificates.
    """

    mode: str | None = None
    certificates: str | None = None
    verify_peer: bool | None = None
    psk: str | None = None

    def or_else(self, other: "TlsOptions") -> "TlsOptions":
        """Return these options, with the values of `other` where this one has none."""
        has_keys = self.certificates is not None or self.psk is not None
        return TlsOptions(
            other.mode if self.mode is None else self.mode,
            self.certificates if has_keys else other.certificates,
            other.verify_peer if self.verify_peer is None else self.verify_peer,
            self.psk if has_keys else other.psk,
        )

    @property
    def tls_mode(self) -> TlsMode:
        """The mode; keys without a mode mean that TLS is required. Raises: NbdTargetError."""
        if self.mode is None:
            has_keys = self.certificates is not None or self.psk is not None
            return TlsMode.REQUIRE if has_keys else TlsMode.OFF
        try:
            return TlsMode(self.mode)
        except ValueError:
            raise NbdTargetError(
                f"tls {self.mode}: is none of off, on and require"
            ) from None

    def check(self) -> None:
        """Raises: NbdTargetError: the options contradict each other, or something is missing. No file is opened."""
        if self.tls_mode is TlsMode.OFF:
            return
        if self.certificates is None and self.psk is None:
            raise NbdTargetError(
                f"tls {self.mode}: needs the directory of the certificates (--tls-certificates DIR, or"
                " tls_certificates in the configuration file)"
            )
        if self.certificates is not None and self.psk is not None:
            raise NbdTargetError("tls: give certificates or pre-shared keys, not both")
        if self.psk is not None and self.verify_peer:
            raise NbdTargetError(
                "tls: with pre-shared keys clients have no certificate to verify"
            )


class ListenerTls:
    """TLS of one listener.

    Attributes:
        options: with the mode in words, also if only keys were given.
        mode: what STARTTLS gets.
        context: for new connections; None with `TlsMode.OFF`.
        ends: by path, what ends first in each file that is used: the server's certificate and those up to its authority; where
            clients are verified, their authorities, and the lists of withdrawn certificates.
    """

    def __init__(self, options: TlsOptions) -> None:
        """Raises: NbdTargetError: see `TlsOptions.check`; a file is missing or wrong."""
        options.check()
        self.mode = options.tls_mode
        self.options = replace(options, mode=self.mode.value)
        self.context: ssl.SSLContext | None = None
        self.ends: dict[str, End] = {}
        self.reload()

    @property
    def verifies_peer(self) -> bool:
        """Whether clients show a certificate that is verified."""
        return self.mode is not TlsMode.OFF and bool(self.options.verify_peer)

    @property
    def knows_clients(self) -> bool:
        """Whether only clients can attach exports without rules that have shown who they are: by a certificate, or by a key."""
        has_key = self.options.psk is not None and self.mode is TlsMode.REQUIRE
        return self.verifies_peer or has_key

    def reload(self) -> None:
        """Read the files again, for connections to come. Raises: NbdTargetError: nothing has changed."""
        if self.mode is TlsMode.OFF:
            return
        options = self.options
        context = server_context(
            options.certificates,
            verify_peer=bool(options.verify_peer),
            psk_file=options.psk,
        )
        ends = {path: earliest_end(path) for path in self._files()}
        self.ends = {path: end for path, end in ends.items() if end is not None}
        self.context = context

    def _files(self) -> list[str]:
        """Return the files of the certificates that are in use, and of the list of withdrawn ones if there is one."""
        directory = self.options.certificates
        if directory is None:
            return []
        paths = [os.path.join(directory, SERVER_CERT)]
        if self.verifies_peer:
            paths.append(os.path.join(directory, CA_CERT))
            withdrawn = os.path.join(directory, CA_CRL)
            paths += [withdrawn] if os.path.exists(withdrawn) else []
        return paths


TLS_UNSAID: Final = TlsOptions()
NO_TLS: Final = ListenerTls(TLS_UNSAID)
