# SPDX-License-Identifier: Apache-2.0
"""TLS on loopback TCP, ours against nbdkit with the same certificates, and what a slow TLS client costs the others.

    python -m scripts.bench_tls [--quick] [--repeat N] [--runtime S] [--size MIB] [--part servers|slow] [--only WORD]...

The first part (`servers`) is paired as in `scripts.bench`; `--only` names some of its workloads. In the second part (`slow`) a client without TLS
writes and flushes to a clone, each of which is a commit, and then the clone hydrates: with and without a TLS client beside it that asks for much and takes its
replies slowly. It tells requests a second, their p99, and the time of the hydration.
"""

import argparse
import os
import shutil
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import ClassVar

from rich.console import Console

from nbdtarget.common.tls_context import client_context
from nbdtarget_protocol import consts as c
from scripts.bench_rounds import available, compare, median_iops, paired_ratio
from scripts.bench_servers import Contender
from scripts.fast_path import warn_if_pure
from scripts.fio import Job, run_fio
from tests.support.certificates import authority
from tests.support.processes import NBDTARGET, ServerProcess, StartError

__all__ = ["TLS", "main"]

TLS = "tls"  # the word for `--only` of `scripts.bench`

JOBS = (
    Job("tls-randread-4k-qd32", "randread", 4096, 32),
    Job("tls-read-256k-qd8", "read", 262144, 8),
    Job("tls-randread-4k-qd1", "randread", 4096, 1),
    Job("tls-randwrite-4k-qd32", "randwrite", 4096, 32),
    Job("tls-write-256k-qd8", "write", 262144, 8),
)
FLUSHES = Job("randwrite-4k-qd1-flush", "randwrite", 4096, 1)
SLOW_READS = 32  # of 1 MiB each
SLOW_TAKES = 16 << 10  # bytes, each SLOW_S
SLOW_S = 0.02


class TlsContender(Contender):
    """A server on loopback TCP, with the certificates of the tests."""

    measured_cold = False

    def __init__(self, work: Path, source: Path) -> None:
        super().__init__(work, source)
        self.port = free_port()

    @property
    def uri(self) -> str:
        return f"nbds://127.0.0.1:{self.port}/{self.export}"

    def launch(self) -> ServerProcess:
        process = ServerProcess(self.argv(), sockets=[], log=self.log)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                return process
            time.sleep(0.02)
        raise StartError(self.log.read_text())

    def argv(self) -> list[str]:
        raise NotImplementedError


class TlsNbdkit(TlsContender):
    name = "nbdkit-tls"
    tool = "nbdkit"

    def argv(self) -> list[str]:
        pki = authority()[1]
        argv = ["nbdkit", "--foreground", "-i", "127.0.0.1", "-p", str(self.port)]
        argv += ["--tls=require", f"--tls-certificates={pki}"]
        return [*argv, "file", str(self.image)]


class TlsOurs(TlsContender):
    name = "linear-tls"
    tool = "cc"
    export: ClassVar[str] = "disk"

    def argv(self) -> list[str]:
        argv = [NBDTARGET, "export", str(self.image), "--name", self.export]
        argv += ["--listen", f"tcp:127.0.0.1:{self.port}", "--tls", "require"]
        argv += ["--tls-certificates", str(authority()[1])]
        return [*argv, "--control", str(self.socket.with_suffix(".control"))]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def slow_client(port: int) -> Iterator[None]:
    """A TLS client that asks for much, and takes its replies slowly."""
    stop = threading.Event()
    raw = socket.create_connection(("127.0.0.1", port))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
    raw.recv(18, socket.MSG_WAITALL)
    raw.sendall(c.CLIENT_FLAGS.pack(3) + c.OPTION.pack(c.IHAVEOPT, c.OPT_STARTTLS, 0))
    raw.recv(c.OPTION_REPLY.size, socket.MSG_WAITALL)
    context: ssl.SSLContext = client_context(str(authority()[1]))
    sock = context.wrap_socket(raw, server_hostname="localhost")
    name = b"disk"
    payload = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    sock.sendall(c.OPTION.pack(c.IHAVEOPT, c.OPT_GO, len(payload)) + payload)

    def read() -> None:
        left = 0
        with suppress(OSError):
            while not stop.wait(SLOW_S):
                if left < 1 << 20:
                    for nr in range(SLOW_READS):
                        sock.sendall(
                            c.REQUEST.pack(
                                c.REQUEST_MAGIC, 0, c.CMD_READ, nr, nr << 20, 1 << 20
                            )
                        )
                    left += SLOW_READS << 20
                left -= len(sock.recv(SLOW_TAKES))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sock.close()


