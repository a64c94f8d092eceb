# SPDX-License-Identifier: Apache-2.0
"""Measures what migrations add to the latency of hits at depth 1.

One client reads 4 KiB from blocks that are cached and pinned, and is alone, or has company:

    quiet         no other client
    promoting     a `warm` of other blocks, again and again: the cache is full, so each promotion is
                  followed or preceded by a demotion
    writing       a second client overwrites 4 KiB at a time, RATE a second at depth 4, in other
                  blocks that are cached and pinned; nothing is written back
    writing back  the same, and a `clean_now` every PERIOD_S, which writes back what it dirties

Migrations are what the second of each pair has and the first has not. Each round has all four, beginning
with another one; a ratio is the median of the rounds' own. In all of them the status is asked for
every PERIOD_S, which costs the server a millisecond. How much was migrated is taken from what the
server wrote to files (/proc/PID/io), less what the second client wrote.
"""

import argparse
import statistics
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final

from rich.console import Console

from scripts.bench_rounds import make_image
from scripts.cache_under_test import KIB, MIB, CacheUnderTest, Counters
from scripts.fio import Job, run_fio

__all__ = ["Sample", "paired_ratio", "run"]

BLOCK_SIZE: Final = 64 * KIB
NR_CBLOCKS: Final = 4096
READ_BLOCKS: Final = 1024  # of the origin, from its beginning
WRITTEN_BLOCKS: Final = 1024  # behind these
PINNED_BLOCKS: Final = READ_BLOCKS + WRITTEN_BLOCKS
ORIGIN_BLOCKS: Final = 2 * NR_CBLOCKS
PIECE_BLOCKS: Final = 512  # of one `warm`
PERIOD_S: Final = 0.1
RATE: Final = 2000
PAGE: Final = 4 * KIB
WANTED: Final = 1.2

READS: Final = Job("hits", "randread", PAGE, 1)
WRITES: Final = Job("writes", "randwrite", PAGE, 4)
QUIET, PROMOTING = "quiet", "promoting"
WRITING, WRITING_BACK = "writing", "writing back"
STATES: Final = (QUIET, PROMOTING, WRITING, WRITING_BACK)
PAIRS: Final = ((PROMOTING, QUIET), (WRITING_BACK, WRITING))
PERCENTILES: Final = {
    "p50_us": "50.000000",
    "p99_us": "99.000000",
    "p999_us": "99.900000",
}


@dataclass(frozen=True)
class Sample:
    """One fio run: the client's latency, and what went on beside it."""

    p50_us: float
    p99_us: float
    p999_us: float
    iops: float
    migrated_mib_per_s: float
    promotions_per_s: float


class Promoter:
    """Sees to it that there is always something to promote."""

    def __init__(self, cache: CacheUnderTest) -> None:
        self._cache = cache
        self._next = PINNED_BLOCKS
        self._wanted = cache.number("promotions")
        self._seen = -1

    def __call__(self) -> None:
        done = self._cache.number("promotions")
        # Blocks that were cached already are not promoted: never wait for the whole of a piece.
        if self._wanted - done < PIECE_BLOCKS or done == self._seen:
            end = self._next + PIECE_BLOCKS
            self._cache.message("warm", f"{self._next}-{end}")
            self._wanted = max(self._wanted, done) + PIECE_BLOCKS
            self._next = end if end < ORIGIN_BLOCKS else PINNED_BLOCKS
        self._seen = done


@contextmanager
def every_period(step: Callable[[], object]) -> Iterator[None]:
    """Call `step` every PERIOD_S meanwhile, in a thread. Raises: what it raised."""
    stop = threading.Event()

    def steps() -> None:
        while not stop.wait(PERIOD_S):
            step()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(steps)
        try:
            yield
        finally:
            stop.set()
        future.result()


def company(
    state: str, cache: CacheUnderTest, promoter: Promoter
) -> Callable[[], object]:
    """Return the work of every period in `state`; each asks for the status once."""
    if state == PROMOTING:
        return promoter
    if state == WRITING_BACK:

        def clean() -> None:
            cache.status()
            cache.message("clean_now")

        return clean
    return cache.status


def written_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    raise ValueError(f"wchar is not in /proc/{pid}/io")


