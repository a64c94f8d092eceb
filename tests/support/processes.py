# SPDX-License-Identifier: Apache-2.0
"""Child processes that listen on a unix socket: start, wait, measure, stop, never leak.

Shared by the benchmarks, the kill loop and the interop tests. A child is ended by its own
process id, never by name, and dies with its parent even if that is killed (PDEATHSIG), so an
interrupted run leaves no server behind.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from tests.support.patience import PATIENCE_S

__all__ = [
    "NBDTARGET",
    "ServerProcess",
    "StartError",
    "maybe_port",
    "nbdkit_file",
    "peak_rss_bytes",
    "rss_bytes",
    "stop_stranger",
    "tell_output",
    "wait_for_file",
    "wait_for_socket",
]

# The console script of the environment that runs us: what a user types.
NBDTARGET: Final = str(Path(sys.executable).with_name("nbdtarget"))

PR_SET_PDEATHSIG: Final = 1
POLL_S: Final = 0.01
TCP_LISTEN: Final = "0A"  # the state, in /proc/net/tcp


class StartError(Exception):
    """A server did not come up; the text holds what it printed."""


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def wait_for_socket(path: Path, *, timeout_s: float = PATIENCE_S) -> bool:
    """Wait until something accepts connections at `path`."""
    deadline = time.monotonic() + timeout_s
    while not _connects(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def wait_for_file(path: Path, *, timeout_s: float = PATIENCE_S) -> bool:
    """Wait until there is a file at `path`."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def maybe_port(pid: int) -> int | None:
    """The TCP port that a process listens on, over IPv4; None: none yet.

    A server that takes any free port, and does not say which, is asked so. A port that is looked for beforehand may be another
    program's by the time the server wants it.
    """
    folder = f"/proc/{pid}/fd"
    links = set()
    with contextlib.suppress(FileNotFoundError):  # a descriptor was closed meanwhile
        for fd in os.listdir(folder):
            links.add(os.readlink(f"{folder}/{fd}"))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == TCP_LISTEN and f"socket:[{words[9]}]" in links:
            return int(words[1].partition(":")[2], 16)
    return None


def tell_output(error: subprocess.CalledProcessError) -> None:
    """Add what the program said to the exception, which names only its command and its status."""
    for name in ("stdout", "stderr"):
        if output := getattr(error, name):
            is_text = isinstance(output, str)
            text = output if is_text else output.decode(errors="replace")
            error.add_note(f"{name}: {text}")


def stop_stranger(pid: int) -> None:
    """Stop a process that is not our child, such as the successor of a server, and wait for its end."""
    watched = os.pidfd_open(pid)
    signal.pidfd_send_signal(watched, signal.SIGTERM)
    assert select.select([watched], [], [], PATIENCE_S)[0], "it does not end"
    os.close(watched)


def _status_kib(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise ValueError(f"{field} is not in /proc/{pid}/status")


def rss_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    return _status_kib(pid, "VmRSS") * 1024


def peak_rss_bytes(pid: int) -> int:
    """Return the most resident memory that a process ever had."""
    return _status_kib(pid, "VmHWM") * 1024


class ServerProcess:
    """One server, from its command line to its end.

    Args:
        argv: the command, which stays in the foreground unless `pid_file` is given.
        sockets: unix sockets that must accept connections before it counts as ready.
        log: where its stdout and stderr go.
        pid_file: for a server that can only daemonize: where it writes its process id.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        sockets: Sequence[Path],
        log: Path,
        env: Mapping[str, str] | None = None,
        pid_file: Path | None = None,
        timeout_s: float = PATIENCE_S,
    ) -> None:
        self.argv = list(argv)
        self.log = log
        for path in sockets:
            # A killed server leaves its socket behind, and some peers refuse to bind over it.
            path.unlink(missing_ok=True)
        with log.open("ab") as out:
            self.child = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **(env or {})},
                preexec_fn=None if pid_file else _die_with_parent,
            )
        self.pid = self.child.pid
        self.pid_file = pid_file
        try:
            self._wait_ready(sockets, timeout_s)
        except BaseException:
            self.kill()
            raise

    def _wait_ready(self, sockets: Sequence[Path], timeout_s: float) -> None:
        if self.pid_file is not None:
            self.child.wait(timeout_s)
        deadline = time.monotonic() + timeout_s
        for path in sockets:
            while not _connects(path):
                died = self.pid_file is None and self.child.poll() is not None
                if died or time.monotonic() > deadline:
                    why = "ended" if died else "does not listen"
                    raise StartError(
                        f"{' '.join(self.argv)}: {why}\n{self.log.read_text()}"
                    )
                time.sleep(POLL_S)
        if self.pid_file is not None:
            self.pid = int(self.pid_file.read_text())

    def cpu_s(self) -> float:
        """Return the CPU time used so far by all threads and all reaped children, seconds."""
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        # The command's name may hold spaces; the fields after it are numbered from 3.
        fields = stat.rpartition(")")[2].split()
        ticks = sum(int(field) for field in fields[11:15])  # utime stime cutime cstime
        return ticks / os.sysconf("SC_CLK_TCK")

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for the end. Returns the exit status (0 for one that daemonized)."""
        if self.pid_file is None:
            return self.child.wait(timeout_s)
        deadline = time.monotonic() + timeout_s
        while Path(f"/proc/{self.pid}").exists():
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.argv, timeout_s)
            time.sleep(POLL_S)
        return 0

    def terminate(self, timeout_s: float = PATIENCE_S) -> int:
        """End it as a service manager does. Returns the exit status."""
        if self.pid_file is None and self.child.poll() is not None:
            return self.child.returncode
        self.signal(signal.SIGTERM)
        try:
            return self.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """End it as a crash does (SIGKILL), and reap it."""
        if self.pid_file is not None and self.pid == self.child.pid:
            return  # it never got as far as a process id of its own
        if self.pid_file is None and self.child.poll() is not None:
            return
        self.signal(signal.SIGKILL)
        self.wait()

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.terminate()
        else:
            self.kill()


def nbdkit_file(
    image: Path, path: Path, log: Path, *extra: str, settings: Sequence[str] = ()
) -> ServerProcess:
    """Serve `image` with nbdkit's file plugin on the unix socket `path`."""
    argv = ["nbdkit", "--foreground", "--unix", str(path), *extra, "file", str(image)]
    argv += settings
    return ServerProcess(argv, sockets=[path], log=log)
