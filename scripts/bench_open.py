# SPDX-License-Identifier: Apache-2.0
"""A 1 TiB sparse clone with 4 KiB regions: how long it takes to open, and how much memory.

    python -m scripts.bench_open [--size GIB] [--region-size SIZE]

Timed from starting the process to the first answered read over NBD, interpreter start
included: first with metadata to be made, then with metadata that already says something
(regions spread over the whole device were written), and how long `nbdtarget version` takes,
as the part of it that any command costs.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from scripts.fast_path import warn_if_pure
from tests.support.plain_client import PlainClient
from tests.support.processes import NBDTARGET, ServerProcess, peak_rss_bytes, rss_bytes

__all__ = ["main"]

MIB: Final = 1 << 20
GIB: Final = 1 << 30


def show(what: str, seconds: float, process: ServerProcess) -> None:
    now, peak = rss_bytes(process.pid) / MIB, peak_rss_bytes(process.pid) / MIB
    print(
        f"{what:34} {seconds:6.2f} s  {now:6.0f} MiB resident, {peak:.0f} MiB at most"
    )


def scatter_writes(path: Path, *, count: int) -> None:
    rng = random.Random(1)
    with PlainClient(path) as client:
        for _ in range(count):
            client.write(rng.randrange(client.size // 4096) * 4096, b"x" * 4096)
        client.flush()
        client.disconnect()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Open a huge clone.")
    parser.add_argument("--size", type=int, default=1024, help="GiB (1024)")
    parser.add_argument("--region-size", default="4K")
    parser.add_argument("--writes", type=int, default=10_000, help="scattered (10000)")
    parser.add_argument("--dir", help="where the images go (a temporary directory)")
    options = parser.parse_args(argv)
    warn_if_pure()
    begin_s = time.monotonic()
    subprocess.run([NBDTARGET, "version"], check=True, stdout=subprocess.DEVNULL)
    print(f"{'nbdtarget version':34} {time.monotonic() - begin_s:6.2f} s")
    with tempfile.TemporaryDirectory(
        prefix="nbdtarget-bench-", dir=options.dir
    ) as name:
        work = Path(name)
        for image in ("source.img", "dest.img"):
            with (work / image).open("wb") as file:
                file.truncate(options.size * GIB)
        path = work / "nbd.sock"
        command = [NBDTARGET, "clone", str(work / "source.img"), str(work / "dest.img")]
        command += ["--metadata", str(work / "meta"), "--no-hydration"]
        command += ["--region-size", options.region_size, "--listen", f"unix:{path}"]
        for what in ("new metadata", "the metadata of the run before"):
            begin_s = time.monotonic()
            with ServerProcess(command, sockets=[path], log=work / "log") as process:
                with PlainClient(path) as client:
                    client.read(client.size - 4096, 4096)
                    client.disconnect()
                show(what, time.monotonic() - begin_s, process)
                begin_s = time.monotonic()
                scatter_writes(path, count=options.writes)
                seconds = time.monotonic() - begin_s
                show(f"  after {options.writes} writes and a flush", seconds, process)
    return 0


if __name__ == "__main__":
    sys.exit(main())
