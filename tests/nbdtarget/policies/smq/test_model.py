# SPDX-License-Identifier: Apache-2.0
"""smq against a plain model (`tests.support.plain_smq`): same calls, same answers, same order in each queue."""

import random
from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from nbdtarget.policies.base import DEMOTE, MISS, MISS_WAKE, OP_NAMES, PROMOTE, Work
from nbdtarget.policies.cleaner import Cleaner
from nbdtarget.policies.smq import lru_shadow
from nbdtarget.policies.smq.multi_level_queue import MultiLevelQueue
from nbdtarget.policies.smq.policy import Smq
from tests.support.plain_smq import LEVELS, PlainQueue, PlainSmq, PlainWork, S

BLOCK = 1 << 16
ORIGIN_BLOCKS = 1 << 14
oblocks = st.one_of(
    st.integers(0, 15),
    st.integers(0, 2048),
    st.integers(0, 8).map(lambda n: 100 * n),
)


class KernelSmq(Smq):
    full_promote_level: ClassVar[int] = 0


class SmqMachine(RuleBasedStateMachine):
    @initialize(
        nr_cblocks=st.sampled_from([1, 3, 4, 8, 40, 256]),
        kind=st.sampled_from([Smq, KernelSmq, Cleaner]),
        loaded=st.lists(
            st.tuples(oblocks, st.booleans(), st.integers(0, 140)),
            unique_by=lambda mapping: mapping[0],
            max_size=40,
        ),
        backwards=st.booleans(),
    )
    def create(
        self,
        nr_cblocks: int,
        kind: type[Smq],
        loaded: list[tuple[int, bool, int]],
        backwards: bool,
    ) -> None:
        size = ORIGIN_BLOCKS * BLOCK
        self.smq = kind(nr_cblocks, origin_size=size, block_size=BLOCK, now_ns=7)
        self.plain = PlainSmq(
            nr_cblocks,
            now=7,
            is_cleaner=kind.is_cleaner,
            full_promote_level=kind.full_promote_level,
        )
        self.now = 7
        self.issued: list[tuple[Work, PlainWork]] = []
        self.migrations = Counter(promote=0, demote=0, writeback=0)
        for n, (oblock, dirty, hint) in enumerate(loaded[:nr_cblocks]):
            cblock = nr_cblocks - 1 - n if backwards else n
            self.smq.load_mapping(cblock, oblock, dirty, hint)
            self.plain.load_mapping(cblock, oblock, dirty, hint)

    def pair(self, work: Work | None, plain: PlainWork | None) -> None:
        if work is None or plain is None:
            assert work is None
            assert plain is None
            return
        assert OP_NAMES[work.op] == plain.op
        assert (work.oblock, work.cblock) == (plain.oblock, plain.cblock)
        self.issued.append((work, plain))
        self.migrations[plain.op] += 1

    @rule(oblock=oblocks, is_write=st.booleans())
    def lookup(self, oblock: int, is_write: bool) -> None:
        cblock, _, wakes = self.plain.lookup(oblock, is_write, fast_copy=False)
        expected = (MISS_WAKE if wakes else MISS) if cblock is None else cblock
        assert self.smq.lookup(oblock, is_write) == expected

    @rule(oblock=oblocks, is_write=st.booleans())
    def lookup_with_work(self, oblock: int, is_write: bool) -> None:
        cblock, plain, _ = self.plain.lookup(oblock, is_write, fast_copy=True)
        found, work = self.smq.lookup_with_work(oblock, is_write)
        assert found == (MISS if cblock is None else cblock)
        self.pair(work, plain)

    @rule(oblock=oblocks)
    def maybe_promote(self, oblock: int) -> None:
        self.pair(self.smq.maybe_promote(oblock), self.plain.maybe_promote(oblock))

    @precondition(lambda self: self.plain.blocks)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        cblock = data.draw(st.sampled_from(sorted(self.plain.blocks)))
        self.pin_to(cblock, pinned)

    def pin_to(self, cblock: int, pinned: bool) -> None:
        if pinned:
            self.smq.pin(cblock)
        else:
            self.smq.unpin(cblock)
        self.plain.pin(cblock, pinned)

    @rule(idle=st.booleans())
    def get_background_work(self, idle: bool) -> None:
        self.pair(
            self.smq.get_background_work(idle), self.plain.get_background_work(idle)
        )

    @precondition(lambda self: self.issued)
    @rule(data=st.data(), success=st.booleans())
    def complete(self, data: st.DataObject, success: bool) -> None:
        index = data.draw(st.integers(0, len(self.issued) - 1))
        work, plain = self.issued.pop(index)
        self.smq.complete_background_work(work, success)
        self.plain.complete(plain, success)

    @precondition(lambda self: any(b.mapped for b in self.plain.blocks.values()))
    @rule(data=st.data(), dirty=st.booleans())
    def set_dirty(self, data: st.DataObject, dirty: bool) -> None:
        mapped = sorted(c for c, b in self.plain.blocks.items() if b.mapped)
        self.set_dirty_to(data.draw(st.sampled_from(mapped)), dirty)

    def set_dirty_to(self, cblock: int, dirty: bool) -> None:
        if dirty:
            self.smq.set_dirty(cblock)
        else:
            self.smq.clear_dirty(cblock)
        self.plain.set_dirty(cblock, dirty)

    @rule(data=st.data())
    def invalidate(self, data: st.DataObject) -> None:
        cblock = data.draw(st.integers(0, self.plain.nr_cblocks - 1))
        if not any(work.cblock == cblock for work, _ in self.issued):
            assert self.smq.invalidate(cblock) == self.plain.invalidate(cblock)

    @rule(after=st.sampled_from([0, 1, S // 10, S + 1, 5 * S, 11 * S, 61 * S]))
    def tick(self, after: int) -> None:
        self.now += after
        assert not self.smq.tick(self.now)
        self.plain.tick(self.now)

    @rule(allow=st.booleans())
    def allow_migrations(self, allow: bool) -> None:
        self.smq.allow_migrations(allow)
        self.plain.may_migrate = allow

    @invariant()
    def same_queues(self) -> None:
        if hasattr(self, "smq"):
            same_levels(self.smq._clean, self.plain.clean)
            same_levels(self.smq._dirty, self.plain.dirty)
            same_levels(self.smq._hotspot.queue, self.plain.hotspot)

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        if not hasattr(self, "smq"):
            return
        blocks = self.plain.blocks
        assert self.smq.residency == len(blocks)
        queued = self.plain.clean.all_entries() + self.plain.dirty.all_entries()
        pending = [cblock for cblock, block in blocks.items() if block.pending]
        apart = [c for c, b in blocks.items() if b.is_apart and not b.pending]
        everything = sorted(queued + pending + apart + self.plain.free)
        assert everything == list(range(self.plain.nr_cblocks))
        assert len(self.smq.tracker) == len(pending)
        assert self.smq.nr_pinned == sum(block.pinned for block in blocks.values())
        for cblock in range(self.plain.nr_cblocks):
            block = blocks.get(cblock)
            assert self.smq.is_pinned(cblock) == (block is not None and block.pinned)
            assert self.smq.get_hint(cblock) == self.plain.hint(cblock)

    @invariant()
    def no_two_cblocks_have_one_oblock(self) -> None:
        if hasattr(self, "smq"):
            mapped = [b.oblock for b in self.plain.blocks.values() if b.mapped]
            assert len(mapped) == len(set(mapped))


def same_levels(queue: MultiLevelQueue, plain: PlainQueue) -> None:
    for level in range(LEVELS):
        assert list(queue.entries(level)) == plain.entries(level), f"level {level}"


TestSmq = pytest.mark.slow(SmqMachine.TestCase)
TestSmq.settings = settings(
    max_examples=40, stateful_step_count=40, derandomize=True, deadline=None
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Smq, KernelSmq])
@pytest.mark.parametrize("nr_cblocks", [40, 64])
def test_long_history_of_a_full_cache(
    kind: type[Smq], nr_cblocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long histories, which hypothesis does not make: full caches, and periods that end under load."""
    rng = random.Random(nr_cblocks)
    machine = SmqMachine()
    # The lead is so short that LRU takes it several times.
    monkeypatch.setattr(lru_shadow, "LEAD_MIN", 8)
    machine.create(nr_cblocks, kind, [], False)
    machine.plain.lru_lead_min = 8
    seen_ahead = set[bool]()
    for n in range(6000):
        oblock = int(rng.paretovariate(0.7)) * 7 % 1000
        if n % 1000 > 700:
            oblock = rng.randrange(nr_cblocks)
        machine.lookup(oblock, rng.random() < 0.3)
        if n % 5 == 0:
            machine.tick(rng.choice([0, 1, S // 4, S, 3 * S]))
        if n > 100 and n % 30 == 0:
            cached = sorted(machine.plain.blocks)
            machine.pin_to(rng.choice(cached), rng.random() < 0.3)
            machine.maybe_promote(rng.randrange(1000))
        work = machine.smq.get_background_work(n % 50 == 0)
        machine.pair(work, machine.plain.get_background_work(n % 50 == 0))
        while len(machine.issued) > 3:
            work, plain = machine.issued.pop(rng.randrange(4))
            success = rng.random() < 0.95
            machine.smq.complete_background_work(work, success)
            machine.plain.complete(plain, success)
            if success and work.op != DEMOTE:
                dirty = work.op == PROMOTE and rng.random() < 0.5
                machine.set_dirty_to(work.cblock, dirty)
        seen_ahead.add(machine.smq._lru.is_ahead)
        assert machine.smq._lru.is_ahead == machine.plain.is_lru_ahead
        if n % 20 == 0:
            assert machine.smq._hotspot.promote_level == machine.plain.promote_level
            machine.same_queues()
            machine.every_block_is_in_one_state()
    assert min(machine.migrations.values()) > 20
    assert seen_ahead == ({False, True} if kind is Smq else {False})
