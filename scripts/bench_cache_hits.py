# SPDX-License-Identifier: Apache-2.0
"""Hits of a warm writeback cache, against servers of a plain file and against other caches.

Everything lies in the page cache, so what is compared is what a request costs the server, not a
disk. The caches have a copy of every block before the clock starts, and are as large as the
image:

    cache          ours, 64 KiB blocks, smq, warmed by the message `warm`. In the end its own
                   counters tell how many of all requests were hits
    nbdkit-cache   nbdkit's cache filter over its file plugin, cache=writeback (its default), which
                   keeps writes to itself until a FLUSH, as ours does; cache-on-read, or it would
                   cache no reads; warmed by reading it all
    qemu-overlay   qemu-nbd on a qcow2 overlay of the image, through the driver copy-on-read, so
                   what is read is kept; warmed by reading it all. A FLUSH leaves writes in
                   the overlay

Beside them the plain servers, a hydrated clone of ours, which is to be as far ahead of these as
the cache is, and the floor: what the kernel alone charges for the same system calls. Between samples of writes, what they left dirty is written back: our cache's and the
filter's home to the image, so each sample's first write to a block finds it clean.
"""

import argparse
import os
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from rich.console import Console
from rich.table import Table

from scripts.bench_rounds import (
    Samples,
    available,
    best_peer,
    compare,
    median_iops,
    paired_ratio,
    raw,
)
from scripts.bench_servers import (
    CLONE,
    FLOOR,
    PEERS,
    Clone,
    Contender,
    Floor,
    Nbdkit,
    Ours,
    QemuNbd,
)
from scripts.cache_under_test import KIB, CacheUnderTest, Counters
from scripts.fio import Job
from tests.support.plain_client import PlainClient
from tests.support.processes import ServerProcess

__all__ = ["CACHE", "CONTENDERS", "JOBS", "SERVERS", "is_wanted", "run", "summarize"]

CACHE: Final = "cache"
OTHER_CACHES: Final = ("nbdkit-cache", "qemu-overlay")
WANTED_OF_CACHES: Final = 2.0

JOBS: Final = (
    *(
        Job(f"{rw}-4k-qd{depth}", rw, 4096, depth)
        for rw in ("randread", "randwrite")
        for depth in (1, 32, 64)
    ),
    Job("read-256k-qd8", "read", 256 * KIB, 8),
    Job("write-256k-qd8", "write", 256 * KIB, 8),
)


def read_all(uri: str) -> None:
    """Read the whole export once."""
    argv = ["fio", "--name=warm", "--ioengine=nbd", f"--uri={uri}", "--rw=read"]
    argv += ["--bs=1M", "--iodepth=8"]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


