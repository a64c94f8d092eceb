# SPDX-License-Identifier: Apache-2.0
"""One signal ends the server within its bounds, whatever hangs below, and says what it left."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from nbdtarget.control import messages as m
from nbdtarget.control.client import ControlClient
from tests.support.patience import PATIENCE_S, wait_until

NBDTARGET = [sys.executable, "-c", "from nbdtarget.cli.app import main; main()"]
SECTORS = 8192
# Reads are given up after a sixth, devices are not waited for after a half: a busy machine has seconds to commit between.
STOP_S = 6

# The bounds that hold where no option names one are so long that a server which does not keep to the option does not end.
NO_OTHER_BOUND = """
from nbdtarget.daemon import stop_bounds
stop_bounds.REQUESTS_S_MAX = stop_bounds.DEVICES_S_MAX = 1e6
stop_bounds.StopBounds.__new__.__defaults__ = (1e6,)
"""
PROGRAM = NO_OTHER_BOUND + NBDTARGET[-1]

# A read of the source never returns, as on a mount whose server has gone.
DEAD_MOUNT = f"""{NO_OTHER_BOUND}
import os, time
os.environ["NBDTARGET_PURE"] = "1"  # compiled code would read without asking `submit`
from nbdtarget.bio import OP_READ
from nbdtarget.devices.file.device import FileDevice
submit = FileDevice.submit
def hang(self, bio):
    if bio.op == OP_READ and self.name.endswith("/source.img") and os.path.exists("dead"):
        bio.own()
        self._pool.submit(lambda: time.sleep(1000) or 0, bio.end)
    else:
        submit(self, bio)
FileDevice.submit = hang
from nbdtarget.cli.app import main
main()
"""


@contextmanager
def started(
    work: Path, *argv: str, program: str = PROGRAM
) -> Iterator[subprocess.Popen[str]]:
    """A server of ours, from the first line that it prints on."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=work,
        env={
            **os.environ,
            "XDG_RUNTIME_DIR": str(work / "run"),
            "NBDTARGET_CONTROL": str(work / f"{argv[0]}.ctl"),
        },
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), process.communicate()
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.communicate(timeout=PATIENCE_S)


@contextmanager
def stopped(process: subprocess.Popen[str]) -> Iterator[None]:
    """Stop the server process for a while: connections to it succeed, and get no answer."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.fixture
def far(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another server, of a disk called `far`, on far.sock."""
    work = tmp_path / "far"
    work.mkdir()
    (work / "far.img").write_bytes(bytes(SECTORS * 512))
    config = work / "far.toml"
    config.write_text(
        f'listen = "unix:{tmp_path}/far.sock"\n'
        f'[device.far]\ntable = "0 {SECTORS} linear far.img 0"\n'
    )
    with started(work, "serve", "--config", str(config)) as process:
        yield process


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status, and what it said on stderr."""
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, err


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def nbd_read(path: Path, name: str) -> socket.socket:
    """A client that has sent a READ of the first 4 KiB of an export, and waits."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    client.recv(18)
    export = name.encode()
    go = len(export).to_bytes(4, "big") + export + (0).to_bytes(2, "big")
    client.sendall(
        (3).to_bytes(4, "big")
        + b"IHAVEOPT"
        + (7).to_bytes(4, "big")
        + len(go).to_bytes(4, "big")
        + go
    )
    client.recv(4096)
    request = (0x25609513).to_bytes(4, "big") + (0).to_bytes(4, "big")
    client.sendall(request + bytes(8) + bytes(8) + (4096).to_bytes(4, "big"))
    return client


@pytest.mark.long
def test_sigterm_commits_a_clone_whose_source_hangs(
    tmp_path: Path, far: subprocess.Popen[str]
) -> None:
    source = f"nbd+unix:///far?socket={tmp_path}/far.sock"
    listen = f"unix:{tmp_path}/nbd.sock"
    argv = ["clone", source, "dest.img", "--no-hydration", "--listen", listen]
    stop = ["--stop-timeout", str(STOP_S)]
    with (
        started(tmp_path, *argv, *stop) as clone,
        stopped(far),
        nbd_read(tmp_path / "nbd.sock", "dest") as client,
    ):
        status, err = end(clone)
        answer = client.recv(4096)
    assert status == 0, err
    assert "far.sock: does not answer: 1 requests are given up" in err
    assert answer[4:8] == (5).to_bytes(4, "big"), "EIO, in a reply of its own"
    # Nothing is in doubt: the same line goes on.
    with started(tmp_path, *argv) as clone:
        assert end(clone)[0] == 0


