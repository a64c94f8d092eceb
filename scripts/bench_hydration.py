# SPDX-License-Identifier: Apache-2.0
"""How fast a destination hydrates from an NBD source, against nbdcopy between the same two.

    python -m scripts.bench_hydration [--size MIB] [--repeat N] [--holes]

The source is an image in the page cache behind nbdkit's file plugin on a unix socket. Both
sides start from no destination and end with one that is flushed (`nbdcopy --flush`; a clone
that exits when hydrated has committed). They take turns, in alternating order, and each
ratio is of one round. Afterwards both destinations must equal the source.

Outside the timing nbdtarget starts once, so that its byte code is there as where it is
installed.

nbdcopy drops what it wrote from the page cache; the clone keeps it for its clients. So where
memory never used before is dear (a virtual machine whose host takes idle memory back: filling
the page cache was seen to cost 0.2 to 2.6 CPU seconds a GiB), only the clone pays for it.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from tests.support.processes import NBDTARGET, nbdkit_file

__all__ = ["Copy", "main"]

MIB: Final = 1 << 20
PATTERN_MIB: Final = 64


@dataclass(frozen=True)
class Copy:
    """One whole copy: seconds of wall clock, and of CPU in the copying process."""

    wall_s: float
    cpu_s: float


def make_source(path: Path, *, size: int, holes: bool) -> None:
    """Write incompressible data; with `holes`, every second 64 MiB only."""
    pattern = os.urandom(PATTERN_MIB * MIB)
    with path.open("wb") as file:
        file.truncate(size)
        for number, offset in enumerate(range(0, size, len(pattern))):
            if not holes or number % 2 == 0:
                file.seek(offset)
                file.write(pattern[: size - offset])
        os.fsync(file.fileno())


def timed(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Copy:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin_s = time.monotonic()
    subprocess.run(
        argv, check=True, stdin=subprocess.DEVNULL, capture_output=True, env=env
    )
    wall_s = time.monotonic() - begin_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Copy(wall_s, cpu_s)


def nbdcopy(uri: str, work: Path, size: int) -> Copy:
    dest = work / "nbdcopy.img"
    with dest.open("wb") as file:
        file.truncate(size)  # as ours: made, not counted
    return timed(["nbdcopy", "--flush", uri, str(dest)])


def clone(uri: str, work: Path, size: int) -> Copy:
    dest = work / "clone.img"
    for path in (dest, work / "clone.meta"):
        path.unlink(missing_ok=True)
    with dest.open("wb") as file:
        file.truncate(size)
    argv = [NBDTARGET, "clone", uri, str(dest)]
    argv += ["--metadata", str(work / "clone.meta"), "--exit-when-hydrated"]
    argv += ["--listen", f"unix:{work / 'clone.sock'}"]
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(work / "pycache")}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    return timed(argv, env)


def compile_byte_code(work: Path) -> None:
    """Run a clone of next to nothing."""
    tiny = work / "tiny.img"
    tiny.write_bytes(b"x" * MIB)
    clone(str(tiny), work, MIB)


def rounds(uri: str, work: Path, size: int, repeat: int) -> dict[str, list[Copy]]:
    sides: list[tuple[str, Callable[[str, Path, int], Copy]]] = [
        ("nbdcopy", nbdcopy),
        ("clone", clone),
    ]
    if shutil.which("nbdcopy") is None:
        print("skipping nbdcopy: it is not installed")
        del sides[0]
    results: dict[str, list[Copy]] = {name: [] for name, _ in sides}
    for round_nr in range(repeat):
        for name, copy in sides if round_nr % 2 == 0 else reversed(sides):
            dest = work / f"{name}.img"
            # The blocks of the last round go back to the file system outside the timing.
            dest.unlink(missing_ok=True)
            os.sync()
            result = copy(uri, work, size)
            results[name].append(result)
            print(
                f"round {round_nr + 1}/{repeat} {name:8} {result.wall_s:6.2f} s wall"
                f" {result.cpu_s:6.2f} s CPU {size / MIB / result.wall_s:7.0f} MiB/s",
                flush=True,
            )
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Hydration against nbdcopy.")
    parser.add_argument("--size", type=int, default=4096, help="MiB (4096)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--holes", action="store_true", help="half of it is a hole")
    parser.add_argument("--dir", help="where the images go (a temporary directory)")
    parser.add_argument("--output", help="write a JSON report")
    options = parser.parse_args(argv)
    if shutil.which("nbdkit") is None:
        print("nbdkit is not installed: there is no source to copy from")
        return 1
    size = options.size * MIB
    with tempfile.TemporaryDirectory(
        prefix="nbdtarget-bench-", dir=options.dir
    ) as name:
        work = Path(name)
        source, path = work / "source.img", work / "source.sock"
        make_source(source, size=size, holes=options.holes)
        uri = f"nbd+unix:///?socket={path}"
        with nbdkit_file(source, path, work / "log", "--readonly"):
            compile_byte_code(work)
            results = rounds(uri, work, size, options.repeat)
        for side in results:
            if not filecmp.cmp(source, work / f"{side}.img", shallow=False):
                print(f"{side}: the destination differs from the source")
                return 1
    if options.output:
        report = {side: [asdict(c) for c in copies] for side, copies in results.items()}
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n")
    if "nbdcopy" in results:
        ratio = statistics.median(
            theirs.wall_s / ours.wall_s
            for theirs, ours in zip(results["nbdcopy"], results["clone"], strict=True)
        )
        print(f"the clone hydrates {ratio:.2f} times as fast as nbdcopy (wanted: 1.0)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
