# SPDX-License-Identifier: Apache-2.0
"""Reads of background copies: joined into few large requests, many at a time, in order."""

import asyncio
import errno

from nbdtarget.bio import OP_READ, PENDING, Bio
from nbdtarget.common.turns import Tasks
from nbdtarget.devices.health import Health
from nbdtarget.devices.ranged.bulk_reads import (
    RANGE_BYTES_MAX,
    RANGE_BYTES_MIN,
    REQUESTS_MIN,
    BulkReads,
)
from nbdtarget.devices.ranged.fetcher import Fetcher
from nbdtarget.devices.ranged.store import SourceAway
from nbdtarget.devices.ranged.traffic import Traffic
from tests.support.image_server import image_of
from tests.support.patience import until
from tests.support.ranged import MemoryStore, in_simulated_time

MIB = 1 << 20
IMAGE = image_of(64 * MIB + 700)


class Rig:
    def __init__(self, *, connections: int = 32) -> None:
        self.store = MemoryStore(IMAGE)
        self.store.latency_s = 0.03
        self.tasks = Tasks()
        self.ended: list[int] = []
        fetcher = Fetcher(
            "source",
            self.store,
            self.store.pin,
            Health(),
            Traffic(),
            source_timeout_s=2.0,
            changed=lambda _: None,
        )
        self.bulk = BulkReads(fetcher, len(IMAGE), self.tasks, connections=connections)

    def take(self, offset: int, length: int) -> Bio:
        buffer = memoryview(bytearray(b"\xee" * length))
        bio = Bio(OP_READ, offset, length, buffer, 0, self._ended)
        self.bulk.take(bio)
        return bio

    def _ended(self, bio: Bio) -> None:
        self.ended.append(bio.offset)

    async def all_ended(self, bios: list[Bio]) -> None:
        await until(lambda: all(bio.status != PENDING for bio in bios))

    @property
    def asked(self) -> list[tuple[int, int]]:
        return [(begin // MIB, end // MIB) for begin, end, *_ in self.store.noted]


def test_chunks_that_follow_each_other_are_one_request() -> None:
    async def work() -> None:
        rig = Rig()
        bios = [rig.take(nr * MIB, MIB) for nr in range(8)]
        bios += [rig.take(20 * MIB, MIB), rig.take(30 * MIB, MIB)]
        await rig.all_ended(bios)
        assert rig.asked == [(0, 4), (4, 8), (20, 21), (30, 31)]
        for bio in bios:
            assert bytes(bio.payload or b"") == IMAGE[bio.offset : bio.offset + MIB]
        assert not any(is_urgent for *_, is_urgent, _ in rig.store.noted)

    in_simulated_time(work())


def test_chunk_ends_while_the_rest_of_its_range_comes() -> None:
    async def work() -> None:
        rig = Rig()
        rig.store.bytes_per_s = MIB
        bios = [rig.take(nr * MIB, MIB) for nr in range(4)]
        await rig.all_ended(bios[:1])
        assert asyncio.get_running_loop().time() < 1.2
        assert [bio.status for bio in bios[1:]] == [PENDING] * 3
        await rig.all_ended(bios)
        assert rig.ended == sorted(rig.ended)

    in_simulated_time(work())


def test_requests_are_more_and_smaller_when_the_source_bears_them() -> None:
    async def work() -> None:
        rig = Rig()
        assert rig.bulk.slots.width == REQUESTS_MIN
        assert rig.bulk.range_bytes == 4 * MIB
        for _ in range(6):
            await rig.all_ended([rig.take(nr * MIB, MIB) for nr in range(64)])
        assert rig.bulk.slots.width > 16
        assert rig.store.nr_open_max <= rig.bulk.slots.width <= 32
        assert RANGE_BYTES_MIN <= rig.bulk.range_bytes <= 2 * MIB
        rig.bulk.slots.width = 2
        assert rig.bulk.range_bytes == RANGE_BYTES_MAX

    in_simulated_time(work())


def test_source_that_is_not_asked_for_much_gets_no_more_connections() -> None:
    async def work() -> None:
        rig = Rig()
        for nr in range(60):
            await rig.all_ended([rig.take(nr * MIB, MIB)])
        assert rig.store.nr_open_max == 1

    in_simulated_time(work())


def test_connections_of_the_url_are_the_limit() -> None:
    async def work() -> None:
        rig = Rig(connections=2)
        await rig.all_ended([rig.take(nr * MIB, MIB) for nr in range(64)])
        assert rig.store.nr_open_max == 2

    in_simulated_time(work())


def test_end_of_the_image_is_rounded_up_with_zeroes() -> None:
    async def work() -> None:
        rig = Rig()
        bios = [rig.take(63 * MIB, MIB), rig.take(64 * MIB, 1024)]
        await rig.all_ended(bios)
        assert bios[1].status == 0
        assert bytes(bios[1].payload or b"") == IMAGE[64 * MIB :] + bytes(1024 - 700)

    in_simulated_time(work())


def test_failure_ends_the_chunks_that_did_not_come() -> None:
    async def work() -> None:
        rig = Rig()

        def trouble(nr: int) -> None:
            if nr > 0:
                raise SourceAway("no")

        rig.store.trouble = trouble
        bios = [rig.take(nr * MIB, MIB) for nr in range(3)]
        await rig.all_ended(bios)
        assert [bio.status for bio in bios] == [errno.EIO] * 3
        rig.store.trouble = None
        again = rig.take(0, MIB)
        await rig.all_ended([again])
        assert again.status == 0

    in_simulated_time(work())


def test_given_up_and_cancelled_chunks_end() -> None:
    async def work() -> None:
        rig = Rig(connections=1)
        bios = [rig.take(nr * 2 * MIB, MIB) for nr in range(3)]
        await asyncio.sleep(0.001)
        rig.bulk.give_up()
        assert [bio.status for bio in bios] == [PENDING, errno.EIO, errno.EIO]
        for task in rig.tasks:
            task.cancel()
        await rig.all_ended(bios)
        assert bios[0].status == errno.EIO

    in_simulated_time(work())
