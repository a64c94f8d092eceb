# SPDX-License-Identifier: Apache-2.0
"""Bios that wait for a lock when the table is suspended."""

import asyncio

from nbdtarget.bio import OP_WRITE
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle


async def test_suspend_without_flush_gives_back_what_waits_for_a_lock(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill([2])
    lab.hold("o", OP_WRITE)
    await lab.message("clean_now")
    await settle()
    parked = lab.submit(OP_WRITE, 2 * BLOCK, 512, fill="n")
    await settle()
    assert parked.status < 0
    suspending = asyncio.ensure_future(lab.registry.suspend("c", noflush=True))
    await settle()
    lab.origin.let_go()
    await suspending
    assert parked.status < 0
    assert not lab.target._blocks.locks.locked
    await lab.resume()
    await settle()
    assert parked.status == 0
    assert (await lab.read(2))[:512] == b"n" * 512
