# SPDX-License-Identifier: Apache-2.0
"""A client that asks for much at once leaves the other clients their turns of the loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from nbdtarget.bio import NO_UNMAP, OP_WRITE_ZEROES, PENDING, Bio
from nbdtarget.common.turns import Turns
from nbdtarget.devices.base import Extent
from nbdtarget.devices.memory import CHUNK_SIZE, MemoryDevice
from nbdtarget_protocol import consts as c
from tests.support.patience import PATIENCE_S, until
from tests.support.peer import MIB, Disk, Served


class Turning:
    """Counts the turns of the loop."""

    def __init__(self) -> None:
        self.nr = 0
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self.nr += 1
        self._handle = self._loop.call_soon(self._turn)

    def stop(self) -> None:
        self._handle.cancel()


@asynccontextmanager
async def turning() -> AsyncIterator[Turning]:
    it = Turning()
    yield it
    it.stop()


class Counting(Disk):
    """Counts bios by the turn of the loop in which they came."""

    def __init__(self, size: int = MIB) -> None:
        super().__init__(size)
        self.turning: Turning | None = None
        self.turns: list[int] = []

    def submit(self, bio: Bio) -> None:
        if self.turning is not None:
            self.turns.append(self.turning.nr)
        super().submit(bio)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        if self.turning is not None:
            self.turns.append(self.turning.nr)
        return [Extent(length, 0)]

    def most_in_one_turn(self) -> int:
        return max(map(self.turns.count, set(self.turns)))


@pytest.fixture
def disk(served: Served) -> Counting:
    served.directory.devices["disk"] = it = Counting(8 * MIB)
    return it


async def test_a_burst_of_large_reads_is_bounded_in_bytes(
    served: Served, disk: Counting
) -> None:
    served.limits = replace(served.limits, turn_us=0, turn_bytes_max=4 * MIB)
    peers = [await served.attach(structured=True) for _ in range(3)]
    async with turning() as disk.turning:
        for peer in peers:
            stream = [peer.request(c.CMD_READ, 0, 2 * MIB) for _ in range(30)]
            peer.writer.write(b"".join(stream))
        for peer in peers:
            assert {(await peer.reply()).cookie for _ in stream} == set(range(1, 31))
    # Two of one connection's own turn, and as many of the first slices of the others.
    assert disk.most_in_one_turn() <= 2 * len(peers)
    assert len(set(disk.turns)) > 30


@pytest.mark.long
@pytest.mark.parametrize("length", [1, 512, 65536])
async def test_a_burst_of_small_reads_is_bounded_in_time(
    served: Served, disk: Counting, length: int
) -> None:
    served.limits = replace(served.limits, turn_us=1)
    peer = await served.attach(structured=True)
    nr = 10_000
    async with turning() as disk.turning:
        stream = [peer.request(c.CMD_READ, 0, length) for _ in range(nr)]
        peer.writer.write(b"".join(stream))
        cookies = [(await peer.reply()).cookie for _ in range(nr)]
    assert cookies == list(range(1, nr + 1))
    assert disk.most_in_one_turn() < 4000


async def test_what_follows_is_served_too_and_the_end_comes_last(
    served: Served,
) -> None:
    served.limits = replace(served.limits, turn_us=1)
    peer = await served.attach()
    for nr in range(200):
        peer.send(c.CMD_WRITE, nr * 4096, payload=bytes([nr]) * 4096)
        peer.send(c.CMD_TRIM, 900_000, 10)
    peer.send(c.CMD_DISC)
    assert {(await peer.reply()).cookie for _ in range(400)} == set(range(1, 401))
    assert await peer.at_end()
    assert served.disk.data[: 200 * 4096 : 4096] == bytes(range(200))


async def test_block_status_is_one_in_each_turn(served: Served, disk: Counting) -> None:
    peer = await served.attach(structured=True, contexts=True)
    async with turning() as disk.turning:
        for _ in range(100):
            peer.send(c.CMD_BLOCK_STATUS, 0, MIB)
        for _ in range(100):
            assert (await peer.reply()).error == 0
    assert disk.most_in_one_turn() == 1


async def test_clearing_memory_takes_many_turns_and_clears_all() -> None:
    size = 2000 * CHUNK_SIZE
    for flags in (0, NO_UNMAP):
        device = MemoryDevice(size)
        for nr in range(2000):
            await device.write(nr * CHUNK_SIZE, b"x")
        bio = Bio(OP_WRITE_ZEROES, 0, size, None, flags, lambda _: None)
        async with turning() as turns:
            device.submit(bio)
            assert bio.status == PENDING
            await until(lambda bio=bio: bio.status != PENDING)  # type: ignore[misc]  # a default, for the loop
            assert turns.nr > 5
        assert bio.status == 0
        assert device.nr_chunks == (2000 if flags else 0)
        assert not any(
            [any(await device.read(nr * CHUNK_SIZE, 1)) for nr in range(2000)]
        )
        await device.close()


async def test_turns_go_round_and_a_cancelled_wait_costs_nothing() -> None:
    turns = Turns()
    seen: list[int] = []

    def again(nr: int, times: int) -> None:
        seen.append(nr)
        if times:
            turns.ask(lambda: again(nr, times - 1))

    turns.ask(lambda: again(1, 2))
    turns.ask(lambda: again(2, 2))
    waiting = asyncio.create_task(turns.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    async with asyncio.timeout(PATIENCE_S):
        await turns.wait()
        await turns.wait()
    await asyncio.sleep(0.01)
    assert seen == [1, 2, 1, 2, 1, 2]
