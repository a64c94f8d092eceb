# SPDX-License-Identifier: Apache-2.0
"""Messages to the service manager, over a real datagram socket."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.daemon.notify import UNSENT_MAX, Notifier
from tests.support.patience import PATIENCE_S

NBDTARGET = [sys.executable, "-c", "from nbdtarget.cli.app import main; main()"]


class Manager:
    """A service manager's end of the conversation."""

    def __init__(self, address: str) -> None:
        self.environment = {"NOTIFY_SOCKET": address}
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address[0] == "@" else address)
        self.socket.settimeout(PATIENCE_S)

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
    assert before <= int(heard["MONOTONIC_USEC"]) < before + PATIENCE_S * 1e6
    notifier.stopping()
    assert manager.hear()["STOPPING"] == "1"
    notifier.main_process(17)
    assert manager.hear() == {"MAINPID": "17", "READY": "1"}
    notifier.watchdog()
    assert manager.hear() == {"WATCHDOG": "1"}
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


def test_a_manager_that_was_busy_hears_of_what_comes_later(
    manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier(manager.environment)
    nr_sent = 0
    while not caplog.records:  # until its queue is full
        notifier.status("x")
        nr_sent += 1
    notifier.watchdog()
    assert len(caplog.records) == 1
    for _ in range(nr_sent - 1):
        assert manager.hear() == {"STATUS": "x"}
    notifier.watchdog()
    assert manager.hear() == {"WATCHDOG": "1"}


def fill(notifier: Notifier, caplog: pytest.LogCaptureFixture) -> int:
    """Send until the manager's queue is full; returns how many messages it has."""
    nr_sent = 0
    while not caplog.records:
        notifier.status("x")
        nr_sent += 1
    return nr_sent - 1


def test_a_state_that_could_not_be_told_is_told_with_the_next_message(
    manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier(manager.environment)
    nr = fill(notifier, caplog)
    notifier.reloading()
    notifier.status("lost")
    notifier.ready("web is served")
    assert notifier.is_behind
    for _ in range(nr):
        assert manager.hear() == {"STATUS": "x"}
    notifier.watchdog()
    assert "RELOADING" in manager.hear()
    assert manager.hear() == {"READY": "1", "STATUS": "web is served"}
    assert manager.hear() == {"WATCHDOG": "1"}
    assert not notifier.is_behind
    assert len(caplog.records) == 1


def test_a_manager_that_never_listens_costs_no_memory(tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": f"{tmp_path}/none"})
    for nr in range(100):
        notifier.ready(str(nr))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as late:
        late.bind(f"{tmp_path}/none")
        late.settimeout(PATIENCE_S)
        notifier.retry()
        heard = [late.recv(4096) for _ in range(UNSENT_MAX)]
        assert heard[-1] == b"READY=1\nSTATUS=99"
        late.setblocking(False)
        with pytest.raises(BlockingIOError):
            late.recv(4096)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "ours"}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
    ids=["none", "any process", "this one", "another one", "zero", "not a number"],
)
def test_a_watchdog_is_meant_for_the_process_that_it_names(
    variables: dict[str, str], expected: float | None
) -> None:
    if variables.get("WATCHDOG_PID") == "ours":
        variables = {**variables, "WATCHDOG_PID": str(os.getpid())}
    assert Notifier(variables).watchdog_s == expected


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
        status = "a is served, 0 clients; not open yet: b"
        assert heard == {"READY": "1", "STATUS": status}
        assert (tmp_path / "s").is_socket(), "clients may come"
        server.send_signal(signal.SIGHUP)
        assert manager.hear_but_patience()["RELOADING"] == "1"
        assert manager.hear_but_patience()["READY"] == "1"
        server.send_signal(signal.SIGTERM)
        assert manager.hear_but_patience()["STOPPING"] == "1"
        server.communicate(timeout=PATIENCE_S)
        assert server.returncode == 0
    finally:
        server.kill()
        server.communicate(timeout=PATIENCE_S)


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
            server.communicate(timeout=PATIENCE_S)
        assert server.returncode == 0
    finally:
        server.kill()
        server.communicate(timeout=PATIENCE_S)


def test_the_service_manager_follows_a_hand_over(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    manager = Manager(f"{tmp_path}/notify")
    # The watchdog is meant for "any process" here; systemd names one, and `hand_over` removes that name.
    manager.environment["WATCHDOG_USEC"] = str(3600 * 10**6)
    server = started(tmp_path, manager, "export", "a")
    heir = 0
    try:
        with manager.socket:
            assert manager.hear_but_patience()["READY"] == "1"
            assert manager.hear_but_patience() == {"WATCHDOG": "1"}
            command = [*NBDTARGET, "upgrade", "--control"]
            environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
            control = f"{tmp_path}/nbdtarget/control/a.sock"
            subprocess.run([*command, control], env=environment, check=True)
            assert manager.hear_but_patience()["RELOADING"] == "1"
            # Two processes speak, each by itself in order, and a status may come between.
            served = {"READY": "1", "STATUS": "a is served, 0 clients"}
            watched = {"WATCHDOG": "1"}  # the new process is watched, too
            heard: list[dict[str, str]] = []
            while not heir or served not in heard or watched not in heard:
                heard.append(manager.hear_but_patience())
                if "MAINPID" in heard[-1]:
                    assert not heir, "it is told once"
                    assert heard[-1]["READY"] == "1"
                    heir = int(heard[-1]["MAINPID"])
            assert server.wait(PATIENCE_S) == 0
            os.kill(heir, signal.SIGTERM)
            while "STOPPING" not in manager.hear_but_patience():
                pass
    finally:
        server.kill()
        if heir:
            with contextlib.suppress(ProcessLookupError):
                os.kill(heir, signal.SIGKILL)
        # stderr is read only now, because the new process has the same one.
        server.communicate(timeout=PATIENCE_S)
