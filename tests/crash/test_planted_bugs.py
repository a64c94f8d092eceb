# SPDX-License-Identifier: Apache-2.0
"""Planted bugs: each breaks one promise, and the check of that promise must fail.

A bug of an invariant is caught by that very invariant, on the workloads of the crash matrix;
bugs of the devices and of the order of a commit by the hypothesis machine, too.
"""

from collections.abc import Callable

import pytest

from nbdtarget.bio import FUA, OP_FLUSH, OP_WRITE, Bio
from nbdtarget.targets import metadata_io
from nbdtarget.targets.base import REMAPPED
from nbdtarget.targets.clone.holes import Holes
from nbdtarget.targets.clone.hydration import Hydration
from nbdtarget.targets.clone.hydrator import Hydrator
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget.targets.committer import Committer, Transaction
from nbdtarget.targets.prison import Cell, Prison
from nbdtarget.targets.registry import TARGET_TYPES
from nbdtarget_metadata.errors import CorruptMetadata
from tests.support.crash import clone_matrix as matrix
from tests.support.crash.invariants import Broken
from tests.support.crash.lazy_device import LazyDevice, lazy_devices
from tests.support.crash.machine import Rig
from tests.support.crash.rigs import LinearRig, QuietCloneRig
from tests.support.crash.state_machine import run_machine

__all__ = ["lazy_devices"]  # a fixture, for each test here

TARGET = "nbdtarget.targets.clone.target."
COMMITTER = "nbdtarget.targets.mapping.Committer"
DEVICE = "tests.support.crash.rigs.CrashDevice"


class NoDestinationFlush(Committer):
    """Vouches for data that may still be lost."""

    async def _commit_transaction(self, transaction: Transaction) -> None:
        await metadata_io.run(self.device, transaction.journal())
        await metadata_io.run(self.device, transaction.superblock())
        transaction.done()


class FlushesLate(NoDestinationFlush):
    """I1: flushes the destination, but only when the superblock is out."""

    async def _commit_transaction(self, transaction: Transaction) -> None:
        await super()._commit_transaction(transaction)
        for device in self.backing:
            await device.flush()


class MovesTheSource(Hydrator):
    """I2: discards a range of the source after it was copied."""

    async def _fill(
        self,
        begin: int,
        end: int,
        pieces: list[tuple[int, int, bool]],
        *,
        is_wanted: bool,
    ) -> None:
        await super()._fill(begin, end, pieces, is_wanted=is_wanted)
        await self.regions.source.discard(begin, end - begin)


class ForgetsItsBits(CloneTarget):
    """I3: forgets that region 3 is hydrated, after that was committed."""

    def _committed(self) -> None:
        super()._committed()
        self._metadata.hydrated[3] = 0


class NoLocks(Prison):
    """I4: grants everything at once."""

    def is_clear(self, begin: int, end: int) -> bool:
        return True

    def maybe_clear_run(self, begin: int, end: int) -> tuple[int, int] | None:
        return begin, end

    def lock(self, begin: int, end: int, granted: Callable[[Cell], None]) -> Cell:
        cell = Cell(begin, end, granted)
        cell.held = True
        granted(cell)
        return cell

    def release(self, cell: Cell) -> None:
        """Do nothing: every lock is granted at once, so no lock waits."""

    def held(self, begin: int, end: int) -> list[tuple[int, int]]:
        return [(begin, end)]


class FlushesTwice(CloneTarget):
    """I5: flushes the destination twice for one FLUSH."""

    def _map_flush(self, bio: Bio) -> int:
        answer = super()._map_flush(bio)
        if answer == REMAPPED:
            self._destination.submit(Bio(OP_FLUSH, 0, 0, None, 0, lambda _: None))
        return answer


class WritesAtEachFlush(CloneTarget):
    """I5: writes metadata, although nothing has changed."""

    def _map_flush(self, bio: Bio) -> int:
        device = self._parts.metadata_device
        zeroes = memoryview(bytes(512))
        end = device.size - len(zeroes)
        device.submit(Bio(OP_WRITE, end, len(zeroes), zeroes, 0, lambda _: None))
        return super()._map_flush(bio)


class FlushesAgain(Committer):
    """I6: flushes the destination again, after the commit has done so."""

    async def _commit_transaction(self, transaction: Transaction) -> None:
        await super()._commit_transaction(transaction)
        for device in self.backing:
            await device.flush()


class EarlyWord(Committer):
    """I6: ends a FLUSH before its commit."""

    def flush(self, bio: Bio) -> None:
        super().flush(bio)
        self._flush_waiters.remove(bio.end)
        bio.end(0)


class LosesCount(Hydration):
    """I7: counts each job as if it were the only one."""

    def _start(
        self, begin: int, end: int, holes: Holes, *, is_wanted: bool = False
    ) -> int:
        end = super()._start(begin, end, holes, is_wanted=is_wanted)
        self.regions.nr_hydrating = 0
        return end


class FlushLies(LazyDevice):
    """Ends each FLUSH, and makes nothing stable."""

    def _make_stable(self, mark: int) -> None:
        """Nothing."""


class FuaLies(LazyDevice):
    """Takes no notice of FUA."""

    def submit(self, bio: Bio) -> None:
        bio.flags &= ~FUA
        super().submit(bio)


def try_matrix() -> None:
    """Every workload, on devices that defer; the images only where a run finds nothing."""
    found = [
        matrix.cuts_of(workload, 0.0, order)
        for order in range(2)
        for workload, _, _ in matrix.MATRIX
        if workload is not matrix.eight_writes_without_a_flush
    ]
    for cuts in found:
        cuts.verify()


def plant(where: str, bug: type, monkeypatch: pytest.MonkeyPatch) -> None:
    if issubclass(bug, CloneTarget):
        monkeypatch.setitem(TARGET_TYPES, where, bug)
    else:
        monkeypatch.setattr(where, bug)


@pytest.mark.parametrize(
    ("where", "bug", "name"),
    [
        pytest.param(COMMITTER, FlushesLate, "I1", marks=pytest.mark.long),
        (TARGET + "Hydrator", MovesTheSource, "I2"),
        ("clone", ForgetsItsBits, "I3"),
        ("nbdtarget.targets.clone.regions.Prison", NoLocks, "I4"),
        ("clone", FlushesTwice, "I5"),
        ("clone", WritesAtEachFlush, "I5"),
        (COMMITTER, FlushesAgain, "I6"),
        (COMMITTER, EarlyWord, "I6"),
        (TARGET + "Hydration", LosesCount, "I7"),
    ],
)
def test_invariant_catches(
    where: str, bug: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(where, bug, monkeypatch)
    with pytest.raises(Broken, match=name):
        try_matrix()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "bug", "make_rig"),
    [
        (DEVICE, FlushLies, LinearRig),
        (DEVICE, FuaLies, LinearRig),
        (COMMITTER, NoDestinationFlush, QuietCloneRig),
        (COMMITTER, EarlyWord, QuietCloneRig),
    ],
)
def test_state_machine_catches(
    where: str,
    bug: type,
    make_rig: Callable[[int, float], Rig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(where, bug, monkeypatch)
    with pytest.raises((AssertionError, CorruptMetadata)):
        run_machine(make_rig)
