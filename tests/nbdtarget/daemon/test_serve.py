# SPDX-License-Identifier: Apache-2.0
"""The server process: starts, listens where it should, and ends in order."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control import messages as m
from nbdtarget.control.client import ControlClient, NoServerError
from nbdtarget.daemon import serve as serve_module
from nbdtarget.daemon.daemon import Daemon
from nbdtarget.devices.http.url_command import set_url_commands, url_command_for
from tests.support.command_line import in_process
from tests.support.patience import PATIENCE_S

NBDTARGET = [sys.executable, "-c", "from nbdtarget.cli.app import main; main()"]


# A service manager passes a socket in this way: it becomes descriptor 3, and the process is told so.
PASS_SOCKET = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServeProcess:
    """`nbdtarget serve`, in a runtime directory of its own; `uri` is what it printed."""

    def __init__(
        self,
        runtime: Path,
        *argv: str,
        passed: int | None = None,
        starts: bool = True,
    ) -> None:
        self.directory = runtime / "nbdtarget"
        self.client = ControlClient(self.directory / "control.sock")
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
        environment.pop("NBDTARGET_CONTROL", None)
        wrapper = []
        if passed is not None:
            wrapper = [sys.executable, "-c", PASS_SOCKET, str(passed)]
        self.process = subprocess.Popen(
            [*wrapper, *NBDTARGET, "serve", *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            pass_fds=[] if passed is None else [passed],
        )
        assert self.process.stdout is not None
        self.uri = self.process.stdout.readline().strip() if starts else ""

    def create(self, name: str, table: str) -> None:
        self.client.ask("create", m.Create(name, table), m.Done)

    def run(self, *words: str, err: bool = False) -> str:
        """Run a command. Returns its stdout, or its stderr if `err`."""
        control = str(self.directory / "control.sock")
        done = in_process(*words, "--control", control)
        assert done.returncode == 0, done.stderr
        return done.stderr if err else done.stdout

    def end(self, number: int) -> str:
        """Send a signal; it must end with 0. Returns what it said on stderr."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, err
        return err

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=PATIENCE_S)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[ServeProcess]:
    process = ServeProcess(tmp_path)
    yield process
    if process.process.returncode is None:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_it_in_order(serve: ServeProcess, number: int) -> None:
    assert serve.uri == f"nbd+unix:///?socket={serve.directory}/nbd.sock"
    serve.create("x", "0 2048 linear memory:1M 0")
    serve.create("y", "0 2048 linear /dev/mapper/x 0")
    serve.client.ask("suspend", m.Suspend("x"), m.Done)
    said = serve.end(number)
    assert said.startswith("nbdtarget: SIGHUP: the server stops") == (
        number == signal.SIGHUP
    )
    assert said.count("\n") == (number == signal.SIGHUP)
    assert list(serve.directory.iterdir()) == []
    with pytest.raises(NoServerError):
        serve.client.ask("version", m.Version(), m.VersionAnswer)


def test_killed_servers_sockets_are_replaced(
    serve: ServeProcess, tmp_path: Path
) -> None:
    serve.kill()
    again = ServeProcess(tmp_path)
    assert again.uri == serve.uri
    assert again.end(signal.SIGTERM) == ""


def test_second_server_is_refused(serve: ServeProcess, tmp_path: Path) -> None:
    second = ServeProcess(tmp_path, "--listen", f"unix:{tmp_path}/other.sock")
    _, err = second.process.communicate(timeout=PATIENCE_S)
    assert second.process.returncode == 1
    assert err.startswith(
        f"nbdtarget: {serve.directory}/control.sock: another server is"
    )
    assert err.count("\n") == 1
    assert not (tmp_path / "other.sock").exists()


def test_passed_socket_is_served_and_stdout_left_alone(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "passed.sock"))
    listener.listen()
    serve = ServeProcess(tmp_path, passed=listener.fileno(), starts=False)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "passed.sock"))
        assert client.recv(8) == b"NBDMAGIC"
    serve.process.send_signal(signal.SIGTERM)
    said = serve.process.communicate(timeout=PATIENCE_S)
    assert (serve.process.returncode, said) == (0, ("", ""))
    listener.close()


@pytest.mark.long
def test_config_is_served_and_followed_on_sighup(tmp_path: Path) -> None:
    config = tmp_path / "disks.toml"
    config.write_text(
        'listen = "unix:nbd.sock"\n[device.a]\ntable = "0 2048 zero"\n'
        '[device.b]\ntable = "0 8 linear /dev/mapper/a 0"\n'
    )
    serve = ServeProcess(tmp_path, "--config", str(config))
    assert serve.uri == f"nbd+unix:///?socket={tmp_path}/nbd.sock"
    written = serve.run("table", "--config")
    assert f'listen = ["unix:{tmp_path}/nbd.sock"]' in written
    with config.open("a") as file:
        file.write('[device.c]\ntable = "0 8 zero"\n')
    serve.process.send_signal(signal.SIGHUP)
    assert serve.process.stderr is not None
    assert serve.process.stderr.readline() == "nbdtarget: reloaded: c created\n"
    assert serve.run("ls").split() == ["a", "(253:0)", "b", "(253:1)", "c", "(253:2)"]
    assert serve.end(signal.SIGTERM) == ""
    # The configuration that was printed makes the same devices again.
    config.write_text(written)
    serve = ServeProcess(tmp_path, "--config", str(config))
    assert serve.run("table", "--config") == written
    assert serve.end(signal.SIGTERM) == ""


