# SPDX-License-Identifier: Apache-2.0
"""A bulk copy that has failed, or that no caller waits for, begins no further chunks."""

import asyncio
import errno

from nbdtarget.devices.bulk_streams import BulkCopy, BulkFailure, Chunk


async def test_a_copy_is_over_when_it_has_failed_or_nobody_waits() -> None:
    future: asyncio.Future[BulkFailure | None]
    future = asyncio.get_running_loop().create_future()
    copy = BulkCopy(future, 2, 8192)
    chunk = Chunk(copy, 4096, 512)
    assert (chunk.status, len(chunk.buffer)) == (0, 0)
    assert not copy.is_over
    copy.failure = BulkFailure(errno.EIO, True, 4096, 512)
    assert copy.is_over
    other = BulkCopy(future, 1, 4096)
    assert not other.is_over
    future.cancel()
    assert other.is_over
