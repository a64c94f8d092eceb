# SPDX-License-Identifier: Apache-2.0
"""Hand-overs under load: fio verifies what it wrote while the server is replaced again and again.

    python -m scripts.upgrade_loop [--count 100] [--devices 10] [--connections 8]

One server has plain files, a clone that hydrates slowly, and a writeback cache. fio writes to several of them over several
connections, verifies each block soon after, and must not see an error. Beside it a client reads from a device of its own, one
request after the other; the longest time that it waits around a hand-over is what a client notices. Prints the median
and the longest of these pauses.
"""

import argparse
import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

from tests.support.plain_client import PlainClient
from tests.support.processes import NBDTARGET, ServerProcess

MIB: Final = 1 << 20
SIZE: Final = 64 * MIB
AROUND_S: Final = 0.3


class Reader(threading.Thread):
    """Reads 4 KiB again and again. `longest_s`: of the reads since it was last set to 0."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(daemon=True)
        self._client = PlainClient(path, name)
        self.longest_s = 0.0
        self.nr_reads = 0
        self.failure = ""
        self.must_end = False

    def run(self) -> None:
        try:
            while not self.must_end:
                begun = time.monotonic()
                self._client.read(0, 4096)
                self.longest_s = max(self.longest_s, time.monotonic() - begun)
                self.nr_reads += 1
        except OSError as error:
            self.failure = str(error)


def tables(work: Path, nr_plain: int) -> dict[str, str]:
    """The devices by name; makes their files."""
    sectors = SIZE // 512
    found = {}
    for nr in range(nr_plain):
        image = work / f"plain{nr}.img"
        image.write_bytes(bytes(SIZE))
        found[f"plain{nr}"] = f"0 {sectors} linear {image} 0"
    for name in ("source", "dest", "fast", "slow"):
        (work / f"{name}.img").write_bytes(bytes(SIZE))
    found["clone"] = (
        f"0 {sectors} clone {work}/clone.meta {work}/dest.img {work}/source.img 128 0 2"
        " hydration_rate 65536"
    )
    found["cache"] = (
        f"0 {sectors} cache {work}/cache.meta {work}/fast.img {work}/slow.img 128 1"
        " writeback smq 0"
    )
    return found


def start_fio(
    work: Path, path: Path, names: list[str], seconds: float
) -> subprocess.Popen[str]:
    argv = ["fio", "--output-format=json", f"--output={work}/fio.json"]
    argv += [
        "--verify_state_save=0",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=8",
        "--verify=crc32c",
    ]
    argv += ["--verify_backlog=256", "--verify_fatal=1", f"--size={SIZE}"]
    argv += ["--time_based", f"--runtime={seconds:g}", "--fsync=64"]
    for nr, name in enumerate(names):
        argv += [f"--name=job{nr}", f"--uri=nbd+unix:///{name}?socket={path}"]
    return subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def upgrade(control: Path) -> int:
    """Returns the new process's number."""
    said = subprocess.run(
        [NBDTARGET, "upgrade", "--json", "--control", str(control)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    pid: int = json.loads(said)["pid"]
    return pid


def stop(pid: int) -> None:
    watched = os.pidfd_open(pid)
    signal.pidfd_send_signal(watched, signal.SIGTERM)
    if not select.select([watched], [], [], 60)[0]:
        sys.exit(f"process {pid} does not end")


def run(work: Path, count: int, nr_devices: int, nr_connections: int) -> int:
    path, control, log = work / "nbd.sock", work / "control.sock", work / "log"
    argv = [
        NBDTARGET,
        "serve",
        "-v",
        "--listen",
        f"unix:{path}",
        "--control",
        str(control),
    ]
    server = ServerProcess(argv, sockets=[path, control], log=log)
    for name, table in tables(work, max(1, nr_devices - 2)).items():
        create = [
            NBDTARGET,
            "create",
            name,
            "--table",
            table,
            "--control",
            str(control),
        ]
        subprocess.run([*create, "--overwrite"], check=True, timeout=60)
    # One connection for each device but the reader's: two clients that verify must not write to one disk.
    wanted = ["clone", "cache", *(f"plain{nr}" for nr in range(1, nr_devices))]
    names = wanted[:nr_connections]
    fio = start_fio(work, path, names, seconds=3600)
    reader = Reader(path, "plain0")
    reader.start()
    pauses, pid = [], server.pid
    for nr in range(count):
        time.sleep(AROUND_S)
        reader.longest_s = 0.0
        pid = upgrade(control)
        time.sleep(AROUND_S)
        pauses.append(reader.longest_s)
        if fio.poll() is not None or reader.failure:
            break
        if nr % 10 == 9:
            print(
                f"{nr + 1} hand-overs, median {statistics.median(pauses):.3f} s",
                flush=True,
            )
    reader.must_end = True
    reader.join(10)
    ended_early = fio.poll() is not None
    fio.send_signal(signal.SIGINT)
    _, said = fio.communicate(timeout=120)
    raw = (work / "fio.json").read_text()
    jobs = json.loads(raw[raw.index("{") :])[
        "jobs"
    ]  # behind what it says of the signal
    errors = [f"{job['jobname']}: error {job['error']}" for job in jobs if job["error"]]
    written = sum(job["write"]["total_ios"] for job in jobs)
    stop(pid)
    tracebacks = log.read_text().count("Traceback")
    print(
        f"{len(pauses)} hand-overs, {len(names)} connections, {written} writes, {reader.nr_reads} reads;"
        f" pause median {statistics.median(pauses):.3f} s, longest {max(pauses):.3f} s"
    )
    failures = [*errors, *([reader.failure] if reader.failure else [])]
    if ended_early:
        failures.append(f"fio has ended early: {said}")
    if tracebacks:
        failures.append(f"{tracebacks} tracebacks in the log")
    for failure in failures:
        print(failure)
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--devices", type=int, default=10)
    parser.add_argument("--connections", type=int, default=8)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="upgrade-"))
    try:
        return run(work, args.count, args.devices, args.connections)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
