# SPDX-License-Identifier: Apache-2.0
"""The surroundings of a helper when it starts: its socket, its pid, its bounds, and its end with its parent."""

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nbdtarget.devices.helper import launch
from tests.support.patience import PATIENCE_S

SCRIPT = launch.__file__
TELL = (
    "import os, resource, sys;"
    "print(os.environ.get('LISTEN_FDS'), os.environ.get('LISTEN_PID') == str(os.getpid()),"
    " resource.getrlimit(resource.RLIMIT_CPU)[0], resource.getrlimit(resource.RLIMIT_AS)[0],"
    " os.environ.get('NOTIFY_SOCKET'), os.environ.get('LISTEN_FDNAMES'))"
)


def run(
    *argv: str, fd: int = -1, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-S", SCRIPT, *argv],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        pass_fds=() if fd < 0 else (fd,),
        env={**os.environ, **environment},
    )


def test_socket_is_passed_as_systemd_does() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        # Another service manager's variables must not reach it.
        done = run(
            *(
                str(os.getpid()),
                str(sock.fileno()),
                "0",
                "0",
                sys.executable,
                "-c",
                TELL,
            ),
            fd=sock.fileno(),
            LISTEN_PID="1",
            LISTEN_FDNAMES="nbd",
            NOTIFY_SOCKET="/x",
        )
    assert done.stdout.split()[:2] == ["1", "True"]
    assert done.stdout.split()[4:] == ["None", "None"]


def test_bounds_hold_and_without_a_socket_none_is_told() -> None:
    done = run(str(os.getpid()), "-1", "7", str(1 << 33), sys.executable, "-c", TELL)
    assert done.stdout.split()[:4] == ["None", "False", "7", str(1 << 33)]


def test_program_that_is_missing_is_told_of() -> None:
    done = run(str(os.getpid()), "-1", "0", "0", "/no/such/program")
    assert done.returncode == 127
    assert done.stderr == "cannot be started: No such file or directory\n"


def test_child_of_another_parent_does_not_run() -> None:
    done = run("1", "-1", "0", "0", sys.executable, "-c", "print('here')")
    assert (done.returncode, done.stdout) == (127, "")


def test_it_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    # The parent starts it, says its pid, and waits to be killed.
    code = (
        "import os, subprocess, sys;"
        f"p = subprocess.Popen([sys.executable, '-I', '-S', {SCRIPT!r}, str(os.getpid()),"
        " '-1', '0', '0', 'sh', '-c', 'echo up; sleep 600'], stdout=subprocess.PIPE);"
        "p.stdout.readline(); print(p.pid, flush=True); p.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    handle = os.pidfd_open(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    _wait_for_end(handle)


def _wait_for_end(handle: int) -> None:
    try:
        assert select.select([handle], [], [], PATIENCE_S)[0], "it still runs"
    finally:
        os.close(handle)


def test_the_script_imports_nothing_of_ours() -> None:
    text = Path(SCRIPT).read_text()
    assert "nbdtarget." not in text.partition('"""')[2].partition('"""')[2]


@pytest.mark.parametrize("argv", [[], ["1"], ["x", "-1", "0", "0"]])
def test_wrong_arguments_start_nothing(argv: list[str]) -> None:
    assert run(*argv).returncode != 0
