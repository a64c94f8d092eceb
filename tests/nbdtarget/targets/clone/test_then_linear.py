# SPDX-License-Identifier: Apache-2.0
"""A clone asks for `linear` in its place when it is complete, and not before."""

import errno as errnos

import pytest

from nbdtarget.bio import OP_WRITE
from tests.support.clock import settle
from tests.support.clone import REGION, Rig

LINEAR = ("linear", "d", "0")


async def make(words: str = "8 2 no_hydration then_linear") -> Rig:
    return await Rig(words=words).start()


async def test_it_asks_after_the_commit_that_makes_the_last_bits_durable() -> None:
    rig = await make()
    rig.bio(OP_WRITE, 0, 7 * REGION)
    rig.destination.hold = True
    first = rig.flush()
    await settle()
    rig.destination.hold = False
    rig.bio(OP_WRITE, 7 * REGION, REGION)  # of the next transaction
    rig.destination.let_go()
    await settle()
    assert first.status == 0
    assert await rig.hydrated() == "8/8"
    assert rig.ctx.replacements == []
    rig.flush()
    await settle()
    assert rig.ctx.replacements == [LINEAR]
    assert rig.ctx.nr_events == 1


async def test_it_does_not_ask_after_a_failed_commit() -> None:
    rig = await make()
    rig.bio(OP_WRITE, 0, 8 * REGION)
    rig.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
    rig.flush()
    await settle()
    await rig.target.message(["then_linear"])
    assert rig.ctx.replacements == []


@pytest.mark.parametrize("words", ["8", "8 1 then_linear"])
async def test_it_asks_at_resume_if_it_was_complete_already(words: str) -> None:
    rig = await make()
    rig.bio(OP_WRITE, 0, 8 * REGION)
    await rig.stop()
    rig.ctx.replacements.clear()
    rig.words = ["m", "d", "s", *words.split()]
    await rig.restart()
    assert rig.ctx.replacements == ([LINEAR] if "then_linear" in words else [])


async def test_it_does_not_ask_while_it_is_suspended() -> None:
    rig = await make()
    rig.bio(OP_WRITE, 0, 8 * REGION)
    await rig.suspend()
    rig.ctx.replacements.clear()
    await rig.target.message(["then_linear"])
    assert rig.ctx.replacements == []
    rig.target.resume()
    assert rig.ctx.replacements == [LINEAR]
