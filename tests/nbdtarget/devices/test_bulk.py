# SPDX-License-Identifier: Apache-2.0
"""Bulk copies: exact, bounded, and over when they say so; what a failure of each side leaves."""

import asyncio
import errno
import os
import random
import threading

import pytest

from nbdtarget.devices import bulk
from nbdtarget.devices.background_threads import NICE_STEP
from nbdtarget.devices.bulk import BulkCopies
from nbdtarget.devices.bulk_streams import BulkFailure
from nbdtarget.devices.memory import MemoryDevice
from tests.support.bulk import LendingDisk, WritableDisk, Writer
from tests.support.clock import settle
from tests.support.patience import PATIENCE_S, until

CHUNK = 4096
SIZE = 64 * CHUNK
CONTENT = random.Random(5).randbytes(SIZE)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "CHUNK_BYTES", CHUNK)


def pair() -> tuple[LendingDisk, WritableDisk, BulkCopies]:
    source, destination = LendingDisk(CONTENT), WritableDisk(SIZE)
    return source, destination, BulkCopies(source, destination)


async def copied(copies: BulkCopies, offset: int, length: int) -> BulkFailure | None:
    copying = copies.maybe_copy(offset, length)
    assert copying is not None
    return await asyncio.wait_for(copying, PATIENCE_S)


async def test_copies_are_exact_also_side_by_side() -> None:
    source, destination, copies = pair()
    ranges = [(512, 9 * CHUNK), (20 * CHUNK, 512), (30 * CHUNK, 34 * CHUNK)]
    want = bytearray(SIZE)
    for offset, length in ranges:
        want[offset : offset + length] = CONTENT[offset : offset + length]
    found = await asyncio.gather(*(copied(copies, *each) for each in ranges))
    assert found == [None] * 3
    assert destination.data == want
    copies.rest()
    await until(lambda: source.came_back == [""] * 3)


async def test_threads_of_a_copy_give_way_to_those_that_serve() -> None:
    source, destination, copies = pair()
    seen: set[tuple[int, int]] = set()
    writer = destination.maybe_bulk_writer()

    def look(data: memoryview, offset: int) -> int:
        seen.add((os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)))
        return Writer.write(writer, data, offset)

    writer.write = look  # type: ignore[method-assign]
    destination.maybe_bulk_writer = lambda: writer  # type: ignore[method-assign]
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert await copied(copies, 0, SIZE) is None
    nice = min(before + NICE_STEP, 19)
    assert seen == {(nice, os.SCHED_BATCH)}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    copies.rest()
    await until(lambda: source.came_back == [""] * 3)


async def test_memory_of_a_stream_is_bounded() -> None:
    source, _, copies = pair()
    source.gate.clear()
    copying = copies.maybe_copy(0, SIZE)
    assert copying is not None
    streams = list(copies._streams)
    await until(lambda: all(stream.asked for stream in streams))  # type: ignore[attr-defined]
    for stream in streams:
        assert len(stream.asked) <= bulk.CHUNKS_PER_STREAM  # type: ignore[attr-defined]
    source.gate.set()
    assert await copying is None
    copies.rest()
    await until(lambda: len(source.came_back) == 3)


@pytest.mark.parametrize("side", ["read", "write"])
async def test_failure_names_its_side_and_leaves_others_alone(side: str) -> None:
    source, destination, copies = pair()
    bad = 40 * CHUNK
    status = errno.EIO if side == "read" else errno.ENOSPC
    (source if side == "read" else destination).errors[bad] = status
    good, failed = await asyncio.gather(
        copied(copies, 0, 8 * CHUNK), copied(copies, 32 * CHUNK, 32 * CHUNK)
    )
    assert good is None
    assert destination.data[: 8 * CHUNK] == CONTENT[: 8 * CHUNK]
    assert failed == BulkFailure(status, side == "read", bad, CHUNK)
    assert destination.failed == ([] if side == "read" else [status])
    # A second attempt uses the same streams.
    source.errors.clear()
    destination.errors.clear()
    assert await copied(copies, 32 * CHUNK, 32 * CHUNK) is None
    copies.rest()
    await until(lambda: source.came_back == [""] * 3)


async def test_chunks_behind_a_failure_are_not_begun() -> None:
    source, destination = LendingDisk(CONTENT, nr_streams=1), WritableDisk(SIZE)
    copies = BulkCopies(source, destination)
    destination.errors = dict.fromkeys(range(0, SIZE, CHUNK), errno.EIO)
    assert await copied(copies, 0, SIZE) is not None
    assert destination.nr_writes <= bulk.CHUNKS_PER_STREAM
    assert destination.failed == [errno.EIO]
    copies.rest()
    await until(lambda: len(source.came_back) == 1)


