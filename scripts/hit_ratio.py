# SPDX-License-Identifier: Apache-2.0
"""How good a cache policy is: its hit ratio once warm, beside LRU's and the best possible one.

    python -m scripts.hit_ratio [--trace FILE | --generator NAME ...] [--policy smq] ...
    python -m scripts.hit_ratio --generator NAME --save-trace FILE ...

A simulation over the policy itself, without any I/O. Three caches of one size see the same accesses;
the first part of them only warms the caches up, the rest is counted:

    the policy  promotes, demotes and writes back through its own work queue. A migration ends
                before the next access; at most `--migrations` of them are begun in a simulated
                second. An access takes 1/`--iops` of a second, and there is a tick a second,
                or after every `--tick-each` accesses, whichever is sooner.
    LRU         caches all that is accessed, in place of what was not for the longest time.
    Belady      knows the future: caches what is accessed again soonest. No cache can do better.

By default there is one access a minute for each block of the cache, as 10000 a second are for 600000
blocks: a small cache is a scale model of a large one. `--iops` has a small cache be a busy one.

Generators, each access a whole block, but for the first:

    fio      what fio reads with random_distribution=zipf:1.1: --request-size bytes each (4096), hot
             and cold ones side by side in a block
    zipf     blocks that are hot as zipf says, and lie anywhere
    uniform  all blocks alike
    scan     zipf, with a sequential read of the whole origin going on for half of the accesses
    shift    zipf whose hot blocks become others halfway through the measured part

A trace file has one access a line, in order; fio's own log (--write_iolog) is one as well:

    1234              read of block 1234 of --block-size bytes
    R 1234            the same; W for a write, r and w will do
    R,1048576,65536   the same as CSV, with offset and length in bytes: all blocks it touches

Lines of fio's log that read and write nothing (sync, datasync, trim, wait, …) are passed over.

`--save-trace` writes the accesses of a generator as CSV, for a client that does them for real.
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
from typing import Final, TextIO

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.policies.base import DEMOTE, MISS, OP_NAMES, PROMOTE, WRITEBACK, Policy
from nbdtarget.policies.registry import POLICY_TYPES, policy_type

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

NS: Final = 1_000_000_000
BLOCK_SIZE: Final = 65536
NEVER: Final = 1 << 62
GENERATORS: Final = ("fio", "zipf", "uniform", "scan", "shift")
FIO_OPS: Final = {"read": False, "write": True}
FIO_REMARKS: Final = ("add", "open", "close")
FIO_NO_ACCESS: Final = ("sync", "datasync", "trim", "wait", "sync_file_range")


class TraceError(NbdTargetError):
    """A line of a trace file is not an access."""

    def __init__(self, name: str, line: int, text: str) -> None:
        super().__init__(name, line, text)
        self.name, self.line, self.text = name, line, text

    def __str__(self) -> str:
        return f"{self.name}:{self.line}: not an access ([R|W] block, or R|W,offset,length): {self.text!r}"


@dataclass
class Trace:
    """Accesses in order: which block, and whether it is written."""

    nr_blocks: int
    blocks: "array[int]" = field(default_factory=lambda: array("Q"))
    writes: bytearray = field(default_factory=bytearray)

    def add(self, block: int, is_write: bool) -> None:
        self.blocks.append(block)
        self.writes.append(is_write)


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
            if not words or words[0].startswith("#") or _is_remark_of_fio(words):
                continue
            try:
                blocks, is_write = _access_of(words, block_size)
            except ValueError:
                raise TraceError(str(path), number, line.strip()) from None
            for block in blocks:
                trace.add(block, is_write)
    trace.nr_blocks = max(trace.blocks, default=0) + 1
    return trace


def _is_remark_of_fio(words: list[str]) -> bool:
    is_head = words[:2] == ["fio", "version"]
    is_file = len(words) in (2, 3) and words[-1] in FIO_REMARKS
    # [time,] file, what, offset, length: it neither reads nor writes.
    is_other = len(words) in (4, 5) and words[-3] in FIO_NO_ACCESS
    return is_head or is_file or is_other


def _access_of(words: list[str], block_size: int) -> tuple[Iterable[int], bool]:
    if len(words) >= 4 and words[-3] in FIO_OPS:  # [time,] file, op, offset, length
        is_write, numbers = FIO_OPS[words[-3]], words[-2:]
    elif words[0].upper() in ("R", "W"):
        is_write, numbers = words[0].upper() == "W", words[1:]
    else:
        is_write, numbers = False, words
        if len(words) > 1:
            raise ValueError(words)
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(words)
    if len(numbers) == 1:
        return (int(numbers[0]),), is_write
    offset, length = map(int, numbers)
    if not length:
        raise ValueError(words)
    blocks = range(offset // block_size, (offset + length - 1) // block_size + 1)
    return blocks, is_write


# ---- the three caches ----


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
    tick_each = min(options.tick_each or options.iops, options.iops)
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
