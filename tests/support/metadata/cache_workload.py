# SPDX-License-Identifier: Apache-2.0
"""A cache that lives on a `Store` and two disks: I/O, migrations, commits, power cuts, by a seed.

The owner is as well-behaved as a cache target must be, and no more. Every metadata operation and
flush is submitted and ends later, in an order that the seed chooses. A resize
is taken step by step, too, with a compaction beside it, while started or before that. After every event the power is
cut, in a copy: each image that the store may leave is opened and judged.

The oracle. An image opens, at a generation that was pre-committed and not before the last one that
anybody could rely on, with that generation's mappings. Whatever the two disks have kept of what
was not flushed: a mapped block holds its own origin block's data, and these are not older than the
last acknowledged flush; nor is the origin's, where nothing is mapped. A **clean** block
equals the origin. After a clean shutdown the dirty bits are those of that moment.
"""

import random
from array import array
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import pytest

from nbdtarget_metadata.cache.metadata import (
    FLUSH_CACHE,
    FLUSH_ORIGIN,
    CacheMetadata,
    CacheTransaction,
)
from nbdtarget_metadata.cache.superblock import PolicyIdentity, device_size_with
from nbdtarget_metadata.errors import CannotShrink, CorruptMetadata, ReadOnlyMetadata
from nbdtarget_metadata.log.superblock import NEEDS_CHECK, superblock_writes
from nbdtarget_metadata.operations import Flush, Read, Steps, Write
from tests.support.metadata.clone_workload import rotten
from tests.support.metadata.small_cache import UUID, dirty, mapped
from tests.support.metadata.store import Store, Ticket, drive, read_image

NR_CBLOCKS = 40
NR_CBLOCKS_MIN = 24
NR_OBLOCKS = 70
NR_OBLOCKS_MIN = 60
BLOCK_SIZE = 3 * 32768
SMQ = PolicyIdentity("smq", (2, 0, 0))


@dataclass(frozen=True)
class Mutant:
    """Which bugs the owner has."""

    flushes_ignored: int = 0
    origin_written_before_removal_is_durable: bool = False
    acknowledged_early: bool = False
    journal_unflushed: bool = False


class State(NamedTuple):
    """The content of a generation."""

    mapped: dict[int, int]
    nr_cblocks: int
    origin_size: int
    clean: bool
    dirty: set[int]
    dirty_log: bool


class Disk:
    """The contents of each block, oldest first: the durable one, then each later write. The last is the current one."""

    def __init__(self) -> None:
        self.written: dict[int, list[tuple[int, int]]] = {}
        self.dropped: dict[int, int] = {}

    def write(self, block: int, content: tuple[int, int]) -> None:
        self.written[block].append(content)

    def now(self, block: int) -> tuple[int, int]:
        return self.written[block][-1]

    def start_flush(self) -> dict[int, int]:
        return {
            block: self.dropped.get(block, 0) + len(written) - 1
            for block, written in self.written.items()
        }

    def end_flush(self, covered: dict[int, int]) -> None:
        for block, last in covered.items():
            nr = last - self.dropped.get(block, 0)
            if nr > 0:
                del self.written[block][:nr]
                self.dropped[block] = last

    def crash(self, rng: random.Random) -> None:
        for block, written in self.written.items():
            self.written[block] = [rng.choice(written)]
        self.dropped.clear()


class Process:
    """A generator with the operations that it waits for."""

    def __init__(
        self, store: Store, steps: Steps[None], *, unflushed: bool = False
    ) -> None:
        self.store = store
        self.steps = steps
        self.unflushed = unflushed
        self.tickets: list[Ticket] = []
        self.done = False
        self._advance()

    def end_one(self, rng: random.Random) -> None:
        self.store.end(self.tickets.pop(rng.randrange(len(self.tickets))))
        if not self.tickets:
            self._advance()

    def _advance(self) -> None:
        while not self.tickets:
            try:
                operation = self.steps.send(None)
            except StopIteration:
                self.done = True
                return
            if isinstance(operation, Read | Write | Flush):
                operation = (operation,)
            for each in operation:
                if not (isinstance(each, Flush) and self.unflushed):
                    self.tickets.append(self.store.submit(each))


