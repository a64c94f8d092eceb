# SPDX-License-Identifier: Apache-2.0
"""Certificates for tests: one authority, made once in a session with the openssl command."""

import functools
import shutil
import subprocess
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from tests.support.patience import PATIENCE_S

__all__ = ["Authority", "authority", "needs_openssl"]

needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl is missing"
)

_KEY: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


class Authority:
    """A certificate authority in a directory of its own."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.certificate = directory / f"{name}.pem"
        self.key = directory / f"{name}.key"
        self._openssl(
            "req", "-x509", *_KEY, "-subj", f"/CN={name}", "-days", "30",
            "-keyout", self.key, "-out", self.certificate,
        )  # fmt: skip

    def issue(
        self, target: Path, side: str, common_name: str, sans: str = "", days: int = 20
    ) -> None:
        """Write SIDE-cert.pem, SIDE-key.pem and ca-cert.pem into `target`.

        Args: sans: as openssl writes them, for example "DNS:localhost,IP:127.0.0.1". days: may be negative: expired.
        """
        target.mkdir(exist_ok=True)
        request = self.directory / "request.pem"
        self._openssl(
            "req", "-new", *_KEY, "-subj", f"/CN={common_name}",
            "-keyout", target / f"{side}-key.pem", "-out", request,
        )  # fmt: skip
        extensions = self.directory / "extensions"
        extensions.write_text(f"subjectAltName={sans}\n" if sans else "")
        self._openssl(
            "x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self.key,
            "-days", str(days), "-extfile", extensions, "-set_serial", "77",
            "-out", target / f"{side}-cert.pem",
        )  # fmt: skip
        shutil.copy(self.certificate, target / "ca-cert.pem")

    def withdraw(self, certificate: Path, target: Path, days: int = 9) -> None:
        """Write a list of withdrawn certificates (CRL) with `certificate` in it. Args: days: until its nextUpdate; may be negative."""
        settings = self.directory / "crl.cnf"
        settings.write_text(
            "[ca]\ndefault_ca=it\n[it]\ndatabase=withdrawn\ndefault_md=sha256\n"
        )
        (self.directory / "withdrawn").write_text("")
        of_us = ("-config", settings, "-cert", self.certificate, "-keyfile", self.key)
        self._openssl("ca", *of_us, "-revoke", certificate)
        now = datetime.now(UTC)
        begin, end = now - timedelta(days=30), now + timedelta(days=days)
        self._openssl(
            "ca", *of_us, "-gencrl", "-out", target,
            "-crl_lastupdate", f"{begin:%Y%m%d%H%M%SZ}",
            "-crl_nextupdate", f"{end:%Y%m%d%H%M%SZ}",
        )  # fmt: skip

    def _openssl(self, *words: str | Path) -> None:
        subprocess.run(
            ["openssl", *map(str, words)],
            check=True,
            capture_output=True,
            timeout=PATIENCE_S,
            cwd=self.directory,
        )


@functools.cache
def authority() -> tuple[Authority, Path]:
    """An authority, and a directory with a server's certificate (localhost, 127.0.0.1) and a client's (alice)."""
    base = Path(tempfile.mkdtemp(prefix="nbdtarget-certs-"))
    it = Authority(base, "test-authority")
    pki = base / "pki"
    it.issue(pki, "server", "server.example", "DNS:localhost,IP:127.0.0.1,IP:::1")
    it.issue(pki, "client", "alice", "DNS:alice.example,email:alice@example")
    return it, pki
