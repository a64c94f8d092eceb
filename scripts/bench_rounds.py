# SPDX-License-Identifier: Apache-2.0
"""Paired rounds: the same fio workloads round all servers, and what came of it.

Each workload goes round all servers before it is repeated, each round begins with another
server, and a ratio is the median of the rounds' own ratios: a slow second hits both sides of it.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from nbdtarget.fast import compiled
from scripts.bench_servers import PEERS, Contender
from scripts.durable_client import run_durable
from scripts.fio import Job, run_fio

__all__ = [
    "Sample",
    "Samples",
    "available",
    "best_peer",
    "compare",
    "make_image",
    "measure",
    "median_iops",
    "paired_ratio",
    "raw",
    "write_report",
]

MIB: Final = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One fio run: rates, the client's latency, and what the server's process burnt."""

    iops: float
    mib_per_s: float
    p99_us: float
    server_cpu_us: float  # per request


Samples = dict[str, dict[str, list[Sample]]]  # workload, server, rounds


def measure(contender: Contender, job: Job, runtime_s: float) -> Sample:
    contender.before(writes=job.writes)
    if job.cold:
        contender.cool()
    else:
        contender.warm()
    process = contender.running()
    cpu_before_s = process.cpu_s()
    if job.durable:
        result = run_durable(contender.socket, contender.export, job, runtime_s)
    else:
        result = run_fio(contender.uri, job, runtime_s)
    time.sleep(0.05)  # nbd-server counts a connection's CPU when it reaps the child
    cpu_s = process.cpu_s() - cpu_before_s
    if job.writes:
        contender.settle()
    side = result["write" if job.writes else "read"]
    return Sample(
        iops=side["iops"],
        mib_per_s=side["bw_bytes"] / MIB,
        p99_us=side["clat_ns"]["percentile"]["99.000000"] / 1000,
        server_cpu_us=cpu_s / side["total_ios"] * 1e6,
    )


def median_iops(rounds: Sequence[Sample]) -> float:
    return statistics.median(sample.iops for sample in rounds)


def best_peer(servers: dict[str, list[Sample]]) -> str | None:
    """Return the fastest of the servers in C that serve a plain file."""
    peers = [peer.name for peer in PEERS if peer.name in servers]
    return max(
        (name for name in peers if servers[name]),
        key=lambda name: median_iops(servers[name]),
        default=None,
    )


def paired_ratio(ours: Sequence[Sample], theirs: Sequence[Sample]) -> float:
    """Return the median of the ratios that each round gave by itself."""
    return statistics.median(
        mine.iops / other.iops for mine, other in zip(ours, theirs, strict=True)
    )


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


def compare(
    classes: Iterable[type[Contender]],
    jobs: Sequence[Job],
    work: Path,
    options: argparse.Namespace,
    console: Console,
) -> Samples:
    """Make an image in `work`, have all servers up at once, and measure them in rounds.

    Raises: StartError, CalledProcessError.
    """
    source = work / "source.img"
    make_image(source, options.size * MIB)
    contenders: list[Contender] = []
    try:
        for contender in (kind(work, source) for kind in classes):
            contenders.append(contender)
            contender.start()
        samples = _rounds(contenders, jobs, options, console)
        for contender in contenders:
            remark = contender.maybe_remark()
            if remark is not None:
                console.print(f"{contender.name}: {remark}")
            contender.stop()
    finally:
        for contender in contenders:
            contender.kill()
    return samples


def _rounds(
    contenders: list[Contender],
    jobs: Sequence[Job],
    options: argparse.Namespace,
    console: Console,
) -> Samples:
    samples: Samples = {job.name: {c.name: [] for c in contenders} for job in jobs}
    for round_nr in range(options.repeat):
        for job in jobs:
            shift = round_nr % len(contenders)
            for contender in contenders[shift:] + contenders[:shift]:
                if not contender.takes(job):
                    continue
                sample = measure(contender, job, options.runtime)
                samples[job.name][contender.name].append(sample)
                console.print(
                    f"[dim]round {round_nr + 1}/{options.repeat} {job.name:18}"
                    f" {contender.name:12} {sample.iops:9.0f}/s"
                    f" {sample.server_cpu_us:6.1f} us CPU a request[/dim]"
                )
    return samples


def raw(samples: Samples) -> dict[str, Any]:
    """All samples, as JSON takes them."""
    return {
        job: {name: [asdict(s) for s in rounds] for name, rounds in servers.items()}
        for job, servers in samples.items()
    }


def write_report(
    options: argparse.Namespace, results: dict[str, Any], *, prefix: str = "bench"
) -> Path:
    """Write what was found, when and where, to `options.output` or a name of its own."""
    now = datetime.datetime.now(datetime.UTC)
    path = Path(options.output or f"{prefix}-{now:%Y-%m-%d-%H%M%S}.json")
    facts = {
        "date": now.isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}",
        "python": platform.python_version(),
        "fast_path": compiled.describe(),
        "load_average": os.getloadavg(),
        "runtime_s": options.runtime,
        "repeat": options.repeat,
        "image_mib": options.size,
    }
    path.write_text(json.dumps({"facts": facts, **results}, indent=1) + "\n")
    return path
