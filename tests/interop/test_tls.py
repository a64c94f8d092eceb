# SPDX-License-Identifier: Apache-2.0
"""TLS with real clients and a real server."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.certificates import authority, needs_openssl
from tests.support.clients import CloneUnderTest, client, needs, report
from tests.support.processes import NBDTARGET, ServerProcess

pytestmark = [pytest.mark.interop, needs_openssl]

PROGRAMS = ("nbdinfo", "nbdcopy", "qemu-img")


@contextmanager
def exported(image: Path, work: Path, *extra: str) -> Iterator[str]:
    """Serve `image` with TLS; yield the URI for libnbd."""
    path = work / "tls.sock"
    argv = [NBDTARGET, "export", str(image), "--name", "disk", *extra]
    argv += ["--tls-certificates", str(authority()[1])]
    process = ServerProcess(
        [*argv, "--listen", f"unix:{path}"], sockets=[path], log=work / "tls.log"
    )
    try:
        yield f"nbds+unix:///disk?socket={path}&tls-certificates={authority()[1]}"
    finally:
        assert process.terminate() == 0


def plain(uri: str) -> str:
    return uri.replace("nbds", "nbd").partition("&")[0]


@needs("nbdinfo")
def test_nbdinfo_says_tls(tmp_path: Path, source_image: Path, content: bytes) -> None:
    with exported(source_image, tmp_path, "--tls", "on") as uri:
        info = report("nbdinfo", "--json", uri)
        assert info["TLS"] is True
        assert info["exports"][0]["export-size"] == len(content)
        # With `on' a client may do without.
        assert report("nbdinfo", "--json", plain(uri))["TLS"] is False


@needs("nbdinfo")
def test_client_without_tls_is_told_that_a_certificate_is_asked_for(
    tmp_path: Path, source_image: Path
) -> None:
    asks = ("--tls-verify-peer", "--tls", "on")
    with exported(source_image, tmp_path, *asks) as uri:
        assert report("nbdinfo", "--json", uri)["TLS"] is True
        said = client("nbdinfo", plain(uri), status=1)
        assert "TLS" in said
    with exported(source_image, tmp_path, *asks, "--access", "ro unix") as uri:
        assert report("nbdinfo", "--json", plain(uri))["TLS"] is False


@needs("nbdinfo")
def test_client_of_another_name_does_not_find_the_export(
    tmp_path: Path, source_image: Path
) -> None:
    rules = ["--tls-verify-peer", "--access", "rw cert:bob"]
    with exported(source_image, tmp_path, *rules) as uri:
        assert not report("nbdinfo", "--list", "--json", uri).get("exports")
        client("nbdinfo", uri, status=1)
    assert "(cert:alice cert:alice.example" in (tmp_path / "tls.log").read_text()


@needs("nbdcopy")
def test_nbdcopy_there_and_back(
    tmp_path: Path, source_image: Path, content: bytes
) -> None:
    new, back = tmp_path / "new.img", tmp_path / "back.img"
    new.write_bytes(content[::-1])
    with exported(source_image, tmp_path) as uri:
        client("nbdcopy", uri, str(back))
        assert back.read_bytes() == content
        client("nbdcopy", "--flush", str(new), uri)
    assert source_image.read_bytes() == content[::-1]


@needs("qemu-img")
def test_qemu_reads_the_disk(
    tmp_path: Path, source_image: Path, content: bytes
) -> None:
    copy = tmp_path / "copy.img"
    with exported(source_image, tmp_path, "--tls-verify-peer"):
        creds = f"tls-creds-x509,id=t,dir={authority()[1]},endpoint=client"
        options = f"driver=nbd,server.type=unix,server.path={tmp_path / 'tls.sock'}"
        options += ",export=disk,tls-creds=t,tls-hostname=localhost"
        argv = ["qemu-img", "convert", "--object", creds, "--image-opts", options]
        client(*argv, "-O", "raw", str(copy))
    assert copy.read_bytes() == content


@needs(*PROGRAMS)
@pytest.mark.parametrize("extra", [[], ["--tls-verify-peer"]], ids=["any", "verified"])
@pytest.mark.parametrize("where", ["tcp:0.0.0.0:0", "unix:x,y.sock"])
def test_lines_that_are_printed_work(
    tmp_path: Path, source_image: Path, content: bytes, where: str, extra: list[str]
) -> None:
    argv = [NBDTARGET, "export", str(source_image), "--name", "a,b", "--listen", where]
    argv += ["--control", str(tmp_path / "control")]
    with subprocess.Popen(
        [*argv, "--tls-certificates", str(authority()[1]), *extra],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
    ) as server:
        assert server.stdout is not None
        said = iter(server.stdout.readline, "\n")
        lines = [line.strip() for line in said if line.startswith("  ")]
        try:
            pasted = [line for line in lines if line.split()[0] in PROGRAMS]
            for line in pasted:
                client("sh", "-c", f"cd {tmp_path} && {line}")
        finally:
            server.terminate()
    assert [line.split()[0] for line in pasted] == list(PROGRAMS)
    assert (tmp_path / "copy.img").read_bytes() == content


@needs("nbdkit")
def test_nbdkit_that_requires_tls_is_the_source_of_a_clone(
    tmp_path: Path, source_image: Path, content: bytes
) -> None:
    path = tmp_path / "nbdkit.sock"
    argv = ["nbdkit", "--foreground", "-U", str(path), "--tls=require", "--readonly"]
    argv += ["--tls-verify-peer", f"--tls-certificates={authority()[1]}"]
    with ServerProcess(
        [*argv, "file", str(source_image)], sockets=[path], log=tmp_path / "nbdkit.log"
    ):
        keys = f"socket={path}&tls-certificates={authority()[1]}"
        clone = CloneUnderTest(tmp_path, content, f"nbds+unix:///?{keys}")
        clone.hydrate()
    assert clone.dest.read_bytes() == content