def measure(
    cache: CacheUnderTest, state: str, promoter: Promoter, runtime_s: float
) -> Sample:
    cache.clean()
    pid = cache.running().pid
    reads = [f"--size={READ_BLOCKS * BLOCK_SIZE}"]
    writes = [f"--offset={READ_BLOCKS * BLOCK_SIZE}", f"--rate_iops={RATE}"]
    writes += [f"--size={WRITTEN_BLOCKS * BLOCK_SIZE}"]
    with ThreadPoolExecutor(1) as pool, every_period(company(state, cache, promoter)):
        before, before_bytes = cache.status(), written_bytes(pid)
        begin_s = monotonic()
        if state in (WRITING, WRITING_BACK):
            other = pool.submit(run_fio, cache.uri, WRITES, runtime_s, extra=writes)
        job = run_fio(cache.uri, READS, runtime_s, extra=reads)["read"]
        if state in (WRITING, WRITING_BACK):
            other.result()
        seconds = monotonic() - begin_s
        after, after_bytes = cache.status(), written_bytes(pid)
    cache.wait_until("migrating", 0)
    counted = Counters(before, after)
    assert counted.total == counted.hits, f"{counted.total - counted.hits} misses"
    migrated = after_bytes - before_bytes - PAGE * counted.write_hits
    latencies = {
        name: job["clat_ns"]["percentile"][key] / 1000
        for name, key in PERCENTILES.items()
    }
    promotions = int(after["promotions"] or 0) - int(before["promotions"] or 0)
    return Sample(
        **latencies,
        iops=job["iops"],
        migrated_mib_per_s=migrated / MIB / seconds,
        promotions_per_s=promotions / seconds,
    )


def paired_ratio(ours: list[Sample], theirs: list[Sample], name: str) -> float:
    """The median of the rounds' own ratios of one of the latencies."""
    pairs = zip(map(asdict, ours), map(asdict, theirs), strict=True)
    ratio: float = statistics.median(one[name] / other[name] for one, other in pairs)
    return ratio


def show(samples: dict[str, list[Sample]], console: Console) -> dict[str, float]:
    """Print medians and ratios; return the ratios."""
    names = list(asdict(samples[QUIET][0]))
    titles = ("p50", "p99", "p99.9", "reads/s", "MiB/s", "promotions/s")
    console.print(f"{'us, medians':14}" + "".join(f"{title:>13}" for title in titles))
    for state in STATES:
        medians = [
            statistics.median(getattr(s, name) for s in samples[state])
            for name in names
        ]
        console.print(f"{state:14}" + "".join(f"{value:13.1f}" for value in medians))
    ratios: dict[str, float] = {}
    for state, control in PAIRS:
        of_state = {
            name: paired_ratio(samples[state], samples[control], name)
            for name in PERCENTILES
        }
        is_good = of_state["p99_us"] <= WANTED
        console.print(
            f"{state} to {control}: p50 {of_state['p50_us']:.2f}, p99 {of_state['p99_us']:.2f}"
            f" (wanted: <= {WANTED}; {'reached' if is_good else 'NOT reached'}),"
            f" p99.9 {of_state['p999_us']:.2f}"
        )
        ratios |= {f"{state}: {name}": ratio for name, ratio in of_state.items()}
    return ratios


def run(work: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, print; return the results."""
    origin = work / "origin.img"
    make_image(origin, ORIGIN_BLOCKS * BLOCK_SIZE)
    cache = CacheUnderTest(
        work, str(origin), ORIGIN_BLOCKS * BLOCK_SIZE, block_size=BLOCK_SIZE
    )
    cache.make_device(NR_CBLOCKS * BLOCK_SIZE)
    samples: dict[str, list[Sample]] = {state: [] for state in STATES}
    with cache.serving():
        cache.message("pin", f"0-{PINNED_BLOCKS}")
        cache.wait_until("pinned_blocks", PINNED_BLOCKS)
        cache.warm(PINNED_BLOCKS, NR_CBLOCKS)
        promoter = Promoter(cache)
        for round_nr in range(options.repeat):
            shift = round_nr % len(STATES)
            for state in STATES[shift:] + STATES[:shift]:
                sample = measure(cache, state, promoter, options.runtime)
                samples[state].append(sample)
    ratios = show(samples, console)
    return {
        "ratios": ratios,
        "samples": {
            state: [asdict(s) for s in each] for state, each in samples.items()
        },
    }
