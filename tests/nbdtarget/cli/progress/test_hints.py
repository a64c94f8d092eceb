# SPDX-License-Identifier: Apache-2.0
import shutil
from pathlib import Path

import pytest

from nbdtarget.cli.progress import hints
from nbdtarget.cli.progress.hints import client_lines, print_attach, tls_client
from nbdtarget.daemon.activation import PassedSockets
from nbdtarget.devices.nbd.uri import parse_nbd_uri
from nbdtarget.server.tls import TlsOptions
from tests.support.certificates import authority, needs_openssl


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (
            "nbd+unix:///d?socket=/run/a%20b",
            {
                "nbdinfo": "'nbd+unix:///d?socket=/run/a%20b'",
                "qemu-img": "info 'nbd+unix:///d?socket=/run/a%20b'",
                "qemu-system-x86_64": "-m 1G -drive 'file=nbd+unix:///d?socket=/run/a%20b,format=raw,if=virtio'",
                "nbd-client": "-unix '/run/a b' -N d /dev/nbd0",
            },
        ),
        (
            "nbd://[::1]:7/a%2Cb",
            {
                "nbdinfo": "'nbd://[::1]:7/a%2Cb'",
                "qemu-img": "info 'nbd://[::1]:7/a%2Cb'",
                "qemu-system-x86_64": "-m 1G -drive 'file=nbd://[::1]:7/a%2Cb,format=raw,if=virtio'",
                "nbd-client": "::1 7 -N a,b /dev/nbd0",
            },
        ),
        (
            "nbd+vsock://2:4000000000/a%2Cb",
            {
                "nbdinfo": "nbd+vsock://2:4000000000/a%2Cb",
                "qemu-img": "info --image-opts driver=nbd,server.type=vsock,server.cid=2,server.port=4000000000,export=a,,b",
            },
        ),
    ],
    ids=["unix", "tcp", "vsock"],
)
def test_lines_to_paste_are_for_clients_that_can_attach(
    uri: str, expected: dict[str, str]
) -> None:
    lines = [line.removeprefix("sudo ").partition(" ") for line in client_lines(uri)]
    said = {program: words for program, _, words in lines}
    copying = said.pop("nbdcopy")
    assert copying == f"--progress {expected['nbdinfo']} copy.img"
    assert said == expected


def tls_lines(uri: str, pki: Path, *, verify: bool) -> dict[str, str]:
    options = TlsOptions("require", str(pki), verify)
    lines = client_lines(uri, tls_client(parse_nbd_uri(uri), options))
    said = [line.removeprefix("sudo ").partition(" ") for line in lines]
    return {program: words for program, _, words in said}


@needs_openssl
def test_lines_with_tls_name_the_directory_and_a_host_of_the_certificate(
    tmp_path: Path,
) -> None:
    pki = Path(shutil.copytree(authority()[1], tmp_path / "pki"))
    keys = f"tls-certificates={pki}"
    disk = "driver=nbd,server.type=inet,server.host=0.0.0.0,server.port=7,export=d"
    tls = "tls-creds=tls,tls-hostname=localhost"
    creds = f"tls-creds-x509,id=tls,dir={pki},endpoint=client"
    drive = ",".join(f"file.{option}" for option in f"{disk},{tls}".split(","))
    assert tls_lines("nbds://0.0.0.0:7/d", pki, verify=True) == {
        "nbdinfo": f"'nbds://localhost:7/d?{keys}'",
        "nbdcopy": f"--progress 'nbds://localhost:7/d?{keys}' copy.img",
        "qemu-img": f"info --object {creds} --image-opts {disk},{tls}",
        "qemu-system-x86_64": f"-m 1G -object {creds} -drive format=raw,if=virtio,{drive}",
        "nbd-client": f"0.0.0.0 7 -N d -cacertfile {pki}/ca-cert.pem -certfile {pki}/client-cert.pem"
        f" -keyfile {pki}/client-key.pem -tlshostname localhost /dev/nbd0",
    }
    # A host that the certificate has stays.
    said = tls_lines("nbds://[::1]:7/d", pki, verify=False)
    assert said["nbdinfo"] == f"'nbds://[::1]:7/d?{keys}'"
    assert "-certfile" not in said["nbd-client"]
    said = tls_lines("nbds+unix:///d?socket=/s", pki, verify=True)
    assert said["nbdinfo"] == f"'nbds+unix:///d?socket=/s&{keys}'"
    assert "server.type=unix,server.path=/s,export=d" in said["qemu-img"]
    assert said["nbd-client"].startswith("-unix /s -N d -cacertfile")


