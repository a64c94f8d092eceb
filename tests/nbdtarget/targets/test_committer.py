# SPDX-License-Identifier: Apache-2.0
"""Group commit, on metadata that is only a list of what was done."""

import asyncio
import errno as errnos
from collections.abc import Callable

import pytest

from nbdtarget.bio import OP_FLUSH, OP_READ, OP_WRITE, Bio
from nbdtarget.targets.committer import Committer
from nbdtarget_metadata.errors import FailedMetadata
from nbdtarget_metadata.operations import Flush, Steps, Write
from tests.support.clock import SimClock, settle
from tests.support.devices import CrashDevice
from tests.support.patience import PATIENCE_S
from tests.support.spy import Spy

JOURNAL, SUPERBLOCK, SNAPSHOT = 4096, 0, 8192


class FakeMetadata:
    """Counts changes; a transaction takes all of them."""

    def __init__(self) -> None:
        self.nr_changes = 0
        self.committed: list[int] = []
        self.clean: list[bool] = []
        self.in_transaction = 0
        self.needs_compaction = False
        self.aborted = False
        self.failed = False

    @property
    def changed(self) -> bool:
        return bool(self.nr_changes or self.in_transaction or self.aborted)

    def pre_commit(self, *, clean_shutdown: bool = False) -> "FakeTransaction | None":
        if self.failed:
            raise FailedMetadata
        assert not self.in_transaction
        if not self.nr_changes and not clean_shutdown:
            return None
        self.clean.append(clean_shutdown)
        self.in_transaction, self.nr_changes = self.nr_changes, 0
        return FakeTransaction(self)

    def compact(self) -> Steps[None]:
        self.needs_compaction = False
        yield Write(SNAPSHOT, bytes(512))

    def abort(self) -> None:
        assert not self.failed
        self.aborted = True
        self.in_transaction = self.nr_changes = 0

    def fail(self) -> None:
        self.failed = True


class FakeTransaction:
    def __init__(self, metadata: FakeMetadata) -> None:
        self.metadata = metadata

    def journal(self) -> Steps[None]:
        yield Write(JOURNAL, bytes(512))
        yield Flush()

    def superblock(self) -> Steps[None]:
        yield Write(SUPERBLOCK, bytes(512), True)

    def done(self) -> None:
        self.metadata.committed.append(self.metadata.in_transaction)
        self.metadata.in_transaction = 0


class Rig:
    def __init__(
        self, *, aborts_on_loss: bool = False, backing: list[Spy] | None = None
    ) -> None:
        self.log: list[tuple[str, str, int, int]] = []
        self.device = Spy(CrashDevice(1 << 14, name="m"), self.log)
        self.backing = backing or [
            Spy(CrashDevice(512, name=name), self.log) for name in ("a", "b")
        ]
        self.metadata = FakeMetadata()
        self.clock = SimClock()
        self.nr_committed = 0
        self.nr_failed = 0
        self.nr_blamed = 0
        self.committer = Committer(
            "c",
            self.metadata,
            self.device,
            self.backing,
            self.clock,
            committed=self._committed,
            failed=self._failed,
            metadata_failed=self._blamed,
            aborts_on_loss=aborts_on_loss,
        )

    def change(self) -> None:
        self.metadata.nr_changes += 1
        self.committer.note_change()

    def flush(self) -> Bio:
        bio = Bio(OP_FLUSH, 0, 0, None, 0, lambda _: None)
        self.committer.flush(bio)
        return bio

    def ops(self) -> list[str]:
        names = {JOURNAL: " journal", SUPERBLOCK: " superblock", SNAPSHOT: " snapshot"}
        ops = [
            device + (f" {op}" if op in ("flush", "read") else names[offset])
            for device, op, offset, _ in self.log
        ]
        self.log.clear()
        return ops

    def _committed(self) -> None:
        self.nr_committed += 1

    def _failed(self) -> None:
        self.nr_failed += 1

    def _blamed(self) -> None:
        self.nr_blamed += 1


