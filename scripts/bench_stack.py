# SPDX-License-Identifier: Apache-2.0
"""Measures what a stack of mapped devices costs a request: none, one `linear`, and four, one on the other.

    python -m scripts.bench_stack [--quick] [--repeat N] [--runtime S] [--size MIB]

One server has all three as exports, each over a file of its own in the page cache; the one without
a table is the file's device itself, which `nbdtarget` cannot be told to serve. fio goes round
them with each workload, in another order each round, and a ratio is the median of the rounds'
own ratios. CPU is the server's, all threads: what other work the machine has hardly changes it.

Wanted: at depth 32 a request through four costs at most 1.25 times one through one.
"""

import argparse
import asyncio
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdtarget.common.units import SECTOR
from nbdtarget.daemon import process
from nbdtarget.devices import resolve
from nbdtarget.devices.base import Device
from nbdtarget.dm.registry import Registry
from nbdtarget.server.listener import Listener
from scripts.fast_path import warn_if_pure
from scripts.fio import Job, run_fio
from tests.support.processes import ServerProcess, StartError

__all__ = ["main"]

MIB: Final = 1 << 20
BLOCK: Final = 4096
BARE, ONE, FOUR = EXPORTS = ("no-table", "one", "four")
HEIGHT: Final = 4
WANTED: Final = 1.25
WANTED_DEPTH: Final = 32

JOBS: Final = tuple(
    Job(f"{rw}-4k-qd{depth}", rw, BLOCK, depth)
    for rw in ("randread", "randwrite")
    for depth in (1, 32, 64)
)


@dataclass(frozen=True)
class Sample:
    """One fio run: requests a second, and the server's CPU time per request."""

    rate: float
    cpu_us: float


Samples = dict[str, dict[str, list[Sample]]]  # job, export, rounds


# ---- the server ----


class _Exports:
    """The mapped devices, and one device that is none."""

    def __init__(self, registry: Registry, bare: Device) -> None:
        self._registry = registry
        self._bare = bare

    def names(self) -> Iterable[tuple[str, str]]:
        return [(BARE, "a file"), *self._registry.names()]

    def listed(self, device: Device) -> tuple[str, str]:
        if device is self._bare:
            return BARE, "a file"
        return self._registry.listed(device)

    def claimed_names(self) -> Iterable[str]:
        return [BARE, *self._registry.claimed_names()]

    def maybe_get(self, name: str) -> Device | None:
        return self._bare if name == BARE else self._registry.maybe_get(name)

    def why_missing(self, name: str) -> str:
        return self._registry.why_missing(name)

    def acquire(self, name: str) -> Device:
        return self._bare if name == BARE else self._registry.acquire(name)

    def release(self, device: Device) -> None:
        if device is not self._bare:
            self._registry.release(device)


async def _serve(work: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    registry = Registry(resolve)
    images = {name: work / f"{name}.img" for name in EXPORTS}
    bare = await resolve.open_device(str(images[BARE]), read_only=False)
    sectors = bare.size // SECTOR
    await registry.create(ONE, f"0 {sectors} linear {images[ONE]} 0")
    below = str(images[FOUR])
    for nr in range(1, HEIGHT + 1):
        name = FOUR if nr == HEIGHT else f"{FOUR}.{nr}"
        await registry.create(name, f"0 {sectors} linear {below} 0")
        below = f"/dev/mapper/{name}"
    listener = Listener(_Exports(registry, bare))
    await listener.start(f"unix:{work / 'nbd.sock'}")
    await stop.wait()
    await listener.close()
    await registry.close()
    await bare.close()


# ---- the measurement ----


def measure(
    server: ServerProcess, work: Path, export: str, job: Job, runtime_s: float
) -> Sample:
    uri = f"nbd+unix:///{export}?socket={work / 'nbd.sock'}"
    before_s = server.cpu_s()
    result = run_fio(uri, job, runtime_s)
    cpu_s = server.cpu_s() - before_s
    if job.writes:
        _settle(work / f"{export}.img")
    side = result["write" if job.writes else "read"]
    return Sample(side["iops"], cpu_s / side["total_ios"] * 1e6)


def _settle(image: Path) -> None:
    """Write dirty pages back, so that no sample pays for the one before it."""
    fd = os.open(image, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def run_rounds(
    server: ServerProcess, work: Path, options: argparse.Namespace
) -> Samples:
    samples: Samples = {job.name: {name: [] for name in EXPORTS} for job in JOBS}
    for round_nr in range(options.repeat):
        shift = round_nr % len(EXPORTS)
        for job in JOBS:
            for export in EXPORTS[shift:] + EXPORTS[:shift]:
                sample = measure(server, work, export, job, options.runtime)
                samples[job.name][export].append(sample)
    return samples


def paired(upper: Iterable[float], lower: Iterable[float]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(
        one / other for one, other in zip(upper, lower, strict=True)
    )


def show(samples: Samples) -> bool:
    """Print medians and ratios; whether all that is wanted was reached."""
    titles = "".join(f"{name:>10}" for name in EXPORTS)
    print(f"{'':20}{'requests a second':^30}  {'CPU, us a request':^30}  four:one")
    print(f"{'':20}{titles}  {titles}    rate   CPU")
    reached = True
    for job in JOBS:
        row = samples[job.name]
        rates = {name: [s.rate for s in row[name]] for name in EXPORTS}
        costs = {name: [s.cpu_us for s in row[name]] for name in EXPORTS}
        shown_rates = "".join(f"{statistics.median(rates[n]):10.0f}" for n in EXPORTS)
        shown_costs = "".join(f"{statistics.median(costs[n]):10.2f}" for n in EXPORTS)
        rate = paired(rates[ONE], rates[FOUR])
        cost = paired(costs[FOUR], costs[ONE])
        is_good = job.depth != WANTED_DEPTH or cost <= WANTED
        reached = reached and is_good
        mark = "" if is_good else f"  above {WANTED}"
        print(
            f"{job.name:20}{shown_rates}  {shown_costs}  {rate:6.2f}{cost:6.2f}{mark}"
        )
    return reached


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What a stack costs a request.")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (5)")
    parser.add_argument("--runtime", type=float, default=1.0, help="s a sample (1)")
    parser.add_argument("--size", type=int, default=128, help="of an image, MiB (128)")
    parser.add_argument("--dir", help="where the images go (a temporary directory)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 0.5 s")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    warn_if_pure()
    if options.serve is not None:
        process.run(lambda: _serve(options.serve))
        return 0
    if shutil.which("fio") is None:
        print("fio is not installed: nothing to measure with")
        return 1
    if options.quick:
        options.repeat, options.runtime = 2, 0.5
    print(f"== a stack of {HEIGHT} linear targets against one")
    with tempfile.TemporaryDirectory(
        prefix="nbdtarget-bench-", dir=options.dir
    ) as name:
        work = Path(name)
        for export in EXPORTS:
            image = work / f"{export}.img"
            image.write_bytes(os.urandom(options.size * MIB))
            _settle(image)
        command = [sys.executable, "-m", "scripts.bench_stack", "--serve", name]
        try:
            with ServerProcess(
                command, sockets=[work / "nbd.sock"], log=work / "log"
            ) as server:
                samples = run_rounds(server, work, options)
        except (StartError, subprocess.CalledProcessError) as error:
            print(error)
            return 1
    return 0 if show(samples) else 1


if __name__ == "__main__":
    sys.exit(main())
