# SPDX-License-Identifier: Apache-2.0
"""What files of certificates say."""

import ssl
import subprocess
import time
from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.x509 import earliest_end, subject_of
from tests.support.certificates import authority, needs_openssl
from tests.support.patience import PATIENCE_S

DAY_S = 86_400


def openssl(*words: str | Path) -> str:
    done = subprocess.run(
        ["openssl", *words],
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    return done.stdout.strip()


def der_of(path: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(path.read_text())


@needs_openssl
def test_end_is_what_openssl_says(tmp_path: Path) -> None:
    path = authority()[1] / "server-cert.pem"
    said = openssl("x509", "-noout", "-enddate", "-in", path)
    end_s = ssl.cert_time_to_seconds(said.removeprefix("notAfter="))
    assert earliest_end(str(path)) == (end_s, "server.example")


@needs_openssl
def test_end_after_2050_has_another_form(tmp_path: Path) -> None:
    authority()[0].issue(tmp_path, "server", "x", days=365 * 40)
    end = earliest_end(str(tmp_path / "server-cert.pem"))
    assert end is not None
    assert abs(end.expires_s - time.time() - 365 * 40 * DAY_S) < DAY_S


@needs_openssl
def test_earliest_end_of_a_chain_counts(tmp_path: Path) -> None:
    own = authority()[0]
    for nr, days in enumerate((20, 3, 9)):
        own.issue(tmp_path / str(nr), "server", f"number {nr}", days=days)
    parts = [tmp_path / str(nr) / "server-cert.pem" for nr in range(3)]
    chain = tmp_path / "chain.pem"
    chain.write_text("words between\n".join(each.read_text() for each in parts))
    end = earliest_end(str(chain))
    assert end == earliest_end(str(parts[1]))
    assert end is not None
    assert end.name == "number 1"


@needs_openssl
def test_list_of_withdrawn_certificates_ends_at_its_next_update(tmp_path: Path) -> None:
    own, pki = authority()
    path = tmp_path / "ca-crl.pem"
    own.withdraw(pki / "client-cert.pem", path, days=5)
    said = openssl("crl", "-noout", "-nextupdate", "-in", path)
    end_s = ssl.cert_time_to_seconds(said.removeprefix("nextUpdate="))
    assert earliest_end(str(path)) == (end_s, "test-authority")


def test_list_need_not_end(tmp_path: Path) -> None:
    # Its version, algorithm, issuer and thisUpdate, and nothing else.
    path = tmp_path / "ca-crl.pem"
    path.write_text(
        "-----BEGIN X509 CRL-----\nMBgwFgIBATAAMAAXDTI2MTIwMTAwMDAwMFo=\n-----END X509 CRL-----\n"
    )
    assert earliest_end(str(path)) is None


@needs_openssl
@pytest.mark.parametrize(
    ("subject", "name"),
    [
        ("/O=us/CN=mallory", "mallory"),
        ("/O=us/OU=disks", "us, disks"),
        ("/CN=a b\\/c", "a b/c"),
    ],
)
def test_subject(tmp_path: Path, subject: str, name: str) -> None:
    path = tmp_path / "c.pem"
    openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
        "-nodes", "-subj", subject, "-keyout", tmp_path / "k.pem", "-out", path,
    )  # fmt: skip
    assert subject_of(der_of(path)) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
        "-----BEGIN CERTIFICATE-----\nMIIBAAAA\n-----END CERTIFICATE-----\n",
        "-----BEGIN CERTIFICATE-----\nMAowCDAAMAAwADAA\n-----END CERTIFICATE-----\n",
    ],
)
def test_end_of_what_is_no_certificate(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.pem"
    path.write_text(text)
    with pytest.raises(NbdTargetError, match="has no certificate in PEM"):
        earliest_end(str(path))
    with pytest.raises(NbdTargetError, match="No such file"):
        earliest_end(str(tmp_path / "y.pem"))


@needs_openssl
def test_half_a_certificate_names_nobody() -> None:
    der = der_of(authority()[1] / "client-cert.pem")
    for length in range(120):
        with pytest.raises((ValueError, IndexError)):
            subject_of(der[:length])
