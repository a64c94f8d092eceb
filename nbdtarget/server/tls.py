# SPDX-License-Identifier: Apache-2.0
"""`ListenerTls`: what a listener says to STARTTLS, and its certificates, which can be changed while it serves."""

import logging
import os
import ssl
from dataclasses import dataclass, replace
from typing import Final

from nbdtarget.common.clock import wall_clock_s
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.tls_context import certificate_end_s, server_context
from nbdtarget_protocol.handshake import TlsMode

__all__ = ["EXPIRY_WARN_S", "NO_TLS", "TLS_UNSAID", "ListenerTls", "TlsOptions"]

log = logging.getLogger(__name__)

EXPIRY_WARN_S: Final = 14 * 86400.0  # before the certificate ends
_DAY_S: Final = 86400.0


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
        certificate_path: the file with the server's certificate; None: there is none.
        expires_s: until when that is valid: Unix time; 0: there is none.
    """

    def __init__(self, options: TlsOptions) -> None:
        """Raises: NbdTargetError: see `TlsOptions.check`; a file is missing or wrong."""
        options.check()
        self.mode = options.tls_mode
        self.options = replace(options, mode=self.mode.value)
        self.context: ssl.SSLContext | None = None
        self.certificate_path: str | None = None
        self.expires_s = 0.0
        if self.mode is not TlsMode.OFF and options.certificates is not None:
            self.certificate_path = os.path.join(
                options.certificates, "server-cert.pem"
            )
        self.reload()

    @property
    def verifies_peer(self) -> bool:
        """Whether clients show a certificate that is verified."""
        return self.mode is not TlsMode.OFF and bool(self.options.verify_peer)

    def reload(self) -> None:
        """Read the files again, for connections to come. Raises: NbdTargetError: nothing has changed."""
        if self.mode is TlsMode.OFF:
            return
        options = self.options
        self.context = server_context(
            options.certificates,
            verify_peer=bool(options.verify_peer),
            psk_file=options.psk,
        )
        if self.certificate_path is not None:
            self.expires_s = certificate_end_s(self.certificate_path)
        self.warn_of_expiry()

    def warn_of_expiry(self) -> None:
        """Log a line if the certificate has ended, or will soon."""
        if self.certificate_path is None:
            return
        left_s = self.expires_s - wall_clock_s()
        if left_s <= 0:
            log.warning(
                "%s: has expired: clients will refuse it; renew it and send SIGHUP",
                self.certificate_path,
            )
        elif left_s < EXPIRY_WARN_S:
            log.warning(
                "%s: expires in %d days: renew it and send SIGHUP",
                self.certificate_path,
                left_s // _DAY_S,
            )


TLS_UNSAID: Final = TlsOptions()
NO_TLS: Final = ListenerTls(TLS_UNSAID)
