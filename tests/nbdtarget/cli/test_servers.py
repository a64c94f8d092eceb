# SPDX-License-Identifier: Apache-2.0
"""Several servers of one user: each job has its own control socket, found by the name of its export."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control import servers
from nbdtarget.control.paths import (
    job_control_path,
    known_controls,
    runtime_directory,
    socket_path,
)
from tests.support.command_line import in_process
from tests.support.patience import PATIENCE_S, wait_until

NBDTARGET = [sys.executable, "-c", "from nbdtarget.cli.app import main; main()"]

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def work(tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the disks are. The sockets are in `runtime`: the path of a socket has a limit, and the temporary folder may have a long one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NBDTARGET_CONTROL", raising=False)
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setattr(servers, "LOOK_S_MAX", PATIENCE_S)
    for name in ("one", "two"):
        Path(name).write_bytes(bytes(1 << 20))
    return tmp_path


@pytest.fixture
def start(work: Path) -> Iterator[Start]:
    started = []

    def start(*argv: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*NBDTARGET, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline(), process.communicate()
        return process

    yield start
    for process in started:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate(timeout=PATIENCE_S)


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*NBDTARGET, *argv],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def says(*argv: str) -> str:
    done = in_process(*argv)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_each_job_is_asked_messaged_and_uncached_by_its_name(start: Start) -> None:
    start("clone", "one", "copy", "--no-hydration")
    start("cache", "two", "fast", "--cache-size", "512K")
    start("serve")
    says("create", "plain", "--table", "0 8 zero")
    assert says("status", "copy").split()[2] == "clone"
    assert says("status", "two", "--noflush").split()[2] == "cache"
    assert says("status", "plain") == "0 8 zero \n"
    by_name = [line.split(":")[0] for line in says("status", "--noflush").splitlines()]
    assert by_name == ["copy", "plain", "two"]
    assert [line.split()[0] for line in says("ls").splitlines()] == by_name
    assert says("table", "two", "plain").startswith("two: 0 2048 cache ")
    says("message", "copy", "0", "enable_hydration")
    assert "two is " in says("uncache", "two")
    assert says("table", "two").split()[2] == "linear"
    assert len(json.loads(says("version", "--json"))["servers"]) == 3
    missing = in_process("status", "nosuch")
    assert (
        missing.stderr
        == "nbdtarget: status nosuch: Device does not exist (No such device or address)\n"
    )


def test_access_goes_to_the_server_that_has_the_export(start: Start) -> None:
    start("export", "one")
    start("export", "two")
    says("access", "two", "ro any")
    assert says("access", "two") == "two: ro any\n"
    assert says("access", "one") == "one: rw any\n"
    for words in (["access", "typo", "ro any"], ["access", "typo", "--clear"]):
        refused = in_process(*words)
        assert refused.returncode == 1
        assert refused.stderr == (
            "nbdtarget: access typo: no server has an export of this name; for one to come, say where with --control"
            " (No such device or address)\n"
        )
    for name in ("one", "two"):
        control = str(job_control_path(name))
        assert "typo" not in says("access", "--control", control)


def test_a_second_job_of_the_same_name_is_refused_in_one_line(
    start: Start, work: Path
) -> None:
    start("clone", "one", "copy")
    second = run("clone", "two", "other", "--name", "copy", "--listen", "unix:s")
    assert second.returncode == 1
    assert second.stderr == (
        "nbdtarget: copy: another server with the control socket"
        f" {runtime_directory()}/control/copy.sock serves this name already: give another"
        " --name\n"
    )
    assert not Path("other").exists()


def test_a_name_that_two_servers_have_is_asked_for_with_both(
    start: Start, work: Path
) -> None:
    start("clone", "one", "copy")
    start("serve")
    says("create", "copy", "--table", "0 8 zero")
    runtime = runtime_directory()
    refused = in_process("remove", "copy")
    assert refused.returncode == 1
    assert refused.stderr == (
        f"nbdtarget: copy is on 2 servers: {runtime}/control/copy.sock,"
        f" {runtime}/control.sock; say which one is meant with --control\n"
    )
    says("remove", "copy", "--control", f"{runtime}/control.sock")
    assert says("status", "copy").split()[2] == "clone"


def test_a_renamed_device_of_a_job_is_found_by_its_new_name(start: Start) -> None:
    start("clone", "one", "copy")
    start("clone", "two", "other")
    says("rename", "copy", "renamed")
    assert says("status", "renamed").split()[2] == "clone"


@pytest.mark.long
def test_command_about_no_device_needs_one_server(start: Start) -> None:
    start("clone", "one", "copy")
    says("create", "a", "--table", "0 8 zero")  # there is only one
    start("clone", "two", "other")
    refused = in_process("create", "b", "--table", "0 8 zero")
    assert refused.returncode == 1
    assert (
        "2 servers are running, and none of them is `nbdtarget serve`" in refused.stderr
    )


@pytest.mark.long
def test_sockets_of_killed_servers_are_removed_by_the_next_server(
    start: Start, work: Path
) -> None:
    killed = start("clone", "one", "copy")
    start("clone", "two", "other")
    killed.kill()
    killed.communicate(timeout=PATIENCE_S)
    assert len(known_controls()) == 2
    assert says("ls").split()[0] == "other"
    assert "Device does not exist" in in_process("status", "copy").stderr
    start("serve")
    names = sorted(os.listdir(runtime_directory() / "control"))
    assert names == ["other.sock", "other.sock.lock"]


@pytest.mark.long
def test_a_server_that_hangs_does_not_delay_the_list_of_the_others(
    start: Start, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "LOOK_S_MAX", 1.0)
    hung = start("clone", "one", "copy")
    start("clone", "two", "other")
    hung.send_signal(signal.SIGSTOP)

    def lists_the_other() -> bool:
        """Whether the other server is listed. On a busy machine it may not answer in time."""
        listed = in_process("ls")
        assert (
            f"nbdtarget: {runtime_directory()}/control/copy.sock: the server does not answer;"
            " it is left out here\n"
        ) in listed.stderr
        return listed.stdout.split()[:1] == ["other"]

    wait_until(lists_the_other)


def test_taken_control_socket_is_a_warning_and_not_an_error(
    start: Start, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDTARGET_CONTROL", str(work / "ctl"))
    start("clone", "one", "copy")
    second = start("clone", "two", "other")
    assert second.stderr is not None
    warning = second.stderr.readline()
    assert f"{work}/ctl: another server is listening there" in warning
    assert "commands find other by the control socket of its name instead" in warning
    monkeypatch.delenv("NBDTARGET_CONTROL")
    assert says("status", "other").split()[2] == "clone"


def test_a_name_that_is_too_long_for_a_socket_is_shortened(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "n" * 127
    # Not the test's own directory: its path alone is too long.
    with tempfile.TemporaryDirectory() as short:
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        one = start("clone", "one", "copy", "--name", name)
        two = start("clone", "two", "other")
        assert says("status", name).split()[2] == "clone"
        for process in (one, two):
            process.terminate()
            process.communicate(timeout=PATIENCE_S)


def test_socket_paths_of_long_names_differ_and_fit(runtime: Path) -> None:
    paths = {socket_path(runtime, "x" * 100 + end) for end in "abc"}
    assert len(paths) == 3
    assert all(len(str(path)) <= 107 for path in paths)
    with pytest.raises(NbdTargetError, match="too long for a socket"):
        socket_path(Path("/" + "d" * 120), "x")


def test_sockets_have_the_modes_that_options_say(start: Start, work: Path) -> None:
    start("clone", "one", "copy", "--socket-mode", "0666", "--control-mode", "0660")
    start("clone", "two", "other")
    directory = runtime_directory()
    assert (directory / "copy.sock").stat().st_mode & 0o777 == 0o666
    assert job_control_path("copy").stat().st_mode & 0o777 == 0o660
    assert (directory / "other.sock").stat().st_mode & 0o777 == 0o600
    assert job_control_path("other").stat().st_mode & 0o777 == 0o600
    # Others get as far as the sockets, and see no names.
    assert directory.stat().st_mode & 0o777 == 0o711


@pytest.mark.long
def test_a_file_whose_name_looks_like_a_scheme_can_be_opened(
    start: Start, work: Path
) -> None:
    Path("disk:1.img").write_bytes(bytes(1 << 20))
    refused = run("clone", "disk:1.img", "copy")
    assert refused.returncode == 1
    assert refused.stderr.rstrip().endswith("; if it is a file, write ./disk:1.img")
    start("clone", "./disk:1.img", "./copy:1.img")
    assert f"{work}/disk:1.img" in says("table")
    start("serve")
    says("create", "line", "--table", "0 8 linear ./disk:1.img 0", "-r")
    assert f"{work}/disk:1.img" in says("table", "line")
