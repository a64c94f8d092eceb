# SPDX-License-Identifier: Apache-2.0
"""Checklist 14: the kernel's weaknesses that a clone could have, by number. Ours must not."""

import errno as errnos

import pytest

from nbdtarget.bio import FUA, OP_DISCARD, OP_READ, OP_WRITE, PENDING
from nbdtarget.common.errors import ConstructorError
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget_metadata.clone.metadata import CloneMetadata
from tests.support.clock import settle
from tests.support.clone import REGION, Rig
from tests.support.dm import make_registry


async def pass_time(rig: Rig, seconds: float, step: float = 0.05) -> None:
    for _ in range(round(seconds / step)):
        await settle(20)
        rig.clock.advance(step)
    await settle(20)


# 6: a discard during a copy of the same region


@pytest.mark.parametrize("copy", ["background", "part write", "batch"])
async def test_14_6_write_after_a_discard_is_not_overtaken_by_a_copy(
    copy: str,
) -> None:
    batch = "4 hydration_threshold 4 hydration_batch_size 4"
    rig = Rig(words=f"8 1 no_hydration {batch if copy == 'batch' else '0'}")
    await rig.start()
    rig.source.hold = True
    if copy == "part write":
        rig.bio(OP_WRITE, 512, 512)
    else:
        await rig.target.message(["enable_hydration"])
        await settle()
    assert rig.source.held, "the copy is under way"
    discard = rig.bio(OP_DISCARD, 0, 2 * REGION)
    write = rig.bio(OP_WRITE, 0, REGION)
    assert (discard.status, write.status) == (PENDING, PENDING)
    await rig.target.message(["disable_hydration"])
    rig.source.let_go()
    await settle()
    assert (discard.status, write.status) == (0, 0)
    assert await rig.disk.read(0, REGION) == b"w" * REGION
    await rig.disk.flush()
    assert await rig.destination.device.read(0, REGION) == b"w" * REGION
    await rig.stop()


