# SPDX-License-Identifier: Apache-2.0
"""Checklist 3.1: FLUSH, FUA and the order of a commit, on exact traces of the devices."""

import errno as errnos
from collections.abc import Callable

import pytest

from nbdtarget.bio import FUA, OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, PENDING, Bio
from nbdtarget.targets import metadata_io
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.clone.superblock import CLONE
from nbdtarget_metadata.log.superblock import read_superblock
from tests.support.clock import settle
from tests.support.clone import REGION, Rig

COPIES = [0, 2 * 4096]  # of one superblock slot; the other is a block further


@pytest.fixture
async def rig() -> Rig:
    """Region 0 is hydrated and committed."""
    rig = await Rig().start()
    rig.bio(OP_WRITE, 0, REGION)
    await rig.disk.flush()
    rig.log.clear()
    return rig


async def generation(rig: Rig) -> int:
    """Return the generation on the metadata device, read from there and not from the target."""
    found = await metadata_io.run(
        rig.metadata.device, read_superblock(CLONE, rig.metadata.size)
    )
    return found.superblock.generation


class Held:
    """Holds every operation back; says what is in flight, and lets it go by name."""

    def __init__(self, rig: Rig) -> None:
        self.spies = {spy.name: spy for spy in (rig.destination, rig.metadata)}
        for spy in self.spies.values():
            spy.hold = True

    async def in_flight(self) -> list[tuple[str, int, int]]:
        await settle()
        return [
            (name, bio.op, bio.flags)
            for name, spy in self.spies.items()
            for bio in spy.held
        ]

    def end(self, name: str) -> None:
        spy = self.spies[name]
        spy.device.submit(spy.held.pop(0))


# When a commit happens


async def test_3_1_flush_with_nothing_changed_is_one_destination_flush(
    rig: Rig,
) -> None:
    before = await generation(rig)
    for _ in range(3):
        rig.bio(OP_WRITE, 0, REGION)
        rig.log.clear()
        assert rig.flush().status == 0, "inline: no task, no wait"
        assert rig.ops() == ["d flush"]
    assert await generation(rig) == before
    await rig.stop()


async def test_3_1_flush_with_changes_is_one_commit(rig: Rig) -> None:
    before = await generation(rig)
    rig.bio(OP_WRITE, REGION, REGION)
    rig.log.clear()
    await rig.disk.flush()
    # One destination flush, one journal record and its flush, two copies of a superblock.
    assert sorted(rig.ops()) == ["d flush", "m flush", "m write", "m write", "m write"]
    assert await generation(rig) == before + 1
    await rig.stop()


async def test_3_1_flushes_run_together_and_the_superblock_after_both(rig: Rig) -> None:
    rig.bio(OP_WRITE, REGION, REGION)
    held = Held(rig)
    flush = rig.flush()
    # The journal's record does not wait for the destination.
    assert await held.in_flight() == [("d", OP_FLUSH, 0), ("m", OP_WRITE, 0)]
    held.end("m")
    assert await held.in_flight() == [("d", OP_FLUSH, 0), ("m", OP_FLUSH, 0)]
    held.end("m")
    assert await held.in_flight() == [("d", OP_FLUSH, 0)], "no superblock yet"
    held.end("d")
    offsets = []
    for _ in COPIES:  # the second only after the first has ended
        assert await held.in_flight() == [("m", OP_WRITE, FUA)]
        assert flush.status == PENDING
        offsets.append(rig.metadata.held[0].offset)
        held.end("m")
    assert offsets in (COPIES, [at + 4096 for at in COPIES])
    await settle()
    assert flush.status == 0
    for spy in held.spies.values():
        spy.let_go()
    await rig.stop()


async def test_3_1_journal_flush_alone_does_not_let_the_superblock_go(rig: Rig) -> None:
    rig.bio(OP_WRITE, REGION, REGION)
    held = Held(rig)
    flush = rig.flush()
    await held.in_flight()
    held.end("d")
    assert await held.in_flight() == [("m", OP_WRITE, 0)]
    held.end("m")
    assert await held.in_flight() == [("m", OP_FLUSH, 0)], "still no superblock"
    held.end("m")
    assert await held.in_flight() == [("m", OP_WRITE, FUA)]
    for spy in held.spies.values():
        spy.let_go()
    await settle()
    assert flush.status == 0
    await rig.stop()


