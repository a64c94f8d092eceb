# SPDX-License-Identifier: Apache-2.0
"""Checklist 5.2: what suspend, resume and table swaps do to a clone."""

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE
from nbdtarget.common.errors import ConstructorError
from nbdtarget.targets.clone.target import CloneTarget
from tests.support.clock import settle
from tests.support.clone import REGION, Rig


async def test_5_2_constructor_loads_the_bitmap_and_starts_nothing() -> None:
    rig = await Rig(words="8").start()
    await rig.suspend()
    before = await rig.hydrated()
    await rig.target.dtr()
    rig.ctx._shared.clear()  # as when the device is closed
    rig.log.clear()
    target = await CloneTarget.ctr(rig.ctx, rig.words)
    await settle()
    rig.clock.advance(5)
    await settle()
    assert {op for _, op, _, _ in rig.log} <= {"read", "flush"}
    assert {device for device, *_ in rig.log} == {"m"}
    assert (await target.status(noflush=True)).split()[3] == before
    await target.dtr()


async def test_5_2_resume_starts_hydration() -> None:
    rig = await Rig(words="8").start()
    await settle(300)
    assert await rig.hydrated() == "8/8"
    await rig.stop()


async def test_5_2_postsuspend_waits_commits_and_stops_the_timer() -> None:
    rig = await Rig(words="8").start()
    rig.source.hold = True
    await settle()
    rig.bio(OP_WRITE, 7 * REGION, REGION)
    rig.target.presuspend()
    rig.source.let_go()
    await rig.target.postsuspend()
    assert not rig.target._metadata.changed
    rig.log.clear()
    rig.clock.advance(10)
    await settle()
    assert rig.log == []
    await rig.target.dtr()


async def test_5_2_failed_commit_of_a_suspend_shows_only_in_the_mode() -> None:
    rig = await Rig().start()
    rig.bio(OP_WRITE, 0, REGION)
    rig.metadata.fails = lambda bio: 5 if bio.op == OP_WRITE else 0
    await rig.suspend()
    assert (await rig.target.status()).endswith(" ro")
    await rig.target.dtr()


async def test_5_2_metadata_is_one_object_for_live_and_inactive_table() -> None:
    # The kernel's has one each, and the second reads an old bitmap. See 14.7.
    rig = await Rig().start()
    inactive = await CloneTarget.ctr(rig.ctx, rig.words)
    rig.bio(OP_WRITE, 0, REGION)
    assert (await inactive.status(noflush=True)).split()[3] == "1/8"
    await rig.stop()
    await inactive.dtr()


@pytest.mark.parametrize("word", ["16", "4"])
async def test_5_2_region_size_is_fixed_for_the_life_of_the_metadata(word: str) -> None:
    rig = await Rig().start()
    await rig.stop()
    with pytest.raises(ConstructorError):
        await CloneTarget.ctr(rig.ctx, ["m", "d", "s", word])


async def test_5_2_target_size_is_fixed_for_the_life_of_the_metadata() -> None:
    rig = await Rig().start()
    await rig.stop()
    rig.ctx.length = 7 * REGION
    with pytest.raises(ConstructorError, match="target size don't match"):
        await CloneTarget.ctr(rig.ctx, rig.words)


async def test_5_2_new_table_begins_at_offset_0_with_the_lines_values() -> None:
    rig = await Rig(words="8 1 no_hydration").start()
    await rig.target.message(["hydration_threshold", "1"])
    await rig.target.message(["hydration_batch_size", "7"])
    rig.source.hold = True
    await rig.target.message(["enable_hydration"])
    await settle()
    rig.target.presuspend()
    rig.source.let_go()
    await rig.target.postsuspend()
    await rig.target.dtr()
    await rig.restart()
    status = await rig.target.status()
    assert " 1 no_hydration 4 hydration_threshold 1 hydration_batch_size 1 " in status
    await rig.stop()


async def test_5_2_same_table_keeps_its_state_over_suspend_and_resume() -> None:
    rig = await Rig().start()
    await rig.target.message(["hydration_threshold", "9"])
    for _ in range(3):
        await rig.suspend()
        await rig.target.preresume()
        rig.target.resume()
    assert "hydration_threshold 9 " in await rig.target.status()
    assert rig.bio(OP_READ, 0, 512).status == 0
    await rig.stop()
