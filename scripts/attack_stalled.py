# SPDX-License-Identifier: Apache-2.0
"""Measures what thousands of clients that stall cost a quiet one, and whether the server gets rid of them.

    python -m scripts.attack_stalled [--quick] [--greedy] [--direct] [--no-end] [--each N] [--json FILE]

All of these are connected at the same time, N of each kind (1,000; 100 with `--quick`):

    handshake   a third says nothing, a third stops in the middle of an option, a third in the middle of a TLS handshake
    payload     stops in the middle of the payload of a WRITE: half of them of 16 KiB, half of 1 MiB
    replies     asks for 4 MiB, 64 KiB at a time, and takes nothing

With `--greedy` the WRITEs are of 16 MiB, half sent, and the READs of 1 MiB each: together many times what the server has in flight at
most. Then most of these clients wait in its line, and stall one after the other. How fast they end is not looked at.

The disk is a file in the page cache. With `--direct` each read of the quiet client goes to the disk, and counts among what is in flight.

A quiet client, in a process of its own, reads 4 KiB at a time from the same export, one read after the other. The table shows how
long its reads took in each phase:

    quiet       before the others come
    arriving    while they connect and send
    stalled     all of them are connected
    ended       the server has closed all of them
    later       what they have needed has gone back to the system, see `nbdtarget.server.spare_memory`

and the resident memory of the server, and how many descriptors it has open, at the end of the phase. The last lines say how long the
server took to close each kind, how many of them were there together, and p99 of `stalled` as a multiple of p99 of `quiet`.

The server runs with bounds that let so many clients in at all; its times are shortened so that a run takes four minutes
(`TIMES`). The exit status is 1 if a stalled client was not closed in time, or a descriptor stays open. With `--no-end` a run is over after
the phase `stalled`, which takes half a minute on an idle machine; no staller is disconnected before.

More memory is resident in the end than before: Python's own allocator keeps pages that a small object holds, and libraries have been
loaded. A second wave of such clients adds nothing to it.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import resource
import select
import socket
import ssl
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from ctypes import c_longlong
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Final

from nbdtarget.server.spare_memory import LOOK_S
from nbdtarget_protocol import consts as c
from scripts.attack import attached, connected, request
from tests.support.certificates import authority
from tests.support.processes import NBDTARGET, ServerProcess

__all__ = ["KINDS", "main", "p99_us"]

KIB: Final = 1 << 10
MIB: Final = 1 << 20
DISK_BYTES: Final = 64 * MIB
READ_BYTES: Final = 4 * KIB
EACH: Final = 1000
EACH_QUICK: Final = 100
PHASE_S: Final = 5.0
PHASE_QUICK_S: Final = 1.0
# Longer than it takes to connect them all on a machine that does something else: those that are closed before do not stall together.
TIMES: Final = {"handshake_timeout_s": 60, "stall_timeout_s": 60, "stall_total_s": 60}
# A client may be closed so much later than its time says. One that has sent an option in a handshake has its time twice.
TIMES_WITHOUT_END: Final = dict.fromkeys(TIMES, 3600)
SLACK_S: Final = 90.0
SHORT_WRITE: Final = 16 * KIB
SETTLE_S: Final = 3.0  # until what the clients have asked for at once is done
SPARE_S: Final = 2.5 * LOOK_S  # until the second look at spare memory is over
READY_S_MAX: Final = 180  # until the quiet client is attached, on a busy machine
ANSWER_S_MAX: Final = 180  # to a client, on a machine that does something else
PAUSE_S: Final = 0.002
ATTEMPTS_MAX: Final = 20
DESCRIPTORS: Final = 64  # beside those of clients

CONFIG: Final = """
listen = ["unix:{folder}/nbd.sock", {{ address = "unix:{folder}/tls.sock", tls = "on", tls_certificates = "{pki}" }}]
control = "unix:{folder}/control.sock"

[limits]
connections_max = {many}
export_connections_max = {many}
handshakes_max = {many}
backlog_max = 4096
{times}

