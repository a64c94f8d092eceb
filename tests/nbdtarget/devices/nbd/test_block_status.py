# SPDX-License-Identifier: Apache-2.0
"""How much a server is asked for at once, and what is made of its answers."""

from nbdtarget.devices.base import EXTENT_HOLE, EXTENT_ZERO, EXTENTS_MAX
from nbdtarget.devices.nbd.block_status import STATUS_RANGE_MIN, BlockStatus, Runs

GIB = 1 << 30
SPARSE = EXTENT_HOLE | EXTENT_ZERO


class Server:
    """A disk of which every second block is a hole; it tells of at most `nr_max` runs."""

    def __init__(self, block: int, nr_max: int) -> None:
        self._block, self._nr_max = block, nr_max
        self.asked: list[tuple[int, int]] = []

    async def status(self, offset: int, length: int) -> Runs | None:
        self.asked.append((offset, length))
        runs: Runs = []
        at, end = offset, offset + length
        while at < end and len(runs) < self._nr_max:
            nr_blocks, inside = divmod(at, self._block)
            run = min(self._block - inside, end - at)
            runs.append((run, SPARSE if nr_blocks % 2 else 0))
            at += run
        return runs


async def first_asked(server: Server, status: BlockStatus) -> int:
    """Bytes that the server is asked for first, for the extents of the whole disk."""
    server.asked.clear()
    await status.extents(0, GIB)
    return server.asked[0][1]


async def test_ranges_shrink_where_a_server_tells_too_much_and_grow_again() -> None:
    server = Server(4096, EXTENTS_MAX)
    status = BlockStatus(1, server.status)
    status.may_ask(GIB)
    found = await status.extents(0, GIB)
    assert [flags for _, flags in found[:3]] == [0, SPARSE, 0]
    assert await first_asked(server, status) == GIB // 16
    await status.extents(0, 8192)  # two runs: little enough to ask for more
    shrunk = max(GIB // 16 // 16, STATUS_RANGE_MIN)
    assert await first_asked(server, status) == 2 * shrunk
    status.may_ask(GIB)  # it was connected to again
    assert await first_asked(server, status) == GIB


async def test_what_lies_in_part_of_a_block_is_asked_for_as_a_whole() -> None:
    server = Server(4096, 100)
    status = BlockStatus(4096, server.status)
    status.may_ask(GIB)
    assert await status.extents(512, 4096) == [(3584, 0), (512, SPARSE)]
    assert server.asked == [(0, 8192)]


async def test_server_that_tells_nothing_is_not_asked_for_ever() -> None:
    async def silent(offset: int, length: int) -> Runs | None:
        return None

    async def short(offset: int, length: int) -> Runs | None:
        return [(512, 0)]

    for ask, offset in ((silent, 0), (short, 512)):
        status = BlockStatus(4096, ask)
        status.may_ask(GIB)
        assert await status.extents(offset, 4096) == []


async def test_flags_of_tomorrow_mean_nothing() -> None:
    async def tell(offset: int, length: int) -> Runs | None:
        return [(4096, 0xFFFF_FFF0 | SPARSE), (4096, 0xFFFF_FFF0)]

    status = BlockStatus(1, tell)
    status.may_ask(GIB)
    assert await status.extents(0, 8192) == [(4096, SPARSE), (4096, 0)]
