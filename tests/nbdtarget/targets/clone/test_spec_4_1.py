# SPDX-License-Identifier: Apache-2.0
"""Checklist 4.1: background hydration: when it starts, how much, and what it makes of failure."""

import errno as errnos
from collections.abc import Callable

import pytest

from nbdtarget.bio import OP_DISCARD, OP_READ, OP_WRITE
from tests.support.clock import settle
from tests.support.clone import REGION, Rig


async def pass_time(rig: Rig, seconds: float, step: float = 0.05) -> None:
    for _ in range(round(seconds / step)):
        await settle(20)
        rig.clock.advance(step)
    await settle(20)


async def make(words: str = "8 1 no_hydration", regions: int = 16) -> Rig:
    return await Rig(size=regions * REGION, words=words).start()


def copies(rig: Rig) -> list[tuple[int, int]]:
    """The regions, (first, number), that were read from the source."""
    return [
        (at // REGION, -(-n // REGION))
        for device, op, at, n in rig.log
        if (device, op) == ("s", "read")
    ]


async def say(rig: Rig, line: str) -> None:
    await rig.target.message(line.split())


# Start conditions


async def read_only(rig: Rig) -> None:
    rig.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
    rig.bio(OP_WRITE, 0, REGION)
    assert (await rig.target.status()).endswith(" ro")


async def done(rig: Rig) -> None:
    rig.bio(OP_DISCARD, 0, rig.size)
    await rig.disk.flush()


async def suspended(rig: Rig) -> None:
    await rig.suspend()


async def disabled(rig: Rig) -> None:
    await say(rig, "disable_hydration")


async def threshold_0(rig: Rig) -> None:
    await say(rig, "hydration_threshold 0")


@pytest.mark.parametrize("state", [read_only, done, suspended, disabled, threshold_0])
async def test_4_1_nothing_starts_when(state: Callable[[Rig], object]) -> None:
    rig = await make()
    await state(rig)  # type: ignore[misc]
    rig.log.clear()
    if state is not disabled:
        await say(rig, "enable_hydration")
    await pass_time(rig, 3)
    assert copies(rig) == []
    rig.metadata.fails = lambda _: 0
    await rig.suspend()
    await rig.target.dtr()


async def test_4_1_client_io_slows_it_and_does_not_stop_it() -> None:
    # The kernel starts nothing while any bio is in flight: a busy disk is never hydrated.
    rig = await make("8 0 4 hydration_threshold 8 hydration_batch_size 2", 64)
    rig.source.hold = True
    read = rig.bio(OP_READ, 63 * REGION, REGION)
    await settle()
    held = [bio for bio in rig.source.held if bio.offset == 63 * REGION]
    assert held
    assert read.status < 0
    for _ in range(400):
        for bio in [bio for bio in rig.source.held if bio not in held]:
            rig.source.held.remove(bio)
            rig.source.device.submit(bio)
        await settle(5)
        rig.clock.advance(0.01)
    assert await rig.hydrated() == "64/64"
    rig.source.let_go()
    assert read.status == 0
    await rig.stop()


# Who wakes it


@pytest.mark.parametrize("line", ["enable_hydration", "hydration_threshold 4"])
async def test_4_1_message_wakes_it(line: str) -> None:
    rig = await make("8 0 2 hydration_threshold 0")
    await say(rig, "hydration_threshold 0")
    if line == "enable_hydration":
        await say(rig, "disable_hydration")
        await say(rig, "hydration_threshold 4")
    await settle()
    assert copies(rig) == []
    await say(rig, line)
    await settle(3)
    assert copies(rig)
    await settle(300)
    assert await rig.hydrated() == "16/16"
    await rig.stop()


async def test_4_1_end_of_client_io_wakes_it_soon() -> None:
    # The kernel's timer needs up to a second.
    rig = await make("8")
    rig.source.hold = True
    await settle()
    rig.bio(OP_READ, 0, REGION)
    rig.source.let_go()
    await pass_time(rig, 0.5, step=0.005)
    assert await rig.hydrated() == "16/16"
    await rig.stop()


# The loop


@pytest.mark.parametrize("threshold", [1, 3, 8])
async def test_4_1_step_1_foreground_copies_count_against_the_threshold(
    threshold: int,
) -> None:
    rig = await make()
    rig.source.hold = True
    for nr in range(2):
        rig.bio(OP_WRITE, (14 + nr) * REGION + 512, 512)
    foreground = len(rig.source.held) // 2  # a gap before it and one behind
    rig.clock.advance(1)
    await say(rig, f"hydration_threshold {threshold}")
    await say(rig, "enable_hydration")
    await pass_time(rig, 0.2)
    # The first one alone, as a client was here a moment ago; then as many as may.
    for bio in [bio for bio in rig.source.held if bio.offset < 14 * REGION]:
        rig.source.held.remove(bio)
        rig.source.device.submit(bio)
    await pass_time(rig, 0.2)
    background = {bio.offset // REGION for bio in rig.source.held} - {14, 15}
    assert len(background) == max(0, threshold - foreground)
    rig.source.let_go()
    await pass_time(rig, 1)
    await rig.stop()


async def test_4_1_step_2_hydrated_and_busy_regions_are_skipped() -> None:
    rig = await make(regions=8)
    rig.bio(OP_WRITE, REGION, REGION)
    rig.source.hold = True
    rig.bio(OP_WRITE, 3 * REGION, 512)
    busy = rig.source.held[:]
    rig.source.held.clear()
    rig.source.hold = False
    rig.clock.advance(1)
    rig.log.clear()
    await say(rig, "hydration_threshold 4")
    await say(rig, "enable_hydration")
    await pass_time(rig, 0.2)
    assert [first for first, _ in copies(rig)] == [0, 2, 4, 5, 6, 7]
    for bio in busy:
        rig.source.device.submit(bio)
    await settle()
    assert await rig.hydrated() == "8/8"
    await rig.stop()


async def test_4_1_step_3_batch_is_adjacent_regions_only() -> None:
    rig = await make("8 1 no_hydration 4 hydration_threshold 8 hydration_batch_size 8")
    for nr in (3, 9):
        rig.bio(OP_WRITE, nr * REGION, REGION)
    rig.clock.advance(1)
    rig.log.clear()
    await say(rig, "enable_hydration")
    await pass_time(rig, 0.2)
    assert copies(rig) == [(0, 3), (4, 5), (10, 6)]
    await rig.stop()


@pytest.mark.parametrize("batch", [0, 1])
async def test_4_1_step_3_batch_of_at_most_one_is_issued_at_once(batch: int) -> None:
    rig = await make(f"8 0 4 hydration_threshold 4 hydration_batch_size {batch}", 4)
    await settle(100)
    assert copies(rig) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    await rig.stop()


async def test_4_1_step_3_batch_is_bounded_by_the_threshold() -> None:
    rig = await make("8 0 4 hydration_threshold 4 hydration_batch_size 64")
    await settle(200)
    assert copies(rig) == [(0, 4), (4, 4), (8, 4), (12, 4)]
    await rig.stop()


async def test_4_1_step_4_offset_begins_at_0_and_goes_round() -> None:
    rig = await make("8", 4)
    rig.source.fails = lambda bio: errnos.EIO if bio.offset == REGION else 0
    await pass_time(rig, 0.2)
    assert [first for first, _ in copies(rig)] == [0, 1, 2, 3]
    rig.source.fails = lambda _: 0
    rig.log.clear()
    await pass_time(rig, 3)
    assert copies(rig) == [(1, 1)]
    assert await rig.hydrated() == "4/4"
    await rig.stop()


# The copy


async def test_4_1_copy_is_one_job_for_a_batch_shortened_at_the_tail() -> None:
    rig = Rig(
        size=3 * REGION + 512,
        words="8 0 4 hydration_threshold 9 hydration_batch_size 9",
    )
    await rig.start()
    await settle(100)
    assert [(op, at, n) for d, op, at, n in rig.log if d != "m"] == [
        ("read", 0, rig.size),
        ("write", 0, rig.size),
        ("flush", 0, 0),
    ]
    await rig.stop()


async def test_4_1_success_sets_the_bits_then_issues_the_queued_writes() -> None:
    rig = await make("8 0 4 hydration_threshold 2 hydration_batch_size 2", 2)
    rig.source.hold = True
    await settle()
    write = rig.bio(OP_WRITE, REGION, 512)
    assert write.status < 0
    rig.log.clear()
    rig.source.let_go()
    await settle()
    assert write.status == 0
    data = [(at, n) for d, op, at, n in rig.log if (d, op) == ("d", "write")]
    assert data == [(0, 2 * REGION), (REGION, 512)]
    await rig.stop()


async def test_4_1_last_hydration_wakes_suspend() -> None:
    rig = await make("8 0 2 hydration_threshold 4")
    rig.source.hold = True
    await settle()
    rig.target.presuspend()
    assert len(rig.source.held) == 4
    rig.source.let_go()
    await rig.target.postsuspend()
    assert await rig.hydrated() == "4/16"
    await pass_time(rig, 2)
    assert await rig.hydrated() == "4/16"
    await rig.target.dtr()


# The end


async def test_4_1_reads_never_promote_a_region() -> None:
    rig = await make("8 0 2 hydration_threshold 1")
    rig.source.hold = True
    await settle()
    rig.source.hold = False
    rig.bio(OP_READ, 9 * REGION, REGION)
    rig.log.clear()
    rig.source.let_go()
    await pass_time(rig, 2)
    assert [first for first, _ in copies(rig)] == list(range(1, 16))
    await rig.stop()


async def test_4_1_completion_is_status_first_and_the_event_at_the_commit() -> None:
    rig = await make("8", 4)
    rig.destination.hold = True
    while await rig.hydrated() != "4/4":
        await settle(1)
        for bio in [b for b in rig.destination.held if b.op == OP_WRITE]:
            rig.destination.held.remove(bio)
            rig.destination.device.submit(bio)
    assert rig.ctx.nr_events == 0
    await settle()
    rig.destination.let_go()
    await settle()
    assert rig.ctx.nr_events == 1
    await rig.stop()


async def test_4_1_full_bitmap_is_done_when_opened() -> None:
    rig = await make()
    rig.bio(OP_WRITE, 0, rig.size)
    await rig.stop()
    await rig.restart()
    assert rig.target._is_hydrated
    assert rig.ctx.nr_events == 1, "not once more"
    rig.bio(OP_READ, 0, REGION)
    assert rig.ops() == ["d read"]
    await rig.stop()


async def test_4_1_users_recipe() -> None:
    # Create with no_hydration, trim what is unused, enable, wait for the event, suspend, and
    # the destination stands for itself.
    rig = await make()
    unused = (5 * REGION, 8 * REGION)
    rig.bio(OP_DISCARD, unused[0], unused[1] - unused[0])
    rig.log.clear()
    await say(rig, "enable_hydration")
    await pass_time(rig, 1)
    assert (await rig.hydrated(), rig.ctx.nr_events) == ("16/16", 1)
    assert [first for first, _ in copies(rig)] == [*range(5), *range(8, 16)]
    await rig.suspend()
    for begin, end in ((0, unused[0]), (unused[1], rig.size)):
        copied = await rig.destination.device.read(begin, end - begin)
        assert copied == rig.content[begin:end]
    await rig.target.dtr()
