# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from nbdtarget.common.certificate_names import host_names
from nbdtarget.common.errors import NbdTargetError
from tests.support.certificates import authority, needs_openssl

pytestmark = needs_openssl


@pytest.mark.parametrize(
    ("sans", "expected"),
    [
        ("", ()),
        ("DNS:localhost,IP:127.0.0.1,IP:::1", ("localhost", "127.0.0.1", "::1")),
        (
            "critical,IP:192.0.2.1,DNS:*.example,DNS:a.example",
            ("a.example", "192.0.2.1"),
        ),
        ("email:a@example", ()),
    ],
    ids=["none", "names and addresses", "critical, with a wildcard", "no host"],
)
def test_names_of_a_certificate(
    tmp_path: Path, sans: str, expected: tuple[str, ...]
) -> None:
    authority()[0].issue(tmp_path, "server", "some.example", sans)
    assert host_names(str(tmp_path / "server-cert.pem")) == expected


@pytest.mark.parametrize("text", ["", "MIIB"])
def test_file_without_a_certificate_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "server-cert.pem"
    file.write_text(text and f"-----BEGIN CERTIFICATE-----\n{text}\n")
    with pytest.raises(NbdTargetError, match="has no certificate in PEM"):
        host_names(str(file))
