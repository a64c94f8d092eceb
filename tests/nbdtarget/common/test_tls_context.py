# SPDX-License-Identifier: Apache-2.0
"""Contexts from directories of certificates and files of keys."""

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.tls_context import (
    client_context,
    has_psk,
    server_context,
)
from tests.support.certificates import authority, needs_openssl
from tests.support.patience import PATIENCE_S

pytestmark = needs_openssl


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(authority()[1], tmp_path / "pki"))


def test_nothing_older_than_tls_1_2_and_no_renegotiation() -> None:
    for context in (
        server_context(str(authority()[1])),
        client_context(str(authority()[1])),
    ):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.options & ssl.OP_NO_RENEGOTIATION


def test_clients_are_asked_for_a_certificate_only_if_it_is_verified(pki: Path) -> None:
    assert server_context(str(pki)).verify_mode == ssl.CERT_NONE
    asking = server_context(str(pki), verify_peer=True)
    assert asking.verify_mode == ssl.CERT_REQUIRED


def test_client_verifies_unless_told_otherwise(pki: Path) -> None:
    assert client_context(str(pki)).check_hostname
    assert client_context(None).verify_mode == ssl.CERT_REQUIRED
    trusting = client_context(None, verify_peer=False)
    assert (trusting.verify_mode, trusting.check_hostname) == (ssl.CERT_NONE, False)


@pytest.mark.parametrize(
    "missing", ["server-cert.pem", "server-key.pem", "ca-cert.pem"]
)
def test_missing_file_is_named(pki: Path, missing: str) -> None:
    (pki / missing).unlink()
    with pytest.raises(NbdTargetError, match=f"{missing}: No such file"):
        server_context(str(pki), verify_peer=True)


def test_client_needs_no_certificate_of_its_own(pki: Path) -> None:
    (pki / "client-cert.pem").unlink()
    client_context(str(pki))


def test_client_certificate_without_its_key_is_a_mistake(pki: Path) -> None:
    (pki / "client-key.pem").unlink()
    with pytest.raises(NbdTargetError, match=r"client-key.pem: No such file"):
        client_context(str(pki))


def test_key_of_another_certificate(pki: Path) -> None:
    shutil.copy(pki / "client-key.pem", pki / "server-key.pem")
    with pytest.raises(NbdTargetError, match="is not the key of"):
        server_context(str(pki))


@pytest.mark.parametrize("name", ["server-cert.pem", "ca-cert.pem", "ca-crl.pem"])
def test_file_that_is_not_pem(pki: Path, name: str) -> None:
    (pki / name).write_text("garbage")
    with pytest.raises(NbdTargetError, match=rf"{name}.*PEM"):
        server_context(str(pki), verify_peer=True)


def test_encrypted_key_asks_nobody_for_a_password(pki: Path) -> None:
    key = pki / "server-key.pem"
    subprocess.run(
        ["openssl", "ec", "-aes128", "-passout", "pass:x", "-in", key, "-out", key],
        check=True,
        capture_output=True,
        timeout=PATIENCE_S,
    )
    with pytest.raises(NbdTargetError, match="is encrypted"):
        server_context(str(pki))


def test_authority_that_is_none(pki: Path) -> None:
    shutil.copy(pki / "client-cert.pem", pki / "ca-cert.pem")
    with pytest.raises(NbdTargetError, match="has no certificate of an authority"):
        server_context(str(pki), verify_peer=True)


# ---- pre-shared keys ----


@pytest.mark.skipif(has_psk(), reason="this Python has PSK")
def test_psk_without_the_python_for_it_is_a_clear_error(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:00112233\n")
    with pytest.raises(NbdTargetError, match=r"needs Python 3\.13"):
        server_context(None, psk_file=str(keys))
    with pytest.raises(NbdTargetError, match=r"needs Python 3\.13"):
        client_context(None, psk_file=str(keys), psk_name="alice")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no keys"),
        ("# alice:00\n\n", "has no keys"),
        ("alice", ":1: is not NAME:KEY"),
        ("a:00\nalice:xy", ":2: is not NAME:KEY"),
        (":0011", ":1: is not NAME:KEY"),
        ("alice:", ":1: is not NAME:KEY"),
        ("bob:0011", "has no key of alice"),
    ],
)
def test_file_of_keys_that_is_wrong(tmp_path: Path, text: str, reason: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text(text)
    with pytest.raises(NbdTargetError, match=reason):
        client_context(None, psk_file=str(keys), psk_name="alice")


def test_file_of_keys_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NbdTargetError, match="No such file"):
        server_context(None, psk_file=str(tmp_path / "keys"))