async def test_14_6_copy_does_not_begin_while_a_discard_is_under_way() -> None:
    rig = await Rig().start()
    rig.destination.hold = True
    discard = rig.bio(OP_DISCARD, 0, 2 * REGION)
    await rig.target.message(["hydration_threshold", "8"])
    await rig.target.message(["enable_hydration"])
    await pass_time(rig, 0.2)
    copied = {bio.offset // REGION for bio in rig.destination.held} - {0}
    assert discard.status == PENDING
    assert not copied & {0, 1}
    rig.destination.let_go()
    await pass_time(rig, 2)
    reads = {at // REGION for d, op, at, _ in rig.log if (d, op) == ("s", "read")}
    assert reads == set(range(2, 8))
    await rig.stop()


# 7: two tables with private copies of one metadata


async def test_14_7_live_and_inactive_table_have_one_metadata() -> None:
    rig = await Rig().start()
    live = rig.target
    inactive = await CloneTarget.ctr(rig.ctx, rig.words)
    assert inactive._metadata is live._metadata
    rig.bio(OP_WRITE, 0, REGION)
    await rig.suspend()
    inactive.resume()
    await live.dtr()
    assert (await inactive.status()).split()[3] == "1/8"
    inactive.presuspend()
    await inactive.postsuspend()
    await inactive.dtr()


@pytest.mark.parametrize(
    "line",
    ["clone /m /d2 /s 8", "clone /m2 /d /s 8", "clone /m /d /s 8", "linear /d 0"],
)
async def test_14_7_second_user_of_metadata_or_destination_is_refused(
    line: str,
) -> None:
    size = CloneMetadata.device_size_for(8)
    data = 8 * REGION
    registry, _ = make_registry(m=size, m2=size, d=data, d2=data, s=data)
    await registry.create("one", "0 64 clone /m /d /s 8 1 no_hydration")
    with pytest.raises(ConstructorError, match="in use by one"):
        await registry.create("two", f"0 64 {line}")
    await registry.close()


@pytest.mark.parametrize("line", ["clone /m /d /d 8", "clone /d /d /s 8"])
async def test_14_7_one_device_in_two_roles_is_refused(line: str) -> None:
    size = CloneMetadata.device_size_for(8)
    registry, opener = make_registry(m=size, d=8 * REGION, s=8 * REGION)
    with pytest.raises(ConstructorError, match="same device stands twice"):
        await registry.create("c", f"0 64 {line}")
    assert opener.still_open == []


# 8: broken regions


def bad_sector(rig: Rig, at: int) -> None:
    rig.source.fails = lambda bio: (
        errnos.EIO if bio.offset <= at < bio.offset + bio.length else 0
    )


async def test_14_8_bad_sector_costs_no_neighbour_of_its_batch() -> None:
    rig = Rig(words="8 0 4 hydration_threshold 8 hydration_batch_size 8")
    bad_sector(rig, 3 * REGION + 1024)
    await rig.start()
    await settle(400)
    assert await rig.hydrated() == "7/8"
    await rig.stop()


async def test_14_8_failure_is_told_by_one_line_and_one_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = Rig(words="8")
    bad_sector(rig, 3 * REGION)
    await rig.start()
    await pass_time(rig, 60, step=0.2)
    lines = [r for r in caplog.records if "hydration failed" in r.getMessage()]
    assert (len(lines), rig.ctx.nr_events) == (1, 1)
    assert "regions 3 to 3" in lines[0].getMessage()
    await rig.stop()


async def test_14_8_broken_region_is_tried_again_ever_more_seldom() -> None:
    rig = Rig(words="8")
    bad_sector(rig, 3 * REGION)
    await rig.start()
    await settle(400)
    tries = []
    for seconds in (4, 60):
        rig.log.clear()
        await pass_time(rig, seconds, step=0.1)
        tries.append(sum(entry[:2] == ("s", "read") for entry in rig.log))
    assert 1 <= tries[0] <= 3
    assert 2 <= tries[1] <= 6
    rig.source.fails = lambda _: 0
    await pass_time(rig, 70, step=0.2)
    assert await rig.hydrated() == "8/8"
    await rig.stop()


async def test_14_8_part_write_that_covers_the_bad_sector_needs_nothing_of_it() -> None:
    rig = await Rig().start()
    bad_sector(rig, 3 * REGION + 1024)
    assert rig.bio(OP_WRITE, 3 * REGION, 512).status == errnos.EIO
    assert rig.bio(OP_WRITE, 3 * REGION + 1024, 512).status == 0
    assert rig.bio(OP_READ, 3 * REGION, REGION).status == 0
    assert await rig.hydrated() == "1/8"
    await rig.stop()


# 9: a discard that could not be recorded


async def test_14_9_discard_that_is_not_recorded_is_an_error() -> None:
    rig = await Rig().start()
    rig.source.hold = True
    rig.bio(OP_WRITE, 512, 512)
    discards = [
        rig.bio(OP_DISCARD, 0, 2 * REGION),  # waits for the copy
        rig.bio(OP_DISCARD, 0, REGION, FUA),
    ]
    rig.bio(OP_WRITE, 5 * REGION, REGION)
    rig.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
    rig.flush()
    await settle()
    rig.log.clear()
    rig.source.let_go()
    await settle()
    assert [discard.status for discard in discards] == [errnos.EIO, errnos.EIO]
    assert ("d", "discard", 0, 2 * REGION) not in rig.log
    assert await rig.disk.read(0, 2 * REGION) == rig.content[: 2 * REGION]
    await rig.stop()


async def test_14_9_discard_with_fua_is_an_error_when_its_commit_fails() -> None:
    rig = await Rig().start()
    rig.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
    discard = rig.bio(OP_DISCARD, 0, REGION, FUA)
    await settle()
    assert discard.status == errnos.EIO
    await rig.stop()


# 16: completion is decided from committed bits


async def test_14_16_completion_is_told_when_the_last_bits_are_durable() -> None:
    rig = await Rig().start()
    rig.bio(OP_WRITE, 0, 7 * REGION)
    rig.destination.hold = True
    flush = rig.flush()
    await settle()
    rig.destination.hold = False
    rig.bio(OP_WRITE, 7 * REGION, REGION)  # full in core; of the next transaction
    rig.destination.let_go()
    await settle()
    assert (flush.status, await rig.hydrated()) == (0, "8/8")
    assert not rig.target._is_hydrated
    assert rig.ctx.nr_events == 0, "the last bit is not durable yet"
    await rig.disk.flush()
    assert rig.target._is_hydrated
    assert rig.ctx.nr_events == 1
    await rig.stop()


async def test_14_16_commit_that_fails_after_that_reverts_to_the_source() -> None:
    rig = await Rig().start()
    rig.bio(OP_WRITE, 0, 7 * REGION)
    rig.destination.hold = True
    rig.flush()
    await settle()
    rig.destination.hold = False
    rig.bio(OP_WRITE, 7 * REGION, REGION)
    rig.destination.let_go()
    await settle()
    rig.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
    rig.flush()
    await settle()
    assert await rig.hydrated() == "7/8"
    assert not rig.target._is_hydrated
    assert await rig.disk.read(7 * REGION, REGION) == rig.content[7 * REGION :]
    assert await rig.disk.read(0, REGION) == b"w" * REGION
    await rig.stop()