[device.d]
table = "0 {sectors} linear {disk} 0"
"""


_connected = functools.partial(connected, timeout_s=ANSWER_S_MAX)
_attached = functools.partial(attached, timeout_s=ANSWER_S_MAX)


def _again_if_closed(connect: Callable[[], socket.socket]) -> socket.socket:
    """A busy machine may let this process wait in the middle of a handshake, for longer than the server does."""
    for _ in range(ATTEMPTS_MAX):
        with contextlib.suppress(ConnectionError):
            return connect()
    raise ConnectionError("the server closes each connection in its handshake")


# ---- the clients that stall: each function makes one ----


def _silent(folder: str) -> socket.socket:
    return _connected(f"{folder}/nbd.sock")


def _half_an_option(folder: str) -> socket.socket:
    sock = _connected(f"{folder}/nbd.sock")
    sock.sendall(c.CLIENT_FLAGS.pack(3) + c.OPTION.pack(c.IHAVEOPT, c.OPT_GO, 100))
    return sock


@functools.cache
def _client_context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _half_a_tls_handshake(folder: str) -> socket.socket:
    sock = _connected(f"{folder}/tls.sock")
    starttls = c.OPTION.pack(c.IHAVEOPT, c.OPT_STARTTLS, 0)
    sock.sendall(c.CLIENT_FLAGS.pack(3) + starttls)
    sock.recv(c.OPTION_REPLY.size, socket.MSG_WAITALL)
    hello = ssl.MemoryBIO()
    client = _client_context().wrap_bio(
        ssl.MemoryBIO(), hello, server_hostname="localhost"
    )
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    # The whole ClientHello: the server answers with its certificate, which this client never reads.
    sock.sendall(hello.read())
    return sock


def _half_a_payload(folder: str, length: int, sent: int) -> socket.socket:
    sock = _attached(f"{folder}/nbd.sock")
    sock.sendall(request(c.CMD_WRITE, length))
    sock.setblocking(False)
    payload = memoryview(bytes(sent))
    with contextlib.suppress(BlockingIOError):  # the server does not take more of it
        while payload:
            payload = payload[sock.send(payload) :]
    return sock


def _no_replies(folder: str, length: int, nr: int) -> socket.socket:
    sock = _attached(f"{folder}/nbd.sock")
    sock.sendall(request(c.CMD_READ, length) * nr)
    return sock


@dataclass(frozen=True, slots=True)
class Greed:
    """How much the clients ask for: bytes."""

    write: int
    sent: int
    read: int
    nr_reads: int


MODEST: Final = Greed(MIB, 200 * KIB, 64 * KIB, 64)
GREEDY: Final = Greed(16 * MIB, 8 * MIB, MIB, 16)
KINDS: Final = ("handshake", "payload", "replies")


def stalled_client(kind: str, folder: str, nr: int, greed: Greed) -> socket.socket:
    """Make the client number `nr` of a kind: a connection that is not going to move any more."""
    if kind == "handshake":
        ways = _silent, _half_an_option, _half_a_tls_handshake
        return ways[nr % len(ways)](folder)
    if kind == "replies":
        return _no_replies(folder, greed.read, greed.nr_reads)
    if nr % 2:
        return _half_a_payload(folder, greed.write, greed.sent)
    return _half_a_payload(folder, SHORT_WRITE, SHORT_WRITE // 2)


def _attackers(folder: str, each: int, greed: Greed, wait_s: float, pipe: Pipe) -> None:
    """Connect them all, and tell when; then tell how long the server took to close each kind.

    Sends: the seconds of connecting; then for each kind how many are still connected, and the longest time until one was closed.
    """
    _allow_descriptors(len(KINDS) * each + DESCRIPTORS)
    begun_s = time.monotonic()
    socks: dict[int, tuple[socket.socket, str, float]] = {}
    poller = select.poll()
    for nr in range(each):
        for kind in KINDS:
            make = functools.partial(stalled_client, kind, folder, nr, greed)
            sock = _again_if_closed(make)
            socks[sock.fileno()] = sock, kind, time.monotonic()
            poller.register(sock, select.POLLRDHUP)
    pipe.send(time.monotonic() - begun_s)
    longest = dict.fromkeys(KINDS, 0.0)
    end_s = time.monotonic() + wait_s
    while socks and time.monotonic() < end_s:
        for fd, _ in poller.poll(1000):
            sock, name, connected_s = socks.pop(fd)
            poller.unregister(fd)
            sock.close()
            longest[name] = max(longest[name], time.monotonic() - connected_s)
    left = [name for _, name, _ in socks.values()]
    pipe.send({name: (left.count(name), took_s) for name, took_s in longest.items()})


# ---- the quiet client ----


def _quiet(
    folder: str,
    ready: Event,
    gently: Event,
    stop: Event,
    nr_read: c_longlong,
    pipe: Pipe,
) -> None:
    """Read until told to stop. Sends: when each read began, and how long it took, seconds.

    Args:
        gently: while it is set, with pauses: else the others, who need the same processors, connect slowly.
        nr_read: counts the reads that have ended.
    """
    sock = _again_if_closed(lambda: _attached(f"{folder}/nbd.sock"))
    began, took = array("d"), array("d")
    reply_bytes = c.SIMPLE_REPLY.size + READ_BYTES
    offset = 0
    ready.set()
    while not stop.is_set():
        for _ in range(1 if gently.is_set() else 100):
            offset = (offset + 7919 * READ_BYTES) % DISK_BYTES
            read = request(c.CMD_READ, READ_BYTES, offset)
            began_s = time.perf_counter()
            sock.sendall(read)
            if len(sock.recv(reply_bytes, socket.MSG_WAITALL)) != reply_bytes:
                raise ConnectionError("the server has closed the quiet client")
            took.append(time.perf_counter() - began_s)
            began.append(began_s)
            nr_read.value += 1
            if gently.is_set():
                time.sleep(PAUSE_S)
    pipe.send((began, took))


def p99_us(took: Sequence[float]) -> float:
    """Of durations in seconds."""
    return 1e6 * sorted(took)[len(took) * 99 // 100]


# ---- the run ----


def _allow_descriptors(nr: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < nr:
        sys.exit(f"{nr} descriptors are needed, and {hard} are allowed (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (nr, hard))


class Server:
    """A server process whose bounds let everybody in."""

    def __init__(
        self, folder: str, each: int, *, is_direct: bool, has_end: bool
    ) -> None:
        pki = authority()[1]
        seconds = TIMES if has_end else TIMES_WITHOUT_END
        times = "\n".join(f"{key} = {value}" for key, value in seconds.items())
        config = Path(folder) / "config.toml"
        config.write_text(
            CONFIG.format(
                folder=folder,
                pki=pki,
                many=len(KINDS) * each + DESCRIPTORS,
                times=times,
                sectors=DISK_BYTES // 512,
                disk=("direct:" if is_direct else "") + f"{folder}/disk.img",
            )
        )
        with (Path(folder) / "disk.img").open("wb") as image:
            for _ in range(DISK_BYTES // MIB):
                image.write(os.urandom(MIB))
        sockets = [Path(folder) / "nbd.sock", Path(folder) / "tls.sock"]
        log = Path(folder) / "log"
        argv = [NBDTARGET, "serve", "--config", str(config)]
        self.process = ServerProcess(argv, sockets=sockets, log=log)

    def nr_open(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident_mib(self) -> float:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE") / MIB


class Phases:
    """When each phase began, and what the server had at its end. Args: nr_read: by the quiet client, so far."""

    def __init__(self, server: Server, nr_read: c_longlong) -> None:
        self._server = server
        self._nr_read = nr_read
        self.rows: list[dict[str, Any]] = []

    def phase(self, name: str, wait: Callable[[], object]) -> None:
        """Run `wait`, which takes as long as the phase: or longer, until the quiet client has begun a read and ended it."""
        begun_s = time.perf_counter()
        nr_before = self._nr_read.value
        wait()
        end_s = time.monotonic() + ANSWER_S_MAX
        while self._nr_read.value < nr_before + 2 and time.monotonic() < end_s:
            time.sleep(PAUSE_S)
        self.rows.append(
            {
                "phase": name,
                "begun_s": begun_s,
                "ended_s": time.perf_counter(),
                "resident_mib": self._server.resident_mib(),
                "nr_open": self._server.nr_open(),
            }
        )

    def measure(self, began: Sequence[float], took: Sequence[float]) -> None:
        """Add the reads of the quiet client to the phases in which they began."""
        for row in self.rows:
            mine = [
                each
                for at, each in zip(began, took, strict=True)
                if row["begun_s"] <= at < row["ended_s"]
            ]
            row["reads"] = len(mine)
            row["p50_us"] = 1e6 * sorted(mine)[len(mine) // 2]
            row["p99_us"] = p99_us(mine)
            row["longest_ms"] = 1e3 * max(mine)


def run(
    folder: str,
    each: int,
    greed: Greed,
    phase_s: float,
    *,
    is_direct: bool,
    has_end: bool = True,
) -> dict[str, Any]:
    """One attack; returns its figures."""
    closed: dict[str, tuple[int, float]] = {}
    spawn = multiprocessing.get_context("spawn")
    server = Server(folder, each, is_direct=is_direct, has_end=has_end)
    ready, gently, stop = spawn.Event(), spawn.Event(), spawn.Event()
    quiet_end, quiet_pipe = spawn.Pipe()
    attack_end, attack_pipe = spawn.Pipe()
    wait_s = max(TIMES.values()) + SLACK_S
    nr_read = spawn.RawValue(c_longlong, 0)
    quiet = spawn.Process(
        target=_quiet, args=(folder, ready, gently, stop, nr_read, quiet_pipe)
    )
    attackers = spawn.Process(
        target=_attackers, args=(folder, each, greed, wait_s, attack_pipe)
    )
    phases = Phases(server, nr_read)
    try:
        quiet.start()
        quiet_pipe.close()  # the other process has it: when that ends, `recv` ends
        if not ready.wait(READY_S_MAX):
            raise TimeoutError("the server does not let the quiet client attach")
        time.sleep(phase_s / 5)  # until caches and polling have settled
        phases.phase("quiet", lambda: time.sleep(phase_s))
        open_before = server.nr_open()
        gently.set()
        attackers.start()
        attack_pipe.close()
        phases.phase("arriving", attack_end.recv)
        time.sleep(SETTLE_S)
        gently.clear()
        phases.phase("stalled", lambda: time.sleep(phase_s))
        if has_end:
            phases.phase("ending", attack_end.poll)
            closed = attack_end.recv()
            phases.rows[-1]["ended_s"] = time.perf_counter()
            time.sleep(SETTLE_S)
            phases.phase("ended", lambda: time.sleep(phase_s))
            phases.phase("later", lambda: time.sleep(SPARE_S))
        stop.set()
        phases.measure(*quiet_end.recv())
    finally:
        for process in (quiet, attackers):
            if process.is_alive():
                process.terminate()
            process.join()
        server.process.terminate()
    return {
        "each": each,
        "phases": phases.rows,
        "closed": closed,
        "stalled": phases.rows[2]["nr_open"] - open_before,
        "held": phases.rows[-1]["nr_open"] - open_before if has_end else 0,
    }


def print_figures(figures: dict[str, Any]) -> None:
    print(
        f"{'phase':10} {'reads':>8} {'p50':>8} {'p99':>9} {'longest':>10} {'MiB':>7} open"
    )
    for row in figures["phases"]:
        print(
            f"{row['phase']:10} {row['reads']:8} {row['p50_us']:5.0f} us"
            f" {row['p99_us']:6.0f} us {row['longest_ms']:7.1f} ms"
            f" {row['resident_mib']:7.1f} {row['nr_open']:4}"
        )
    for kind, (left, took_s) in figures["closed"].items():
        state = f"{left} are still connected" if left else f"closed in {took_s:.1f} s"
        print(f"{figures['each']} that stall in {kind}: {state}")
    all_of_them = len(KINDS) * figures["each"]
    print(f"connected at the end of stalled: {figures['stalled']} of {all_of_them}")
    rows = {row["phase"]: row for row in figures["phases"]}
    ratio = rows["stalled"]["p99_us"] / rows["quiet"]["p99_us"]
    print(f"p99 of the quiet client while all stall: {ratio:.2f} of its quiet value")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer, and shorter")
    parser.add_argument("--greedy", action="store_true", help="use up all bounds")
    parser.add_argument("--direct", action="store_true", help="without page cache")
    parser.add_argument("--no-end", action="store_true", help="not how they end")
    parser.add_argument("--each", type=int, metavar="N", help="clients of each kind")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    each = options.each or (EACH_QUICK if options.quick else EACH)
    _allow_descriptors(len(KINDS) * each + DESCRIPTORS)
    with tempfile.TemporaryDirectory() as folder:
        phase_s = PHASE_QUICK_S if options.quick else PHASE_S
        greed = GREEDY if options.greedy else MODEST
        how = {"is_direct": options.direct, "has_end": not options.no_end}
        figures = run(folder, each, greed, phase_s, **how)
    print_figures(figures)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    is_rid = options.greedy or all(left == 0 for left, _ in figures["closed"].values())
    return int(not is_rid or figures["held"] > 0)


if __name__ == "__main__":
    sys.exit(main())
