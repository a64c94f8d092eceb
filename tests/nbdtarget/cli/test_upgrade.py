# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget upgrade`, with real servers: their clients notice nothing but a pause."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control import messages as m
from nbdtarget.control.client import ControlClient
from nbdtarget.control.figures import Events, EventsAnswer, Figures, FiguresAnswer
from nbdtarget.porcelain.trace_file import read_trace
from tests.support.certificates import authority, needs_openssl
from tests.support.clients import CloneUnderTest, refused
from tests.support.patience import PATIENCE_S
from tests.support.plain_client import CMD_WRITE, PlainClient, PlainClientError
from tests.support.processes import NBDTARGET, ServerProcess, stop_stranger

MIB = 1 << 20


def get(where: Path, url: str) -> bytes:
    """Ask a socket of metrics or of control; the whole answer."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(where))
        head = f"GET {url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        client.sendall(head.encode())
        return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.long
def test_clients_stay_and_the_sockets_are_the_same(tmp_path: Path) -> None:
    content = os.urandom(4 * MIB)
    (tmp_path / "source.img").write_bytes(content)
    clone = CloneUnderTest(tmp_path, content, str(tmp_path / "source.img"))
    control = tmp_path / "control.sock"
    old = clone.start("--control", str(control), "--hydration-rate", "64K")
    with PlainClient(clone.socket, clone.name) as client:
        client.write(0, b"x" * 4096)
        said = subprocess.run(
            [NBDTARGET, "upgrade", "--json", "--control", str(control)],
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE_S,
        ).stdout
        assert old.child.wait(PATIENCE_S) == 0
        pid = json.loads(said)["pid"]
        version = ControlClient(control).ask("version", m.Version(), m.VersionAnswer)
        assert version.pid == pid
        assert client.read(0, 8192) == b"x" * 4096 + content[4096:8192]
        client.write(8192, b"y" * 512)
        client.flush()
        with PlainClient(clone.socket, clone.name) as other:
            assert other.read(8192, 512) == b"y" * 512
    stop_stranger(pid)
    assert not control.exists()
    assert not clone.socket.exists()
    assert "Traceback" not in clone.log.read_text()
    clone.hydrate()
    assert (
        clone.dest.read_bytes()[:8704] == b"x" * 4096 + content[4096:8192] + b"y" * 512
    )


def test_a_recorded_trace_goes_on(tmp_path: Path) -> None:
    content = os.urandom(4 * MIB)
    (tmp_path / "source.img").write_bytes(content)
    clone = CloneUnderTest(tmp_path, content, str(tmp_path / "source.img"))
    control, trace = tmp_path / "control.sock", tmp_path / "boot.trace"
    order = tmp_path / "order.trace"
    order.write_text("nbdtarget-trace 1\n2097152 65536\n")
    old = clone.start(
        *("--control", str(control), "--no-hydration"),
        *("--record-trace", str(trace), "--hydrate-order", str(order)),
    )
    with PlainClient(clone.socket, clone.name) as client:
        client.read(MIB, 4096)
        client.read(0, 4096)
        order.unlink()  # it was read when the clone began
        pid = ControlClient(control).ask("upgrade", m.Upgrade(), m.UpgradeAnswer).pid
        assert old.child.wait(PATIENCE_S) == 0
        client.read(MIB, 512)
        client.read(3 * MIB, 4096)
    stop_stranger(pid)
    assert read_trace(str(trace)) == [
        (at, at + 65536) for at in (MIB, 0, 3 * MIB)
    ]  # whole regions, each once
    assert "Traceback" not in clone.log.read_text()


def test_a_disk_in_memory_is_refused_and_goes_on(tmp_path: Path) -> None:
    path, control = tmp_path / "nbd.sock", tmp_path / "control.sock"
    argv = [NBDTARGET, "export", "memory:1M", "--name", "m", "--listen", f"unix:{path}"]
    server = ServerProcess(
        [*argv, "--control", str(control)], sockets=[path], log=tmp_path / "log"
    )
    with PlainClient(path, "m") as client:
        client.write(0, b"x" * 512)
        said = refused([NBDTARGET, "upgrade", "--control", str(control)])
        assert "memory:1M: its contents, which are in memory, would be lost" in said
        assert client.read(0, 512) == b"x" * 512
    assert server.terminate() == 0


def test_requests_that_wait_in_a_suspended_device_refuse_it_by_name(
    tmp_path: Path,
) -> None:
    path, control = tmp_path / "nbd.sock", tmp_path / "control.sock"
    (tmp_path / "b.img").write_bytes(bytes(MIB))
    argv = [NBDTARGET, "serve", "--listen", f"unix:{path}", "--control", str(control)]
    server = ServerProcess(argv, sockets=[path], log=tmp_path / "log")
    ask = ControlClient(control).ask
    ask("create", m.Create("b", f"0 8 linear {tmp_path}/b.img 0"), m.Done)
    with PlainClient(path, "b") as client:
        ask("suspend", m.Suspend("b"), m.Done)
        client.send(CMD_WRITE, payload=b"x" * 512)
        said = refused([NBDTARGET, "upgrade", "--control", str(control)])
        assert "device b is suspended, and requests of client " in said
        ask("resume", m.Resume("b"), m.Done)
        assert client.receive()[1] == 0
        assert client.read(0, 512) == b"x" * 512
    assert server.terminate() == 0


def test_metrics_have_a_socket_of_their_own_which_moves_too(tmp_path: Path) -> None:
    path, control = tmp_path / "nbd.sock", tmp_path / "control.sock"
    metrics = tmp_path / "metrics.sock"
    argv = [NBDTARGET, "serve", "--listen", f"unix:{path}", "--control", str(control)]
    server = ServerProcess(
        [*argv, "--metrics", str(metrics), "--no-metrics-devices"],
        sockets=[path, metrics],
        log=tmp_path / "log",
    )
    ControlClient(control).ask("create", m.Create("z", "0 8 zero"), m.Done)

    for where in (metrics, control):
        answer = get(where, "/metrics")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"Content-Type: text/plain; version=0.0.4" in answer
        assert b"\nnbdtarget_devices 1\n" in answer
        assert b'device="' not in answer
    assert b" 404 " in get(metrics, "/v1/status").partition(b"\r\n")[0]
    assert b" 404 " in get(metrics, "/v1/openapi.json").partition(b"\r\n")[0]
    pid = ControlClient(control).ask("upgrade", m.Upgrade(), m.UpgradeAnswer).pid
    assert server.child.wait(PATIENCE_S) == 0
    assert b"\nnbdtarget_devices 1\n" in get(metrics, "/metrics")
    # The new process keeps events, too.
    events = ControlClient(control).ask("events", Events(since=0), EventsAnswer)
    assert events.last > 0
    stop_stranger(pid)
    assert not metrics.exists()


@needs_openssl
def test_sockets_are_as_protected_as_before_whatever_the_file_says_now(
    tmp_path: Path,
) -> None:
    """What only a restart applies is not applied by an upgrade, least of all when that opens what was closed."""
    secure, plain, control = (tmp_path / each for each in ("tls", "plain", "control"))
    metrics, token, config = (tmp_path / each for each in ("metrics", "token", "toml"))
    token.write_text("correct-horse-battery\n")
    begin = f'control = "{control}"\nmetrics = "{metrics}"\n[device.b]\ntable = "0 8 zero"\n'
    config.write_text(
        f'listen = ["unix:{plain}", {{ address = "unix:{secure}", tls = "require" }}]\n'
        f'tls = "off"\ntls_certificates = "{authority()[1]}"\n'
        f'control_token_file = "{token}"\nmetrics_devices = false\n{begin}'
        '[device.a]\naccess = ["none any"]\ntable = "0 8 zero"\n'
        "[limits]\nconnections_max = 3\n"
    )
    argv = [NBDTARGET, "serve", "--config", str(config)]
    server = ServerProcess(argv, sockets=[secure, plain, metrics], log=tmp_path / "log")
    config.write_text(f'listen = ["unix:{tmp_path}/other"]\n{begin}')
    known = ControlClient(control, "correct-horse-battery")
    attached = PlainClient(plain, "b")
    for _ in range(2):  # the second process hands over what it was handed
        pid = known.ask("upgrade", m.Upgrade(), m.UpgradeAnswer).pid
        assert server.child.wait(PATIENCE_S) == 0
        version = known.ask("version", m.Version(), m.VersionAnswer)
        assert version.pid == pid
        schemes = [uri.partition(":")[0] for uri in version.uris]
        assert schemes == ["nbd+unix", "nbds+unix"]
        with pytest.raises(PlainClientError):
            PlainClient(secure, "b")
        with pytest.raises(PlainClientError):
            PlainClient(plain, "a")
        PlainClient(plain, "b").sock.close()
        with pytest.raises(NbdTargetError, match="token"):
            ControlClient(control).ask("version", m.Version(), m.VersionAnswer)
        said = get(metrics, "/metrics")
        assert b'device="' not in said
        assert b'{bound="connections_max"} 3\n' in said
        assert attached.read(0, 512) == bytes(512)
        clients = known.ask("figures", Figures(), FiguresAnswer).clients
        assert {each.identity for each in clients} == {f"uid:{os.getuid()}"}
        # Its stderr is that of the first process again.
        assert os.readlink(f"/proc/{pid}/fd/2") == str(tmp_path / "log")
    attached.sock.close()
    stop_stranger(pid)