class CacheWorkload:
    """See the module head."""

    def __init__(
        self,
        seed: int,
        mutant: Mutant | None = None,
        *,
        lazy: bool = False,
        restless: bool = False,
    ) -> None:
        """Lazy: compactions are overtaken. Restless: suspended, resized and rotten all the time."""
        self.rng = random.Random(seed)
        self.image_rng = random.Random(seed + 1)
        self.mutant = mutant or Mutant()
        self.lazy = lazy
        self.restless = restless
        # With few removals, the origin is flushed for other reasons only.
        self.removals = 0.52 if seed % 2 else 0.9
        self.size = device_size_with(NR_CBLOCKS, 16 + (8 if seed % 4 >= 2 else 0))
        self.store = Store(self.size)
        self.cache = Disk()
        self.origin = Disk()
        for cblock in range(NR_CBLOCKS):
            self.cache.written[cblock] = [(-1, 0)]
        for oblock in range(NR_OBLOCKS):
            self.origin.written[oblock] = [(oblock, 0)]
        self.latest = [0] * NR_OBLOCKS
        self.promised = [0] * NR_OBLOCKS
        self.acknowledged = 1
        self.nr_images = self.nr_moves = self.nr_overtaken = 0
        self.nr_clean = self.nr_clean_blocks_after_crash = self.nr_needs_check = 0
        self.nr_resized_unstarted = self.nr_resized_beside_compaction = 0
        self.nr_resizes_cut = self.nr_shrinks = self.nr_grows = self.nr_healed = 0
        self._judged = 0
        self.is_spoiled = False  # one copy is rotten already, and not healed yet
        self.metadata = drive(
            self.store,
            CacheMetadata.format(
                device_size=self.size,
                block_size=BLOCK_SIZE,
                origin_size=NR_OBLOCKS * BLOCK_SIZE,
                nr_cblocks=NR_CBLOCKS,
                uuid=UUID,
            ),
        )
        self.expected = {0: self._state(clean=True), 1: self._state(clean=True)}
        self._forget_processes()

    def _forget_processes(self) -> None:
        self.journal: Process | None = None
        self.superblock: Process | None = None
        self.compaction: Process | None = None
        self.needs_check: Process | None = None
        self.transaction: CacheTransaction | None = None
        self.resizing: Steps[None] | None = None
        self.flushing: list[tuple[Disk, dict[int, int]]] = []
        self.promises: list[int] | None = None
        # Origin blocks whose removal is not durable: in core, in the transaction.
        self.removed: set[int] = set()
        self.removing: set[int] = set()

    def _state(self, *, clean: bool) -> State:
        metadata = self.metadata
        return State(
            mapped(metadata),
            metadata.nr_cblocks,
            metadata.origin_size,
            clean,
            dirty(metadata),
            metadata.dirty_log,
        )

    # Events

    def run(self, nr_events: int) -> None:
        for _ in range(nr_events):
            self._event()
            self.check()

    def _event(self) -> None:
        draw = self.rng.random()
        if self.needs_check is not None:
            self._step_needs_check()
        elif draw < 0.004:
            self.kill()
        elif draw < 0.007 or (self.restless and 0.9 < draw < 0.92):
            self.crash()
        elif draw < 0.009:
            self._abort()
            steps = self.metadata.record_needs_check()
            self.needs_check = Process(self.store, steps)
        elif draw < (0.03 if self.lazy else 0.14):
            self._step_compaction()
        elif self.resizing is not None:
            self._step_resize()
        elif draw < 0.65 or not self.metadata.may_change:
            self._step_commit()
        else:
            for _ in range(self.rng.choice((1, 1, 6))):
                if self.resizing is None:
                    self._change()

    def _change(self) -> None:
        draw = self.rng.random()
        cblock = self.rng.randrange(self.metadata.nr_cblocks)
        oblock = self.metadata.maybe_oblock(cblock)
        if draw < 0.01:
            self.metadata.clear_log()
        elif draw < (0.1 if self.restless else 0.02) and self.transaction is None:
            if self.restless:
                self._write_all_back()
            self._resize()
        elif oblock is None:
            self._fill(cblock)
        elif draw < 0.5:
            self._write_hit(cblock, oblock)
        elif self.metadata.is_dirty(cblock):
            self.origin.write(oblock, self.cache.now(cblock))
            self.metadata.set_clean(cblock)
        elif draw < self.removals:
            self.metadata.remove(cblock)
            self.removed.add(oblock)

    def _fill(self, cblock: int) -> None:
        oblock = self.rng.randrange(self.metadata.nr_oblocks)
        draw = self.rng.random()
        if self.metadata.maybe_cblock(oblock) is not None:
            return
        busy = oblock in self.removed or oblock in self.removing
        if busy and not self.mutant.origin_written_before_removal_is_durable:
            return
        if draw < 0.3 or not self.metadata.may_insert(cblock):
            self.latest[oblock] += 1
            self.origin.write(oblock, (oblock, self.latest[oblock]))
        elif draw < 0.7:
            self.cache.write(cblock, self.origin.now(oblock))
            self.metadata.insert(cblock, oblock, dirty=False)
        else:
            self.latest[oblock] += 1
            self.cache.write(cblock, (oblock, self.latest[oblock]))
            self.metadata.insert(cblock, oblock, dirty=True)

    def _write_hit(self, cblock: int, oblock: int) -> None:
        if not self.metadata.is_dirty(cblock) and not self.metadata.may_dirty(cblock):
            self.metadata.log_dirty(cblock)
            return
        self.metadata.set_dirty(cblock)
        self.latest[oblock] += 1
        self.cache.write(cblock, (oblock, self.latest[oblock]))
        if self.rng.random() < 0.3:  # through
            self.origin.write(oblock, (oblock, self.latest[oblock]))
            self.metadata.set_clean(cblock)

    def _write_all_back(self) -> None:
        for cblock in dirty(self.metadata):
            oblock = self.metadata.maybe_oblock(cblock)
            assert oblock is not None
            self.origin.write(oblock, self.cache.now(cblock))
            self.metadata.set_clean(cblock)

    def _resize(self) -> None:
        metadata, rng = self.metadata, self.rng
        self.nr_resized_unstarted += not metadata.may_change
        if rng.random() < 0.5:
            nr_cblocks = rng.randint(NR_CBLOCKS_MIN, NR_CBLOCKS)
            self.nr_grows += nr_cblocks > len(metadata._values)
            self.resizing = metadata.resize_cache(nr_cblocks)
        else:
            nr_oblocks = rng.randint(NR_OBLOCKS_MIN, NR_OBLOCKS)
            self.resizing = metadata.resize_origin(nr_oblocks * BLOCK_SIZE)
        self._step_resize()

    def _step_resize(self) -> None:
        assert self.resizing is not None
        self.nr_resized_beside_compaction += self.compaction is not None
        before = mapped(self.metadata)
        try:
            assert next(self.resizing) == ()
        except StopIteration:
            self.resizing = None
        except CannotShrink:
            assert mapped(self.metadata) == before
            self.resizing = None
        removed = set(before.values()) - set(mapped(self.metadata).values())
        self.nr_shrinks += bool(removed)
        self.removed |= removed

    def _step_compaction(self) -> None:
        if self.compaction is None:
            if self.metadata.needs_compaction or self.rng.random() < 0.05:
                self.compaction = Process(self.store, self.metadata.compact())
        elif not self.compaction.done:
            self.compaction.end_one(self.rng)
        if self.compaction is not None and self.compaction.done:
            self.compaction = None

    def _step_commit(self) -> None:
        if self.transaction is None:
            self._pre_commit()
        elif self.superblock is not None:
            self._step_superblock()
        elif self.flushing and self.rng.random() < 0.5:
            disk, covered = self.flushing.pop()
            disk.end_flush(covered)
        elif self.journal is None:
            steps = self.transaction.journal()
            unflushed = self.mutant.journal_unflushed
            self.journal = Process(self.store, steps, unflushed=unflushed)
        elif not self.journal.done:
            self.journal.end_one(self.rng)
        elif not self.flushing:
            steps = self.transaction.superblock()
            self.superblock = Process(self.store, steps)
            if self.mutant.acknowledged_early:
                self._acknowledge()

    def _pre_commit(self) -> None:
        metadata, rng = self.metadata, self.rng
        if not metadata.may_change and rng.random() < 0.3:
            self._resize()
            return
        # Rarely a commit comes first, to heal a copy or to keep a resize.
        if not metadata.may_change and rng.random() < 0.8:
            drive(self.store, metadata.start(dirty_log=rng.random() < 0.7))
        often = 0.2 if self.restless else 0.05
        clean = metadata.may_change and rng.random() < often
        if clean:
            hints = array("I", range(metadata.nr_cblocks))
            metadata.prepare_shutdown(policy=SMQ, hints=hints)
        transaction = metadata.pre_commit(clean_shutdown=clean)
        if transaction is None:
            return
        self.transaction = transaction
        self.nr_moves += transaction.moves
        self.nr_overtaken += transaction.moves and self.compaction is not None
        self.nr_clean += clean
        self.nr_healed += transaction.taken.only_rewrites
        state = self._state(clean=clean or transaction.taken.only_rewrites)
        self.expected[transaction.generation] = state
        flushes = transaction.taken.flushes & ~self.mutant.flushes_ignored
        if rng.random() < 0.3:  # somebody waits for a FLUSH
            flushes |= FLUSH_CACHE | FLUSH_ORIGIN
            self.promises = self.latest.copy()
        if flushes & FLUSH_CACHE:
            self.flushing.append((self.cache, self.cache.start_flush()))
        if flushes & FLUSH_ORIGIN:
            self.flushing.append((self.origin, self.origin.start_flush()))
        self.removing, self.removed = self.removed, set()

    def _step_superblock(self) -> None:
        assert self.superblock is not None
        assert self.transaction is not None
        self.superblock.end_one(self.rng)
        if self.superblock.done:
            self.transaction.done()
            self._acknowledge()
            self.transaction = self.superblock = self.journal = None
            self.removing = set()

    def _acknowledge(self) -> None:
        assert self.transaction is not None
        self.acknowledged = self.transaction.generation
        if self.promises is not None:
            self.promised = self.promises
        self.promises = None

    def _abort(self) -> None:
        """Abort, and check that surviving mappings are on disk, whether the transaction reached it or not."""
        metadata = self.metadata
        metadata.abort()
        if self.resizing is not None:
            self._refuse_to_go_on(self.resizing)
        generation = metadata.generation
        left = [self.expected.get(generation + nr) for nr in range(2)]
        for cblock in filter(metadata.mapping_survives, range(metadata.nr_cblocks)):
            oblock = metadata.maybe_oblock(cblock)
            assert all(state.mapped[cblock] == oblock for state in left if state)
        self._end_tickets()

    def _refuse_to_go_on(self, resizing: Steps[None]) -> None:
        before = mapped(self.metadata)
        with pytest.raises(ReadOnlyMetadata):
            next(resizing)
        assert mapped(self.metadata) == before
        self.nr_resizes_cut += 1

    def _end_tickets(self) -> None:
        """An operation has ended, somehow, before its generator is closed."""
        self.store.kill(self.rng)
        self._forget_processes()

    def _step_needs_check(self) -> None:
        assert self.needs_check is not None
        if not self.needs_check.done:
            self.needs_check.end_one(self.rng)
            return
        for image in self.store.crash_images(self.image_rng):
            assert self.maybe_open(image) is None, "needs_check was not durable"
        self.nr_needs_check += 1
        superblock = self.metadata._superblock
        cleared = msgspec.structs.replace(
            superblock,
            generation=superblock.generation + 1,
            flags=superblock.flags & ~NEEDS_CHECK,
        )
        state = self.expected[superblock.generation - 2]
        self.expected = {cleared.generation: state}
        drive(self.store, _write(cleared))
        self.acknowledged = cleared.generation
        self._reopen()

    # Ends of a life

    def kill(self) -> None:
        self.store.kill(self.rng)
        self._reopen()

    def crash(self) -> None:
        images = list(self.store.crash_images(self.rng))
        image = self.rng.choice(images)
        if self.restless and not self.is_spoiled and self.rng.random() < 0.3:
            image = rotten(image, self.rng.randrange(4) * 8)
            self.is_spoiled = True
        self.store = Store(self.size, image)
        self.cache.crash(self.rng)
        self.origin.crash(self.rng)
        self._reopen()
        # The mappings that were read now must not be lost again, unless a single copy rots.
        if not self.metadata.changed:
            self.promised = self.latest.copy()

    def _reopen(self) -> None:
        self._forget_processes()
        self.metadata = metadata = drive(self.store, _opening(self.size))
        generation = metadata.generation
        for later in [each for each in self.expected if each > generation]:
            del self.expected[later]
        if not metadata.changed:
            self.acknowledged = generation
        for oblock in range(NR_OBLOCKS):
            cblock = metadata.maybe_cblock(oblock)
            held = self.origin.now(oblock)
            if cblock is not None:
                assert metadata.is_dirty(cblock) or self.cache.now(cblock) == held
                held = self.cache.now(cblock)
            self.latest[oblock] = held[1]

    # The oracle

    def check(self) -> None:
        """Judge each image that a crash may leave now; see the module head."""
        disks = [*self.cache.written.values(), *self.origin.written.values()]
        state = (*self.store.state(), self.acknowledged, str(self.promised), str(disks))
        if hash(state) == self._judged:
            return
        self._judged = hash(state)
        for image in self.store.crash_images(self.image_rng):
            self.judge(image)
        self.is_spoiled = self.is_spoiled and bool(self.metadata._unhealed)
        if not self.is_spoiled:
            self.judge(rotten(image, self.image_rng.randrange(4) * 8))

    def maybe_open(self, image: bytes) -> CacheMetadata | None:
        """Open without writing; None if `needs_check` forbids it, which must be so."""
        try:
            return read_image(image, _opening(len(image)))
        except CorruptMetadata as error:
            if self.needs_check is None or error.found != "needs_check":
                raise
            return None

    def judge(self, image: bytes) -> None:
        self.nr_images += 1
        metadata = self.maybe_open(image)
        if metadata is None:
            return
        generation = metadata.generation
        assert generation >= self.acknowledged, "an acknowledged commit is lost"
        state = self.expected[generation]
        found = mapped(metadata)
        assert found == state.mapped, "a third state"
        assert metadata.nr_mapped == len(found)
        assert metadata.nr_cblocks == state.nr_cblocks
        assert metadata.origin_size == state.origin_size
        assert metadata.clean_when_opened == state.clean
        held_dirty = dirty(metadata)
        if state.clean:
            assert held_dirty == state.dirty
        elif not state.dirty_log:
            assert held_dirty == set(found)
        by_oblock = {oblock: cblock for cblock, oblock in found.items()}
        for oblock, promised in enumerate(self.promised):
            kept = self.origin.written[oblock]
            cblock = by_oblock.get(oblock)
            if cblock is not None:
                in_cache = self.cache.written[cblock]
                if cblock not in held_dirty:
                    self.nr_clean_blocks_after_crash += 1
                    assert {*in_cache, *kept} == {in_cache[0]}, "clean, but differs"
                kept = in_cache
            for holds, version in kept:
                assert holds == oblock, "another block's data"
                assert version >= promised, "an acknowledged flush is lost"


def _write(superblock: msgspec.Struct) -> Steps[None]:
    yield superblock_writes(superblock)  # type: ignore[arg-type]  # a superblock it is


def _opening(size: int) -> Steps[CacheMetadata]:
    return CacheMetadata.open(device_size=size, block_size=BLOCK_SIZE)
