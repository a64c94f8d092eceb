# SPDX-License-Identifier: Apache-2.0
"""Cases in which a FLUSH or FUA promised too much. They were found by a review of the cache target."""

import errno as errnos

from nbdtarget.bio import FUA, OP_WRITE
from nbdtarget_metadata.mode import Mode
from tests.support.cache import BLOCK, DIRTY_BUSY, CacheLab
from tests.support.clock import settle


async def test_table_loaded_before_a_commit_failed_acknowledges_no_fua(
    lab: CacheLab,
) -> None:
    # The mapping that could not be removed durably comes back when the metadata are repaired.
    await lab.create(DIRTY_BUSY)
    await lab.load(DIRTY_BUSY)
    await lab.make_read_only()
    await lab.resume()
    assert lab.core.mode is Mode.RO
    fua = lab.submit(OP_WRITE, 5 * BLOCK, 512, FUA)
    await settle()
    assert fua.status == errnos.EIO


async def test_table_loaded_before_a_commit_failed_writes_no_metadata(
    lab: CacheLab,
) -> None:
    await lab.create(DIRTY_BUSY)
    await lab.load(DIRTY_BUSY)
    await lab.make_read_only()
    await lab.resume()
    lab.log.clear()
    owed, flush = lab.flush(), lab.flush()
    await settle()
    assert [owed.status, flush.status] == [errnos.EIO, errnos.EIO]
    assert lab.asked("m") == []
