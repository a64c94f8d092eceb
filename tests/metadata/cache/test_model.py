# SPDX-License-Identifier: Apache-2.0
"""CacheMetadata against plain dictionaries: whatever is called, in whatever order."""

from array import array
from typing import Any

import pytest
from bitarray import bitarray
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from nbdtarget_metadata.cache.load import Discarded
from nbdtarget_metadata.cache.metadata import CacheMetadata, CacheTransaction
from nbdtarget_metadata.cache.superblock import PolicyIdentity
from nbdtarget_metadata.errors import CannotShrink
from nbdtarget_metadata.mode import Mode
from nbdtarget_metadata.operations import Operation, Steps
from tests.support.metadata.small_cache import (
    BLOCK_SIZE,
    NR_CBLOCKS,
    NR_OBLOCKS,
    SIZE,
    dirty,
    finish,
    format_on,
    mapped,
    open_on,
)
from tests.support.metadata.store import Store, drive

CBLOCKS = st.integers(0, NR_CBLOCKS - 1)
OBLOCKS = st.integers(0, NR_OBLOCKS - 1)
POLICY = PolicyIdentity("smq", (2, 0, 0))


def started(machine: "CacheModel") -> bool:
    return machine.metadata.may_change and machine.transaction is None


class CacheModel(RuleBasedStateMachine):
    """`now` and `dirty` in core, `taken` by the transaction, `committed` on disk."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(SIZE)
        self.metadata: CacheMetadata
        self.now: dict[int, int] = {}
        self.dirty: set[int] = set()
        self.taken: dict[int, int] = {}
        self.committed: dict[int, int] = {}
        # The dirty blocks that a clean shutdown has recorded; None: the last shutdown was not clean.
        self.recorded: set[int] | None = set()
        self.syncs = False
        self.transaction: CacheTransaction | None = None
        self.compaction: Steps[None] | None = None

    @initialize()
    def format(self) -> None:
        self.metadata = format_on(self.store)

    @precondition(lambda self: self.transaction is None)
    @rule(dirty_log=st.booleans())
    def start(self, dirty_log: bool) -> None:
        drive(self.store, self.metadata.start(dirty_log=dirty_log))
        self.pre_commit()
        self.finish_commit()
        assert self.metadata.may_change

    @precondition(lambda self: self.metadata.may_change)
    @rule(cblock=CBLOCKS, oblock=OBLOCKS, is_dirty=st.booleans())
    def insert(self, cblock: int, oblock: int, is_dirty: bool) -> None:
        metadata = self.metadata
        if not metadata.may_insert(cblock) or oblock >= metadata.nr_oblocks:
            return
        if metadata.maybe_cblock(oblock) is not None:
            return
        metadata.insert(cblock, oblock, dirty=is_dirty)
        self.now[cblock] = oblock
        if is_dirty:
            self.dirty.add(cblock)

    @precondition(lambda self: self.metadata.may_change and self.now)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        cblock = data.draw(st.sampled_from(sorted(self.now)))
        if cblock in self.dirty:
            self.metadata.set_clean(cblock)
            self.dirty.remove(cblock)
        self.metadata.remove(cblock)
        del self.now[cblock]
        assert not self.metadata.may_insert(cblock)

    @precondition(lambda self: self.metadata.may_change and self.now)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        cblock = data.draw(st.sampled_from(sorted(self.now)))
        if self.metadata.may_dirty(cblock):
            self.metadata.set_dirty(cblock)
            self.dirty.add(cblock)
        else:
            assert self.metadata.dirty_log
            self.metadata.log_dirty(cblock)

    @precondition(lambda self: self.metadata.may_change and self.dirty)
    @rule(data=st.data())
    def write_back(self, data: st.DataObject) -> None:
        cblock = data.draw(st.sampled_from(sorted(self.dirty)))
        self.metadata.set_clean(cblock)
        self.dirty.remove(cblock)

    @precondition(started)
    @rule(nr_cblocks=st.integers(1, NR_CBLOCKS))
    def resize_cache(self, nr_cblocks: int) -> None:
        cut = {cblock for cblock in self.now if cblock >= nr_cblocks}
        self.resize(self.metadata.resize_cache(nr_cblocks), cut)
        assert bool(cut & self.dirty) or self.metadata.nr_cblocks == nr_cblocks

    @precondition(started)
    @rule(nr_oblocks=OBLOCKS.filter(bool))
    def resize_origin(self, nr_oblocks: int) -> None:
        cut = {c for c, oblock in self.now.items() if oblock >= nr_oblocks}
        self.resize(self.metadata.resize_origin(nr_oblocks * BLOCK_SIZE), cut)
        assert bool(cut & self.dirty) or self.metadata.nr_oblocks == nr_oblocks

    def resize(self, steps: Steps[None], cut: set[int]) -> None:
        if cut & self.dirty:
            with pytest.raises(CannotShrink) as caught:
                drive(self.store, steps)
            assert caught.value.cblock == min(cut & self.dirty)
        else:
            drive(self.store, steps)
            self.now = {c: o for c, o in self.now.items() if c not in cut}

    @precondition(lambda self: self.transaction is None)
    @rule()
    def pre_commit(self) -> None:
        changed = self.metadata.changed
        self.transaction = self.metadata.pre_commit()
        assert (self.transaction is not None) == changed
        self.taken = dict(self.now)
        self.syncs = False

    @precondition(started)
    @rule(with_hints=st.booleans())
    def full_sync(self, with_hints: bool) -> None:
        metadata = self.metadata
        if with_hints:
            metadata.prepare_shutdown(
                policy=POLICY,
                hints=array("I", range(7, 7 + metadata.nr_cblocks)),
                discarded=Discarded(BLOCK_SIZE, bitarray("011", endian="little")),
            )
        self.transaction = metadata.pre_commit(clean_shutdown=True)
        assert self.transaction is not None
        self.taken = dict(self.now)
        self.syncs = True

    @precondition(lambda self: self.transaction is not None)
    @rule()
    def finish_commit(self) -> None:
        if self.transaction is not None:
            finish(self.store, self.transaction)
            self.committed = self.taken
            if not self.transaction.taken.only_rewrites:
                self.recorded = set(self.dirty) if self.syncs else None
        self.transaction = None

    @precondition(started)
    @rule(times=st.integers(1, 12))
    def commit_often(self, times: int) -> None:
        """Fill the journal."""
        for nr in range(times):
            self.insert(nr, NR_OBLOCKS - 1 - nr, is_dirty=False)
            self.pre_commit()
            self.finish_commit()

    @precondition(lambda self: self.compaction is None)
    @rule()
    def start_compaction(self) -> None:
        self.compaction = self.metadata.compact()

    @precondition(lambda self: self.compaction is not None)
    @rule()
    def step_compaction(self) -> None:
        assert self.compaction is not None
        try:
            operation: Operation | tuple[Any, ...] = self.compaction.send(None)
        except StopIteration:
            self.compaction = None
        else:
            if operation:
                self.store.do(operation)  # type: ignore[arg-type]  # never a tuple of them

    @rule(aborts=st.booleans())
    def reopen(self, aborts: bool) -> None:
        if aborts:
            self.metadata.abort()
            assert self.metadata.mode is Mode.RO
            assert mapped(self.metadata) == self.now
        self.compaction = self.transaction = None
        self.metadata = open_on(self.store)
        self.now = dict(self.committed)
        self.expect_dirty()

    def expect_dirty(self) -> None:
        found = dirty(self.metadata)
        if self.recorded is not None:
            assert found == self.recorded
        elif self.metadata.dirty_log:
            assert found <= set(self.now)
            assert found >= self.dirty & set(self.now)
        else:
            assert found == set(self.now)
        assert self.metadata.clean_when_opened == (self.recorded is not None)
        self.dirty = found

    @invariant()
    def look(self) -> None:
        if not hasattr(self, "metadata"):
            return
        metadata = self.metadata
        assert mapped(metadata) == self.now
        assert metadata.nr_mapped == len(self.now)
        assert dirty(metadata) == self.dirty
        assert metadata.nr_dirty == len(self.dirty)  # J7
        assert len(set(self.now.values())) == len(self.now)  # J2
        for cblock, oblock in self.now.items():
            assert metadata.maybe_cblock(oblock) == cblock
        listed = list(metadata.mappings(POLICY))
        assert [each[:3] for each in listed] == [
            (cblock, oblock, cblock in self.dirty)
            for cblock, oblock in sorted(self.now.items())
        ]


TestCacheModel = pytest.mark.slow(CacheModel.TestCase)
TestCacheModel.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