class Cache(Ours):
    """Ours, over an origin of its own."""

    name = CACHE
    block_size: ClassVar[int] = 64 * KIB

    def __init__(self, work: Path, source: Path) -> None:
        super().__init__(work, source)
        self.cache = CacheUnderTest(
            work, str(self.image), source.stat().st_size, block_size=self.block_size
        )

    @property
    def uri(self) -> str:
        return self.cache.uri

    def start(self) -> None:
        self.copy_image()
        self.cache.make_device(self.cache.length)
        self.cache.start()
        self.process = self.cache.process
        self.cache.warm(0, self.cache.length // self.block_size)
        self.settle()
        self._status_when_warm = self.cache.status()

    def settle(self) -> None:
        if self.process is not None:
            self.cache.clean()
            make_durable(self.cache.device)
        super().settle()

    def maybe_remark(self) -> str | None:
        counted = Counters(self._status_when_warm, self.cache.status())
        return f"{counted.total:,} requests, {counted.hit_ratio:.4%} of them hits"


class NbdkitCache(Nbdkit):
    name = OTHER_CACHES[0]

    def start(self) -> None:
        super().start()
        read_all(self.uri)

    def launch(self) -> ServerProcess:
        argv = ["nbdkit", "--foreground", "--unix", str(self.socket)]
        argv += ["--filter=cache", "file", str(self.image)]
        argv += ["cache=writeback", "cache-on-read=true"]
        # It makes the cache there, and unlinks it at once.
        env = {"TMPDIR": str(self.image.parent)}
        return ServerProcess(argv, sockets=[self.socket], log=self.log, env=env)

    def settle(self) -> None:
        if self.process is not None:
            with PlainClient(self.socket, timeout_s=120) as client:
                client.flush()
                client.disconnect()
            # The unlinked file has no name to sync it by.
            os.sync()
        super().settle()


class QemuOverlay(QemuNbd):
    name = OTHER_CACHES[1]

    def __init__(self, work: Path, source: Path) -> None:
        super().__init__(work, source)
        self.overlay = self.image.with_suffix(".qcow2")

    @classmethod
    def maybe_missing(cls) -> str | None:
        return super().maybe_missing() or (
            None if shutil.which("qemu-img") else "qemu-img"
        )

    def start(self) -> None:
        self.copy_image()
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw"]
        subprocess.run([*argv, "-b", str(self.image), str(self.overlay)], check=True)
        self.process = self.launch()
        read_all(self.uri)
        self.settle()

    def launch(self) -> ServerProcess:
        argv = ["qemu-nbd", "--persistent", "--shared=4", "--cache=writeback"]
        argv += ["--discard=unmap", f"--socket={self.socket}", "--image-opts"]
        argv += ["driver=copy-on-read,discard=unmap,file.driver=qcow2,"]
        argv[-1] += f"file.file.driver=file,file.file.filename={self.overlay}"
        return ServerProcess(argv, sockets=[self.socket], log=self.log)

    def settle(self) -> None:
        super().settle()
        if self.process is not None:
            make_durable(self.overlay)

    def maybe_remark(self) -> str | None:
        allocated = self.overlay.stat().st_blocks * 512
        share = allocated / self.source.stat().st_size
        return f"{share:.0%} of the image is in the overlay"


def make_durable(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


CONTENDERS: Final[tuple[type[Contender], ...]] = (
    Floor,
    *PEERS,
    NbdkitCache,
    QemuOverlay,
    Clone,
    Cache,
)

SERVERS: Final = tuple(each.name for each in CONTENDERS)


def summarize(samples: Samples) -> dict[str, Any]:
    """Reduce to medians, and the cache's ratio to each other server."""
    summary: dict[str, Any] = {}
    for job, servers in samples.items():
        ours, best = servers[CACHE], best_peer(servers)
        summary[job] = {
            "best_plain": best,
            "clone_to_best_plain": paired_ratio(servers[CLONE], servers[best])
            if best and CLONE in servers
            else None,
            "servers": {
                name: {
                    "iops": median_iops(rounds),
                    "p99_us": statistics.median(s.p99_us for s in rounds),
                    "server_cpu_us": statistics.median(s.server_cpu_us for s in rounds),
                    "cache_to_it": paired_ratio(ours, rounds),
                }
                for name, rounds in servers.items()
            },
        }
    return summary


def tables(summary: dict[str, Any]) -> list[Table]:
    names = list(next(iter(summary.values()))["servers"])
    rates = Table(title="hits a second, median; how far the cache is ahead, paired")
    costs = Table(title="server CPU, µs a request")
    for table in (rates, costs):
        table.add_column("workload", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right")
    for job, row in summary.items():
        rate_cells, cost_cells = [], []
        for name in names:
            server = row["servers"][name]
            cell = f"{server['iops']:,.0f}"
            if name == row["best_plain"]:
                cell = f"[bold]{cell}[/bold]"
            if name != CACHE:
                cell += f" {server['cache_to_it']:.2f}x"
            rate_cells.append(cell)
            cost_cells.append(f"{server['server_cpu_us']:.1f}")
        rates.add_row(job, *rate_cells)
        costs.add_row(job, *cost_cells)
    return [rates, costs]


def verdicts(summary: dict[str, Any]) -> list[str]:
    """Return a line for each workload: its goal, and whether it is met."""
    lines = []
    for job, row in summary.items():
        servers, words = row["servers"], []
        best, clone = row["best_plain"], row["clone_to_best_plain"]
        if best is not None:
            ratio = servers[best]["cache_to_it"]
            words.append(f"{ratio:.2f} of {best}")
            if clone is not None:
                words[-1] += f", as the clone's {clone:.2f}"
        if FLOOR in servers:
            cost, floor = (servers[n]["server_cpu_us"] for n in (CACHE, FLOOR))
            words.append(f"{cost / floor:.2f} of the floor's CPU")
        caches = [servers[n]["cache_to_it"] for n in OTHER_CACHES if n in servers]
        if caches:
            good = "reached" if min(caches) >= WANTED_OF_CACHES else "NOT reached"
            words.append(
                f"{min(caches):.2f} of the best other cache, wanted {WANTED_OF_CACHES}:"
                f" {good}"
            )
        lines.append(f"{job}: {'; '.join(words)}")
    return lines


def is_wanted(name: str, servers: Sequence[str]) -> bool:
    """Whether `--server` asks for it. The cache itself is always measured."""
    return not servers or name == CACHE or name in servers


def run(work: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, print; return the results. Raises: StartError, CalledProcessError."""
    wanted = [each for each in CONTENDERS if is_wanted(each.name, options.server)]
    classes: Sequence[type[Contender]] = available(wanted, console)
    samples = compare(classes, JOBS, work, options, console)
    summary = summarize(samples)
    for table in tables(summary):
        console.print(table)
    for line in verdicts(summary):
        console.print(line, highlight=False)
    return {"summary": summary, "samples": raw(samples)}
