# SPDX-License-Identifier: Apache-2.0
"""Requests per second, ours against nbdkit, qemu-nbd and nbd-server, in one paired run.

    python -m scripts.bench [--quick] [--repeat N] [--runtime S] [--only WORD]...

Everything shares one machine and its noise, so figures of different runs must not be
compared. Here each workload goes round all servers before it is repeated, each round begins
with another server, and a ratio is the median of the rounds' own ratios: a slow second hits
both sides of it. The image lies in the page cache of a real file system (not tmpfs, where
RWF_NOWAIT reads do not work), and dirty pages are written back between samples.

Then what a stack of mapped devices costs a request, and what a commit costs:
`scripts.bench_stack`, `scripts.bench_commit`; `--only stack` or `--only commit` for nothing else.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts import bench_commit, bench_stack
from scripts.bench_servers import CONTENDERS, PEERS, Contender
from scripts.fio import Job, run_fio
from scripts.processes import StartError

__all__ = ["WORKLOADS", "Sample", "Workload", "main", "paired_ratio"]

MIB = 1 << 20
# `--only` one of them: no server but ours.
COMMIT = "commit"  # needs no fio
STACK = "stack"


@dataclass(frozen=True)
class Workload(Job):
    """`wanted`: the ratio of a hydrated clone to the best peer we aim at."""

    wanted: float


WORKLOADS = (
    Workload("randread-4k-qd1", "randread", 4096, 1, 1.0),
    Workload("randread-4k-qd32", "randread", 4096, 32, 1.5),
    Workload("randread-4k-qd64", "randread", 4096, 64, 1.5),
    Workload("randwrite-4k-qd1", "randwrite", 4096, 1, 1.0),
    Workload("randwrite-4k-qd32", "randwrite", 4096, 32, 1.2),
    Workload("randwrite-4k-qd64", "randwrite", 4096, 64, 1.2),
    Workload("read-256k-qd8", "read", 262144, 8, 1.0),
    Workload("write-256k-qd8", "write", 262144, 8, 1.0),
)


@dataclass(frozen=True)
class Sample:
    """One fio run: rates, the client's latency, and what the server's process burnt."""

    iops: float
    mib_per_s: float
    p99_us: float
    server_cpu_us: float  # per request


def measure(contender: Contender, workload: Workload, runtime_s: float) -> Sample:
    contender.before(writes=workload.writes)
    process = contender.running()
    cpu_before_s = process.cpu_s()
    job = run_fio(contender.uri, workload, runtime_s)
    time.sleep(0.05)  # nbd-server counts a connection's CPU when it reaps the child
    cpu_s = process.cpu_s() - cpu_before_s
    if workload.writes:
        contender.settle()
    side = job["write" if workload.writes else "read"]
    return Sample(
        iops=side["iops"],
        mib_per_s=side["bw_bytes"] / MIB,
        p99_us=side["clat_ns"]["percentile"]["99.000000"] / 1000,
        server_cpu_us=cpu_s / side["total_ios"] * 1e6,
    )


Samples = dict[str, dict[str, list[Sample]]]  # workload, server, rounds


def median_iops(rounds: Sequence[Sample]) -> float:
    return statistics.median(sample.iops for sample in rounds)


def paired_ratio(ours: Sequence[Sample], theirs: Sequence[Sample]) -> float:
    """Return the median of the ratios that each round gave by itself."""
    return statistics.median(
        mine.iops / other.iops for mine, other in zip(ours, theirs, strict=True)
    )


def best_peer(servers: dict[str, list[Sample]]) -> str | None:
    peers = [peer.name for peer in PEERS if peer.name in servers]
    return max(peers, key=lambda name: median_iops(servers[name]), default=None)


def run_rounds(
    contenders: list[Contender],
    workloads: Sequence[Workload],
    options: argparse.Namespace,
    console: Console,
) -> Samples:
    samples: Samples = {w.name: {c.name: [] for c in contenders} for w in workloads}
    for round_nr in range(options.repeat):
        for workload in workloads:
            shift = round_nr % len(contenders)
            for contender in contenders[shift:] + contenders[:shift]:
                sample = measure(contender, workload, options.runtime)
                samples[workload.name][contender.name].append(sample)
                console.print(
                    f"[dim]round {round_nr + 1}/{options.repeat} {workload.name:18}"
                    f" {contender.name:11} {sample.iops:9.0f}/s"
                    f" {sample.server_cpu_us:6.1f} us CPU a request[/dim]"
                )
    return samples


def summarize(samples: Samples) -> dict[str, Any]:
    """Reduce to medians and ratios, for the JSON report and the table alike."""
    summary: dict[str, Any] = {}
    for workload, servers in samples.items():
        best = best_peer(servers)
        summary[workload] = {
            "best_peer": best,
            "servers": {
                name: {
                    "iops": median_iops(rounds),
                    "mib_per_s": statistics.median(s.mib_per_s for s in rounds),
                    "p99_us": statistics.median(s.p99_us for s in rounds),
                    "server_cpu_us": statistics.median(s.server_cpu_us for s in rounds),
                    "to_best_peer": paired_ratio(rounds, servers[best])
                    if best
                    else None,
                }
                for name, rounds in servers.items()
            },
        }
    return summary


def tables(summary: dict[str, Any], workloads: Iterable[Workload]) -> list[Table]:
    names = [
        c.name for c in CONTENDERS if c.name in next(iter(summary.values()))["servers"]
    ]
    rates = Table(title="requests a second, median; ratio to the best peer, paired")
    costs = Table(title="server CPU, µs a request")
    for table in (rates, costs):
        table.add_column("workload", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right")
    rates.add_column("wanted", justify="right")
    for workload in workloads:
        row = summary[workload.name]
        rate_cells, cost_cells = [], []
        for name in names:
            server = row["servers"][name]
            ratio = server["to_best_peer"]
            cell = f"{server['iops']:,.0f}"
            if name == row["best_peer"]:
                cell = f"[bold]{cell}[/bold]"
            elif ratio is not None:
                cell += f" {ratio:.2f}x"
            rate_cells.append(cell)
            cost_cells.append(f"{server['server_cpu_us']:.1f}")
        rates.add_row(workload.name, *rate_cells, f"{workload.wanted:.1f}x")
        costs.add_row(workload.name, *cost_cells)
    return [rates, costs]


def selected(
    words: Sequence[str],
) -> tuple[list[type[Contender]], list[Workload]]:
    """Pick servers (whole names) and workloads (parts of names) that `--only` asks for.

    Raises: ValueError: a word that names neither.
    """
    servers = [c for c in CONTENDERS if c.name in words]
    workloads = [w for w in WORKLOADS if any(word in w.name for word in words)]
    for word in words:
        if not any(c.name == word for c in CONTENDERS) and not any(
            word in w.name for w in WORKLOADS
        ):
            raise ValueError(f"--only {word}: no such server or workload")
    return servers or list(CONTENDERS), workloads or list(WORKLOADS)


def available(
    classes: Iterable[type[Contender]], console: Console
) -> list[type[Contender]]:
    found = []
    for contender in classes:
        missing = contender.maybe_missing()
        if missing is None:
            found.append(contender)
        else:
            console.print(f"skipping {contender.name}: {missing} is not installed")
    return found


def make_image(path: Path, size: int) -> None:
    """Write `size` bytes of incompressible, non-zero data."""
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))


def report(
    options: argparse.Namespace, summary: dict[str, Any], samples: Samples
) -> Path:
    now = datetime.datetime.now(datetime.UTC)
    path = Path(options.output or f"bench-{now:%Y-%m-%d-%H%M%S}.json")
    facts = {
        "date": now.isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}",
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
        "runtime_s": options.runtime,
        "repeat": options.repeat,
        "image_mib": options.size,
    }
    raw = {
        workload: {
            name: [asdict(s) for s in rounds] for name, rounds in servers.items()
        }
        for workload, servers in samples.items()
    }
    text = json.dumps({"facts": facts, "summary": summary, "samples": raw}, indent=1)
    path.write_text(text + "\n")
    return path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare NBD servers with fio.")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (5)")
    parser.add_argument(
        "--runtime", type=float, default=3.0, help="seconds a sample (3)"
    )
    parser.add_argument(
        "--size", type=int, default=1024, help="image size in MiB (1024)"
    )
    parser.add_argument("--only", action="append", default=[], metavar="WORD")
    parser.add_argument("--dir", help="where the images go (a temporary directory)")
    parser.add_argument("--output", help="the JSON report (bench-DATE.json)")
    parser.add_argument("--quick", action="store_true", help="256 MiB, 2 rounds of 1 s")
    options = parser.parse_args(argv)
    if options.quick:
        options.repeat, options.runtime, options.size = 2, 1.0, 256
    words = [word for word in options.only if word not in (COMMIT, STACK)]
    options.commits = not options.only or COMMIT in options.only
    options.stacks = not options.only or STACK in options.only
    options.servers = not options.only or bool(words)
    try:
        options.contenders, options.workloads = selected(words)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    status = compare_servers(options) if options.servers else 0
    words = ["--quick"] if options.quick else []
    words += ["--dir", options.dir] if options.dir else []
    if options.stacks:
        status = bench_stack.main(words) or status
    if options.commits:
        status = bench_commit.main(words) or status
    return status


def compare_servers(options: argparse.Namespace) -> int:
    console = Console(width=None if sys.stdout.isatty() else 160)
    if shutil.which("fio") is None:
        console.print("fio is not installed: nothing to measure with")
        return 1
    classes = available(options.contenders, console)
    contenders: list[Contender] = []
    with tempfile.TemporaryDirectory(
        prefix="nbdtarget-bench-", dir=options.dir
    ) as name:
        work = Path(name)
        make_image(work / "source.img", options.size * MIB)
        try:
            for contender in (kind(work, work / "source.img") for kind in classes):
                contenders.append(contender)
                contender.start()
            samples = run_rounds(contenders, options.workloads, options, console)
            for contender in contenders:
                contender.stop()
        except (StartError, subprocess.CalledProcessError) as error:
            console.print(str(error), markup=False)
            return 1
        finally:
            for contender in contenders:
                contender.kill()
    summary = summarize(samples)
    for table in tables(summary, options.workloads):
        console.print(table)
    console.print(f"written: {report(options, summary, samples)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
