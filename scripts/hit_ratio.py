# SPDX-License-Identifier: Apache-2.0
"""How good a cache policy is: its hit ratio once warm, beside LRU's and the best possible one.

    python -m scripts.hit_ratio [--trace FILE | --generator NAME ...] [--policy smq] ...

A simulation over the policy itself, without any I/O. Three caches of one size see the same accesses;
the first part of them only warms the caches up, the rest is counted:

    the policy  promotes, demotes and writes back through its own work queue. A migration ends
                before the next access; at most `--migrations` of them are begun in a simulated
                second. An access takes 1/`--iops` of a second, and there is a tick a second,
                or with `--tick-each` one after every so many accesses.
    LRU         caches all that is accessed, in place of what was not for the longest time.
    Belady      knows the future: caches what is accessed again soonest. No cache can do better.

Time matters to smq, whose periods are a second to a minute. By default there is one access a minute for
each block of the cache, as 10000 a second are for 600000 blocks: a small cache is a scale model of a
large one. With many more accesses nearly every cached block is hit in each period, and smq, which
looks at that once in a period, can tell them apart less well.

Generators: zipf (as fio's random_distribution=zipf:1.1; hot blocks lie anywhere), uniform, scan (zipf,
with a sequential read of the whole origin going on for half of the accesses), shift (zipf whose hot
blocks become others halfway through the measured part).

A trace file has one access a line, in order:

    R 1234            read of block 1234 of --block-size bytes; W for a write
    R,1048576,65536   the same as CSV, with offset and length in bytes: all blocks it touches
"""

import argparse
import heapq
import itertools
import math
import random
import sys
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nbdtarget.errors import NbdTargetError
from nbdtarget.policies.base import DEMOTE, MISS, OP_NAMES, PROMOTE, WRITEBACK, Policy
from nbdtarget.policies.registry import policy_type, policy_types

__all__ = [
    "Trace",
    "TraceError",
    "belady_hits",
    "generate",
    "lru_hits",
    "main",
    "parser",
    "policy_run",
    "read_trace",
]

NS: Final = 1_000_000_000
BLOCK_SIZE: Final = 65536
NEVER: Final = 1 << 62
GENERATORS: Final = ("zipf", "uniform", "scan", "shift")


class TraceError(NbdTargetError):
    """A line of a trace file is not an access."""

    def __init__(self, name: str, line: int, text: str) -> None:
        super().__init__(name, line, text)
        self.name, self.line, self.text = name, line, text

    def __str__(self) -> str:
        return f"{self.name}:{self.line}: not an access (R|W block, or R|W,offset,length): {self.text!r}"


@dataclass
class Trace:
    """Accesses in order: which block, and whether it is written."""

    nr_blocks: int
    blocks: "array[int]" = field(default_factory=lambda: array("Q"))
    writes: bytearray = field(default_factory=bytearray)

    def add(self, block: int, is_write: bool) -> None:
        self.blocks.append(block)
        self.writes.append(is_write)


# ---- where accesses come from ----------------------------------------------------------------


def zipf(rng: random.Random, nr_blocks: int, theta: float) -> Iterator[int]:
    """Block numbers of which the k-th hottest is drawn with a weight of 1/k^theta."""
    weights = (1 / rank**theta for rank in range(1, nr_blocks + 1))
    shares = list(itertools.accumulate(weights))
    places = list(range(nr_blocks))
    rng.shuffle(places)
    while True:
        yield places[bisect_left(shares, rng.random() * shares[-1])]


def uniform(rng: random.Random, nr_blocks: int) -> Iterator[int]:
    while True:
        yield rng.randrange(nr_blocks)


def generate(name: str, options: argparse.Namespace) -> Trace:
    nr_blocks, rng = options.origin_blocks, random.Random(options.seed)
    total = options.warm_up + options.accesses
    if name == "uniform":
        source = uniform(rng, nr_blocks)
    else:
        source = zipf(rng, nr_blocks, options.theta)
    if name == "scan":
        scan = itertools.cycle(range(nr_blocks))
        source = itertools.chain.from_iterable(zip(source, scan, strict=False))
    elif name == "shift":
        other = zipf(rng, nr_blocks, options.theta)
        before = options.warm_up + options.accesses // 2
        source = itertools.chain(itertools.islice(source, before), other)
    trace = Trace(nr_blocks)
    for block in itertools.islice(source, total):
        trace.add(block, rng.random() < options.writes)
    return trace


def read_trace(path: Path, block_size: int) -> Trace:
    """Read a trace file.

    Raises:
        TraceError: a line that is no access.
        OSError: the file cannot be read.
    """
    trace = Trace(0)
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            words = line.replace(",", " ").split()
            if not words or words[0].startswith("#"):
                continue
            try:
                blocks = _blocks_of(words, block_size)
            except ValueError:
                raise TraceError(str(path), number, line.strip()) from None
            for block in blocks:
                trace.add(block, words[0] == "W")
    trace.nr_blocks = max(trace.blocks, default=0) + 1
    return trace


