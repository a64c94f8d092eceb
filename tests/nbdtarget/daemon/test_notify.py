# SPDX-License-Identifier: Apache-2.0
"""What the service manager hears, over a real datagram socket."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

from nbdtarget.daemon.notify import Notifier
from nbdtarget.daemon.stop_bounds import STOP_S_MAX

NBDTARGET = [sys.executable, "-c", "from nbdtarget.cli.app import main; main()"]
UNITS = Path(__file__).parents[3] / "docs" / "systemd"
TIMEOUT_S = 30


class Manager:
    """A service manager's end of the conversation."""

    def __init__(self, address: str) -> None:
        self.environment = {"NOTIFY_SOCKET": address}
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address[0] == "@" else address)
        self.socket.settimeout(TIMEOUT_S)

    def hear(self) -> dict[str, str]:
        lines = self.socket.recv(4096).decode().split("\n")
        return dict(line.split("=", 1) for line in lines)

    def hear_but_patience(self) -> dict[str, str]:
        """The next message that is no mere sign of life."""
        while list(heard := self.hear()) == ["EXTEND_TIMEOUT_USEC"]:
            assert int(heard["EXTEND_TIMEOUT_USEC"]) > 1_000_000
        return heard


@pytest.fixture(params=["path", "abstract"])
def manager(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Manager]:
    path = f"{tmp_path}/notify"
    manager = Manager(path if request.param == "path" else f"@{path}")
    with manager.socket:
        yield manager


def test_every_message_has_the_words_of_the_protocol(manager: Manager) -> None:
    notifier = Notifier(manager.environment)
    notifier.ready("two disks\nREADY=0")
    assert manager.hear() == {"READY": "1", "STATUS": "two disks READY=0"}
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading()
    heard = manager.hear()
    assert heard["RELOADING"] == "1"
    assert before <= int(heard["MONOTONIC_USEC"]) < before + 10_000_000
    notifier.stopping()
    assert manager.hear()["STOPPING"] == "1"
    notifier.extend(1.5)
    assert manager.hear() == {"EXTEND_TIMEOUT_USEC": "1500000"}


@pytest.mark.parametrize("address", ["", "vsock:2:1", "/nonexistent/notify"])
def test_no_manager_is_no_failure(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.ready("")
    notifier.stopping()
    assert len(caplog.records) == (1 if address else 0)


def started(work: Path, manager: Manager, *argv: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **manager.environment, "XDG_RUNTIME_DIR": str(work)}
    environment.pop("NBDTARGET_CONTROL", None)
    return subprocess.Popen(
        [*NBDTARGET, *argv],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_service_manager_follows_a_server_from_start_to_end(
    tmp_path: Path, manager: Manager
) -> None:
    config = tmp_path / "disks.toml"
    config.write_text(
        f'listen = "unix:{tmp_path}/s"\n[device.a]\ntable = "0 8 zero"\n'
        '[device.b]\ntable = "0 8 linear missing.img 0"\n'
    )
    server = started(tmp_path, manager, "serve", "--config", str(config))
    try:
        heard = manager.hear_but_patience()
        assert heard == {"READY": "1", "STATUS": "1 devices are served; not yet: b"}
        assert (tmp_path / "s").is_socket(), "clients may come"
        server.send_signal(signal.SIGHUP)
        assert manager.hear_but_patience()["RELOADING"] == "1"
        assert manager.hear_but_patience()["READY"] == "1"
        server.send_signal(signal.SIGTERM)
        assert manager.hear_but_patience()["STOPPING"] == "1"
        server.communicate(timeout=TIMEOUT_S)
        assert server.returncode == 0
    finally:
        server.kill()
        server.communicate(timeout=TIMEOUT_S)


@pytest.mark.parametrize("job", ["clone", "cache"])
def test_the_service_manager_follows_a_job_from_start_to_end(
    tmp_path: Path, job: str
) -> None:
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    size = ["--cache-size", "512K"] if job == "cache" else []
    manager = Manager(f"{tmp_path}/notify")
    server = started(tmp_path, manager, job, "a", "b", *size)
    try:
        with manager.socket:
            assert manager.hear_but_patience()["READY"] == "1"
            server.send_signal(signal.SIGTERM)
            assert manager.hear_but_patience()["STOPPING"] == "1"
            server.communicate(timeout=TIMEOUT_S)
        assert server.returncode == 0
    finally:
        server.kill()
        server.communicate(timeout=TIMEOUT_S)


@pytest.mark.parametrize("unit", sorted(UNITS.iterdir()), ids=lambda unit: unit.name)
def test_the_example_units_leave_time_for_a_stop_and_wait_for_ready(unit: Path) -> None:
    parsed = ConfigParser(strict=True, interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read_string(unit.read_text())
    service = parsed["Service"]
    assert service["Type"] == "notify"
    assert float(service["TimeoutStopSec"]) > STOP_S_MAX
    program, command, *words = service["ExecStart"].split()
    assert Path(program).name == "nbdtarget"
    known = subprocess.run(
        [*NBDTARGET, command, "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert all(word in known for word in words if word.startswith("--"))
