# SPDX-License-Identifier: Apache-2.0
"""Measures what a hydration adds to the latency of a client at depth 1; and migrations of a cache, see `bench_cache_migrations`.

    python -m scripts.bench_p99 [--quick] [--size MIB] [--repeat N] [--runtime S]

One client reads 4 KiB at random from data in the page cache, and is alone, or has a copy of an image from nbdkit beside it:

    beside        the client reads another disk of the server whose clone hydrates at full speed
    same disk     the client reads regions of that clone that are hydrated already; the hydration yields to it
    nbdcopy       the client reads from nbdkit, and nbdcopy makes the same copy: what the machine and the disk alone do to a
                  client, without any of our code

Each round measures each of them quiet and with the copy, on the same files, and a ratio is the median of the rounds' own. `MiB/s` is how fast the
copy was meanwhile. A sample ends before the copy does, or it is said.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from nbdtarget.common.units import SECTOR
from nbdtarget.control import messages as m
from nbdtarget.control.client import ControlClient
from scripts import bench_cache
from scripts.bench_hydration import fresh, make_source
from scripts.bench_rounds import make_image
from scripts.cache_under_test import uri_of
from scripts.fast_path import warn_if_pure
from scripts.fio import Job, run_fio
from tests.support.processes import NBDTARGET, ServerProcess, nbdkit_file

__all__ = ["P99", "Sample", "main", "ratio"]

P99: Final = "p99"  # the word for `--only` of `scripts.bench`
MIB: Final = 1 << 20
READS: Final = Job("reads", "randread", 4096, 1)
DISK_MIB: Final = 64  # that the client reads
REGION: Final = 64 << 10
IN_FLIGHT: Final = (16 << 20) // REGION  # what `nbdtarget clone` sets
BATCH: Final = (4 << 20) // REGION
WANTED: Final = 1.2
STATES: Final = ("beside", "same disk", "nbdcopy")


@dataclass(frozen=True)
class Sample:
    """One run of fio: microseconds, and the rate of the copy beside it."""

    p50_us: float
    p99_us: float
    p999_us: float
    mib_per_s: float


class Rig:
    """Our server and nbdkit, each with a disk to read, and an image to copy."""

    def __init__(self, work: Path, source: Path, size: int) -> None:
        self.work = work
        self.image = source
        self.size = size
        self.source = uri_of(work / "source.sock")
        self.socket, self.control = work / "ours.sock", work / "ours.control"
        self.nbdkit = work / "peer.sock"
        for name in ("ours", "peer"):
            make_image(work / f"{name}.img", DISK_MIB * MIB)
        log = work / "log"
        self.processes = [
            nbdkit_file(source, work / "source.sock", log, "--readonly"),
            nbdkit_file(work / "peer.img", self.nbdkit, log),
            ServerProcess(
                [
                    NBDTARGET,
                    "serve",
                    "--listen",
                    f"unix:{self.socket}",
                    "--control",
                    str(self.control),
                ],
                sockets=[self.socket, self.control],
                log=log,
            ),
        ]
        table = f"0 {DISK_MIB * MIB // SECTOR} linear {work / 'ours.img'} 0"
        self.client = ControlClient(self.control)
        self.client.ask("create", m.Create("disk", table), m.Done)

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()

    def warm(self) -> None:
        """Read into the page cache what the clients will read: opening a disk for writing has dropped it."""
        for name in ("ours", "peer"):
            with (self.work / f"{name}.img").open("rb") as file:
                while file.read(MIB):
                    pass

    def make_clone(self) -> None:
        """Make a clone that has hydrated what the client reads, and no more."""
        fresh(self.work / "clone.img", self.size)
        (self.work / "clone.meta").unlink(missing_ok=True)
        table = (
            f"0 {self.size // SECTOR} clone {self.work / 'clone.meta'}"
            f" {self.work / 'clone.img'} {self.source} {REGION // SECTOR} 1 no_hydration"
            f" 4 hydration_threshold {IN_FLIGHT} hydration_batch_size {BATCH}"
        )
        self.client.ask("create", m.Create("clone", table), m.Done)
        # Data that a client writes stays in the page cache.
        self._fio("clone", "write", ["--bs=1m"])

    def _fio(self, name: str, rw: str, extra: list[str]) -> None:
        job = Job("fill", rw, MIB, 4)
        run_fio(
            uri_of(self.socket, name),
            job,
            0.5,
            extra=[f"--size={DISK_MIB * MIB}", *extra],
        )

    def remove_clone(self) -> None:
        self.client.ask("remove", m.Remove("clone"), m.Done)

    def hydrated_bytes(self) -> int:
        answer = self.client.ask(
            "status", m.Status(("clone",), None, True), m.LinesAnswer
        )
        found = answer.devices[0].lines[0].fields["regions_hydrated"]
        assert isinstance(found, int)
        return found * REGION

    def start_hydration(self) -> None:
        request = m.Message("clone", 0, ("enable_hydration",))
        self.client.ask("message", request, m.MessageAnswer)


def read(uri: str, runtime_s: float, copied_bytes: Callable[[], int]) -> Sample:
    before, begin_s = copied_bytes(), time.monotonic()
    report = run_fio(uri, READS, runtime_s, extra=[f"--size={DISK_MIB * MIB}"])["read"]
    seconds = time.monotonic() - begin_s
    percentile = report["clat_ns"]["percentile"]
    return Sample(
        percentile["50.000000"] / 1000,
        percentile["99.000000"] / 1000,
        percentile["99.900000"] / 1000,
        (copied_bytes() - before) / MIB / seconds,
    )


def nothing() -> int:
    return 0


def measure_ours(
    rig: Rig, state: str, runtime_s: float, console: Console
) -> list[Sample]:
    rig.make_clone()
    uri = uri_of(rig.socket, "clone" if state == "same disk" else "disk")
    rig.warm()
    quiet = read(uri, runtime_s, nothing)
    rig.warm()
    rig.start_hydration()
    busy = read(uri, runtime_s, rig.hydrated_bytes)
    if rig.hydrated_bytes() >= rig.size:
        console.print(
            f"{state}: the hydration ended during the sample: take a larger --size"
        )
    rig.remove_clone()
    return [quiet, busy]


def measure_nbdcopy(rig: Rig, runtime_s: float, console: Console) -> list[Sample]:
    dest = rig.work / "nbdcopy.img"
    fresh(dest, rig.size)
    uri = uri_of(rig.nbdkit)
    rig.warm()
    quiet = read(uri, runtime_s, nothing)
    rig.warm()
    # A server of its own: nbdkit 1.32 aborts when a client that reads is killed.
    path = rig.work / "nbdcopy.sock"
    server = nbdkit_file(rig.image, path, rig.work / "log", "--readonly")
    copy = subprocess.Popen(["nbdcopy", "--flush", uri_of(path), str(dest)])

    def written_bytes() -> int:
        # Blocks are given to the file when it is written back: good enough for a rate.
        return dest.stat().st_blocks * 512

    try:
        busy = read(uri, runtime_s, written_bytes)
        if copy.poll() is not None:
            console.print("nbdcopy ended during the sample: take a larger --size")
    finally:
        copy.kill()
        copy.wait()
        server.kill()
    dest.unlink()
    return [quiet, busy]


def ratio(rounds: Sequence[Sequence[Sample]], name: str) -> float:
    """The median of the rounds' own ratios, busy to quiet, of one of the latencies."""
    return float(
        statistics.median(getattr(b, name) / getattr(q, name) for q, b in rounds)
    )