@pytest.mark.parametrize(
    ("when", "commits", "destination_flushes"),
    # A commit that took all changes leaves the others a flush of their own, and no commit.
    [("at once", 1, 1), ("during a commit", 1, 2), ("during a commit, changed", 2, 2)],
)
async def test_3_1_flushes_of_64_clients_ride_on_two_commits_at_most(
    rig: Rig, when: str, commits: int, destination_flushes: int
) -> None:
    before = await generation(rig)
    for nr in range(1, 7):
        rig.bio(OP_WRITE, nr * REGION, REGION)
    rig.log.clear()
    flushes = [rig.flush()]
    if when != "at once":
        rig.destination.hold = True
        await settle()
        rig.destination.hold = False
    if when == "during a commit, changed":
        rig.bio(OP_WRITE, 7 * REGION, REGION)
    flushes += [rig.flush() for _ in range(63)]
    assert {flush.status for flush in flushes} == {PENDING}
    rig.destination.let_go()
    await settle()
    assert {flush.status for flush in flushes} == {0}
    assert await generation(rig) - before == commits
    assert rig.ops().count("d flush") == destination_flushes
    await rig.stop()


async def test_3_1_fua_write_to_a_hydrated_region_commits_only_if_changed(
    rig: Rig,
) -> None:
    assert rig.bio(OP_WRITE, 0, 512, FUA).status == 0
    assert rig.ops() == ["d write"]
    rig.bio(OP_WRITE, REGION, REGION)
    rig.log.clear()
    write = rig.bio(OP_WRITE, 0, 512, FUA)
    await settle()
    assert write.status == 0
    ops = rig.ops()
    assert (ops.count("d flush"), ops[-1]) == (1, "d write")
    await rig.stop()


async def test_3_1_fua_overwrite_always_commits(rig: Rig) -> None:
    before = await generation(rig)
    write = rig.bio(OP_WRITE, REGION, REGION, FUA)
    await settle()
    assert write.status == 0
    assert await generation(rig) == before + 1
    await rig.stop()


async def test_3_1_time_commits_a_second_after_the_change_and_never_idly(
    rig: Rig,
) -> None:
    before = await generation(rig)
    rig.clock.advance(10)
    await settle()
    assert rig.log == []
    rig.bio(OP_WRITE, REGION, REGION)
    rig.clock.advance(0.99)
    await settle()
    assert await generation(rig) == before
    rig.clock.advance(0.02)
    await settle()
    assert await generation(rig) == before + 1
    await rig.stop()


@pytest.mark.parametrize(
    ("how", "commits"),
    [("status", 1), ("noflush", 0), ("suspended", 0), ("read-only", 0)],
)
async def test_3_1_status_commits_unless(rig: Rig, how: str, commits: int) -> None:
    if how == "read-only":
        rig.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
        rig.bio(OP_WRITE, 2 * REGION, REGION, FUA)
        await settle()
        rig.metadata.fails = lambda _: 0
    before = await generation(rig)
    rig.bio(OP_WRITE, REGION, REGION)
    if how == "suspended":
        await rig.suspend()
        before = await generation(rig)
        rig.target._metadata.set_hydrated(5, 6)
    await rig.target.status(noflush=how == "noflush")
    assert await generation(rig) - before == commits
    if how != "suspended":
        await rig.suspend()
    await rig.target.dtr()


async def test_3_1_suspend_commits_after_all_hydrations_have_ended(rig: Rig) -> None:
    before = await generation(rig)
    rig.source.hold = True
    write = rig.bio(OP_WRITE, REGION, 512)
    rig.target.presuspend()
    rig.source.let_go()
    assert write.status == 0
    await rig.target.postsuspend()
    assert await generation(rig) == before + 1
    assert not rig.target._metadata.changed
    await rig.target.dtr()


# Steps


async def test_3_1_step_1_nothing_changed_leaves_the_destination_unflushed(
    rig: Rig,
) -> None:
    assert await rig.target._committer.commit()
    assert rig.log == []
    await rig.stop()


async def test_3_1_step_2_read_only_metadata_is_not_committed(rig: Rig) -> None:
    rig.bio(OP_WRITE, REGION, REGION)
    rig.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
    assert not await rig.target._committer.commit()
    rig.metadata.fails = lambda _: 0
    rig.log.clear()
    assert not await rig.target._committer.commit()
    assert rig.log == []
    await rig.stop()


async def test_3_1_step_3_what_is_hydrated_during_a_commit_belongs_to_the_next(
    rig: Rig,
) -> None:
    rig.bio(OP_WRITE, REGION, REGION)
    held = Held(rig)
    rig.flush()
    await held.in_flight()
    rig.destination.hold = False
    rig.bio(OP_WRITE, 2 * REGION, REGION)
    for spy in held.spies.values():
        spy.let_go()
    await settle()
    steps = CloneMetadata.open(
        device_size=rig.metadata.size, region_size=REGION, target_size=rig.size
    )
    opened = await metadata_io.run(rig.metadata.device, steps)
    assert (opened.hydrated.to01(), rig.target._metadata.changed) == ("11000000", True)
    await rig.stop()


