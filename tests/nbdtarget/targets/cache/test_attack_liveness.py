# SPDX-License-Identifier: Apache-2.0
"""What was seen to hang, to hold the loop, or to give up too early, and must not."""

from nbdtarget.bio import OP_DISCARD, OP_WRITE
from tests.nbdtarget.targets.cache.lab import BLOCK, CacheLab, settle

NO_PASSDOWN = "1 no_discard_passdown smq 2 migration_threshold 0"


async def test_discards_that_overlap_like_tiles_all_end_when_the_first_may() -> None:
    # A file system's trim, cut where no block ends: each waits for the one before.
    nr_discards = 256  # that one connection may have in flight
    lab = CacheLab(nr_oblocks=nr_discards + 1)
    await lab.create(NO_PASSDOWN)
    lab.origin.hold = True
    first = lab.submit(OP_WRITE, 0, 512)
    discards = [
        lab.submit(OP_DISCARD, nr * BLOCK + 512, BLOCK) for nr in range(nr_discards)
    ]
    parked = lab.submit(OP_WRITE, nr_discards * BLOCK, 512)
    assert parked.status < 0
    lab.origin.let_go()
    await settle()
    assert {bio.status for bio in (first, *discards, parked)} == {0}
    await lab.close()
