# SPDX-License-Identifier: Apache-2.0
"""Three caches of one size see the same accesses; the first part of them only warms the caches up, the rest is counted.

the policy  promotes, demotes and writes back through its own work queue. A migration ends before the next access; at
            most `Options.migrations` of them are begun in a simulated second. An access takes 1/`iops` of a second, and there is a
            tick a second, or after every `tick_each` accesses, whichever is sooner.
LRU         caches all that is accessed, in place of what was not for the longest time.
Belady      knows the future: caches what is accessed again soonest. No cache can do better.
"""

import heapq
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final, Protocol

from nbdtarget.advise.traces import Trace
from nbdtarget.policies.base import MISS, PROMOTE, Policy
from nbdtarget.policies.registry import policy_type

__all__ = ["Options", "Run", "belady_hits", "lru_hits", "policy_run"]

NS: Final = 1_000_000_000
NEVER: Final = 1 << 62


def lru_hits(trace: Trace, nr_cblocks: int, warm_up: int) -> int:
    """Return how many accesses after the first `warm_up` hit a cache of `nr_cblocks` blocks."""
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
    """As `lru_hits`. Of what is cached and what was just accessed, drop what comes again last."""
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


class Options(Protocol):
    """How the policy is run; see the module head.

    Attributes:
        migrations: a second.
        tick_each: 0: each second.
        idle: write back as if there were no I/O.
        full_promote_level: of smq; None: its own.
    """

    policy: str
    block_size: int
    migrations: float
    idle: bool
    tick_each: int
    iops: int
    warm_up: int
    full_promote_level: int | None


@dataclass
class Run:
    """The hits and misses among the counted accesses, and the migrations of the same time."""

    hits: int = 0
    migrations: list[int] = field(default_factory=lambda: [0, 0, 0])


class _Simulation:
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


def policy_run(trace: Trace, nr_cblocks: int, options: Options) -> Run:
    """Run a policy over the trace."""
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
    budget_each_s = options.migrations
    simulation = _Simulation(policy, budget_each_s=budget_each_s, idle=options.idle)
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
