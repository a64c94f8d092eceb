# SPDX-License-Identifier: Apache-2.0
"""How fast a destination hydrates from an NBD source, against nbdcopy between the same two.

    python -m scripts.bench_hydration [--quick] [--size MIB] [--repeat N] [--holes] [--only SOURCE]...

The source is an image behind nbdkit's file plugin, in the page cache, written in pieces of 64 KiB as all images of the benches
are. It is reached in four ways, of which `--only` chooses some:

    unix, tcp            the server says that it takes several connections: nbdcopy uses four, we too
    unix-one, tcp-one    it takes one (nbdkit's filter multi-conn)

Both sides begin with a destination that is a hole, and end with one that is flushed (`nbdcopy --flush`; a clone
that exits when hydrated has committed). They take turns, in alternating order, and each
ratio is of one round. Afterwards both destinations must equal the source.

`clone` is the whole command: it starts Python, makes metadata, serves, copies, commits and stops. `start` is what the same
command takes for one region, the median of all rounds; a second ratio leaves that out. CPU time is that of the copying process, without the
server's and the kernel's own threads.

nbdcopy drops what it has written from the page cache, and so does the background of a clone.
"""

import argparse
import filecmp
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from scripts.fast_path import warn_if_pure
from tests.support.processes import NBDTARGET, ServerProcess, nbdkit_file

__all__ = ["SOURCES", "Copy", "main", "summarize"]

MIB: Final = 1 << 20
GIB: Final = 1 << 30
PATTERN_MIB: Final = 64
PIECE: Final = 64 << 10
TCP_PORT: Final = 10829  # and the next one
ONE: Final = ("--filter=multi-conn",)
ONE_SETTINGS: Final = ("multi-conn-mode=disable",)
WANTED: Final = {"unix": 1.1, "tcp": 1.1, "unix-one": 0.85, "tcp-one": 0.85}
SOURCES: Final = tuple(WANTED)


@dataclass(frozen=True)
class Copy:
    """One whole copy: seconds of wall clock and of CPU, and the most memory, of the copying process."""

    wall_s: float
    cpu_s: float
    peak_rss_mib: float


def make_source(path: Path, *, size: int, holes: bool) -> None:
    """Write incompressible data; with `holes`, every second 64 MiB only."""
    pattern = os.urandom(PATTERN_MIB * MIB)
    with path.open("wb", buffering=0) as file:
        file.truncate(size)
        for number, offset in enumerate(range(0, size, len(pattern))):
            if holes and number % 2:
                continue
            file.seek(offset)
            for at in range(0, min(len(pattern), size - offset), PIECE):
                file.write(pattern[at : at + PIECE])
        os.fsync(file.fileno())


def timed(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Copy:
    begin_s = time.monotonic()
    child = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=env,
    )
    # Not `getrusage`, whose peak of memory is that of all children so far.
    _, status, usage = os.wait4(child.pid, 0)
    wall_s = time.monotonic() - begin_s
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, argv)
    return Copy(wall_s, _cpu_s(usage), usage.ru_maxrss / 1024)


def _cpu_s(usage: resource.struct_rusage) -> float:
    return float(usage.ru_utime + usage.ru_stime)


def fresh(dest: Path, size: int) -> None:
    """Make a destination that is a hole; the blocks of the one before go back to the file system here."""
    dest.unlink(missing_ok=True)
    with dest.open("wb") as file:
        file.truncate(size)
    os.sync()


def nbdcopy(uri: str, work: Path, size: int) -> Copy:
    dest = work / "nbdcopy.img"
    fresh(dest, size)
    return timed(["nbdcopy", "--flush", uri, str(dest)])


def clone(uri: str, work: Path, size: int, name: str = "clone") -> Copy:
    dest, metadata = work / f"{name}.img", work / f"{name}.meta"
    metadata.unlink(missing_ok=True)
    fresh(dest, size)
    argv = [NBDTARGET, "clone", uri, str(dest)]
    argv += ["--metadata", str(metadata), "--exit-when-hydrated"]
    argv += ["--listen", f"unix:{work / 'clone.sock'}"]
    argv += ["--control", str(work / "clone.control")]
    # The byte code is there, as where it is installed.
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(work / "pycache")}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    return timed(argv, env)


def start(work: Path) -> Copy:
    """Run a clone of next to nothing."""
    tiny = work / "tiny-source.img"
    tiny.write_bytes(b"x" * PIECE)
    return clone(str(tiny), work, PIECE, "tiny")


def rounds(uri: str, work: Path, size: int, repeat: int) -> dict[str, list[Copy]]:
    sides: list[tuple[str, Callable[[str, Path, int], Copy]]] = [
        ("nbdcopy", nbdcopy),
        ("clone", clone),
    ]
    results: dict[str, list[Copy]] = {
        name: [] for name in ("nbdcopy", "clone", "start")
    }
    for round_nr in range(repeat):
        for name, copy in sides if round_nr % 2 == 0 else reversed(sides):
            results[name].append(copy(uri, work, size))
        results["start"].append(start(work))
    return results


