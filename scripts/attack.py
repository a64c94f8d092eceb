# SPDX-License-Identifier: Apache-2.0
"""Measures what hostile clients cost a quiet one: bounded attacks on a real server, and a table.

    python -m scripts.attack [--quick] [--disk file|zero] [--json FILE] [--against FILE] [--program PATH]

A quiet client, in a process of its own, reads 512 bytes again and again while each attack runs. The table has a row for
each attack:

    p50, p99, longest   how long a read of the quiet client took
    attach              how long a new client needed to attach while the attackers were still connected
    MiB                 the resident memory of the server after the attackers have closed their connections
    held                descriptors that the server still has open, beyond what it had before the attack

The exit status is 1 if something stays held. `--json` keeps the figures; `--against` prints the figures of an earlier run
beside the new ones; `--program` attacks another build of the server. Only runs on one machine with the same
`--quick` and `--disk` can be compared.

The disk is a file in the page cache, whose plain requests compiled code serves where it was built. With `--disk zero` it
is a `zero` target, and Python serves everything.
"""

import argparse
import contextlib
import gzip
import json
import multiprocessing
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Final

from nbdtarget_protocol import consts as c

BIN: Final = Path(sys.executable).parent
MIB: Final = 1 << 20
DISK_BYTES: Final = 64 << 20
DISKS: Final = ("file", "zero")
NOISE: Final = random.Random(0).randbytes(64 << 10)
# For the server to start, and to notice that the attackers have gone, on a machine that does something else.
PATIENCE_S: Final = 180.0
STARTS_MAX: Final = 5  # another program may have taken a port that was free
PAUSE_S: Final = 0.002
ATTACH_S: Final = 10.0  # a new client gives up after this
TOKEN: Final = "correct-horse-battery"
BEFORE_S: Final = 0.2
QUIET_S: Final = 300.0  # the quiet client waits so long for one read

Address = str | tuple[str, int]


def request(command: int, length: int, offset: int = 0) -> bytes:
    return c.REQUEST.pack(c.REQUEST_MAGIC, 0, command, 1, offset, length)


