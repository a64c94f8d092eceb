# SPDX-License-Identifier: Apache-2.0
"""How fast a clone of an image on a distant web server is, against nbdkit's curl plugin and nbdcopy.

    python -m scripts.bench_sources [--size MIB] [--repeat N] [--latency-ms 30] [--mib-s 200] [--only PART]... [--quick]

The server (`scripts.store_server`) answers each request after `--latency-ms`, and sends `--mib-s` in all; it is the same for all. The parts, which
`--only` chooses, are:

    hydration     `nbdtarget clone URL FILE --exit-when-hydrated`, without what the same command takes for one region, against the
                  time that the bytes alone take. In turns with it, `curl URL -o FILE` and a sync of FILE: what this machine, this disk and this
                  server can do at best. And `nbdkit curl URL --run nbdcopy`, of a part of the image, as it is slower than ten times
    first         from the moment when the fresh clone says where clients may attach until a client has attached and has 4 KiB of the
                  middle of the disk; in round trips of `--latency-ms`. The clone hydrates meanwhile
    boot          what a Debian reads when it boots (`tests/support/debian-boot.trace`), one read after the other: from the fresh clone, from one that
                  hydrates that first, and from `qemu-nbd -r URL`
    random        100 reads of 4 KiB all over the fresh clone, one after the other: from the clone while it hydrates, and from nbdkit

Afterwards the copies must equal the image.
"""

import argparse
import contextlib
import filecmp
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from nbdtarget.porcelain.trace_file import read_trace, write_trace
from scripts.bench_hydration import clone, fresh, make_source, start, timed
from scripts.fast_path import warn_if_pure
from scripts.fleet_sim import TRACE, fitted
from tests.support.plain_client import PlainClient
from tests.support.processes import NBDTARGET, ServerProcess

__all__ = ["main"]

MIB: Final = 1 << 20
NR_READS: Final = 100
PART_MIB: Final = 64  # of the image, for what is slow
BOOT_READ: Final = 128 << 10
START_S_MAX: Final = 20.0


@contextlib.contextmanager
def store(
    image: Path, work: Path, name: str, options: argparse.Namespace
) -> Iterator[str]:
    """Serve `image`; yield its URL."""
    port_file = work / f"{name}.port"
    port_file.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "scripts.store_server", str(image), str(port_file)]
    argv += [f"--latency-ms={options.latency_ms}", f"--mib-s={options.mib_s}"]
    with ServerProcess(argv, sockets=[], log=work / f"{name}.log"):
        deadline_s = time.monotonic() + START_S_MAX
        while not port_file.exists():
            if time.monotonic() > deadline_s:
                raise TimeoutError((work / f"{name}.log").read_text())
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port_file.read_text()}/disk.img"


def nbdkit_curl(url: str, work: Path, size: int) -> float:
    """Copy by nbdkit and nbdcopy; return the seconds."""
    dest = work / "nbdcopy.img"
    fresh(dest, size)
    run = f'nbdcopy --flush "$uri" {dest}'
    return timed(["nbdkit", "-U", "-", "curl", url, "--run", run]).wall_s


@contextlib.contextmanager
def clone_server(url: str, work: Path, size: int, *more: str) -> Iterator[Path]:
    """Serve a fresh clone; yield its socket as soon as it takes connections."""
    dest, metadata, path = work / "first.img", work / "first.meta", work / "first.sock"
    for each in (dest, metadata, path):
        each.unlink(missing_ok=True)
    fresh(dest, size)
    argv = [NBDTARGET, "clone", url, str(dest), "--metadata", str(metadata)]
    argv += [
        "--listen",
        f"unix:{path}",
        "--control",
        str(work / "first.control"),
        *more,
    ]
    with ServerProcess(argv, sockets=[path], log=work / "first.log"):
        yield path


