# SPDX-License-Identifier: Apache-2.0
"""Unpinning blocks whose promotion was requested and that are not cached yet."""

import errno as errnos

import pytest

from nbdtarget.bio import OP_WRITE
from nbdtarget.common.errors import TableError
from nbdtarget.targets.cache import promotion_requests as requests
from tests.support.cache import DIRTY_BUSY, CacheLab
from tests.support.clock import settle


def pinned(lab: CacheLab) -> list[int]:
    found = []
    for oblock in range(32):
        cblock = lab.cblock(oblock)
        if cblock is not None and lab.target._blocks.policy.is_pinned(cblock):
            found.append(oblock)
    return found


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("2", [0, 1, 3, 4, 5]),
        ("0-2", [2, 3, 4, 5]),
        ("4-9", [0, 1, 2, 3]),
        ("0-32", []),
        ("1 3", [0, 2, 4, 5]),
    ],
)
async def test_unpin_before_the_blocks_have_come_leaves_the_others_pinned(
    lab: CacheLab, words: str, left: list[int]
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.message("pin 0-6")
    await lab.message(f"unpin {words}")
    await lab.pass_time(3)
    assert [lab.cblock(oblock) is not None for oblock in range(6)] == [True] * 6
    assert pinned(lab) == left


async def test_unpin_that_would_leave_too_many_ranges_is_refused(
    lab: CacheLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "RANGES_MAX", 2)
    await lab.create(DIRTY_BUSY)
    await lab.message("pin 0-6")
    with pytest.raises(TableError, match="too many ranges") as caught:
        await lab.message("unpin 2")
    assert caught.value.errno == errnos.EBUSY
    await settle()
    await lab.pass_time(3)
    assert pinned(lab) == [0, 1, 2, 3, 4, 5]


async def test_pin_whose_promotion_failed_does_not_pin_the_block_later(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    lab.fail("c", OP_WRITE)
    await lab.message("pin 3")
    await lab.pass_time(2)
    assert lab.cblock(3) is None
    lab.fail("c")
    await lab.message("warm 3")
    await lab.pass_time(2)
    assert lab.cblock(3) is not None
    assert pinned(lab) == []
