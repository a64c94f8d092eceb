# SPDX-License-Identifier: Apache-2.0
"""A zipf load on a slow origin: how much of it the cache answers, and how much that helps.

The origin is a file behind `nbdkit --filter=delay`, which takes 5 ms for each request. fio reads 4 KiB
pieces of it (random_distribution=zipf:1.1, depth 32) through a cache of an eighth of its size, and
writes down what it reads. The first half of the time warms the cache up, the second is counted, by the cache
itself. Then the very same accesses go through `scripts.hit_ratio`: the policy alone, an LRU list,
and Belady's optimum.

Time. smq decides in periods of up to a minute, and is made for caches in which a block is used once in
minutes; this one is small, so that a run is short, and each block is used some ten times a second. So
the policy's minute is made to pass in less than a second: the server runs on a clock that is
`--clock` times as fast (for the cache only: the delay of 5 ms is real). With `--clock 1` time is
what it is, and smq has no time to learn anything in half a minute.
"""

import argparse
import asyncio
import signal
import sys
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Final

from rich.console import Console

from nbdtarget import daemon
from nbdtarget.clock import Timer, monotonic_ns
from nbdtarget.control.api import ControlServer
from nbdtarget.control.verbs import Verbs
from nbdtarget.devices import resolve
from nbdtarget.dm.registry import Registry
from nbdtarget.server.listener import Listener
from scripts import hit_ratio
from scripts.bench_rounds import make_image
from scripts.bench_servers import nbdkit_file
from scripts.cache_under_test import KIB, CacheUnderTest, Counters, uri_of
from scripts.fio import Job, run_fio

__all__ = ["FastClock", "Recorded", "read_fio_log", "run"]

BLOCK_SIZE: Final = 32 * KIB
NR_CBLOCKS: Final = 1024
ORIGIN_BLOCKS: Final = 8 * NR_CBLOCKS
DELAY: Final = "5ms"
THETA: Final = 1.1
THREADS: Final = 64  # of nbdkit: as many requests sleep at once
CLOCK: Final = 100
JOB: Final = Job("zipf", "randread", 4 * KIB, 32)
BARE_S: Final = 2.0


# ---- a server whose clock is fast ------------------------------------------------------------


class FastClock:
    """Real time, `factor` times as fast."""

    def __init__(self, factor: int) -> None:
        self._factor = factor
        self._begin_ns = monotonic_ns()

    def now_ns(self) -> int:
        return self._begin_ns + (monotonic_ns() - self._begin_ns) * self._factor

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        loop = asyncio.get_running_loop()
        return loop.call_later(delay_s / self._factor, callback)

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s / self._factor)


