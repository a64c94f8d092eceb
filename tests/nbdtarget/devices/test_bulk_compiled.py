# SPDX-License-Identifier: Apache-2.0
"""Bulk copies by compiled threads: who is told of what, and in which order."""

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.common.activity import ACTIVITY
from nbdtarget.devices import bulk, bulk_compiled
from nbdtarget.devices.bulk import BulkCopies
from nbdtarget.devices.bulk_compiled import CompiledCopies
from nbdtarget.devices.bulk_streams import BulkCopy, BulkFailure
from nbdtarget.devices.nbd import lent as lent_module
from nbdtarget.devices.nbd.device import NbdDevice
from nbdtarget.fast.compiled import IS_COMPILED, describe
from tests.support.bulk import LendingDisk, MemoryFileDisk, Stream, WritableDisk, Writer
from tests.support.nbd_device import SIZE, device_of
from tests.support.nbd_server import StrictServer
from tests.support.patience import PATIENCE_S, until

pytestmark = pytest.mark.skipif(not IS_COMPILED, reason=describe())

CHUNK = 4096
CONTENT = random.Random(8).randbytes(SIZE)


class Rig:
    """A server, its device, and copies to a file in memory."""

    def __init__(self, server: StrictServer, source: NbdDevice) -> None:
        self.server, self.source = server, source
        self.destination = MemoryFileDisk(SIZE)
        self.copies = BulkCopies(source, self.destination)

    def copy(
        self, offset: int = 0, length: int = SIZE
    ) -> "asyncio.Future[BulkFailure | None]":
        copying = self.copies.maybe_copy(offset, length)
        assert copying is not None
        assert self.copies._compiled is not None
        return copying

    async def ended(
        self, copying: "asyncio.Future[BulkFailure | None]"
    ) -> BulkFailure | None:
        return await asyncio.wait_for(copying, PATIENCE_S)


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(bulk, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(lent_module, "CHUNK_BYTES", CHUNK)
    async with StrictServer(tmp_path) as server:
        server.disk[:] = CONTENT
        rig = Rig(server, await device_of(server, read_only=True))
        yield rig
        server.gate.set()
        rig.copies.rest()
        await rig.source.close()
        await rig.destination.close()


async def test_compiled_only_if_all_have_compiled_halves() -> None:
    disk = MemoryFileDisk(SIZE)
    stream = Stream(LendingDisk(CONTENT))
    for streams, writer in (
        ([stream], Writer(disk)),
        ([], Writer(disk)),
        ([stream], Writer(WritableDisk(SIZE))),
    ):
        made = CompiledCopies.maybe(list(streams), writer, CHUNK, lambda _: None)
        assert made is None
    await disk.close()


async def test_a_copy_has_failed_only_when_its_device_knows(rig: Rig) -> None:
    rig.server.hang_up_after = 9
    copying = rig.copy()
    known: list[bool] = []
    copying.add_done_callback(lambda _: known.append(rig.source.health.is_usable))
    failure = await rig.ended(copying)
    assert failure is not None
    assert (failure.status, failure.is_read) == (errno.EIO, True)
    await until(lambda: known == [False])


async def test_news_of_a_stream_come_before_the_end_of_its_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both are there when the loop has its turn."""
    source, destination = LendingDisk(CONTENT), MemoryFileDisk(SIZE)
    copies, stream = BulkCopies(source, destination), Stream(source)
    known: list[list[str]] = []

    def read_failed(status: int) -> int:
        known.append(list(source.came_back))
        return status

    monkeypatch.setattr(stream, "read_failed", read_failed)
    copy = BulkCopy(asyncio.get_running_loop().create_future(), 0, 0)
    copy.failure, copy.stream = BulkFailure(errno.EIO, True, 0, CHUNK), stream
    copies._told.append((stream, "server hung up"))
    copies._compiled_ended([copy])
    assert copy.future.result() == copy.failure
    assert known == [["server hung up"]]
    await destination.close()


async def test_a_write_that_fails_is_told_to_the_destination(rig: Rig) -> None:
    # A file that can only be read takes the place of the one that is written.
    fd = os.open(f"/proc/self/fd/{rig.destination.fd}", os.O_RDONLY)
    os.dup2(fd, rig.destination.fd)
    os.close(fd)
    failure = await rig.ended(rig.copy(0, CHUNK))
    assert failure == BulkFailure(errno.EBADF, False, 0, CHUNK)
    assert rig.destination.failed == [errno.EBADF]
    assert rig.source.health.is_usable


async def test_a_cancelled_copy_begins_nothing_more_and_others_go_on(rig: Rig) -> None:
    rig.server.gate.clear()
    first = rig.copy()
    await until(lambda: len(rig.server.noted) >= 3)
    first.cancel()
    await asyncio.sleep(0)  # the future calls what waits for its end
    second = rig.copy(0, 4 * CHUNK)
    rig.server.gate.set()
    assert await rig.ended(second) is None
    assert rig.destination.content()[: 4 * CHUNK] == CONTENT[: 4 * CHUNK]
    await until(lambda: rig.copies._nr_copies == 0)
    assert len(rig.server.noted) <= 4 + 3 * bulk.CHUNKS_PER_STREAM


async def test_copies_give_way_while_clients_are_active(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(bulk_compiled, "SMALL_CHUNK_BYTES", CHUNK // 2)
    assert await rig.ended(rig.copy(0, CHUNK)) is None
    assert [length for *_, length in rig.server.noted] == [CHUNK]
    ACTIVITY.nr_batches += 1
    rig.server.gate.clear()
    copying = rig.copy()
    await until(lambda: len(rig.server.noted) == 2)
    assert rig.source.nr_in_flight == 1
    monkeypatch.setattr(bulk_compiled, "QUIET_S", 1e9)
    ACTIVITY.nr_batches += 1
    other = rig.copy(0, CHUNK)  # the look that it takes
    rig.server.gate.set()
    assert await rig.ended(copying) is None
    assert await rig.ended(other) is None
    assert rig.destination.content() == CONTENT
    assert {length for *_, length in rig.server.noted[1:]} == {CHUNK // 2}


async def test_the_loop_watches_until_the_last_copy_has_ended(rig: Rig) -> None:
    loop = asyncio.get_running_loop()
    assert await rig.ended(rig.copy()) is None
    session = rig.copies._compiled
    assert session is not None
    rig.copies.rest()
    assert not loop.remove_reader(session._copies.event_fd)
    # All streams break; what they had under way ends later, and is not forgotten.
    await until(lambda: not rig.source._lent)
    rig.server.gate.clear()
    copying = rig.copy()
    session = rig.copies._compiled
    assert session is not None
    await until(lambda: rig.source.nr_in_flight == 3 * bulk.CHUNKS_PER_STREAM)
    rig.source._connection_lost("the cable was cut")
    assert await rig.ended(copying) is not None
    assert rig.copies._compiled is None
    assert not loop.remove_reader(session._copies.event_fd)


async def test_what_a_thread_raises_ends_the_copy_and_is_reported(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: reported.append(context["exception"])
    )
    monkeypatch.setattr(bulk, "CHUNKS_PER_STREAM", 1000)
    failure = await rig.ended(rig.copy())
    assert failure is not None
    assert (failure.status, failure.is_read) == (errno.EIO, True)
    await until(lambda: len(reported) == 3)
    assert all(isinstance(each, ValueError) for each in reported)
