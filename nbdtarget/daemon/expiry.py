# SPDX-License-Identifier: Apache-2.0
"""Until when certificates are valid that disks of other servers (`nbds:`) use, and what is said when some end.

The files of listeners are read with their certificates (`ListenerTls`). Those of disks are read when a status, a metric or the daily look needs them, and again when they have changed:
each new connection of such a disk reads them, too.
"""

import logging
import os
from collections.abc import Iterable
from typing import Final

from nbdtarget.common.errors import NbdTargetError, ResolveError
from nbdtarget.common.tls_context import CA_CERT, CA_CRL, CLIENT_CERT, SERVER_CERT
from nbdtarget.common.x509 import End, earliest_end
from nbdtarget.devices.nbd.uri import parse_nbd_uri

__all__ = ["EXPIRY_WARN_S", "DiskCertificates", "expiry_warning"]

log = logging.getLogger(__name__)

EXPIRY_WARN_S: Final = 14 * 86400.0  # before the end
_DAY_S: Final = 86400.0
_TLS: Final = "nbds"  # the schemes of encrypted disks begin so
# What follows if it has ended.
_EFFECTS: Final = {
    SERVER_CERT: "clients refuse it",
    CLIENT_CERT: "servers refuse it",
    CA_CERT: "certificates of that authority are refused",
    CA_CRL: "all certificates of that authority are refused until there is a new list",
}


def expiry_warning(path: str, end: End, now_s: float) -> str:
    """Return the line to log about a file; "": it is valid for a while."""
    left_s = end.expires_s - now_s
    if left_s >= EXPIRY_WARN_S:
        return ""
    whose = f" ({end.name})" if end.name else ""
    effect = _EFFECTS[os.path.basename(path)]
    if left_s <= 0:
        return f"{path}: has expired{whose}: {effect}"
    return f"{path}: expires in {left_s // _DAY_S:.0f} days{whose}; then {effect}"


class DiskCertificates:
    """See the module head."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, ...], End | None]] = {}

    def ends(self, disks: Iterable[str]) -> dict[str, End]:
        """Return what these disks use, by path. Args: disks: their names; only those with TLS matter."""
        paths = sorted({path for disk in disks for path in _files_of(disk)})
        # Those of disks that are not there any more are forgotten.
        self._known = {path: self._look(path) for path in paths}
        return {path: end for path, (_, end) in self._known.items() if end is not None}

    def _look(self, path: str) -> tuple[tuple[int, ...], End | None]:
        try:
            stat = os.stat(path)
        except OSError:
            return (
                (),
                None,
            )  # it is optional, or the next connection says that it is missing
        signature = stat.st_ino, stat.st_size, stat.st_mtime_ns
        known = self._known.get(path)
        if known is not None and known[0] == signature:
            return known
        try:
            return signature, earliest_end(path)
        except NbdTargetError as error:
            log.warning("it is not known until when this is valid: %s", error)
            return signature, None


def _files_of(disk: str) -> list[str]:
    if not disk.lower().startswith(_TLS):
        return []
    try:
        tls = parse_nbd_uri(disk).tls
    except ResolveError:
        return []  # the name of something else begins so
    if tls is None or tls.certificates is None or tls.psk_file is not None:
        return []
    names = (CA_CERT, CA_CRL, CLIENT_CERT) if tls.verify_peer else (CLIENT_CERT,)
    return [os.path.join(tls.certificates, name) for name in names]
