# SPDX-License-Identifier: Apache-2.0
"""Block locks against a model that only keeps the holders: levels, quiescence, and no request starves.

The model keeps every hold and every lock in the order they came, and says from that alone what may
be granted. A walk asks for holds and locks at random, ends them in any order, and looks after
each step.
"""

import random
from dataclasses import dataclass, field

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE, Bio
from nbdtarget.targets.cache.locks import BlockLock, BlockLocks

NR_BLOCKS = 6
STEPS = 120


@dataclass(eq=False)
class Asked:
    """A lock that was asked for: what it still waits for, by the model."""

    lock: BlockLock
    waits_for: set[object] = field(default_factory=set)
    level: int = 0
    is_single: bool = False  # such a one may be raised
    nr_granted: int = 0

    @property
    def blocks(self) -> range:
        return range(self.lock.begin, self.lock.end)


class World:
    """The locks, and the model beside them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.locks = BlockLocks()
        self.holds: dict[Bio, tuple[int, bool]] = {}
        self.asked: list[Asked] = []  # oldest first
        self.parked: list[Bio] = []

    # ---- what happens ----

    def io(self) -> None:
        oblock, is_write = self.rng.randrange(NR_BLOCKS), self.rng.random() < 0.5
        bio = Bio(OP_WRITE if is_write else OP_READ, 0, 0, None, 0, lambda _: None)
        blocking = self.locks.maybe_blocking(oblock, is_write=is_write)
        theirs = [each for each in self.asked if oblock in each.blocks]
        must_wait = any(is_write or each.level for each in theirs)
        assert (blocking is not None) == must_wait
        assert self.locks.is_locked(oblock) or not theirs
        if blocking is None:
            self.locks.hold(oblock, bio, is_write=is_write)
            self.holds[bio] = oblock, is_write
        else:
            assert oblock in range(blocking.begin, blocking.end)
            blocking.parked.append(bio)
            self.parked.append(bio)

    def end_io(self) -> None:
        if self.holds:
            bio = self.rng.choice(list(self.holds))
            del self.holds[bio]
            for each in self.asked:
                each.waits_for.discard(bio)
            bio.end(0)

    def ask(self) -> None:
        begin = self.rng.randrange(NR_BLOCKS)
        length = self.rng.choice((0, 0, 1, 3))
        blocks = range(begin, min(begin + max(1, length), NR_BLOCKS))
        older = {each for each in self.asked if _meet(each.blocks, blocks)}
        writers = {
            bio
            for bio, (oblock, is_write) in self.holds.items()
            if is_write and oblock in blocks
        }
        lock: BlockLock | None
        if length:
            lock = self.locks.lock_range(blocks.start, blocks.stop, self._granted)
            asked = Asked(lock, {*older, *writers})
        else:
            lock = self.locks.maybe_lock(begin, self._granted)
            assert (lock is None) == bool(older), "a single one is never waited for"
            if lock is None:
                return
            asked = Asked(lock, {*writers}, is_single=True)
        asked.nr_granted = int(not asked.waits_for)
        self.asked.append(asked)

    def raise_level(self) -> None:
        mine = [each for each in self.asked if each.lock.held and not each.level]
        mine = [each for each in mine if each.is_single]
        if not mine:
            return
        asked = self.rng.choice(mine)
        asked.level = 1
        asked.waits_for = {
            bio for bio, (oblock, _) in self.holds.items() if oblock in asked.blocks
        }
        asked.nr_granted += not asked.waits_for
        self.locks.raise_level(asked.lock, self._granted)

    def unlock(self) -> None:
        held = [each for each in self.asked if each.lock.held]
        if not held:
            return
        asked = self.rng.choice(held)
        self.asked.remove(asked)
        for each in self.asked:
            each.waits_for.discard(asked)
        mine = list(asked.lock.parked)
        assert self.locks.unlock(asked.lock) == mine
        assert not asked.lock.parked
        self.parked = [bio for bio in self.parked if bio not in mine]

    def _granted(self, lock: BlockLock) -> None:
        """Called from inside: at this moment it must be alone."""
        assert lock.held
        for oblock, is_write in self.holds.values():
            if oblock in range(lock.begin, lock.end):
                assert not is_write
                assert not lock.level
        for each in self.asked:
            if each.lock is lock:
                each.nr_granted += 1
            elif each.lock.held:
                assert not _meet(each.blocks, range(lock.begin, lock.end))

    # ---- what must hold ----

    def look(self) -> None:
        for each in self.asked:
            assert each.lock.held == (not each.waits_for), each.lock
        assert self.locks.nr_holds == len(self.holds)
        assert len(self.locks.locked) == len(self.asked)
        for oblock in range(NR_BLOCKS):
            there = [w for at, w in self.holds.values() if at == oblock and w]
            assert self.locks.nr_writers(oblock) == len(there)


def _meet(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


@pytest.mark.parametrize("seed", range(40))
def test_locks_are_granted_when_the_model_says_so(seed: int) -> None:
    world = World(seed)
    weights = {"io": 6, "end_io": 5, "ask": 4, "raise_level": 2, "unlock": 3}
    for name in world.rng.choices(list(weights), list(weights.values()), k=STEPS):
        getattr(world, name)()
        world.look()
    # Nothing new comes, and all that is under way ends: everybody has had their turn.
    for _ in range(2 * STEPS):
        world.end_io()
        world.unlock()
        world.look()
    assert not world.asked
    assert not world.parked
    assert not world.holds


def test_new_reads_starve_no_lock_that_is_being_raised() -> None:
    locks, granted = BlockLocks(), list[BlockLock]()
    read = Bio(OP_READ, 0, 0, None, 0, lambda _: None)
    locks.hold(1, read, is_write=False)
    lock = locks.maybe_lock(1, lambda _: None)
    assert lock is not None
    locks.raise_level(lock, granted.append)
    assert not granted
    assert locks.maybe_blocking(1, is_write=False) is lock
    read.end(0)
    assert granted == [lock]


def test_parked_bios_can_be_taken_back_and_the_others_stay_in_order() -> None:
    locks = BlockLocks()
    lock = locks.maybe_lock(2, lambda _: None)
    assert lock is not None
    bios = [Bio(OP_WRITE, at, 0, None, 0, lambda _: None) for at in range(4)]
    lock.parked.extend(bios)
    assert locks.take_parked(lambda bio: bio.offset % 2 == 0) == [bios[0], bios[2]]
    assert locks.unlock(lock) == [bios[1], bios[3]]
