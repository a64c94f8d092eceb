# SPDX-License-Identifier: Apache-2.0
"""Requests per second, ours against nbdkit, qemu-nbd and nbd-server, in one paired run.

    python -m scripts.bench [--quick] [--repeat N] [--runtime S] [--only WORD]...

Everything shares one machine and its noise, so figures of different runs must not be
compared. Here each workload goes round all servers before it is repeated, each round begins
with another server, and a ratio is the median of the rounds' own ratios: a slow second hits
both sides of it. The image lies in the page cache of a real file system (not tmpfs, where
RWF_NOWAIT reads do not work), and dirty pages are written back between samples. All images are written
in pieces of the same size, which on ext4 decides what small writes to them cost later. For the cold workloads the image is
dropped from the page cache before each sample. The durable workloads need the disk for each write, by FUA or by a FLUSH after
it: `bench_durable.c` is their client, and --dir should lie on the disk in question.

`floor` is `bench_floor.c`: it makes the system calls and nothing else, so it shows what the kernel alone charges.

Then what a stack of mapped devices costs a request, what a commit costs, and how fast a cache is:
`scripts.bench_stack`, `scripts.bench_commit`, `scripts.bench_cache`; and what a hydration does to the latency of a client beside it:
`scripts.bench_p99`; and TLS, against nbdkit with the same certificates: `scripts.bench_tls`. `--only stack`, `commit`, `cache`, one of the
cache's parts (`cache-hits` …), `p99` or `tls` for nothing else.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts import bench_cache, bench_commit, bench_p99, bench_stack, bench_tls
from scripts.bench_rounds import (
    Samples,
    available,
    best_peer,
    compare,
    median_iops,
    paired_ratio,
    raw,
    write_report,
)
from scripts.bench_servers import CONTENDERS, Contender
from scripts.fast_path import warn_if_pure
from scripts.fio import Job
from tests.support.processes import StartError

__all__ = ["WORKLOADS", "Workload", "main"]

# `--only` one of them: no server but ours.
COMMIT = "commit"  # needs no fio
STACK = "stack"


@dataclass(frozen=True)
class Workload(Job):
    """`wanted`: the ratio of a hydrated clone to the best peer we aim at."""

    wanted: float = 1.0


WORKLOADS = (
    Workload("randread-4k-qd1", "randread", 4096, 1, wanted=1.2),
    Workload("randread-4k-qd32", "randread", 4096, 32, wanted=1.2),
    Workload("randread-4k-qd64", "randread", 4096, 64, wanted=1.2),
    Workload("randwrite-4k-qd1", "randwrite", 4096, 1, wanted=1.2),
    Workload("randwrite-4k-qd32", "randwrite", 4096, 32, wanted=1.05),
    Workload("randwrite-4k-qd64", "randwrite", 4096, 64, wanted=1.05),
    Workload("read-256k-qd8", "read", 262144, 8, wanted=1.2),
    Workload("write-256k-qd8", "write", 262144, 8, wanted=1.1),
    Workload("cold-read-4k-qd1", "randread", 4096, 1, cold=True, wanted=0.95),
    Workload("cold-read-4k-qd32", "randread", 4096, 32, cold=True, wanted=1.2),
    Workload("durable-fua-4k-qd1", "randwrite", 4096, 1, durable="fua"),
    Workload("durable-fua-4k-qd32", "randwrite", 4096, 32, durable="fua"),
    Workload("durable-flush-4k-qd1", "randwrite", 4096, 1, durable="flush"),
    Workload("durable-flush-4k-qd32", "randwrite", 4096, 32, durable="flush"),
)


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
                if rounds
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
            server = row["servers"].get(name)
            if server is None:
                rate_cells.append("")
                cost_cells.append("")
                continue
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
    own = (COMMIT, STACK, bench_p99.P99, bench_tls.TLS, *bench_cache.WORDS)
    words = [word for word in options.only if word not in own]
    options.commits = not options.only or COMMIT in options.only
    options.stacks = not options.only or STACK in options.only
    options.p99 = not options.only or bench_p99.P99 in options.only
    options.tls = not options.only or bench_tls.TLS in options.only
    options.caches = bench_cache.selected(options.only)
    options.servers = not options.only or bool(words)
    try:
        options.contenders, options.workloads = selected(words)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    warn_if_pure()
    status = compare_servers(options) if options.servers else 0
    words = ["--quick"] if options.quick else []
    words += ["--dir", options.dir] if options.dir else []
    if options.stacks:
        status = bench_stack.main(words) or status
    if options.commits:
        status = bench_commit.main(words) or status
    if options.p99:
        # With `--only p99` the cache's share of it, too; otherwise that is among the cache's parts.
        status = bench_p99.main(words + ["--no-cache"] * bool(options.caches)) or status
    if options.tls:
        rounds = ["--repeat", str(options.repeat), "--runtime", str(options.runtime)]
        status = bench_tls.main(words + ([] if options.quick else rounds)) or status
    if options.caches:
        for part in options.caches:
            words += ["--only", part]
        if not options.quick:
            words += ["--repeat", str(options.repeat), "--size", str(options.size)]
            words += ["--runtime", str(options.runtime)]
        status = bench_cache.main(words) or status
    return status


def compare_servers(options: argparse.Namespace) -> int:
    console = Console(width=None if sys.stdout.isatty() else 160)
    if shutil.which("fio") is None:
        console.print("fio is not installed: nothing to measure with")
        return 1
    classes = available(options.contenders, console)
    with tempfile.TemporaryDirectory(
        prefix="nbdtarget-bench-", dir=options.dir
    ) as name:
        try:
            samples = compare(classes, options.workloads, Path(name), options, console)
        except (StartError, subprocess.CalledProcessError) as error:
            console.print(str(error), markup=False)
            return 1
    summary = summarize(samples)
    for table in tables(summary, options.workloads):
        console.print(table)
    results = {"summary": summary, "samples": raw(samples)}
    console.print(f"written: {write_report(options, results)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