async def test_commit_order() -> None:
    rig = Rig()
    rig.change()
    assert not rig.committer.is_clean
    assert await rig.committer.commit()
    assert rig.ops() == ["a flush", "b flush", "m journal", "m flush", "m superblock"]
    assert rig.metadata.committed == [1]
    assert rig.committer.is_clean


@pytest.mark.parametrize("late", [0, 1, 2])
async def test_superblock_waits_for_every_flush(late: int) -> None:
    rig = Rig()
    devices = [*rig.backing, rig.device]
    devices[late].hold = True
    rig.change()
    flush = rig.flush()
    await settle()
    assert "m superblock" not in rig.ops()
    assert flush.status < 0
    devices[late].let_go()
    await settle()
    assert flush.status == 0
    assert rig.metadata.committed == [1]


async def test_all_waiting_callers_share_one_commit() -> None:
    rig = Rig()
    rig.change()
    flushes = [rig.flush() for _ in range(5)]
    told: list[int] = []
    rig.committer.after_commit(told.append)
    await settle()
    assert [flush.status for flush in flushes] == [0] * 5
    assert told == [0]
    assert rig.ops().count("m superblock") == 1


async def test_flush_during_a_commit_gets_a_flush_of_its_own() -> None:
    rig = Rig()
    rig.change()
    rig.backing[0].hold = True
    first = rig.flush()
    await settle()
    late = [rig.flush(), rig.flush()]
    rig.backing[0].let_go()
    await settle()
    assert first.status == 0
    assert [flush.status for flush in late] == [0, 0]
    # One commit, then one flush of each device for both late ones.
    assert rig.ops()[-3:] == ["m superblock", "a flush", "b flush"]


async def test_change_during_a_commit_belongs_to_the_next() -> None:
    rig = Rig()
    rig.change()
    rig.backing[0].hold = True
    rig.flush()
    await settle()
    rig.change()
    rig.change()
    told: list[int] = []
    rig.committer.after_commit(told.append)
    rig.backing[0].let_go()
    await settle()
    assert rig.metadata.committed == [1, 2]
    assert told == [0]


async def test_period_starts_with_the_first_change_and_ends_with_a_commit() -> None:
    rig = Rig()
    rig.change()
    rig.clock.advance(0.7)
    rig.change()
    rig.clock.advance(0.4)
    await settle()
    assert rig.metadata.committed == [2]
    rig.clock.advance(10)
    await settle()
    assert rig.metadata.committed == [2]
    rig.change()
    assert await rig.committer.commit()
    rig.clock.advance(10)
    await settle()
    assert rig.metadata.committed == [2, 1]


async def test_clean_shutdown_is_said_once() -> None:
    rig = Rig()
    assert await rig.committer.commit(clean_shutdown=True)
    rig.change()
    assert await rig.committer.commit()
    await rig.committer.quiesce()
    assert rig.metadata.clean == [True, False]


async def test_commit_of_nothing_does_nothing() -> None:
    rig = Rig()
    assert await rig.committer.commit()
    assert rig.ops() == []


def fail(op: int) -> Callable[[Bio], int]:
    return lambda bio: errnos.EIO if bio.op == op else 0


@pytest.mark.parametrize("device", [0, 1, 2])
@pytest.mark.parametrize("op", [OP_FLUSH, OP_WRITE])
async def test_failure_aborts_and_is_final(device: int, op: int) -> None:
    rig = Rig()
    if op == OP_WRITE and device < 2:
        return  # nothing is written there
    failing = [*rig.backing, rig.device][device]
    failing.fails = fail(op)
    rig.change()
    flush = rig.flush()
    told: list[int] = []
    rig.committer.after_commit(told.append)
    await settle()
    assert flush.status == errnos.EIO
    assert told == [errnos.EIO]
    assert rig.metadata.aborted
    assert not rig.metadata.failed
    assert rig.nr_failed == 1
    failing.fails = lambda _: 0
    rig.log.clear()
    assert rig.flush().status < 0
    assert not await rig.committer.commit()
    assert rig.ops() == []
    await rig.committer.quiesce()


