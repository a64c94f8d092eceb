# SPDX-License-Identifier: Apache-2.0
"""CloneMetadata against a set of numbers: whatever is called, in whatever order."""

from typing import Any

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

from nbdtarget_metadata.clone.metadata import CloneMetadata, CloneTransaction
from nbdtarget_metadata.errors import ReadOnlyMetadata
from nbdtarget_metadata.mode import Mode
from nbdtarget_metadata.operations import Operation, Steps
from tests.support.metadata.report import check
from tests.support.metadata.small_clone import NR_REGIONS, SIZE, format_on, open_on
from tests.support.metadata.store import Store, drive, read_image

RANGES = st.tuples(st.integers(0, NR_REGIONS - 1), st.integers(0, NR_REGIONS - 1)).map(
    lambda pair: (min(pair), max(pair) + 1)
)


class CloneModel(RuleBasedStateMachine):
    """`bits` in core, `taken` by the transaction under way, `committed` on disk."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(SIZE)
        self.bits: set[int] = set()
        self.taken: set[int] | None = None
        self.committed: set[int] = set()
        self.aborted = False
        self.transaction: CloneTransaction | None = None
        self.compaction: Steps[None] | None = None
        self.metadata: CloneMetadata

    @initialize()
    def format(self) -> None:
        self.metadata = format_on(self.store)

    @rule(bounds=RANGES)
    def set_hydrated(self, bounds: tuple[int, int]) -> None:
        try:
            self.metadata.set_hydrated(*bounds)
        except ReadOnlyMetadata:
            assert self.aborted
        else:
            self.bits.update(range(*bounds))

    @rule(region_nr=st.integers(0, NR_REGIONS - 1))
    def set_one_hydrated(self, region_nr: int) -> None:
        self.set_hydrated((region_nr, region_nr + 1))

    @precondition(lambda self: self.transaction is None and not self.aborted)
    @rule(clean=st.booleans())
    def pre_commit(self, clean: bool) -> None:
        changed = self.metadata.changed
        assert changed == (self.bits != self.committed or self.metadata.needs_rewrite)
        self.transaction = self.metadata.pre_commit(clean_shutdown=clean)
        assert self.transaction is not None or not changed
        self.taken = set(self.bits)

    @precondition(lambda self: self.transaction is not None)
    @rule()
    def finish_commit(self) -> None:
        assert self.transaction is not None
        assert self.taken is not None
        drive(self.store, self.transaction.journal())
        drive(self.store, self.transaction.superblock())
        self.transaction.done()
        self.transaction = None
        self.committed = self.taken

    @rule(times=st.integers(1, 12))
    @precondition(lambda self: self.transaction is None and not self.aborted)
    def commit_often(self, times: int) -> None:
        """Fill the journal."""
        for _ in range(times):
            missing = set(range(NR_REGIONS)) - self.bits
            if missing:
                self.set_one_hydrated(min(missing))
            self.pre_commit(clean=False)
            if self.transaction is not None:
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
                assert hasattr(operation, "_fields")
                self.store.do(operation)  # type: ignore[arg-type]  # never a tuple of them

    @rule()
    def abort(self) -> None:
        self.metadata.abort()
        self.aborted = True
        self.transaction = None
        self.bits = set(self.committed)

    @rule()
    def reopen(self) -> None:
        self.compaction = None
        self.metadata = open_on(self.store)
        self.aborted = False
        self.transaction = None
        self.bits = set(self.committed)

    @invariant()
    def look(self) -> None:
        if not hasattr(self, "metadata"):
            return
        metadata = self.metadata
        assert metadata.nr_hydrated == len(self.bits)
        assert metadata.hydration_done == (len(self.committed) == NR_REGIONS)
        assert (metadata.mode is Mode.RO) == self.aborted
        seen: set[int] = set()
        for begin, end, hydrated in metadata.runs(0, NR_REGIONS):
            assert metadata.all_hydrated(begin, end) == hydrated
            assert metadata.none_hydrated(begin, end) == (not hydrated)
            seen.update(range(begin, end) if hydrated else ())
        assert seen == self.bits
        missing = set(range(NR_REGIONS)) - self.bits
        assert metadata.maybe_next_unhydrated(0, NR_REGIONS) == min(
            missing, default=None
        )

    def teardown(self) -> None:
        # dmtest's habit: whatever a test did, what it leaves is in order.
        if hasattr(self, "metadata"):
            report = read_image(bytes(self.store.current()), check(SIZE))
            assert report.nr_hydrated == len(self.committed)


TestCloneModel = pytest.mark.slow(CloneModel.TestCase)
TestCloneModel.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
