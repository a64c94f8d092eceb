# SPDX-License-Identifier: Apache-2.0
"""Background copies: in bulk or by bios, and what is written back behind them."""

import asyncio
import errno
import random

import pytest

from nbdtarget.bio import OP_WRITE, Bio
from nbdtarget.devices import bulk
from nbdtarget.devices.base import Device
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.targets import background_copier
from nbdtarget.targets.background_copier import WINDOWS_MAX, BackgroundCopier
from nbdtarget.targets.copier import CopyError
from tests.support.bulk import LendingDisk, WritableDisk
from tests.support.clock import settle
from tests.support.patience import PATIENCE_S, until

CHUNK = 4096
WINDOW = 4 * CHUNK
SIZE = 64 * CHUNK
CONTENT = random.Random(6).randbytes(SIZE)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(background_copier, "WINDOW_BYTES", WINDOW)


class ToldDisk(MemoryDevice):
    """Notes what it is told that it will write behind."""

    def __init__(self, size: int, *, name: str) -> None:
        super().__init__(size, name=name)
        self.behind: list[tuple[int, int]] = []

    def submit_behind(self, bio: Bio) -> None:
        self.behind.append((bio.op, bio.offset))
        self.submit(bio)


def made(source: Device, destination: Device) -> BackgroundCopier:
    def failed(error: BaseException) -> None:
        raise error

    return BackgroundCopier(source, destination, failed)


async def test_copies_in_bulk_and_drops_what_it_has_copied() -> None:
    source, destination = LendingDisk(CONTENT), WritableDisk(SIZE)
    copier = made(source, destination)
    for at in range(0, SIZE, 2 * CHUNK):
        await copier.copy(at, 2 * CHUNK)
    assert destination.data == CONTENT
    await copier.copy(CHUNK, CHUNK)
    copier.rest()
    await copier.quiesce()
    copier.rest()
    await copier.quiesce()
    windows = [[(at, at + WINDOW)] for at in range(0, SIZE, WINDOW)]
    assert destination.behind == [*windows, [(CHUNK, 2 * CHUNK)], []]
    copier.rest()  # nothing is left to be dropped
    await copier.quiesce()
    assert len(destination.behind) == len(windows) + 2
    await until(lambda: source.came_back == [""] * 3)


async def test_copies_by_bios_where_nothing_is_lent() -> None:
    source, destination = MemoryDevice(SIZE, name="s"), ToldDisk(SIZE, name="d")
    await source.write(0, CONTENT)
    copier = made(source, destination)
    await copier.copy(CHUNK, 9 * CHUNK)
    assert destination.behind == [(OP_WRITE, CHUNK)]
    want = CONTENT[CHUNK : 10 * CHUNK]
    assert bytes(await destination.read(CHUNK, 9 * CHUNK)) == want
    copier.rest()
    await copier.quiesce()


@pytest.mark.parametrize("side", ["read", "write"])
async def test_a_failure_is_the_error_of_a_copier(side: str) -> None:
    source, destination = LendingDisk(CONTENT), WritableDisk(SIZE)
    copier = made(source, destination)
    (source if side == "read" else destination).errors[3 * CHUNK] = errno.ENOSPC
    with pytest.raises(CopyError) as caught:
        await copier.copy(0, 8 * CHUNK)
    assert caught.value.is_read is (side == "read")
    error = caught.value.error
    name = "source" if side == "read" else "destination"
    assert (error.errno, error.offset, error.length) == (errno.ENOSPC, 3 * CHUNK, CHUNK)
    assert name in str(error)
    copier.rest()
    await until(lambda: source.came_back == [""] * 3)
    assert destination.behind == []


async def test_copies_wait_for_a_disk_that_is_slower_than_they_are() -> None:
    source, destination = LendingDisk(CONTENT), WritableDisk(SIZE)
    copier = made(source, destination)
    destination.behind_gate.clear()
    for nr in range(WINDOWS_MAX):
        await asyncio.wait_for(copier.copy(nr * WINDOW, WINDOW), PATIENCE_S)
    late = asyncio.ensure_future(copier.copy(WINDOWS_MAX * WINDOW, WINDOW))
    await settle()
    assert destination.data[WINDOWS_MAX * WINDOW :] == bytes(SIZE - 4 * WINDOW)
    assert len(destination.behind) == 1  # one at a time
    destination.behind_gate.set()
    await asyncio.wait_for(late, PATIENCE_S)
    copier.rest()
    await copier.quiesce()
    assert [each for each in destination.behind if each] == [
        [(nr * WINDOW, (nr + 1) * WINDOW)] for nr in range(WINDOWS_MAX + 1)
    ]
    await until(lambda: source.came_back == [""] * 3)