async def test_superblock_is_not_written_after_a_failed_flush() -> None:
    rig = Rig()
    rig.backing[1].fails = fail(OP_FLUSH)
    rig.change()
    assert not await rig.committer.commit()
    assert "m superblock" not in rig.ops()


async def test_unreadable_metadata_fails_for_good() -> None:
    rig = Rig()
    rig.device.fails = lambda bio: errnos.EIO if bio.op in (OP_READ, OP_WRITE) else 0
    rig.change()
    assert not await rig.committer.commit()
    assert rig.metadata.failed
    assert rig.nr_failed == 1


async def test_failed_flush_without_changes_is_only_that() -> None:
    rig = Rig()
    rig.backing[0].fails = lambda _: errnos.ENOSPC
    flush = rig.flush()
    await settle()
    assert flush.status == errnos.ENOSPC
    assert not rig.committer.has_failed


async def test_only_the_metadata_device_is_blamed_for_what_it_did() -> None:
    for failing, op in ((0, OP_FLUSH), (2, OP_FLUSH), (2, OP_WRITE)):
        rig = Rig()
        [*rig.backing, rig.device][failing].fails = fail(op)
        rig.change()
        assert not await rig.committer.commit()
        assert rig.nr_blamed == (failing == 2)
        assert rig.committer.last_error is not None
        assert rig.committer.last_error.startswith("commit: ")


@pytest.mark.parametrize("lost", [0, 1, 2])
async def test_no_commit_after_a_device_says_that_it_may_have_lost_data(
    lost: int,
) -> None:
    """It goes on, as a server does that was connected to again; but its last flush did not cover all."""
    rig = Rig()
    rig.change()
    [*rig.backing, rig.device][lost].health.note_loss()
    flush = rig.flush()
    await settle()
    assert flush.status == errnos.EIO
    assert rig.metadata.committed == []
    assert rig.metadata.aborted