def summarize(results: Mapping[str, Sequence[Copy]], size: int) -> dict[str, float]:
    """Reduce the rounds of one source to medians, and ratios of rounds."""

    def median(side: str, field: str) -> float:
        return float(statistics.median(getattr(each, field) for each in results[side]))

    start_s, start_cpu_s = median("start", "wall_s"), median("start", "cpu_s")
    pairs = list(zip(results["nbdcopy"], results["clone"], strict=True))
    return {
        "nbdcopy_s": median("nbdcopy", "wall_s"),
        "clone_s": median("clone", "wall_s"),
        "start_s": start_s,
        "ratio": statistics.median(t.wall_s / o.wall_s for t, o in pairs),
        "ratio_without_start": statistics.median(
            t.wall_s / max(o.wall_s - start_s, 0.001) for t, o in pairs
        ),
        "nbdcopy_cpu_s_per_gib": median("nbdcopy", "cpu_s") / (size / GIB),
        "clone_cpu_s_per_gib": (median("clone", "cpu_s") - start_cpu_s) / (size / GIB),
        "nbdcopy_rss_mib": median("nbdcopy", "peak_rss_mib"),
        "clone_rss_mib": median("clone", "peak_rss_mib"),
    }


def table(summary: Mapping[str, Mapping[str, float]], size: int) -> Table:
    shown = Table(title=f"hydration of {size // MIB} MiB, flushed; medians")
    for column in (
        "source",
        "nbdcopy s",
        "clone s",
        "start s",
        "times nbdcopy",
        "without start",
        "wanted",
        "CPU s/GiB nbdcopy",
        "clone",
        "peak MiB nbdcopy",
        "clone ",
    ):
        shown.add_column(column, justify="right")
    for source, row in summary.items():
        shown.add_row(
            source,
            *(f"{row[key]:.2f}" for key in ("nbdcopy_s", "clone_s", "start_s")),
            f"{row['ratio']:.2f}",
            f"{row['ratio_without_start']:.2f}",
            f"{WANTED[source]:.2f}",
            f"{row['nbdcopy_cpu_s_per_gib']:.2f}",
            f"{row['clone_cpu_s_per_gib']:.2f}",
            f"{row['nbdcopy_rss_mib']:.0f}",
            f"{row['clone_rss_mib']:.0f}",
        )
    return shown


def serve(name: str, source: Path, work: Path, stack: ExitStack) -> str:
    """Serve the source in the way of that name until `stack` ends; return the URI."""
    filters, settings = (ONE, ONE_SETTINGS) if name.endswith("-one") else ((), ())
    log = work / "log"
    if name.startswith("unix"):
        path = work / f"{name}.sock"
        stack.enter_context(
            nbdkit_file(source, path, log, "--readonly", *filters, settings=settings)
        )
        return f"nbd+unix:///?socket={path}"
    port = TCP_PORT + bool(filters)
    argv = ["nbdkit", "--foreground", "--ipaddr", "127.0.0.1", "--port", str(port)]
    argv += ["--readonly", "--pidfile", str(work / f"{name}.pid"), *filters]
    argv += ["file", str(source), *settings]
    stack.enter_context(ServerProcess(argv, sockets=[], log=log))
    deadline_s = time.monotonic() + 10
    while not (work / f"{name}.pid").exists():  # it is written when it listens
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"nbdkit does not listen: {log.read_text()}")
        time.sleep(0.01)
    return f"nbd://127.0.0.1:{port}/"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Hydration against nbdcopy.")
    parser.add_argument("--size", type=int, default=4096, help="MiB (4096)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="512 MiB, one round")
    parser.add_argument("--holes", action="store_true", help="half of it is a hole")
    parser.add_argument("--only", action="append", choices=SOURCES)
    parser.add_argument("--dir", help="where the images go (a temporary directory)")
    parser.add_argument("--source", help="an image to copy, instead of a new one")
    parser.add_argument("--output", help="write a JSON report")
    options = parser.parse_args(argv)
    warn_if_pure()
    missing = [tool for tool in ("nbdkit", "nbdcopy") if shutil.which(tool) is None]
    if missing:
        print(f"{' and '.join(missing)}: not installed")
        return 1
    size, repeat = options.size * MIB, options.repeat
    if options.quick:
        size, repeat = 512 * MIB, 1
    results: dict[str, dict[str, list[Copy]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="nbdtarget-bench-", dir=options.dir) as name,
        ExitStack() as stack,
    ):
        work = Path(name)
        source = work / "source.img"
        if options.source:
            source = Path(options.source)
            size = source.stat().st_size
        else:
            make_source(source, size=size, holes=options.holes)
        start(work)  # compiles
        for each in options.only or SOURCES:
            uri = serve(each, source, work, stack)
            results[each] = rounds(uri, work, size, repeat)
            for side in ("nbdcopy", "clone"):
                if not filecmp.cmp(source, work / f"{side}.img", shallow=False):
                    print(f"{each}: the destination of {side} differs from the source")
                    return 1
    summary = {each: summarize(found, size) for each, found in results.items()}
    Console(width=140).print(table(summary, size))
    if options.output:
        report = {
            each: {side: [asdict(c) for c in copies] for side, copies in found.items()}
            for each, found in results.items()
        }
        text = json.dumps({"summary": summary, "raw": report}, indent=1)
        Path(options.output).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
