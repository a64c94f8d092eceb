# SPDX-License-Identifier: Apache-2.0
"""The crash machine must catch each way to get the order wrong.

Each mutant is one wrong step in an otherwise untouched clone. A suite that passes one of
them proves nothing about the right order.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator

import pytest

from metadata.operations import Flush, Read, Steps, Write
from nbdtarget import metadata_io
from nbdtarget.bio import FUA, Bio
from nbdtarget.devices.base import EXTENT_DATA, EXTENT_ZERO, Extent
from nbdtarget.targets.base import REMAPPED
from nbdtarget.targets.clone.filler import Filler
from nbdtarget.targets.clone.foreground import Foreground, RegionWrite
from nbdtarget.targets.clone.holes import Piece
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget.targets.committer import Committer, Transaction
from nbdtarget.targets.prison import Cell, Prison
from tests.crash.rigs import REGION_SIZE, CloneRig
from tests.crash.test_machine import Step, draw_walk, maybe_failure
from tests.support.devices import CrashDevice
from tests.support.model import SECTOR

WALKS_MAX = 50
TARGET = "nbdtarget.targets.clone.target."
FOREGROUND = "nbdtarget.targets.clone.foreground."


class NoDestinationFlush(Committer):
    """Vouches for data that may still be lost."""

    async def _commit_transaction(self, transaction: Transaction) -> None:
        await metadata_io.run(self.device, transaction.journal())
        await metadata_io.run(self.device, transaction.superblock())
        transaction.done()


class CommitBeforeFlush(NoDestinationFlush):
    """Flushes the destination, but only when the superblock is out."""

    async def _commit_transaction(self, transaction: Transaction) -> None:
        await super()._commit_transaction(transaction)
        for device in self.backing:
            await device.flush()


class SuperblockBeforeJournal(Committer):
    """Lets the superblock vouch for a journal that may still be lost."""

    async def _commit_transaction(self, transaction: Transaction) -> None:
        await asyncio.gather(*(device.flush() for device in self.backing))
        await metadata_io.run(self.device, _without_flush(transaction.journal()))
        await metadata_io.run(self.device, transaction.superblock())
        transaction.done()


class SuperblockWithoutFua(Committer):
    """Believes in a superblock that may still be lost."""

    async def _commit_transaction(self, transaction: Transaction) -> None:
        await asyncio.gather(*(device.flush() for device in self.backing))
        await metadata_io.run(self.device, transaction.journal())
        await metadata_io.run(self.device, _without_fua(transaction.superblock()))
        transaction.done()


class FlushRidesOnRunningCommit(Committer):
    """A FLUSH that comes while a commit runs ends with that commit."""

    async def _commit_transaction(self, transaction: Transaction) -> None:
        await super()._commit_transaction(transaction)
        late, self._flush_waiters = self._flush_waiters, []
        for waiter in late:
            waiter(0)


class FlushWithoutFlush(Committer):
    """A FLUSH whose commit found nothing left to commit ends without a flush."""

    async def _flush_only(self) -> int:
        return 0


class RunningCommitIsClean(Committer):
    """Takes what a running commit is about to make durable for durable."""

    @property
    def is_clean(self) -> bool:
        return self._running is not None or super().is_clean


class FlushPassesDown(CloneTarget):
    """A FLUSH flushes the destination, and commits nothing."""

    def _map_flush(self, bio: Bio) -> int:
        bio.device = self._destination
        return REMAPPED


class FuaWithoutCommit(Foreground):
    """A FUA write to a hydrated region whose bit is not committed."""

    def write_hydrated(self, bio: Bio) -> None:
        self.regions.destination.submit(bio)


class FuaOverwriteWithoutCommit(RegionWrite):
    """A FUA write that hydrates its region, and ends before the bit is durable."""

    def _leave(self, errno: int) -> None:
        self.bio.flags &= ~FUA
        super()._leave(errno)


class BitBeforeOverwrite(RegionWrite):
    """Sets the bits when the write is submitted, not when it has ended."""

    def _write_payload(self) -> None:
        self.regions.set_hydrated(self.first, self.last)
        super()._write_payload()


class NoCopyOfGaps(RegionWrite):
    """Takes every write for one of whole regions."""

    def gaps(self) -> list[tuple[int, int]]:
        return []


class KeepsBorrowedPayload(Foreground):
    """Keeps a payload that belongs to the submitter."""

    def write(self, bio: Bio) -> None:
        bio.borrowed = False
        super().write(bio)


class BitBeforeCopy(Filler):
    """Sets the bits when the copy is begun."""

    async def hydrate(
        self, begin: int, end: int, pieces: list[Piece], nr_errors: int = 0
    ) -> list[int]:
        if self.regions.is_writable:
            self.regions.set_hydrated(begin, end)
        return await super().hydrate(begin, end, pieces, nr_errors)


class NoLocks(Prison):
    """Grants everything at once."""

    def is_clear(self, begin: int, end: int) -> bool:
        return True

    def maybe_clear_run(self, begin: int, end: int) -> tuple[int, int] | None:
        return begin, end

    def lock(self, begin: int, end: int, granted: Callable[[Cell], None]) -> Cell:
        cell = Cell(begin, end, granted)
        granted(cell)
        return cell

    def release(self, cell: Cell) -> None:
        """Nobody waits."""


def _without_flush(steps: Steps[None]) -> Steps[None]:
    for operation in steps:
        if not isinstance(operation, Flush):
            yield operation


def _without_fua(steps: Steps[None]) -> Steps[None]:
    for operation in steps:
        # Not `isinstance(…, tuple)`: each operation is one, too.
        if isinstance(operation, Read | Write | Flush):
            yield operation
        else:
            yield tuple(
                Write(w.offset, w.data) if isinstance(w, Write) else w
                for w in operation
            )


class LazyDevice(CrashDevice):
    """Carries a deferred bio out some turns of the loop later, not on the next one.

    Only so does a FLUSH overtake a write, and one device's write another device's. It
    also tells its zeroes.
    """

    async def extents(self, offset: int, length: int) -> list[Extent]:
        image = self.image()[offset : offset + length]
        await asyncio.sleep(0)
        return [
            Extent(len(piece), EXTENT_DATA if any(piece) else EXTENT_ZERO)
            for piece in (image[at : at + SECTOR] for at in range(0, length, SECTOR))
        ]

    def _carry_out_one(self) -> None:
        if self._random.random() < 0.8:
            asyncio.get_running_loop().call_soon(self._carry_out_one)
        else:
            super()._carry_out_one()


# Steps of the walks below. A seed that is a multiple of three defers every bio.
QUIET: Step = ("message", 0, 1, False)  # disable_hydration
FLUSH: Step = ("flush", 0, 0, False)
DRAIN: Step = ("drain", 0, 0, False)


def turn(turns: int) -> Step:
    return ("turn", 0, turns % 20, False)


def write(region: int, length: int = REGION_SIZE, *, fua: bool = False) -> Step:
    return ("write", region * REGION_SIZE, length, fua)


def directed_walks() -> Iterator[tuple[int, list[Step]]]:
    """Power cuts all along the places where an order matters."""
    for seed in range(0, 120, 3):
        cut: Step = ("cut_power", seed, 0, False)
        few, many = turn(seed % 7), turn(seed)
        # A FLUSH overtakes a write that hydrates.
        yield seed, [QUIET, write(3), FLUSH, many, many, cut]
        # A plain write and a FLUSH of it while a commit is under way.
        hydrated = [QUIET, write(3), FLUSH, DRAIN]
        late = [write(3, 512), turn(9), FLUSH, turn(19), many, cut]
        yield seed, [*hydrated, write(5), FLUSH, few, *late]
        # FUA to a region whose bit is not durable, and FUA that sets one.
        yield seed, [QUIET, write(3), DRAIN, write(3, 512, fua=True), many, many, cut]
        yield seed, [QUIET, write(3, fua=True), turn(19), many, cut]
        # Two parts of one region at the same time.
        beside: Step = ("write", 3 * REGION_SIZE + 1024, 512, False)
        yield seed, [QUIET, write(3, 512), beside, DRAIN]


def walks() -> Iterator[tuple[int, list[Step]]]:
    yield from directed_walks()
    for seed in range(WALKS_MAX):
        yield seed, draw_walk(seed)


@pytest.fixture(autouse=True)
def lazy_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tests.crash.rigs.CrashDevice", LazyDevice)
    monkeypatch.setattr("nbdtarget.targets.clone.holes.HOLE_BYTES_MIN", SECTOR)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
def test_walks_pass_when_nothing_is_wrong() -> None:
    for seed, steps in walks():
        error = maybe_failure(CloneRig, seed, steps)
        assert error is None, (seed, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "mutant"),
    [
        (TARGET + "Committer", NoDestinationFlush),
        (TARGET + "Committer", CommitBeforeFlush),
        (TARGET + "Committer", SuperblockBeforeJournal),
        (TARGET + "Committer", SuperblockWithoutFua),
        (TARGET + "Committer", FlushRidesOnRunningCommit),
        (TARGET + "Committer", FlushWithoutFlush),
        (TARGET + "Committer", RunningCommitIsClean),
        ("nbdtarget.dm.types.CloneTarget", FlushPassesDown),
        (TARGET + "Foreground", FuaWithoutCommit),
        (TARGET + "Foreground", KeepsBorrowedPayload),
        (FOREGROUND + "RegionWrite", FuaOverwriteWithoutCommit),
        (FOREGROUND + "RegionWrite", BitBeforeOverwrite),
        (FOREGROUND + "RegionWrite", NoCopyOfGaps),
        (TARGET + "Filler", BitBeforeCopy),
        ("nbdtarget.targets.clone.regions.Prison", NoLocks),
    ],
)
def test_crash_machine_catches(
    where: str, mutant: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mutant is FlushPassesDown:
        monkeypatch.setattr(CloneTarget, "_map_flush", FlushPassesDown._map_flush)
    else:
        monkeypatch.setattr(where, mutant)
    assert any(
        maybe_failure(CloneRig, seed, steps) is not None for seed, steps in walks()
    )