async def test_a_stream_that_breaks_fails_its_copy_and_tells_its_device_first() -> None:
    source, destination, copies = pair()
    source.breaks_at = 7 * CHUNK
    copying = copies.maybe_copy(0, 16 * CHUNK)
    assert copying is not None
    told: list[list[str]] = []
    copying.add_done_callback(lambda _: told.append(list(source.came_back)))
    failure = await copying
    assert failure is not None
    assert (failure.status, failure.is_read) == (errno.EIO, True)
    await settle()
    assert told == [["the server hung up"]]
    assert copies.nr_streams == 2
    source.breaks_at = -1
    assert await copied(copies, 0, 16 * CHUNK) is None
    assert destination.data[: 16 * CHUNK] == CONTENT[: 16 * CHUNK]
    copies.rest()
    await until(lambda: len(source.came_back) == 3)


async def test_the_last_stream_that_breaks_ends_all_copies() -> None:
    source, destination = LendingDisk(CONTENT, nr_streams=1), WritableDisk(SIZE)
    copies = BulkCopies(source, destination)
    source.breaks = True
    failures = await asyncio.gather(
        *(copied(copies, at * CHUNK, 8 * CHUNK) for at in (0, 8, 16))
    )
    assert all(each is not None and each.status == errno.EIO for each in failures)
    # Nothing more is lent: from here on it is copied by bios.
    assert copies.maybe_copy(0, CHUNK) is None
    source.nr_to_lend, source.breaks = 2, False
    assert await copied(copies, 0, SIZE) is None
    assert destination.data == CONTENT
    copies.rest()
    await until(lambda: len(source.came_back) == 3)


async def test_a_bug_in_a_thread_ends_the_copy_and_is_reported() -> None:
    source, destination = LendingDisk(CONTENT, nr_streams=1), WritableDisk(SIZE)
    copies = BulkCopies(source, destination)
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: reported.append(context["exception"])
    )
    destination.errors = None  # type: ignore[assignment]
    failure = await copied(copies, 0, CHUNK)
    assert failure is not None
    assert failure.status == errno.EIO
    await until(lambda: len(reported) == 1)
    assert isinstance(reported[0], AttributeError)
    assert "internal error" in source.came_back[0]


async def test_a_cancelled_copy_begins_nothing_more_and_others_go_on() -> None:
    source, destination, copies = pair()
    source.gate.clear()
    first = copies.maybe_copy(0, SIZE)
    assert first is not None
    first.cancel()
    copies.rest()  # not yet: chunks are under way
    assert copies.nr_streams == 3
    source.gate.set()
    assert await copied(copies, 0, 4 * CHUNK) is None
    assert destination.data[: 4 * CHUNK] == CONTENT[: 4 * CHUNK]
    await until(lambda: copies._nr_copies == 0)
    assert destination.nr_writes <= 4 + 3 * bulk.CHUNKS_PER_STREAM
    copies.rest()
    await until(lambda: source.came_back == [""] * 3)


async def test_streams_rest_and_are_borrowed_again() -> None:
    source, _, copies = pair()
    for _ in range(3):
        source.came_back.clear()
        assert await copied(copies, 0, SIZE) is None
        copies.rest()
        copies.rest()
        assert copies.nr_streams == 0
        await until(lambda: source.came_back == [""] * 3)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE, CHUNK), (SIZE - CHUNK, 2 * CHUNK), (100, 512), (0, 100)],
    ids=["outside", "over the end", "offset", "length"],
)
async def test_what_a_stream_cannot_ask_for_goes_another_way(
    offset: int, length: int
) -> None:
    source, destination, copies = pair()
    assert copies.maybe_copy(offset, length) is None
    assert destination.nr_writes == 0
    copies.rest()
    await until(lambda: source.came_back in ([], [""] * 3))


async def test_devices_that_lend_nothing_or_have_no_writer() -> None:
    plain = MemoryDevice(SIZE, name="plain")
    assert BulkCopies(plain, WritableDisk(SIZE)).maybe_copy(0, CHUNK) is None
    source = LendingDisk(CONTENT)
    assert BulkCopies(source, plain).maybe_copy(0, CHUNK) is None
    assert source.nr_to_lend == 3  # and nothing was borrowed for it
