# SPDX-License-Identifier: Apache-2.0
"""TLS contexts from a directory of certificates, with the file names that nbdkit, QEMU and libnbd share.

    server    server-cert.pem, server-key.pem; ca-cert.pem if clients must show a certificate
    client    ca-cert.pem, or the authorities that the system trusts; client-cert.pem and client-key.pem if both are there
    both      ca-crl.pem: certificates that are withdrawn; optional

A file of pre-shared keys (PSK) has a line `NAME:KEY` for each client, KEY in hexadecimal, as psktool writes it. A PSK server
has no certificate at all: with one, the two sides may agree on the certificate and the key would never be asked for.

TLS 1.2 and later; no renegotiation, no compression, no tickets, so each connection shows its certificate anew.
"""

import os
import ssl
from collections.abc import Callable
from typing import Final, Protocol, cast

from nbdtarget.common.errors import NbdTargetError

__all__ = [
    "CA_CERT",
    "CA_CRL",
    "CLIENT_CERT",
    "PSK_FILE_MAX",
    "SERVER_CERT",
    "client_context",
    "has_psk",
    "server_context",
]

CA_CERT: Final = "ca-cert.pem"
CA_CRL: Final = "ca-crl.pem"
SERVER_CERT: Final = "server-cert.pem"
CLIENT_CERT: Final = "client-cert.pem"
PSK_FILE_MAX: Final = 1 << 20  # bytes
_PSK_CIPHERS: Final = "kECDHEPSK:kDHEPSK:PSK:!eNULL:!aNULL"


class _PskContext(Protocol):
    """The methods that Python 3.13 added to SSLContext."""

    def set_psk_server_callback(
        self, callback: Callable[[str | None], bytes]
    ) -> None: ...

    def set_psk_client_callback(
        self, callback: Callable[[str | None], tuple[str | None, bytes]]
    ) -> None: ...


def has_psk() -> bool:
    """Whether this Python can do pre-shared keys."""
    return bool(getattr(ssl, "HAS_PSK", False))


def server_context(
    directory: str | None, *, verify_peer: bool = False, psk_file: str | None = None
) -> ssl.SSLContext:
    """The context of a listener: of a directory, or of a file of pre-shared keys.

    Args: verify_peer: clients must show a certificate of ca-cert.pem.
    Raises: NbdTargetError: a file is missing or wrong; one sentence.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _set_common(context)
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_CIPHER_SERVER_PREFERENCE
    if psk_file is not None:
        keys = _read_psk(psk_file)
        # An identity without a key gets none: OpenSSL ends the handshake then.
        _psk(context).set_psk_server_callback(lambda name: keys.get(name or "", b""))
        return context
    assert directory is not None
    _load_pair(context, directory, "server")
    if verify_peer:
        _load_authority(context, directory)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(
    directory: str | None,
    *,
    verify_peer: bool = True,
    psk_file: str | None = None,
    psk_name: str = "",
) -> ssl.SSLContext:
    """The context of a client. No `directory`: the system's authorities, and no certificate of ours.

    Args: verify_peer: False: any certificate will do, also that of somebody who sits on the wire.
    Raises: NbdTargetError: as `server_context`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _set_common(context)
    if not verify_peer or psk_file is not None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if psk_file is not None:
        key = _read_psk(psk_file).get(psk_name)
        if key is None:
            raise NbdTargetError(f"{psk_file}: has no key of {psk_name or 'nobody'}")
        _psk(context).set_psk_client_callback(lambda _: (psk_name, key))
        return context
    if directory is None:
        if verify_peer:
            context.load_default_certs()
        return context
    if verify_peer:
        _load_authority(context, directory)
    if os.path.exists(os.path.join(directory, CLIENT_CERT)):
        _load_pair(context, directory, "client")
    return context


def _set_common(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION


def _load_pair(context: ssl.SSLContext, directory: str, side: str) -> None:
    """A certificate, the certificates between it and the authority, and its key."""
    certificate = os.path.join(directory, f"{side}-cert.pem")
    key = os.path.join(directory, f"{side}-key.pem")
    for path in (certificate, key):
        _check_readable(path)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except NbdTargetError:
        raise NbdTargetError(
            f"{key}: is encrypted, and nobody is there to type a password: store it in the clear, mode 0600"
        ) from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            reason = f"{key}: is not the key of {certificate}"
        else:
            reason = f"{certificate}, {key}: not a certificate and a key in PEM ({error.reason or error})"
        raise NbdTargetError(reason) from None


def _no_password() -> str:
    raise NbdTargetError("encrypted key")


def _load_authority(context: ssl.SSLContext, directory: str) -> None:
    authority = os.path.join(directory, CA_CERT)
    _check_readable(authority)
    _load_locations(context, authority)
    if not context.cert_store_stats()["x509_ca"]:
        raise NbdTargetError(f"{authority}: has no certificate of an authority (CA)")
    withdrawn = os.path.join(directory, CA_CRL)
    if os.path.exists(withdrawn):
        _check_readable(withdrawn)
        _load_locations(context, withdrawn)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _load_locations(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise NbdTargetError(f"{path}: not PEM ({error.reason or error})") from None


def _check_readable(path: str) -> None:
    """OpenSSL does not say which file is missing."""
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise NbdTargetError(f"{path}: {error.strerror or error}") from None


# ---- pre-shared keys ----


def _psk(context: ssl.SSLContext) -> _PskContext:
    if not has_psk():
        raise NbdTargetError(
            "TLS with pre-shared keys needs Python 3.13 or later: use certificates"
        )
    # With TLS 1.3 a key may be declined, and Python has no callbacks for it.
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_PSK_CIPHERS)
    return cast(_PskContext, context)


def _read_psk(path: str) -> dict[str, bytes]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(PSK_FILE_MAX)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NbdTargetError(f"{path}: {reason}") from None
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, digits = line.strip().rpartition(":")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not name or not key:
            raise NbdTargetError(f"{path}:{number}: is not NAME:KEY in hexadecimal")
        keys[name] = key
    if not keys:
        raise NbdTargetError(f"{path}: has no keys")
    return keys