def first_read_s(url: str, work: Path, size: int) -> float:
    with clone_server(url, work, size) as path:
        log = work / "first.log"
        deadline_s = time.monotonic() + START_S_MAX
        while "attach to" not in log.read_text():
            if time.monotonic() > deadline_s:
                raise TimeoutError(log.read_text())
            time.sleep(0.0005)
        begun_s = time.monotonic()
        client = PlainClient(path, "first")
        client.read(size // 2 + 8192, 4096)
        return time.monotonic() - begun_s


def random_reads_s(path: Path, export: str, size: int) -> list[float]:
    source = random.Random(5)
    client = PlainClient(path, export)
    found = []
    for _ in range(NR_READS):
        offset = source.randrange(size // 4096) * 4096
        begun_s = time.monotonic()
        client.read(offset, 4096)
        found.append(time.monotonic() - begun_s)
    return found


def boot_s(path: Path, export: str, trace: list[tuple[int, int]]) -> float:
    """Read what a boot reads, as the kernel does: at most 128 KiB at a time."""
    client = PlainClient(path, export)
    begun_s = time.monotonic()
    for begin, end in trace:
        for at in range(begin, end, BOOT_READ):
            client.read(at, min(BOOT_READ, end - at))
    return time.monotonic() - begun_s


def qemu_boot_s(url: str, work: Path, trace: list[tuple[int, int]]) -> float:
    path = work / "qemu.sock"
    argv = ["qemu-nbd", "-r", "-f", "raw", "-t", "-k", str(path), url]
    with ServerProcess(argv, sockets=[path], log=work / "qemu.log"):
        return boot_s(path, "", trace)


def nbdkit_reads_s(url: str, work: Path, size: int) -> list[float]:
    path = work / "nbdkit.sock"
    argv = ["nbdkit", "--foreground", "--unix", str(path), "curl", url]
    with ServerProcess(argv, sockets=[path], log=work / "nbdkit.log"):
        return random_reads_s(path, "", size)


def curl(url: str, work: Path, size: int) -> float:
    """Download by curl, and sync; return the seconds."""
    dest = work / "curl.img"
    fresh(dest, size)
    begun_s = time.monotonic()
    timed(["curl", "--silent", "--fail", "--output", str(dest), url])
    with dest.open("rb") as file:
        os.fdatasync(file.fileno())
    return time.monotonic() - begun_s


class Bench:
    """The image, its server, and the parts of the benchmark, each of which returns its figures."""

    def __init__(self, work: Path, url: str, options: argparse.Namespace) -> None:
        self._work = work
        self._url = url
        self._options = options
        self._size = options.size * MIB
        self._trace = fitted(read_trace(str(TRACE)), self._size)

    def hydration(self) -> dict[str, float]:
        work, options = self._work, self._options
        clones, starts, curls = [], [], []
        start(work)  # compiles
        for round_nr in range(options.repeat):
            if round_nr % 2:
                curls.append(curl(self._url, work, self._size))
            clones.append(clone(self._url, work, self._size).wall_s)
            starts.append(start(work).wall_s)
            if not round_nr % 2:
                curls.append(curl(self._url, work, self._size))
        if not filecmp.cmp(work / "image.img", work / "clone.img", shallow=False):
            raise AssertionError("the clone differs from the image")
        start_s = statistics.median(starts)
        copied_s = statistics.median(clones) - start_s
        floor_s = self._size / (options.mib_s * MIB)
        return {
            "clone_s": statistics.median(clones),
            "start_s": start_s,
            "curl_s": statistics.median(curls),
            "hydration_mib_s": options.size / copied_s,
            "hydration_of_bandwidth": floor_s / copied_s,
            "curl_of_bandwidth": floor_s / statistics.median(curls),
        }

    def nbdkit(self) -> dict[str, float]:
        part = self._work / "part.img"
        make_source(part, size=PART_MIB * MIB, holes=False)
        with store(part, self._work, "part", self._options) as url:
            nbdkit_s = nbdkit_curl(url, self._work, PART_MIB * MIB)
        return {"nbdkit_mib_s": PART_MIB / nbdkit_s}

    def first(self) -> dict[str, float]:
        options = self._options
        firsts = [
            first_read_s(self._url, self._work, self._size)
            for _ in range(options.repeat)
        ]
        first_ms = 1000 * statistics.median(firsts)
        return {
            "first_read_ms": first_ms,
            "first_read_round_trips": first_ms / options.latency_ms,
        }

    def boot(self) -> dict[str, float]:
        url, work, size, trace = self._url, self._work, self._size, self._trace
        write_trace(str(work / "boot.trace"), trace)
        order = ("--hydrate-order", str(work / "boot.trace"))
        boots, traced = [], []
        for _ in range(self._options.repeat):
            with clone_server(url, work, size) as path:
                boots.append(boot_s(path, "first", trace))
            with clone_server(url, work, size, *order) as path:
                traced.append(boot_s(path, "first", trace))
        qemu_s = qemu_boot_s(url, work, trace)
        return {
            "boot_s": statistics.median(boots),
            "boot_traced_s": statistics.median(traced),
            "boot_qemu_nbd_s": qemu_s,
            "boot_times_qemu_nbd": qemu_s / statistics.median(traced),
        }

    def random(self) -> dict[str, float]:
        reads = []
        for _ in range(self._options.repeat):
            with clone_server(self._url, self._work, self._size) as path:
                reads += random_reads_s(path, "first", self._size)
        nbdkit_reads = nbdkit_reads_s(self._url, self._work, self._size)
        return {
            "random_read_ms": 1000 * statistics.median(reads),
            "random_read_p99_ms": 1000 * statistics.quantiles(reads, n=100)[98],
            "nbdkit_random_read_ms": 1000 * statistics.median(nbdkit_reads),
        }


PARTS: Final = ("hydration", "nbdkit", "first", "boot", "random")


def measure(work: Path, options: argparse.Namespace) -> dict[str, float]:
    image = work / "image.img"
    make_source(image, size=options.size * MIB, holes=False)
    figures: dict[str, float] = {}
    with store(image, work, "image", options) as url:
        bench = Bench(work, url, options)
        for part in options.only or PARTS:
            figures |= getattr(bench, part)()
    if "nbdkit_mib_s" in figures and "hydration_mib_s" in figures:
        figures["times_nbdkit"] = figures["hydration_mib_s"] / figures["nbdkit_mib_s"]
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A clone of a distant image.")
    parser.add_argument("--size", type=int, default=1024, help="MiB (1024)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--latency-ms", type=float, default=30.0)
    parser.add_argument("--mib-s", type=float, default=200.0)
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="256 MiB, one round")
    parser.add_argument("--dir", help="where the images go (a temporary directory)")
    options = parser.parse_args(argv)
    warn_if_pure()
    missing = [
        tool
        for tool in ("curl", "nbdkit", "nbdcopy", "qemu-nbd")
        if shutil.which(tool) is None
    ]
    if missing:
        print(f"{' and '.join(missing)}: not installed")
        return 1
    if options.quick:
        options.size, options.repeat = 256, 1
    with tempfile.TemporaryDirectory(
        prefix="nbdtarget-bench-", dir=options.dir
    ) as name:
        try:
            figures = measure(Path(name), options)
        except subprocess.CalledProcessError as error:
            print(error)
            return 1
    print(
        json.dumps({key: round(value, 3) for key, value in figures.items()}, indent=1)
    )
    return 0


if __name__ == "__main__":
    os.environ.pop("http_proxy", None)
    sys.exit(main())