@pytest.mark.long
def test_sigterm_ends_a_clone_whose_source_is_on_a_dead_mount(
    tmp_path: Path,
) -> None:
    (tmp_path / "source.img").write_bytes(os.urandom(SECTORS * 512))
    argv = ["clone", "source.img", "dest.img", "--no-hydration"]
    argv += ["--listen", f"unix:{tmp_path}/nbd.sock"]
    stop = ["--stop-timeout", str(STOP_S)]
    with started(tmp_path, *argv, *stop, program=DEAD_MOUNT) as clone:
        (tmp_path / "dead").touch()
        with nbd_read(tmp_path / "nbd.sock", "dest"):
            status, err = end(clone)
    assert "dest: no answer from" in err
    assert "source.img (1 requests)" in err
    assert "leaving without waiting for: " in err
    assert "could not be committed" not in err
    assert status == 0, err


@pytest.mark.long
def test_sigterm_with_a_hanging_disk_commits_the_other_devices(
    tmp_path: Path, far: subprocess.Popen[str]
) -> None:
    (tmp_path / "near.img").write_bytes(bytes(SECTORS * 512))
    (tmp_path / "source.img").write_bytes(bytes(SECTORS * 512))
    config = tmp_path / "disks.toml"
    config.write_text(
        f'listen = "unix:nbd.sock"\nstop_timeout = {STOP_S}\n'
        "[device.far]\n"
        f'table = "0 {SECTORS} linear nbd+unix:///far?socket=far.sock 0"\n'
        "[device.near]\n"
        f'table = "0 {SECTORS} clone near.meta near.img source.img 128"\n'
    )
    with (
        started(tmp_path, "serve", "--config", str(config)) as serve,
        stopped(far),
        nbd_read(tmp_path / "nbd.sock", "far"),
    ):
        status, err = end(serve)
    assert status == 1
    assert "/dev/mapper/far: no answer from nbd+unix:///far?socket=" in err
    assert "/dev/mapper/far: could not be committed" in err
    assert "near" not in err
    info = subprocess.run(
        [*NBDTARGET, "metadata", "info", "near.meta"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    assert "clean" in info.stdout.lower()


def test_a_second_signal_ends_it_at_once(
    tmp_path: Path, far: subprocess.Popen[str]
) -> None:
    source = f"nbd+unix:///far?socket={tmp_path}/far.sock"
    listen = f"unix:{tmp_path}/nbd.sock"
    argv = ["clone", source, "dest.img", "--no-hydration", "--listen", listen]
    for number, expected in (
        (signal.SIGTERM, -signal.SIGTERM),
        (signal.SIGINT, 130),
    ):
        with ExitStack() as stack:
            clone = stack.enter_context(started(tmp_path, *argv))
            stack.enter_context(stopped(far))
            stack.enter_context(nbd_read(tmp_path / "nbd.sock", "dest"))
            clone.send_signal(number)
            assert clone.stderr is not None
            # It has the signal, and waits for the source.
            wait_until(lambda: not connects(tmp_path / "nbd.sock"))
            assert clone.poll() is None
            clone.send_signal(number)
            clone.communicate(timeout=PATIENCE_S)
            assert clone.returncode == expected


def test_a_command_over_a_disk_that_hangs_fails_in_one_line(
    tmp_path: Path, far: subprocess.Popen[str]
) -> None:
    config = tmp_path / "disks.toml"
    config.write_text(
        'listen = "unix:nbd.sock"\n[device.a]\n'
        f'table = "0 {SECTORS} linear nbd+unix:///far?socket=far.sock 0"\n'
    )
    with started(tmp_path, "serve", "--config", str(config)) as serve:
        control = tmp_path / "serve.ctl"
        with stopped(far):
            suspend = subprocess.run(
                [*NBDTARGET, "suspend", "a", "--timeout", "0.2"],
                env={**os.environ, "NBDTARGET_CONTROL": str(control)},
                capture_output=True,
                text=True,
                check=False,
                timeout=PATIENCE_S,
            )
        assert suspend.returncode == 1
        assert suspend.stderr == (
            "nbdtarget: suspend a: no answer from"
            f" nbd+unix:///far?socket={tmp_path}/far.sock (1 requests) for 0.2 s; the"
            " device goes on as before (Connection timed out)\n"
        )
        client = ControlClient(control)
        client.ask("suspend", m.Suspend("a"), m.Done)
        assert end(serve)[0] == 0
