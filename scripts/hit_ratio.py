# SPDX-License-Identifier: Apache-2.0
"""How good a cache policy is: its hit ratio once warm, beside LRU's and the best possible one.

    python -m scripts.hit_ratio [--trace FILE | --generator NAME ...] [--policy smq] ...
    python -m scripts.hit_ratio --generator NAME --save-trace FILE ...

`nbdtarget advise` answers with a trace of one's own for a whole range of sizes, by the same three caches
(`nbdtarget.advise.caches`): the policy, LRU, and Belady's, which knows the future. Here traces are generated, and
there is a knob for everything.

By default there is one access a minute for each block of the cache, as 10000 a second are for 600000
blocks: a small cache is a scale model of a large one. `--iops` has a small cache be a busy one.

Generators, each access a whole block, but for the first:

    fio      what fio reads with random_distribution=zipf:1.1: --request-size bytes each (4096), hot
             and cold ones side by side in a block
    zipf     blocks that are hot as zipf says, and lie anywhere
    uniform  all blocks alike
    scan     zipf, with a sequential read of the whole origin going on for half of the accesses
    shift    zipf whose hot blocks become others halfway through the measured part

Trace files: `nbdtarget.advise.traces`.

`--save-trace` writes the accesses of a generator as CSV, for a client that does them for real.
"""

import argparse
import itertools
import math
import random
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TextIO

from nbdtarget.advise.caches import belady_hits, lru_hits, policy_run
from nbdtarget.advise.traces import Trace, TraceError, read_trace
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.policies.base import DEMOTE, OP_NAMES, PROMOTE, WRITEBACK
from nbdtarget.policies.registry import POLICY_TYPES

__all__ = [
    "Trace",
    "TraceError",
    "belady_hits",
    "fio_zipf",
    "generate",
    "lru_hits",
    "main",
    "parser",
    "policy_run",
    "read_trace",
]

BLOCK_SIZE: Final = 65536
GENERATORS: Final = ("fio", "zipf", "uniform", "scan", "shift")


# ---- where accesses come from ----


def zipf(rng: random.Random, nr_blocks: int, theta: float) -> Iterator[int]:
    """Block numbers of which the k-th hottest is drawn with a weight of 1/k^theta."""
    weights = (1 / rank**theta for rank in range(1, nr_blocks + 1))
    shares = list(itertools.accumulate(weights))
    places = list(range(nr_blocks))
    rng.shuffle(places)
    while True:
        yield places[bisect_left(shares, rng.random() * shares[-1])]


# fio's approximation (by Gray and others), its multiplier for the places of ranks, not its seeds.
def fio_zipf(rng: random.Random, nr_requests: int, theta: float) -> Iterator[int]:
    """The requests that fio makes with random_distribution=zipf:`theta`."""
    zeta = sum(rank**-theta for rank in range(1, nr_requests + 1))
    zeta2 = 1 + 0.5**theta
    eta = (1 - (2 / nr_requests) ** (1 - theta)) / (1 - zeta2 / zeta)
    first = rng.getrandbits(32)
    while True:
        share = rng.random()
        if share * zeta < zeta2:
            rank = int(share * zeta >= 1)
        else:
            rank = int(nr_requests * (eta * share - eta + 1) ** (1 / (1 - theta)))
        place = rank * 0x61C8864680B583EB & (1 << 64) - 1
        yield (place + first) % nr_requests


def uniform(rng: random.Random, nr_blocks: int) -> Iterator[int]:
    while True:
        yield rng.randrange(nr_blocks)


def requests(
    name: str, rng: random.Random, options: argparse.Namespace
) -> Iterator[int]:
    """Numbers of requests, of blocks or for fio of what is smaller; there is no end of them."""
    nr_blocks, theta = options.origin_blocks, options.theta
    if name == "fio":
        each = options.block_size // options.request_size
        return fio_zipf(rng, nr_blocks * each, theta)
    if name == "uniform":
        return uniform(rng, nr_blocks)
    source = zipf(rng, nr_blocks, theta)
    if name == "scan":
        scan = itertools.cycle(range(nr_blocks))
        return itertools.chain.from_iterable(zip(source, scan, strict=False))
    if name == "shift":
        other = zipf(rng, nr_blocks, theta)
        before = options.warm_up + options.accesses // 2
        return itertools.chain(itertools.islice(source, before), other)
    return source