async def test_loss_while_a_commit_runs_aborts_it_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The journal hangs; what is in core alone is lost meanwhile, and must not be read."""
    rig = Rig()
    rig.committer._rests_on_unflushed = lambda lost: rig.metadata.changed
    rig.committer.watch()
    aborted = []

    def hanging_journal(transaction: FakeTransaction) -> Steps[None]:
        yield Write(JOURNAL, bytes(512))
        rig.metadata.nr_changes += 1
        rig.backing[0].health.note_loss()
        aborted.append(rig.metadata.aborted)
        yield Flush()

    monkeypatch.setattr(FakeTransaction, "journal", hanging_journal)
    rig.change()
    flush = rig.flush()
    await settle()
    assert aborted == [True]
    assert flush.status == errnos.EIO
    assert not any("superblock" in op for op in rig.ops())
    assert rig.nr_failed == 1


@pytest.mark.parametrize("aborts", [False, True])
async def test_loss_without_changes_fails_one_flush(aborts: bool) -> None:
    rig = Rig(aborts_on_loss=aborts)
    rig.backing[0].health.note_loss()
    first = rig.flush()
    await settle()
    assert first.status == errnos.EIO
    assert rig.metadata.aborted == aborts
    second = rig.flush()
    await settle()
    assert second.status == (errnos.EIO if aborts else 0)


async def test_loss_before_the_table_is_no_news() -> None:
    rig = Rig()
    rig.backing[0].health.note_loss()
    late = Rig(backing=rig.backing)
    late.change()
    assert await late.committer.commit()


async def test_compaction_runs_beside_commits() -> None:
    rig = Rig()
    rig.metadata.needs_compaction = True
    rig.change()
    assert await rig.committer.commit()
    rig.device.hold = True
    await settle()
    quiescing = asyncio.ensure_future(rig.committer.quiesce())
    await settle()
    assert not quiescing.done()
    rig.device.let_go()
    await quiescing
    assert rig.ops()[-1] == "m snapshot"


async def test_failed_compaction_aborts_after_the_commit_under_way() -> None:
    rig = Rig()
    rig.metadata.needs_compaction = True
    rig.device.fails = lambda bio: errnos.EIO if bio.offset == SNAPSHOT else 0
    rig.change()
    assert await rig.committer.commit()
    rig.backing[0].hold = True
    rig.change()
    flush = rig.flush()
    await settle()
    assert not rig.metadata.aborted
    rig.backing[0].let_go()
    await settle()
    assert flush.status == 0
    assert rig.metadata.aborted
    assert rig.nr_failed == 1


async def test_unexpected_exception_fails_all_waiting_callers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = Rig()
    rig.metadata.in_transaction = 1  # pre_commit asserts
    rig.metadata.nr_changes = 1
    flush = rig.flush()
    await settle()
    assert flush.status == errnos.EIO
    assert rig.metadata.failed
    assert rig.nr_failed == 1
    assert "AssertionError" in caplog.text


async def test_cancelled_waiter_does_not_disturb_the_others() -> None:
    # A client that has asked for a status may go away, and SIGTERM cancels the task that watches progress.
    rig = Rig()
    rig.device.hold = True
    rig.change()
    waiter = asyncio.ensure_future(rig.committer.commit())
    flush = rig.flush()
    await settle()
    waiter.cancel()
    await settle()
    rig.device.let_go()
    await settle()
    assert flush.status == 0
    assert not rig.metadata.failed
    assert rig.metadata.committed == [1]


async def test_compaction_that_fails_after_a_failed_commit_ends() -> None:
    # Both writes were under way when the disk died: the loop must not turn for ever.
    rig = Rig()
    rig.change()
    rig.metadata.needs_compaction = True
    assert await rig.committer.commit()
    rig.device.hold = True
    await settle()
    rig.change()
    flush = rig.flush()
    rig.backing[0].fails = lambda _: errnos.EIO
    await settle()
    (snapshot,) = [bio for bio in rig.device.held if bio.offset == SNAPSHOT]
    rig.device.held.remove(snapshot)
    rig.device.let_go()
    await settle()
    assert flush.status == errnos.EIO
    snapshot.end(errnos.EIO)
    async with asyncio.timeout(PATIENCE_S):
        await rig.committer.quiesce()
    assert rig.committer.has_failed


@pytest.mark.parametrize("nr_bad", [1, 2])
async def test_all_callers_are_answered_when_a_callback_raises(
    caplog: pytest.LogCaptureFixture, nr_bad: int
) -> None:
    rig = Rig()

    def broken(errno: int) -> None:
        raise AssertionError(f"told {errno}")

    told: list[int] = []
    rig.change()
    for _ in range(nr_bad):
        rig.committer.after_commit(broken)
    rig.committer.after_commit(told.append)
    flush = rig.flush()
    await settle()
    assert told == [errnos.EIO]
    assert flush.status == errnos.EIO
    assert "AssertionError: told" in caplog.text
    assert rig.metadata.failed


async def test_callback_that_asks_again_and_again_does_not_keep_the_loop_busy() -> None:
    rig = Rig()
    nr_asked = 0

    def ask_again(_: int) -> None:
        nonlocal nr_asked
        nr_asked += 1
        if nr_asked < 10_000:
            rig.committer.after_commit(ask_again)

    rig.committer.after_commit(ask_again)
    for _ in range(20):
        await asyncio.sleep(0)
    assert 0 < nr_asked < 100
    (commit,) = rig.committer._tasks
    commit.cancel()
    await settle()
    assert nr_asked >= 10_000  # told that it failed, each time