async def _serve(factor: int, listen: str, control: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    registry = Registry(resolve, clock=FastClock(factor))
    listener = Listener(registry)
    server = ControlServer(Verbs(registry, list), control)
    await server.start()
    await listener.start(listen)
    await stop.wait()
    await listener.close()
    await registry.close()
    await server.close()


def serve(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="`nbdtarget serve` on a fast clock.")
    parser.add_argument("--clock", type=int, required=True)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--control", type=Path, required=True)
    options = parser.parse_args(argv)
    daemon.run(lambda: _serve(options.clock, options.listen, options.control))


# ---- the trace -------------------------------------------------------------------------------


@dataclass
class Recorded:
    """What fio did, and when: microseconds since its start, one for each access."""

    trace: hit_ratio.Trace
    times_us: "array[int]"


def read_fio_log(path: Path, *, block_size: int, nr_blocks: int) -> Recorded:
    """Read what `write_iolog` wrote (version 3): `TIME FILE read|write OFFSET LENGTH`.

    Raises: ValueError: it is something else.
    """
    recorded = Recorded(hit_ratio.Trace(nr_blocks), array("Q"))
    with path.open() as lines:
        if next(lines, "").split() != ["fio", "version", "3", "iolog"]:
            raise ValueError(f"{path}: not a log of fio, version 3")
        for line in lines:
            time_us, _, action, *place = line.split()
            if action not in ("read", "write"):
                continue
            offset, length = map(int, place)
            if offset % block_size + length > block_size:
                raise ValueError(f"{path}: an access to two blocks: {line.strip()}")
            recorded.trace.add(offset // block_size, action == "write")
            recorded.times_us.append(int(time_us))
    return recorded


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


# ---- the measurement -------------------------------------------------------------------------


def load(uri: str, runtime_s: float, log: Path | None = None) -> dict[str, Any]:
    # Without an end of its own, or fio would begin again with the same numbers.
    extra = [f"--random_distribution=zipf:{THETA}", "--io_size=1T"]
    if log is not None:
        extra.append(f"--write_iolog={log}")
    return run_fio(uri, JOB, runtime_s, extra=extra)


def measure(
    cache: CacheUnderTest, log: Path, seconds: float
) -> tuple[Counters, int, Counters]:
    """Load the cache for `seconds`.

    Returns: what it counted in the second half; promotions in it; and what it counted in all.
    """
    fresh = cache.status()
    with ThreadPoolExecutor(1) as pool:
        end_s = monotonic() + seconds
        job = pool.submit(load, cache.uri, seconds, log)
        sleep(end_s - seconds / 2 - monotonic())
        warm = cache.status()
        job.result()
    done = cache.status()
    promotions = [status["promotions"] for status in (warm, done)]
    before, after = (int(number or 0) for number in promotions)
    return Counters(warm, done), after - before, Counters(fresh, done)


def run(work: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, print; return the results."""
    image, slow, log = work / "origin.img", work / "slow.sock", work / "fio.log"
    make_image(image, ORIGIN_BLOCKS * BLOCK_SIZE)
    cache = CacheUnderTest(
        work,
        uri_of(slow),
        ORIGIN_BLOCKS * BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        serve=[sys.executable, "-m", __name__, "--clock", str(options.clock)],
    )
    cache.make_device(NR_CBLOCKS * BLOCK_SIZE)
    with nbdkit_file(
        image,
        slow,
        work / "nbdkit.log",
        *["--filter=delay", f"--threads={THREADS}"],
        settings=[f"rdelay={DELAY}", f"wdelay={DELAY}"],
    ):
        bare = load(uri_of(slow), min(BARE_S, options.zipf))["read"]["iops"]
        with cache.serving():
            warm, promotions, all_of_it = measure(cache, log, options.zipf)
    recorded = read_fio_log(log, block_size=BLOCK_SIZE, nr_blocks=ORIGIN_BLOCKS)
    nr_accesses = len(recorded.trace.blocks)
    if all_of_it.total != nr_accesses:
        console.print(f"fio read {nr_accesses} times, the cache saw {all_of_it.total}")
    warm_up = nr_accesses - warm.total
    seconds = (recorded.times_us[-1] - recorded.times_us[warm_up]) / 1e6
    rate = warm.total / seconds
    ratios = simulate(
        recorded.trace,
        warm_up,
        max(round(nr_accesses / options.zipf / options.clock), 1),
    )
    console.print(
        f"{nr_accesses:,} reads of 4 KiB, zipf:{THETA}, of {ORIGIN_BLOCKS} blocks of"
        f" {BLOCK_SIZE // KIB} KiB behind {DELAY}; {NR_CBLOCKS} of them fit into the cache;"
        f" its clock is {options.clock} times as fast; the last {warm.total:,} are counted:"
    )
    console.print(
        f"  measured {warm.hit_ratio:.2%}; of the same trace: smq alone {ratios['smq']:.2%},"
        f" LRU {ratios['LRU']:.2%}, Belady {ratios['Belady']:.2%}"
    )
    console.print(
        f"  {rate:,.0f} reads a second, {rate / bare:.1f} times what the origin gives without a"
        f" cache ({bare:,.0f}); {promotions} promotions in {seconds:.0f} s"
    )
    return {
        "accesses": nr_accesses,
        "counted": warm.total,
        "hit_ratio": warm.hit_ratio,
        "simulated": ratios,
        "reads_per_s": rate,
        "reads_per_s_without_cache": bare,
        "promotions": promotions,
        "clock": options.clock,
    }


if __name__ == "__main__":
    serve()
