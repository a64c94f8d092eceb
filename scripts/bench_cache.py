# SPDX-License-Identifier: Apache-2.0
"""How fast a cache is, how much memory it takes, and what it does while no client asks for anything.

    python -m scripts.bench_cache [--only PART]... [--server NAME]... [--repeat N] [--runtime S] [--size MIB] [--quick]

    cache-hits        hits in a warm writeback cache, against other servers and other caches (or those that --server names)
    cache-zipf        hit ratio and rate of a zipf load on an origin that takes 5 ms, beside LRU and the
                      best possible, of the same trace
    cache-memory      bytes for each block of the cache, and of the origin
    cache-migrations  what migrations add to the latency of hits at depth 1
    cache-idle        what a clean cache does when no client asks for anything

Each part is a module `scripts.bench_cache_*` and tells at its head what it measures, and how.
Needs fio; the first two also nbdkit.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from nbdtarget.common.errors import NbdTargetError
from scripts import (
    bench_cache_hits,
    bench_cache_idle,
    bench_cache_memory,
    bench_cache_migrations,
    bench_cache_zipf,
)
from scripts.bench_rounds import write_report
from scripts.fast_path import warn_if_pure
from tests.support.plain_client import PlainClientError
from tests.support.processes import StartError

__all__ = ["WORDS", "main", "selected"]

Part = Callable[[Path, argparse.Namespace, Console], dict[str, Any]]

ALL: Final = "cache"
PARTS: Final[dict[str, Part]] = {
    "cache-hits": bench_cache_hits.run,
    "cache-zipf": bench_cache_zipf.run,
    "cache-memory": bench_cache_memory.run,
    "cache-migrations": bench_cache_migrations.run,
    "cache-idle": bench_cache_idle.run,
}
WORDS: Final = (ALL, *PARTS)


def selected(only: Sequence[str]) -> list[str]:
    """Return the parts that `--only` asks for; all of them if it asks for nothing."""
    if not only or ALL in only:
        return list(PARTS)
    return [part for part in PARTS if part in only]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a cache costs and gives.")
    add = parser.add_argument
    add("--only", action="append", default=[], choices=WORDS, metavar="PART")
    servers = bench_cache_hits.SERVERS
    add(
        "--server",
        action="append",
        default=[],
        choices=servers,
        metavar="NAME",
        help="measure hits of the cache and of this server only: " + ", ".join(servers),
    )
    add("--repeat", type=int, default=5, help="rounds (5)")
    add("--runtime", type=float, default=3.0, help="seconds a sample (3)")
    add("--size", type=int, default=1024, help="image of the hits, MiB (1024)")
    add("--zipf", type=float, default=30.0, help="seconds of cache-zipf (30)")
    add("--idle", type=float, default=10.0, help="seconds of cache-idle (10)")
    add("--dir", help="where the images go (a temporary directory)")
    add("--output", help="the JSON report (bench-cache-DATE.json)")
    add("--quick", action="store_true", help="256 MiB, 2 rounds of 1 s, 10 s of zipf")
    options = parser.parse_args(argv)
    if options.quick:
        options.repeat, options.runtime, options.size = 2, 1.0, 256
        options.zipf, options.idle = 10.0, 5.0
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    warn_if_pure()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if shutil.which("fio") is None:
        console.print("fio is not installed: nothing to measure with")
        return 1
    results: dict[str, Any] = {}
    status = 0
    for name in selected(options.only):
        console.print(f"\n== {name}")
        begin_s = time.monotonic()
        with tempfile.TemporaryDirectory(
            prefix="nbdtarget-bench-", dir=options.dir
        ) as work:
            try:
                results[name] = PARTS[name](Path(work), options, console)
            except (
                NbdTargetError,
                PlainClientError,
                StartError,
                TimeoutError,
                subprocess.CalledProcessError,
            ) as error:
                console.print(f"{name}: {error}", markup=False)
                status = 1
        console.print(f"[dim]{name}: {time.monotonic() - begin_s:.0f} s[/dim]")
    path = write_report(options, results, prefix="bench-cache")
    console.print(f"written: {path}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