def show(samples: dict[str, list[list[Sample]]]) -> Table:
    table = Table(title="4 KiB reads at depth 1, us, medians")
    for column in (
        "",
        "p50 quiet",
        "busy",
        "p99 quiet",
        "busy ",
        "p99.9 quiet",
        "busy  ",
    ):
        table.add_column(column, justify="right")
    table.add_column("MiB/s", justify="right")
    table.add_column("p99 busy to quiet", justify="right")
    for state, rounds in samples.items():
        cells = []
        for name in ("p50_us", "p99_us", "p999_us"):
            for side in (0, 1):
                value = statistics.median(getattr(each[side], name) for each in rounds)
                cells.append(f"{value:.0f}")
        rate = statistics.median(each[1].mib_per_s for each in rounds)
        table.add_row(state, *cells, f"{rate:.0f}", f"{ratio(rounds, 'p99_us'):.2f}")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Latency beside copies.")
    parser.add_argument("--size", type=int, default=4096, help="MiB to copy (4096)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--runtime", type=float, default=2.0, help="seconds a sample")
    parser.add_argument(
        "--quick", action="store_true", help="1024 MiB, two rounds of 0.5 s"
    )
    parser.add_argument("--only", action="append", choices=STATES)
    parser.add_argument("--source", help="an image to copy, instead of a new one")
    parser.add_argument("--dir", help="where the images go (a temporary directory)")
    parser.add_argument("--no-cache", action="store_true", help="leave the cache out")
    options = parser.parse_args(argv)
    warn_if_pure()
    if options.quick:
        options.size, options.repeat, options.runtime = 1024, 2, 0.5
    console = Console(width=None if sys.stdout.isatty() else 140)
    missing = [t for t in ("fio", "nbdkit", "nbdcopy") if shutil.which(t) is None]
    if missing:
        console.print(f"{' and '.join(missing)}: not installed")
        return 1
    samples: dict[str, list[list[Sample]]] = {s: [] for s in options.only or STATES}
    with tempfile.TemporaryDirectory(
        prefix="nbdtarget-bench-", dir=options.dir
    ) as name:
        work = Path(name)
        source = Path(options.source) if options.source else work / "source.img"
        if not options.source:
            make_source(source, size=options.size * MIB, holes=False)
        rig = Rig(work, source, source.stat().st_size)
        try:
            for _ in range(options.repeat):
                for state, rounds in samples.items():
                    if state == "nbdcopy":
                        found = measure_nbdcopy(rig, options.runtime, console)
                    else:
                        found = measure_ours(rig, state, options.runtime, console)
                    rounds.append(found)
        finally:
            rig.close()
    console.print(show(samples))
    console.print(f"wanted: at most {WANTED}, or what nbdcopy does to nbdkit's client")
    if options.no_cache:
        return 0
    words = ["--only", "cache-migrations", *(["--quick"] if options.quick else [])]
    return bench_cache.main(words + (["--dir", options.dir] if options.dir else []))


if __name__ == "__main__":
    sys.exit(main())
