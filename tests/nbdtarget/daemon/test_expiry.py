# SPDX-License-Identifier: Apache-2.0
"""The lines about certificates that end."""

import pytest

from nbdtarget.common.x509 import End
from nbdtarget.daemon.expiry import EXPIRY_WARN_S, DiskCertificates, expiry_warning

DAY_S = 86_400.0


@pytest.mark.parametrize(
    ("path", "left_s", "name", "line"),
    [
        ("/p/server-cert.pem", EXPIRY_WARN_S, "x", ""),
        (
            "/p/server-cert.pem",
            2.5 * DAY_S,
            "",
            "/p/server-cert.pem: expires in 2 days; then clients refuse it",
        ),
        (
            "/p/ca-cert.pem",
            -1.0,
            "us",
            "/p/ca-cert.pem: has expired (us): certificates of that authority are refused",
        ),
    ],
)
def test_what_ends_soon_is_warned_of(
    path: str, left_s: float, name: str, line: str
) -> None:
    assert expiry_warning(path, End(1e9 + left_s, name), 1e9) == line


def test_disks_without_certificates_have_none() -> None:
    disks = [
        "/srv/nbds.img",
        "nbds-is-a-relative-path",
        "nbd://host/d",
        "nbds://host/d",
        "nbds://host/d?tls-psk-file=/k&tls-certificates=/c",
        "nbds://host/d?tls-certificates=/nowhere",
    ]
    assert DiskCertificates().ends(disks) == {}