def test_a_config_with_mistakes_is_refused_with_their_lines(tmp_path: Path) -> None:
    config = tmp_path / "disks.toml"
    config.write_text('[device.a]\ntabel = "0 8 zero"\nuuid = 3\n')
    serve = ServeProcess(tmp_path, "--config", str(config))
    assert serve.uri == ""
    assert serve.process.wait(PATIENCE_S) == 1
    _, err = serve.process.communicate(timeout=PATIENCE_S)
    assert err.splitlines() == [
        f"nbdtarget: {config}:2: unknown key `device.a.tabel' (did you mean `table'?)",
        f"nbdtarget: {config}:3: `device.a.uuid': Expected `str`, got `int`",
    ]
    assert not (tmp_path / "nbdtarget").exists()


@pytest.mark.long
def test_device_that_cannot_be_opened_is_listed_with_the_reason(
    tmp_path: Path,
) -> None:
    config = tmp_path / "disks.toml"
    config.write_text(
        '[device.a]\ntable = "0 8 zero"\n[device.b]\ntable = "0 8 linear late.img 0"\n'
    )
    serve = ServeProcess(tmp_path, "--config", str(config))
    reason = (
        f"linear: Device lookup failed: {tmp_path}/late.img: no such file or directory"
    )
    assert serve.run("ls") == f"a\t(253:0)\nb\t(253:1) failed: {reason}\n"
    assert serve.run("status") == f"a: 0 8 zero \nb: failed: {reason}\n"
    assert f"Failure:           {reason}\n" in serve.run("info", "b")
    # A user who writes this over the file that was read would lose the table.
    written = serve.run("table", "--config", err=True)
    assert "nbdtarget: table: b could not be opened, so its table is missing" in written
    (info,) = json.loads(serve.run("info", "b", "--json"))["devices"]
    assert info["failure"] == reason
    (tmp_path / "late.img").write_bytes(bytes(4096))
    serve.process.send_signal(signal.SIGHUP)
    assert serve.process.stderr is not None
    said = [serve.process.stderr.readline() for _ in range(3)]
    assert said == [
        f"nbdtarget: {config}: device b: {reason}; it is not served; the server goes on trying to open it\n",
        f"nbdtarget: {config}: device b: is served now\n",
        "nbdtarget: reloaded: b created\n",
    ]
    assert serve.run("ls") == "a\t(253:0)\nb\t(253:1)\n"
    assert serve.end(signal.SIGTERM) == ""


def test_a_stop_does_not_wait_for_a_server_that_does_not_start(tmp_path: Path) -> None:
    config = tmp_path / "disks.toml"
    config.write_text(
        '[device.a]\ntable = "0 8 zero"\n'
        '[device.b]\ntable = "0 8 linear nbd+unix:///x?socket=mute.sock 0"\n'
    )
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(tmp_path / "mute.sock"))
        mute.listen()
        serve = ServeProcess(tmp_path, "--config", str(config), starts=False)
        connection, _ = mute.accept()  # it waits for our greeting now
        with connection:
            assert serve.end(signal.SIGTERM) == ""
    assert list(serve.directory.iterdir()) == []


@pytest.mark.long
def test_what_is_kept_survives_a_hand_over_and_a_crash(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    old = ServeProcess(tmp_path, "--state", state)
    heir = 0
    try:
        old.run("create", "a", "--persist", "--table", "0 8 zero")
        old.run("create", "gone", "--table", "0 8 zero")
        heir = json.loads(old.run("upgrade", "--json"))["pid"]
        assert old.process.wait(PATIENCE_S) == 0
        # The new process has the directory now, and keeps in it.
        old.run("create", "b", "--persist", "--table", "0 16 zero")
        os.kill(heir, signal.SIGKILL)
        old.process.communicate(timeout=PATIENCE_S)  # until nothing holds its stderr
        heir = 0
    finally:
        if heir:
            os.kill(heir, signal.SIGKILL)
        old.kill()
    again = ServeProcess(tmp_path, "--state", state)
    assert again.run("ls") == "a\t(253:0)\nb\t(253:1)\n"
    assert again.end(signal.SIGTERM) == ""


def test_damaged_state_ends_the_start_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    file = tmp_path / "state/devices.toml"
    file.write_text('[device.a]\ntable = "0 8 zero"\n')
    serve = ServeProcess(tmp_path, "--state", str(tmp_path / "state"))
    _, err = serve.process.communicate(timeout=PATIENCE_S)
    assert serve.process.returncode == 1
    assert err.startswith(f"nbdtarget: {file}: it does not begin as such a file does.")
    assert err.count("\n") == 1
    assert file.read_text() == '[device.a]\ntable = "0 8 zero"\n'


async def test_commands_of_the_file_are_known_before_disks_are_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "disks.toml"
    config.write_text('url_commands = { "https://h/a" = ["sign", "a"] }\n')
    seen = []

    async def take_over(*_: object, **__: object) -> None:
        seen.append(url_command_for("https://h/a"))
        raise NbdTargetError("that is all")

    monkeypatch.setattr(serve_module, "maybe_offer", object)
    monkeypatch.setattr(Daemon, "take_over", take_over)
    options = serve_module.ServeOptions(
        config=str(config), listen=(f"unix:{tmp_path}/nbd",)
    )
    try:
        with pytest.raises(NbdTargetError, match="that is all"):
            await serve_module.serve_until_stopped(options, lambda _: None)
    finally:
        set_url_commands({})
    assert seen == [("sign", "a")]
