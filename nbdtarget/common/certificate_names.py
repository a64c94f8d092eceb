# SPDX-License-Identifier: Apache-2.0
"""`host_names`: by which names and addresses clients may call a server, as its certificate says."""

import ipaddress
from typing import Final

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.x509 import element, first_certificate

__all__ = ["host_names"]

_SUBJECT_ALT_NAME: Final = bytes.fromhex("0603551d11")  # 2.5.29.17, in DER
_BOOLEAN: Final = 0x01
_DNS_NAME: Final = 0x82
_IP_ADDRESS: Final = 0x87


def host_names(path: str) -> tuple[str, ...]:
    """Return the names (DNS), and then the addresses, of the first certificate of a PEM file.

    Names with a `*` are left out: no host is called so.
    Raises: NbdTargetError: there is no certificate.
    """
    try:
        return _host_names(first_certificate(path))
    except (ValueError, IndexError):
        raise NbdTargetError(f"{path}: has no certificate in PEM") from None


def _host_names(der: bytes) -> tuple[str, ...]:
    _, certificate, _ = element(der)
    _, found, rest = certificate.partition(_SUBJECT_ALT_NAME)
    if not found:
        return ()
    tag, octets, rest = element(rest)
    if tag == _BOOLEAN:  # optional: whether the extension is critical
        _, octets, _ = element(rest)
    _, rest, _ = element(octets)
    names, addresses = [], []
    while rest:
        tag, value, rest = element(rest)
        if tag == _DNS_NAME and b"*" not in value:
            names.append(value.decode("ascii"))
        elif tag == _IP_ADDRESS:
            addresses.append(str(ipaddress.ip_address(value)))
    return (*names, *addresses)