@needs_openssl
def test_directory_of_a_client_is_asked_for_if_the_server_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pki = Path(shutil.copytree(authority()[1], tmp_path / "pki"))
    (pki / "client-key.pem").unlink()
    options = TlsOptions("require", str(pki), True)
    print_attach("d is served", "d", ["nbds://localhost:7/{name}"], options)
    said = capsys.readouterr().out
    assert (
        "(CERTIFICATES: the client's directory with ca-cert.pem, client-cert.pem and client-key.pem)"
        in said
    )
    assert "nbdinfo 'nbds://localhost:7/d?tls-certificates=CERTIFICATES'" in said
    # Other machines, which vsock is for, have a directory of their own in any case.
    options = TlsOptions("require", str(pki), False)
    print_attach("d is served", "d", ["nbds+vsock://2:7/{name}"], options)
    said = capsys.readouterr().out
    assert "(CERTIFICATES: the client's directory with ca-cert.pem)" in said
    assert "nbd-client" not in said


@needs_openssl
def test_lines_use_tls_where_it_is_on_and_clients_are_verified(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = TlsOptions("on", str(authority()[1]), True)
    print_attach("d is served", "d", ["nbd://0.0.0.0:7/{name}"], options)
    assert "nbdinfo 'nbds://localhost:7/d?tls-cert" in capsys.readouterr().out
    options = TlsOptions("on", str(authority()[1]), False)
    print_attach("d is served", "d", ["nbd://0.0.0.0:7/{name}"], options)
    assert "nbdinfo nbd://0.0.0.0:7/d\n" in capsys.readouterr().out


@needs_openssl
def test_host_is_one_of_this_machine_if_the_certificate_has_one(tmp_path: Path) -> None:
    authority()[0].issue(tmp_path, "server", "x", "DNS:far.example,DNS:localhost")
    for uri, host in (("0.0.0.0", "localhost"), ("192.0.2.1", "far.example")):
        said = tls_lines(f"nbds://{uri}:7/d", tmp_path, verify=False)
        assert said["nbdinfo"].startswith(f"'nbds://{host}:7/d?")


@needs_openssl
def test_tcp_server_whose_certificate_names_no_host_has_no_lines(
    tmp_path: Path,
) -> None:
    authority()[0].issue(tmp_path, "server", "some.example")
    assert not tls_lines("nbds://localhost:7/d", tmp_path, verify=False)
    said = tls_lines("nbds+unix:///d?socket=/s", tmp_path, verify=False)
    assert sorted(said) == ["nbdcopy", "nbdinfo"]


def test_lines_with_a_pre_shared_key_say_whose_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = TlsOptions(None, None, None, "/etc/keys.psk")
    print_attach("d is served", "d", ["nbds://localhost:7/{name}"], options)
    said = capsys.readouterr().out
    assert "for example with one of (NAME: one of /etc/keys.psk)\n" in said
    assert "nbdinfo 'nbds://NAME@localhost:7/d?tls-psk-file=/etc/keys.psk'\n" in said
    assert "qemu" not in said


def test_nothing_is_printed_where_a_socket_was_passed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hints, "passed_sockets", lambda: PassedSockets((3,)))
    print_attach("d is served", "d", ["nbd://localhost:7/{name}"], TlsOptions())
    assert capsys.readouterr().out == ""
