# SPDX-License-Identifier: Apache-2.0
"""Checklist 14: the kernel's weaknesses that a cache could have, by number. Ours must not."""

from nbdtarget.bio import OP_DISCARD, OP_WRITE, PENDING
from tests.nbdtarget.targets.cache.lab import BLOCK, DIRTY_BUSY, CacheLab, settle

BUSY = "2 migration_threshold 0"
PASSTHROUGH = f"1 passthrough smq {BUSY}"
A, B = 3, 4  # blocks of the origin


async def test_14_15_discard_waits_for_a_write_that_was_sent_while_it_waited(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.fill_clean([A, B])
    await lab.recreate(PASSTHROUGH)
    lab.metadata.hold = True
    lab.hold("o", OP_WRITE)
    writes = [lab.submit(OP_WRITE, nr * BLOCK, 512, fill="n") for nr in (A, B)]
    await settle()
    discard = lab.submit(OP_DISCARD, A * BLOCK, 2 * BLOCK)
    lab.metadata.let_go()
    await settle()
    assert [bio.op for bio in lab.origin.held] == [OP_WRITE, OP_WRITE]
    assert [bio.status for bio in (*writes, discard)] == [PENDING] * 3
    assert lab.asked("o", "discard") == []
    lab.origin.let_go()
    await settle()
    assert [bio.status for bio in (*writes, discard)] == [0, 0, 0]
    assert lab.asked("o", "write", "discard")[-1][0] == "discard"