def generate(
    name: str, options: argparse.Namespace, save: TextIO | None = None
) -> Trace:
    """The accesses of a generator; `save` takes them as a trace file."""
    rng = random.Random(options.seed)
    size = options.request_size if name == "fio" else options.block_size
    trace = Trace(options.origin_blocks)
    total = options.warm_up + options.accesses
    for request in itertools.islice(requests(name, rng, options), total):
        is_write = rng.random() < options.writes
        trace.add(request * size // options.block_size, is_write)
        if save is not None:
            print("W" if is_write else "R", request * size, size, sep=",", file=save)
    return trace


# ---- the command line ----


def parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    result = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--policy", default="smq", choices=sorted(POLICY_TYPES))
    add("--trace", type=Path, metavar="FILE", help="instead of a generator")
    add("--generator", dest="generators", action="append", choices=GENERATORS)
    add("--save-trace", type=Path, metavar="FILE", help="what one generator gives")
    add("--theta", type=float, default=1.1, help="of zipf (1.1)")
    add("--writes", type=float, default=0.3, help="share of writes (0.3)")
    add("--seed", type=int, default=1)
    add("--cache-blocks", type=_count, default=4096, help="(4096)")
    add("--origin-blocks", type=_count, help="(8 times the cache)")
    add("--block-size", type=_count, default=BLOCK_SIZE, help="bytes (65536)")
    add("--request-size", type=_count, default=4096, help="of fio, bytes (4096)")
    add("--warm-up", type=int, help="accesses (half a trace file; else 1000000)")
    add("--accesses", type=_count, default=500_000, help="that are counted (500000)")
    add("--iops", type=_count, help="accesses a second (the cache's blocks / 60)")
    add("--migrations", type=float, default=math.inf, help="a second (no limit)")
    add("--tick-each", type=int, default=32, help="accesses; 0: each second (32)")
    add("--full-promote-level", type=int, help="of smq; 0: as the kernel (56)")
    add("--idle", action="store_true", help="write back as if there were no I/O")
    return result


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def report(name: str, trace: Trace, options: argparse.Namespace) -> None:
    nr, warm_up = options.cache_blocks, options.warm_up
    counted = len(trace.blocks) - warm_up
    run = policy_run(trace, nr, options)
    rows: list[tuple[str, Callable[[], int]]] = [
        (options.policy, lambda: run.hits),
        ("LRU", lambda: lru_hits(trace, nr, warm_up)),
        ("Belady", lambda: belady_hits(trace, nr, warm_up)),
    ]
    ratios = "  ".join(f"{what} {hits() / counted:7.2%}" for what, hits in rows)
    migrations = ", ".join(
        f"{run.migrations[op]} {OP_NAMES[op]}" for op in (PROMOTE, DEMOTE, WRITEBACK)
    )
    print(f"{name:10} {ratios}   {migrations}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.origin_blocks is None:
        options.origin_blocks = 8 * options.cache_blocks
    if options.iops is None:
        options.iops = max(options.cache_blocks // 60, 1)
    if options.block_size % options.request_size:
        print("hit_ratio: --request-size must divide --block-size", file=sys.stderr)
        return 2
    if options.trace is None:
        if options.warm_up is None:
            options.warm_up = 1_000_000
        names = options.generators or list(GENERATORS)
        if options.save_trace is None:
            for name in names:
                report(name, generate(name, options), options)
            return 0
        if len(names) != 1:
            print("hit_ratio: --save-trace is of one --generator", file=sys.stderr)
            return 2
        with options.save_trace.open("w") as save:
            report(names[0], generate(names[0], options, save), options)
        return 0
    try:
        trace = read_trace(options.trace, options.block_size)
    except (NbdTargetError, OSError) as error:
        print(f"hit_ratio: {error}", file=sys.stderr)
        return 1
    if options.warm_up is None:
        options.warm_up = len(trace.blocks) // 2
    if len(trace.blocks) <= options.warm_up:
        print(
            f"hit_ratio: {options.trace}: no access after the warm-up", file=sys.stderr
        )
        return 1
    report(options.trace.name, trace, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