def _blocks_of(words: list[str], block_size: int) -> Iterable[int]:
    op, *numbers = words
    if op not in ("R", "W") or not all(number.isdecimal() for number in numbers):
        raise ValueError(words)
    if len(numbers) == 1:
        return (int(numbers[0]),)
    offset, length = map(int, numbers)
    if not length:
        raise ValueError(words)
    return range(offset // block_size, (offset + length - 1) // block_size + 1)


# ---- the three caches ------------------------------------------------------------------------


def lru_hits(trace: Trace, nr_cblocks: int, warm_up: int) -> int:
    cached: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for n, block in enumerate(trace.blocks):
        if block in cached:
            cached.move_to_end(block)
            hits += n >= warm_up
        else:
            if len(cached) == nr_cblocks:
                cached.popitem(last=False)
            cached[block] = None
    return hits


def belady_hits(trace: Trace, nr_cblocks: int, warm_up: int) -> int:
    """Of what is cached and what was just accessed, drop what comes again last."""
    next_use = array("q", [NEVER]) * len(trace.blocks)
    seen: dict[int, int] = {}
    for n in range(len(trace.blocks) - 1, -1, -1):
        next_use[n] = seen.get(trace.blocks[n], NEVER)
        seen[trace.blocks[n]] = n
    cached: dict[int, int] = {}  # block -> its next use
    latest: list[tuple[int, int]] = []  # (-next use, block), some of them out of date
    hits = 0
    for n, block in enumerate(trace.blocks):
        if block in cached:
            hits += n >= warm_up
        cached[block] = next_use[n]
        heapq.heappush(latest, (-next_use[n], block))
        while len(cached) > nr_cblocks:
            use, victim = heapq.heappop(latest)
            if cached.get(victim) == -use:
                del cached[victim]
    return hits


@dataclass
class Run:
    """What became of the accesses that were counted, and the migrations of the same time."""

    hits: int = 0
    migrations: list[int] = field(default_factory=lambda: [0, 0, 0])


class Simulation:
    """A policy whose migrations cost nothing but their number."""

    def __init__(self, policy: Policy, *, budget_each_s: float, idle: bool) -> None:
        self.policy = policy
        self.budget_each_s = budget_each_s
        self.budget = budget_each_s
        self.idle = idle
        self.dirty = set[int]()
        self.migrations = [0, 0, 0]

    def access(self, block: int, is_write: bool) -> bool:
        cblock = self.policy.lookup(block, is_write)
        if cblock < 0:
            if cblock != MISS:
                self.migrate()
            return False
        if is_write and cblock not in self.dirty:
            self.dirty.add(cblock)
            self.policy.set_dirty(cblock)
        return True

    def tick(self, now_ns: int, elapsed_s: float) -> None:
        room = self.budget + self.budget_each_s * elapsed_s
        self.budget = min(room, self.budget_each_s)
        behind = self.policy.tick(now_ns)
        while behind:
            behind = self.policy.catch_up()
        self.migrate()

    def migrate(self) -> None:
        while self.budget >= 1:
            work = self.policy.get_background_work(self.idle)
            if work is None:
                break
            self.budget -= 1
            self.migrations[work.op] += 1
            if work.op != PROMOTE and work.cblock in self.dirty:
                self.dirty.discard(work.cblock)
                self.policy.clear_dirty(work.cblock)
            self.policy.complete_background_work(work, success=True)


def policy_run(trace: Trace, nr_cblocks: int, options: argparse.Namespace) -> Run:
    kind = policy_type(options.policy)
    if options.full_promote_level is not None:
        fields = {"full_promote_level": options.full_promote_level}
        kind = type(kind.__name__, (kind,), fields)
    policy = kind(
        nr_cblocks,
        origin_size=trace.nr_blocks * options.block_size,
        block_size=options.block_size,
        now_ns=0,
    )
    simulation = Simulation(policy, budget_each_s=options.migrations, idle=options.idle)
    tick_each = options.tick_each or options.iops
    run, before = Run(), [0, 0, 0]
    for n, block in enumerate(trace.blocks):
        if n == options.warm_up:
            before = list(simulation.migrations)
        hit = simulation.access(block, bool(trace.writes[n]))
        run.hits += hit and n >= options.warm_up
        if (n + 1) % tick_each == 0:
            simulation.tick((n + 1) * NS // options.iops, tick_each / options.iops)
    run.migrations = [
        now - then for now, then in zip(simulation.migrations, before, strict=True)
    ]
    return run


# ---- the command line ------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description="Hit ratios of one trace, once warm.")
    add = result.add_argument
    add("--policy", default="smq", choices=sorted(policy_types()))
    add("--trace", type=Path, metavar="FILE", help="instead of a generator")
    add("--generator", dest="generators", action="append", choices=GENERATORS)
    add("--theta", type=float, default=1.1, help="of zipf (1.1)")
    add("--writes", type=float, default=0.3, help="share of writes (0.3)")
    add("--seed", type=int, default=1)
    add("--cache-blocks", type=_count, default=4096, help="(4096)")
    add("--origin-blocks", type=_count, help="(8 times the cache)")
    add("--block-size", type=_count, default=BLOCK_SIZE, help="bytes (65536)")
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
    if options.trace is None:
        if options.warm_up is None:
            options.warm_up = 1_000_000
        for name in options.generators or GENERATORS:
            report(name, generate(name, options), options)
        return 0
    try:
        trace = read_trace(options.trace, options.block_size)
    except (TraceError, OSError) as error:
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