def connected(address: Address, timeout_s: float = PATIENCE_S) -> socket.socket:
    """A connection that has been greeted."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    sock = socket.socket(family)
    sock.settimeout(timeout_s)
    sock.connect(address)
    sock.recv(18, socket.MSG_WAITALL)
    return sock


def attached(
    address: Address, *, structured: bool = False, timeout_s: float = PATIENCE_S
) -> socket.socket:
    """A connection in transmission."""
    sock = connected(address, timeout_s)
    sock.sendall(c.CLIENT_FLAGS.pack(3))
    if structured:
        sock.sendall(c.OPTION.pack(c.IHAVEOPT, c.OPT_STRUCTURED_REPLY, 0))
        sock.recv(20, socket.MSG_WAITALL)
    sock.sendall(c.OPTION.pack(c.IHAVEOPT, c.OPT_EXPORT_NAME, 1) + b"d")
    if len(sock.recv(10, socket.MSG_WAITALL)) != 10:
        raise ConnectionError("not attached")
    return sock


class Server:
    """A server process with one export, `d`. `disk`: one of `DISKS`."""

    def __init__(self, folder: Path, program: str, disk: str) -> None:
        self.unix: Address = str(folder / "nbd.sock")
        token = folder / "token"
        token.write_text(f"{TOKEN}\n")
        token.chmod(0o600)
        for _ in range(STARTS_MAX):
            if self._starts(program, token):
                break
        else:
            raise ConnectionError("the server does not start")
        try:
            self._create_device(program, self._target(folder, disk))
        except BaseException:
            self.stop()
            raise

    def _starts(self, program: str, token: Path) -> bool:
        """Start the process; whether it serves."""
        self.tcp: tuple[str, int] = ("127.0.0.1", _free_port())
        self.control: tuple[str, int] = ("127.0.0.1", _free_port())
        host, control_port = self.control
        self._process = subprocess.Popen(
            [
                program, "serve", "--verbose",
                "--listen", f"unix:{self.unix}", "--listen", f"tcp:{host}:{self.tcp[1]}",
                "--control", f"tcp:{host}:{control_port}", "--control-token-file", token,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # and it is never read, which must not stop the server
        )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline():
            return True
        print(self._process.communicate()[1].decode(), file=sys.stderr)
        return False

    def _target(self, folder: Path, disk: str) -> str:
        """The words of the table line; makes the file."""
        if disk == "zero":
            return "zero"
        image = folder / "disk.img"
        with image.open("wb") as file:
            for _ in range(DISK_BYTES // len(NOISE)):
                file.write(NOISE)
        return f"linear {image} 0"

    def _create_device(self, program: str, target: str) -> None:
        host, control_port = self.control
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(self.control).close()
                break
            time.sleep(0.02)
        environment = os.environ | {
            "NBDTARGET_CONTROL": f"tcp:{host}:{control_port}",
            "NBDTARGET_CONTROL_TOKEN": TOKEN,
        }
        subprocess.run(
            [
                program, "create", "d", "--table", f"0 {DISK_BYTES // 512} {target}",
            ],
            check=True,
            env=environment,
        )  # fmt: skip

    def nr_open(self) -> int:
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    def resident_mib(self) -> int:
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE") // MIB

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


# ---- attacks: each makes its connections, does its worst, and returns what to close ----

Attack = Callable[[Server, int], list[socket.socket]]


def burst_of_large_reads(server: Server, scale: int) -> list[socket.socket]:
    sock = attached(server.unix, structured=True)
    nr = 20 * scale
    sock.sendall(request(c.CMD_READ, 32 * MIB) * nr)
    got = 0
    while got < 32 * nr:
        got += len(sock.recv(MIB))
    return [sock]


def largest_reads(server: Server, scale: int) -> list[socket.socket]:
    sock = attached(server.unix)
    for _ in range(4 * scale):
        sock.sendall(request(c.CMD_READ, 64 * MIB))
        left = 16 + 64 * MIB
        while left:
            left -= len(sock.recv(min(left, MIB)))
    return [sock]


def headers_of_large_writes(server: Server, scale: int) -> list[socket.socket]:
    socks = [attached(server.unix) for _ in range(10 * scale)]
    for sock in socks:
        sock.sendall(request(c.CMD_WRITE, 32 * MIB))
    time.sleep(0.5)
    return socks


def resets_in_a_payload(server: Server, scale: int) -> list[socket.socket]:
    for _ in range(10 * scale):
        sock = attached(server.unix)
        sock.sendall(request(c.CMD_READ, 8))
        time.sleep(0.002)
        sock.sendall(request(c.CMD_WRITE, MIB) + bytes(100_000))
        sock.close()
    return []


def idle_connections(server: Server, scale: int) -> list[socket.socket]:
    socks = [socket.create_connection(server.tcp) for _ in range(40 * scale)]
    time.sleep(0.5)
    return socks


def attach_and_leave(server: Server, scale: int) -> list[socket.socket]:
    for _ in range(60 * scale):
        attached(server.unix).close()
    return []


def half_headers_on_the_control_socket(
    server: Server, scale: int
) -> list[socket.socket]:
    socks = [socket.create_connection(server.control) for _ in range(20 * scale)]
    for sock in socks:
        sock.sendall(b"POST /v1/info HT")
    return socks


def compressed_body_without_the_token(
    server: Server, scale: int
) -> list[socket.socket]:
    body = gzip.compress(bytes(20 * scale * MIB), 1)
    head = "POST /v1/info HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\n"
    sock = socket.create_connection(server.control)
    sock.settimeout(PATIENCE_S)
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    sock.recv(100)
    return [sock]


def large_bodies_with_the_token(server: Server, scale: int) -> list[socket.socket]:
    lines = '"' + "0 1 zero\\n" * (scale * 150_000) + '"'
    body = f'{{"name": "e", "table": {lines}}}'.encode()
    head = f"POST /v1/create HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    socks = []
    for _ in range(2):
        sock = socket.create_connection(server.control)
        sock.settimeout(PATIENCE_S)
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        sock.recv(100)
        socks.append(sock)
    return socks


ATTACKS: Final[tuple[Attack, ...]] = (
    burst_of_large_reads,
    largest_reads,
    headers_of_large_writes,
    resets_in_a_payload,
    idle_connections,
    attach_and_leave,
    half_headers_on_the_control_socket,
    compressed_body_without_the_token,
    large_bodies_with_the_token,
)


def _quiet(address: Address, ready: Event, stop: Event, results: Any) -> None:
    """The quiet client: how long each of its reads took."""
    sock = attached(address)
    sock.settimeout(QUIET_S)
    ready.set()
    waits: list[float] = []
    while not stop.is_set():
        began_s = time.perf_counter()
        sock.sendall(request(c.CMD_READ, 512))
        sock.recv(528, socket.MSG_WAITALL)
        waits.append(time.perf_counter() - began_s)
        time.sleep(PAUSE_S)
    results.put(waits)


def _attach_ms(server: Server) -> float:
    """How long a new client needs to attach; ATTACH_S if it gives up."""
    began_s = time.perf_counter()
    try:
        attached(server.unix, timeout_s=ATTACH_S).close()
    except TimeoutError:
        return 1e3 * ATTACH_S
    return 1e3 * (time.perf_counter() - began_s)


def run(server: Server, attack: Attack, scale: int) -> dict[str, Any]:
    """One attack; returns its row of the table."""
    spawn = multiprocessing.get_context("spawn")
    open_before = server.nr_open()
    ready, stop, results = spawn.Event(), spawn.Event(), spawn.Queue()
    quiet = spawn.Process(target=_quiet, args=(server.unix, ready, stop, results))
    quiet.start()
    if not ready.wait(QUIET_S):
        raise TimeoutError("the server does not let the quiet client attach")
    time.sleep(BEFORE_S)
    attackers = attack(server, scale)
    attach_ms = _attach_ms(server)
    for sock in attackers:
        sock.close()
    time.sleep(BEFORE_S)
    stop.set()
    waits = sorted(results.get())
    quiet.join()
    deadline_s = time.monotonic() + PATIENCE_S
    while server.nr_open() > open_before and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return {
        "attack": attack.__name__,
        "p50_ms": 1e3 * statistics.median(waits),
        "p99_ms": 1e3 * waits[len(waits) * 99 // 100],
        "longest_ms": 1e3 * waits[-1],
        "attach_ms": attach_ms,
        "resident_mib": server.resident_mib(),
        "held": server.nr_open() - open_before,
    }


def line_of(row: dict[str, Any], before: dict[str, Any] | None) -> str:
    """A row of the table; with the figures of an earlier run, if there are some."""
    line = (
        f"{row['attack']:36} {row['p50_ms']:5.1f} ms {row['p99_ms']:5.1f} ms"
        f" {row['longest_ms']:5.0f} ms {row['attach_ms']:5.0f} ms"
        f" {row['resident_mib']:5} {row['held']:4}"
    )
    if before is None:
        return line
    return (
        f"{line}   before: {before['p50_ms']:.1f}, {before['p99_ms']:.1f},"
        f" {before['longest_ms']:.0f}, {before['attach_ms']:.0f} ms,"
        f" {before['resident_mib']} MiB, {before['held']} held"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--disk", choices=DISKS, default=DISKS[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--against", metavar="FILE", help="an earlier --json")
    parser.add_argument("--program", default=str(BIN / "nbdtarget"), metavar="PATH")
    options = parser.parse_args()
    earlier: dict[str, dict[str, Any]] = {}
    if options.against:
        text = Path(options.against).read_text()
        earlier = {row["attack"]: row for row in json.loads(text)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), options.program, options.disk)
        try:
            print(
                f"{'attack':36} {'p50':>8} {'p99':>8} {'longest':>8} {'attach':>8}"
                f" {'MiB':>5} held"
            )
            for attack in ATTACKS:
                row = run(server, attack, 1 if options.quick else 10)
                rows.append(row)
                print(line_of(row, earlier.get(row["attack"])), flush=True)
        finally:
            server.stop()
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["held"] > 0 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
