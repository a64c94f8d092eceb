# SPDX-License-Identifier: Apache-2.0
"""A zipf load on a slow origin: how much of it the cache answers, and how much that helps.

The origin is a file behind `nbdkit --filter=delay`, which takes 5 ms for each request. fio reads 4 KiB
pieces of it (random_distribution=zipf:1.1, depth 32) through a cache of an eighth of its size, and
writes down what it reads. The first half of the time warms the cache up; what comes in the second is counted,
by the cache itself. Then the very same accesses go through `scripts.hit_ratio`, at the same rate: the
policy alone, whose promotions take no time; an LRU list; and Belady's optimum.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Final

from rich.console import Console

from scripts import hit_ratio
from scripts.bench_rounds import make_image
from scripts.cache_under_test import KIB, CacheUnderTest, Counters, uri_of
from scripts.fio import Job, run_fio
from tests.support.processes import nbdkit_file

__all__ = ["Measured", "run", "simulate"]

BLOCK_SIZE: Final = 32 * KIB
NR_CBLOCKS: Final = 1024
ORIGIN_BLOCKS: Final = 8 * NR_CBLOCKS
DELAY: Final = "5ms"
THETA: Final = 1.1
THREADS: Final = 64  # of nbdkit: as many requests sleep at once
JOB: Final = Job("zipf", "randread", 4 * KIB, 32)
BARE_S: Final = 2.0
MARGIN_S: Final = 0.5  # fio is still at it when the counting ends


@dataclass(frozen=True)
class Measured:
    """The counters of the cache: before the first look, and between that and the last.

    Attributes:
        nr_warm_up: accesses before the first look.
        counted: those after it. seconds: how long they took.
        promotions: in that time.
    """

    nr_warm_up: int
    counted: Counters
    seconds: float
    promotions: int


def load(uri: str, runtime_s: float, log: Path | None = None) -> dict[str, Any]:
    # Without an end of its own, or fio would begin again with the same numbers.
    extra = [f"--random_distribution=zipf:{THETA}", "--io_size=1T"]
    if log is not None:
        extra.append(f"--write_iolog={log}")
    return run_fio(uri, JOB, runtime_s, extra=extra)


def measure(cache: CacheUnderTest, log: Path, seconds: float) -> Measured:
    """Load the cache for `seconds`. Raises: CalledProcessError."""
    fresh = cache.status()
    with ThreadPoolExecutor(1) as pool:
        begin_s = monotonic()
        job = pool.submit(load, cache.uri, seconds, log)
        sleep(seconds / 2)
        warm, warm_s = cache.status(), monotonic()
        sleep(max(begin_s + seconds - MARGIN_S - warm_s, MARGIN_S))
        done, done_s = cache.status(), monotonic()
        job.result()
    return Measured(
        Counters(fresh, warm).total,
        Counters(warm, done),
        done_s - warm_s,
        int(done["promotions"] or 0) - int(warm["promotions"] or 0),
    )


def simulate(trace: hit_ratio.Trace, warm_up: int, iops: int) -> dict[str, float]:
    """The hit ratios of policies that see `trace`, from access `warm_up` on."""
    words = ["--policy", "smq", "--warm-up", str(warm_up), "--iops", str(iops)]
    words += ["--block-size", str(BLOCK_SIZE)]
    options = hit_ratio.parser().parse_args(words)
    counted = len(trace.blocks) - warm_up
    hits = {
        "smq": hit_ratio.policy_run(trace, NR_CBLOCKS, options).hits,
        "LRU": hit_ratio.lru_hits(trace, NR_CBLOCKS, warm_up),
        "Belady": hit_ratio.belady_hits(trace, NR_CBLOCKS, warm_up),
    }
    return {name: count / counted for name, count in hits.items()}


def run(work: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, print; return the results. Raises: StartError, CalledProcessError."""
    image, slow, log = work / "origin.img", work / "slow.sock", work / "fio.log"
    make_image(image, ORIGIN_BLOCKS * BLOCK_SIZE)
    cache = CacheUnderTest(
        work, uri_of(slow), ORIGIN_BLOCKS * BLOCK_SIZE, block_size=BLOCK_SIZE
    )
    cache.make_device(NR_CBLOCKS * BLOCK_SIZE)
    with nbdkit_file(
        image,
        slow,
        work / "nbdkit.log",
        *["--filter=delay", f"--threads={THREADS}"],
        settings=[f"rdelay={DELAY}", f"wdelay={DELAY}"],
    ):
        bare = load(uri_of(slow), BARE_S)["read"]["iops"]
        with cache.serving():
            measured = measure(cache, log, options.zipf)
    trace = hit_ratio.read_trace(log, BLOCK_SIZE)
    # Accesses after the last look are not counted there, so they are not counted here.
    nr_seen = measured.nr_warm_up + measured.counted.total
    del trace.blocks[nr_seen:], trace.writes[nr_seen:]
    rate = measured.counted.total / measured.seconds
    ratios = simulate(trace, measured.nr_warm_up, max(round(rate), 1))
    show(measured, ratios, rate=rate, bare=bare, console=console)
    return {
        "accesses": nr_seen,
        "counted": measured.counted.total,
        "hit_ratio": measured.counted.hit_ratio,
        "simulated": ratios,
        "reads_per_s": rate,
        "reads_per_s_without_cache": bare,
        "promotions": measured.promotions,
    }


def show(
    measured: Measured,
    ratios: dict[str, float],
    *,
    rate: float,
    bare: float,
    console: Console,
) -> None:
    counted = measured.counted
    console.print(
        f"4 KiB reads, zipf:{THETA}, depth {JOB.depth}, of {ORIGIN_BLOCKS} blocks of"
        f" {BLOCK_SIZE // KIB} KiB behind {DELAY}; {NR_CBLOCKS} fit into the cache."
        f" After {measured.nr_warm_up:,} to warm up {counted.total:,} are counted:"
    )
    is_good = ratios["smq"] >= ratios["LRU"] and counted.hit_ratio >= ratios["LRU"]
    console.print(
        f"  measured {counted.hit_ratio:.2%}; of the same trace: smq alone"
        f" {ratios['smq']:.2%}, LRU {ratios['LRU']:.2%}, Belady {ratios['Belady']:.2%}"
        f" (wanted: at least LRU's; {'reached' if is_good else 'NOT reached'})"
    )
    console.print(
        f"  {rate:,.0f} reads a second, {rate / bare:.1f} times what the origin gives without"
        f" a cache ({bare:,.0f}); {measured.promotions} promotions in {measured.seconds:.0f} s"
    )