async def test_3_1_step_6_completion_raises_one_event(rig: Rig) -> None:
    # The kernel raises one for each later commit too. See 14.16.
    rig.bio(OP_WRITE, 0, rig.size)
    assert rig.ctx.nr_events == 0
    await rig.disk.flush()
    assert rig.ctx.nr_events == 1
    await rig.disk.flush()
    await rig.target.status()
    assert rig.ctx.nr_events == 1
    await rig.stop()


# Failure


def failing(op: int) -> Callable[[Bio], int]:
    return lambda bio: errnos.EIO if bio.op == op else 0


@pytest.mark.parametrize(
    ("device", "op"),
    [("d", OP_FLUSH), ("m", OP_WRITE), ("m", OP_FLUSH)],
    ids=["destination flush", "metadata write", "metadata flush"],
)
async def test_3_1_failed_commit_reverts_goes_read_only_and_fails_what_waits(
    rig: Rig, device: str, op: int
) -> None:
    waits = rig.bio(OP_WRITE, REGION, REGION, FUA)
    plain = rig.bio(OP_WRITE, 2 * REGION, REGION)
    (rig.destination if device == "d" else rig.metadata).fails = failing(op)
    flush, fua = rig.flush(), rig.bio(OP_WRITE, 0, 512, FUA)
    await settle()
    assert [bio.status for bio in (waits, plain, flush, fua)] == [
        errnos.EIO,
        0,
        errnos.EIO,
        errnos.EIO,
    ]
    rig.destination.fails = rig.metadata.fails = lambda _: 0
    status = (await rig.target.status()).split()
    assert (status[3], status[-1], rig.ctx.nr_events) == ("1/8", "ro", 1)
    # Regions hydrated since the last good commit are the source's again.
    assert await rig.disk.read(REGION, 2 * REGION) == (rig.content[REGION : 3 * REGION])
    # For good: what "succeeds" now would prove nothing.
    assert rig.flush().status == errnos.EIO
    assert rig.bio(OP_WRITE, 0, 512, FUA).status == errnos.EIO
    assert rig.bio(OP_WRITE, 0, 512).status == 0
    assert rig.bio(OP_READ, 0, 512).status == 0
    assert rig.bio(OP_WRITE, REGION, REGION).status == errnos.EIO
    await rig.stop()


async def test_3_1_unreadable_metadata_is_fail_and_stays_so(rig: Rig) -> None:
    rig.bio(OP_WRITE, REGION, REGION)
    rig.metadata.fails = lambda _: errnos.EIO
    flush = rig.flush()
    await settle()
    assert flush.status == errnos.EIO
    rig.metadata.fails = lambda _: 0
    assert await rig.target.status() == "Fail"
    assert rig.bio(OP_READ, 0, 512).status == errnos.EIO
    assert rig.ctx.nr_events == 1
    await rig.stop()


async def test_3_1_only_a_new_table_returns_to_rw(rig: Rig) -> None:
    rig.bio(OP_WRITE, REGION, REGION)
    rig.metadata.fails = failing(OP_WRITE)
    rig.flush()
    await settle()
    rig.metadata.fails = lambda _: 0
    await rig.stop()
    await rig.restart()
    assert (await rig.target.status()).endswith(" rw")
    assert await rig.hydrated() == "1/8"
    assert rig.bio(OP_WRITE, REGION, REGION, FUA).status == PENDING
    await settle()
    assert await rig.hydrated() == "2/8"
    await rig.stop()


# After a commit


async def test_3_1_flush_is_not_sent_again_after_the_commit_that_flushed(
    rig: Rig,
) -> None:
    rig.bio(OP_WRITE, REGION, REGION)
    rig.log.clear()
    await rig.disk.flush()
    assert rig.ops().count("d flush") == 1
    await rig.stop()


async def test_3_1_flush_is_passed_down_after_a_commit_that_found_nothing(
    rig: Rig,
) -> None:
    rig.bio(OP_WRITE, REGION, REGION)
    rig.log.clear()
    rig.destination.hold = True
    rig.target._committer.start_commit()
    await settle()
    flush = rig.flush()  # while that one runs: it must not ride on it
    rig.destination.let_go()
    await settle()
    assert flush.status == 0
    assert rig.ops().count("d flush") == 2
    await rig.stop()


async def test_3_1_discard_is_covered_by_the_commit_that_follows(rig: Rig) -> None:
    before = await generation(rig)
    assert rig.bio(OP_DISCARD, REGION, 2 * REGION).status == 0
    await rig.disk.flush()
    assert await generation(rig) == before + 1
    assert rig.bio(OP_DISCARD, REGION, 2 * REGION).status == 0
    await rig.disk.flush()
    assert await generation(rig) == before + 1
    await rig.stop()
