# SPDX-License-Identifier: Apache-2.0
"""WRITE_ZEROES that has to be written out: what fails on the way is said at the end."""

import errno as errnos

from nbdtarget.bio import OP_WRITE_ZEROES, PENDING, Bio
from tests.support.dm import make_registry


async def test_failed_write_of_zeroes_fails_the_whole() -> None:
    size = 9 << 20
    registry, opener = make_registry(a=size)
    await registry.create("d", f"0 {size // 512} linear /a 0")
    below = opener.open["/a"]
    below.hold = True
    bio = Bio(OP_WRITE_ZEROES, 0, size, None, 0, lambda _: None)
    registry.get("d").submit(bio)
    below.held.pop(0).end(errnos.ENOSPC)
    while below.held:
        assert bio.status == PENDING
        below.held.pop(0).end(0)
    assert bio.status == errnos.ENOSPC
    below.let_go()
    await registry.close()
