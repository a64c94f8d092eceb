# SPDX-License-Identifier: Apache-2.0
"""Device: the coroutines are built on submit, whether a bio ends inside it or later."""

import asyncio
import errno

import pytest

from nbdtarget.bio import (
    FUA,
    NO_UNMAP,
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import EXTENT_DATA, Device, Extent, append_extent


class RecordingDevice(Device):
    """Ends each bio with `status`, at once or on the loop's next turn."""

    def __init__(self, *, inline: bool, status: int = 0) -> None:
        super().__init__("recording", 4096)
        self.inline = inline
        self.status = status
        self.seen: list[tuple[int, int, int, int]] = []

    def submit(self, bio: Bio) -> None:
        self.seen.append((bio.op, bio.offset, bio.length, bio.flags))
        if bio.op == OP_READ and bio.payload is not None:
            bio.payload[:] = b"r" * bio.length
        if self.inline:
            bio.end(self.status)
        else:
            asyncio.get_running_loop().call_soon(bio.end, self.status)


@pytest.fixture(params=[True, False], ids=["inline", "later"])
def device(request: pytest.FixtureRequest) -> RecordingDevice:
    return RecordingDevice(inline=request.param)


async def test_coroutines_submit_their_operation(device: RecordingDevice) -> None:
    assert bytes(await device.read(1, 2)) == b"rr"
    await device.write(3, b"abc", fua=True)
    await device.flush()
    await device.discard(5, 6)
    await device.write_zeroes(7, 8, no_unmap=True)
    await device.prefetch(9, 10)
    assert device.seen == [
        (OP_READ, 1, 2, 0),
        (OP_WRITE, 3, 3, FUA),
        (OP_FLUSH, 0, 0, 0),
        (OP_DISCARD, 5, 6, 0),
        (OP_WRITE_ZEROES, 7, 8, NO_UNMAP),
        (OP_CACHE, 9, 10, 0),
    ]


@pytest.mark.parametrize("inline", [True, False])
async def test_failure_raises_what_failed_and_where(inline: bool) -> None:
    device = RecordingDevice(inline=inline, status=errno.EIO)
    with pytest.raises(DeviceError) as caught:
        await device.write(512, b"x")
    assert str(caught.value) == "recording: write of 1 bytes at 512: Input/output error"
    assert caught.value.errno == errno.EIO


async def test_extents_of_a_device_that_does_not_know_are_data() -> None:
    device = RecordingDevice(inline=True)
    assert await device.extents(0, 4096) == [Extent(4096, EXTENT_DATA)]


async def test_cancelled_wait_leaves_the_bio_to_end_alone() -> None:
    device = RecordingDevice(inline=False)
    task = asyncio.create_task(device.flush())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("op", "offset", "length", "expected"),
    [
        (OP_READ, 4096, 0, 0),
        (OP_READ, 4095, 2, errno.EINVAL),
        (OP_CACHE, 4095, 2, errno.EINVAL),
        (OP_WRITE, 4095, 2, errno.ENOSPC),
        (OP_WRITE_ZEROES, 4095, 2, errno.ENOSPC),
        (OP_DISCARD, 4095, 2, errno.EINVAL),
        (OP_FLUSH, 0, 0, 0),
    ],
)
def test_bounds_are_checked_by_operation(
    op: int, offset: int, length: int, expected: int
) -> None:
    device = RecordingDevice(inline=True)
    assert device.check_bounds(Bio(op, offset, length, None, 0, print)) == expected


def test_read_only_device_refuses_to_change() -> None:
    device = RecordingDevice(inline=True)
    device.read_only = True
    assert device.check_bounds(Bio(OP_WRITE, 0, 1, None, 0, print)) == errno.EPERM
    assert device.check_bounds(Bio(OP_READ, 0, 1, None, 0, print)) == 0


async def test_device_that_has_no_context_says_0() -> None:
    device = RecordingDevice(inline=True)
    assert device.contexts == ()
    assert await device.context_extents("hydration", 0, 4096) == [Extent(4096, 0)]


def test_append_extent_joins_what_is_alike() -> None:
    found: list[Extent] = []
    for length, flags in ((1, 0), (2, 0), (3, 3), (4, 0)):
        append_extent(found, length, flags)
    assert found == [(3, 0), (3, 3), (4, 0)]