def beside_a_slow_client(
    work: Path, options: argparse.Namespace, *, is_slow: bool
) -> tuple[float, float, float]:
    """Serve a clone that hydrates; its flushed writes a second, their p99 in us, and the seconds of the hydration."""
    port = free_port()
    path = work / "clone.sock"
    for each in ("dest.img", "meta"):
        (work / each).unlink(missing_ok=True)
    argv = [NBDTARGET, "clone", str(work / "source.img"), str(work / "dest.img")]
    argv += ["--metadata", str(work / "meta"), "--name", "disk", "--no-hydration"]
    argv += ["--listen", f"unix:{path}", "--listen", f"tcp:127.0.0.1:{port}"]
    argv += ["--tls", "on", "--tls-certificates", str(authority()[1])]
    argv += ["--control", str(work / "control")]
    process = ServerProcess(argv, sockets=[path], log=work / "clone.log")
    uri = f"nbd+unix:///disk?socket={path}"
    try:
        with slow_client(port) if is_slow else nullcontext():
            return measured(uri, work, options)
    finally:
        process.terminate()


def measured(
    uri: str, work: Path, options: argparse.Namespace
) -> tuple[float, float, float]:
    result = run_fio(uri, FLUSHES, options.runtime, extra=["--fsync=1"])["write"]
    p99_us = result["clat_ns"]["percentile"]["99.000000"] / 1000
    control = ["--control", str(work / "control")]
    begun = time.monotonic()
    message = [NBDTARGET, "message", "disk", "0", "enable_hydration", *control]
    subprocess.run(message, check=True)
    status = [NBDTARGET, "status", "disk", *control]
    while True:
        words = subprocess.run(
            status, check=True, capture_output=True, text=True
        ).stdout.split()
        hydrated, total = words[6].split("/")
        if hydrated == total:
            break
        time.sleep(0.05)
    return result["iops"], p99_us, time.monotonic() - begun


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure TLS.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--runtime", type=float, default=3.0)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--dir")
    parser.add_argument("--part", choices=["servers", "slow"])
    parser.add_argument("--only", action="append", default=[], metavar="WORD")
    options = parser.parse_args(argv)
    warn_if_pure()
    if options.quick:
        options.repeat, options.runtime = 2, 1.0
    if shutil.which("fio") is None:
        print("fio is not installed: nothing to measure with")
        return 1
    console = Console(width=None if sys.stdout.isatty() else 160)
    with tempfile.TemporaryDirectory(prefix="nbdtarget-tls-", dir=options.dir) as name:
        work = Path(name)
        # fio lets libnbd read no files but those of the user's own directory.
        home = work / "home" / ".config" / "pki"
        home.mkdir(parents=True)
        (home / "libnbd").symlink_to(authority()[1])
        os.environ["HOME"] = str(work / "home")
        if options.part != "slow":
            compare_servers(work, options, console)
        if options.part != "servers":
            compare_slow(work, options, console)
    return 0


def compare_servers(work: Path, options: argparse.Namespace, console: Console) -> None:
    classes = available((TlsOurs, TlsNbdkit), console)
    chosen = [j for j in JOBS if any(word in j.name for word in options.only)]
    samples = compare(classes, chosen or JOBS, work, options, console)
    for job, servers in samples.items():
        shown = [
            f"{name} {median_iops(rounds):,.0f}/s" for name, rounds in servers.items()
        ]
        if len(servers) == len((TlsOurs, TlsNbdkit)):
            ratio = paired_ratio(servers[TlsOurs.name], servers[TlsNbdkit.name])
            shown.append(f"{ratio:.2f}x, paired")
        console.print(f"{job}: {', '.join(shown)}", highlight=False)


def compare_slow(work: Path, options: argparse.Namespace, console: Console) -> None:
    source = work / "source.img"
    if not source.exists():
        with source.open("wb") as file:
            for _ in range(options.size):
                file.write(os.urandom(1 << 20))
    ratios: list[tuple[float, ...]] = []
    for _ in range(options.repeat):
        quiet = beside_a_slow_client(work, options, is_slow=False)
        slow = beside_a_slow_client(work, options, is_slow=True)
        ratios.append((slow[0] / quiet[0], quiet[1] / slow[1], quiet[2] / slow[2]))
        console.print(f"quiet {quiet}, beside a slow client {slow}", highlight=False)
    names = ("flushed writes", "p99 of a flushed write", "hydration")
    for name, of_name in zip(names, zip(*ratios, strict=True), strict=True):
        median = statistics.median(of_name)
        console.print(f"{name}: {median:.2f} of the speed without it", highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())
