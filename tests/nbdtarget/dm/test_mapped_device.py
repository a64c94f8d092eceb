# SPDX-License-Identifier: Apache-2.0
"""A mapped device: the way of a bio, suspend and resume, failure, events."""

import asyncio
import errno as errnos
import logging

import pytest

from nbdtarget.bio import (
    FAST_ZERO,
    FUA,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    PENDING,
    Bio,
)
from nbdtarget.common.errors import TableError
from nbdtarget.dm.mapped_device import State
from tests.support.clock import SimClock
from tests.support.dm import (
    ProbeTarget,
    content,
    make,
    make_registry,
    submit,
)

MIXED = "0 8 linear /a 8\n8 8 error\n16 8 zero\n24 8 linear /b 0"


async def test_single_target_maps_and_offsets() -> None:
    device, _, opener = await make("0 8 linear /a 8", a=16384)
    assert submit(device, OP_WRITE, 512, b"hello", flags=FUA).status == 0
    assert opener.open["/a"].data[4608:4613] == b"hello"
    assert opener.open["/a"].log == [(OP_WRITE, 4608, 5, FUA)]
    bio = submit(device, OP_READ, 512, 5)
    assert content(bio) == b"hello"


@pytest.mark.parametrize(
    ("op", "errno"),
    [
        (OP_READ, errnos.EINVAL),
        (OP_WRITE, errnos.ENOSPC),
        (OP_WRITE_ZEROES, errnos.ENOSPC),
        (OP_DISCARD, errnos.EINVAL),
    ],
)
async def test_bio_past_the_end_never_reaches_the_device_below(
    op: int, errno: int
) -> None:
    device, _, opener = await make("0 8 linear /a 0", a=16384)
    assert submit(device, op, 4095, 2).status == errno
    assert opener.open["/a"].log == []


async def test_several_targets_split_at_their_borders() -> None:
    device, _, opener = await make("0 8 linear /a 8\n8 8 linear /b 0", a=8192, b=4096)
    data = bytes(range(200)) * 4
    assert submit(device, OP_WRITE, 4096 - 300, data).status == 0
    assert opener.open["/a"].log == [(OP_WRITE, 8192 - 300, 300, 0)]
    assert opener.open["/b"].log == [(OP_WRITE, 0, 500, 0)]
    assert content(submit(device, OP_READ, 4096 - 300, 800)) == data


async def test_split_bio_ends_with_the_error_of_its_failing_part() -> None:
    device, _, opener = await make(MIXED, a=8192, b=4096)
    assert submit(device, OP_READ, 0, 16384).status == errnos.EIO
    assert submit(device, OP_READ, 8192, 8192).status == 0
    assert len(opener.open["/a"].log) == 1


async def test_zero_target_overwrites_the_readers_buffer() -> None:
    device, _, _ = await make("0 8 zero")
    buffer = bytearray(b"secret" * 3)
    bio = Bio(OP_READ, 0, 18, memoryview(buffer), 0, lambda _: None)
    device.submit(bio)
    assert (bio.status, bytes(buffer)) == (0, bytes(18))


async def test_error_target_fails_everything_but_flush() -> None:
    device, _, _ = await make("0 8 error")
    for op in (OP_READ, OP_WRITE, OP_DISCARD, OP_WRITE_ZEROES):
        assert submit(device, op, 0, 512).status == errnos.EIO
    assert submit(device, OP_FLUSH).status == 0


async def test_flush_goes_to_every_target_and_errors_win() -> None:
    device, _, opener = await make(MIXED, a=8192, b=4096)
    opener.open["/b"].hold = True
    opener.open["/a"].flush_errno = errnos.EIO
    bio = submit(device, OP_FLUSH)
    assert bio.status == PENDING
    opener.open["/b"].let_go()
    assert bio.status == errnos.EIO
    assert opener.open["/a"].log == opener.open["/b"].log == [(OP_FLUSH, 0, 0, 0)]


async def test_flush_is_sent_num_flush_bios_times() -> None:
    device, _, _ = await make("0 8 probe /a /b", a=4096, b=4096)
    assert device.active is not None
    target = device.active.targets[0]
    assert isinstance(target, ProbeTarget)
    target.holds_flushes = True
    bio = submit(device, OP_FLUSH)
    assert len(target.flushes) == 2
    target.flushes[0].end(0)
    assert bio.status == PENDING
    target.flushes[1].end(0)
    assert bio.status == 0


async def test_write_zeroes_is_written_out_when_the_target_cannot() -> None:
    size = 9 << 20
    device, _, opener = await make(f"0 {size // 512} linear /a 0", a=size)
    below = opener.open["/a"]
    below.data[:] = b"\xff" * size
    await device.write_zeroes(512, size - 1024, fua=True)
    assert bytes(below.data) == b"\xff" * 512 + bytes(size - 1024) + b"\xff" * 512
    assert {entry[0] for entry in below.log} == {OP_WRITE}
    assert {entry[3] for entry in below.log} == {FUA}


async def test_write_zeroes_written_out_is_bounded_in_flight() -> None:
    size = 9 << 20
    device, _, opener = await make(f"0 {size // 512} linear /a 0", a=size)
    below = opener.open["/a"]
    below.hold = True
    bio = submit(device, OP_WRITE_ZEROES, 0, size)
    assert len(below.held) == 4
    while bio.status == PENDING:
        below.serve(below.held.pop(0))
        assert len(below.held) <= 4
    assert bio.status == 0


async def test_fast_zero_is_refused_when_it_would_be_writing() -> None:
    device, _, opener = await make("0 8 linear /a 0", a=4096)
    bio = submit(device, OP_WRITE_ZEROES, 0, 512, flags=FAST_ZERO)
    assert bio.status == errnos.ENOTSUP
    assert opener.open["/a"].log == []


async def test_discard_does_nothing_when_the_target_cannot() -> None:
    device, _, opener = await make("0 8 linear /a 0", a=4096)
    assert submit(device, OP_DISCARD, 0, 512).status == 0
    assert opener.open["/a"].log == []


async def test_read_only_device_reads_and_refuses_writes() -> None:
    device, _, opener = await make("0 8 linear /a 0", read_only=True, a=4096)
    assert opener.open["/a"].read_only
    assert submit(device, OP_READ, 0, 512).status == 0
    for op in (OP_WRITE, OP_DISCARD, OP_WRITE_ZEROES):
        assert submit(device, op, 0, 512).status == errnos.EPERM


async def test_device_without_a_table_fails_all_io() -> None:
    registry, _ = make_registry()
    device = await registry.create("x", None)
    assert submit(device, OP_READ, 0, 512).status == errnos.EIO
    await device.resume()
    assert device.state is State.ACTIVE
    await device.suspend()
    with pytest.raises(TableError, match="no table"):
        await device.resume()


async def test_suspend_waits_for_what_is_in_flight() -> None:
    device, _, opener = await make("0 8 linear /a 0", a=4096)
    below = opener.open["/a"]
    below.hold = True
    first = submit(device, OP_WRITE, 0, b"old")
    suspend = asyncio.create_task(device.suspend())
    await asyncio.sleep(0)
    assert device.state is State.SUSPENDING
    later = submit(device, OP_WRITE, 0, b"new")
    assert len(below.held) == 1
    below.let_go()
    await suspend
    assert (first.status, later.status) == (0, PENDING)
    assert device.state.value == "SUSPENDED"
    await device.resume()
    assert later.status == 0
    assert below.data[:3] == b"new"


@pytest.mark.parametrize("noflush", [False, True])
async def test_suspend_flushes_unless_asked_not_to(noflush: bool) -> None:
    device, _, opener = await make("0 8 linear /a 0", a=4096)
    submit(device, OP_WRITE, 0, b"data")
    await device.suspend(noflush=noflush)
    flushes = [entry for entry in opener.open["/a"].log if entry[0] == OP_FLUSH]
    assert len(flushes) == (0 if noflush else 1)


@pytest.mark.parametrize("disk", ["/a", "/b"])
async def test_flush_that_fails_in_suspend_is_a_loss(disk: str) -> None:
    device, registry, opener = await make("0 8 linear /a 0", a=4096, b=4096)
    submit(device, OP_WRITE, 0, b"data")
    opener.open["/a"].flush_errno = errnos.EIO
    await registry.load("x", f"0 8 linear {disk} 0")
    await device.resume()
    opener.open["/a"].flush_errno = 0
    assert device.losses > 0
    assert submit(device, OP_FLUSH).status == 0  # its sender compares the losses


async def test_queued_bio_owns_its_payload() -> None:
    device, _, opener = await make("0 8 linear /a 0", a=4096)
    await device.suspend()
    buffer = bytearray(b"mine")
    bio = Bio(OP_WRITE, 0, 4, memoryview(buffer), 0, lambda _: None, None, True)
    device.submit(bio)
    buffer[:] = b"XXXX"
    await device.resume()
    assert opener.open["/a"].data[:4] == b"mine"


async def test_suspend_and_resume_call_the_target_in_the_kernels_order() -> None:
    device, registry, _ = await make("0 8 probe /a /b", a=4096, b=4096)
    await device.suspend()
    await device.suspend()
    await device.resume()
    await device.resume()
    await registry.remove("x")
    assert ProbeTarget.lives == [
        *("ctr", "preresume", "resume"),
        *("presuspend", "postsuspend", "preresume", "resume"),
        *("presuspend", "postsuspend", "dtr"),
    ]


async def test_resume_swaps_the_inactive_table_in() -> None:
    device, registry, opener = await make("0 8 linear /a 0", a=4096, b=8192)
    await registry.load("x", "0 16 linear /b 0")
    assert device.size == 4096
    assert submit(device, OP_WRITE, 0, b"a").status == 0
    await device.resume()
    assert (device.size, device.inactive) == (8192, None)
    assert submit(device, OP_WRITE, 0, b"b").status == 0
    assert opener.open["/a"].data[:1] == b"a"
    assert opener.open["/b"].data[:1] == b"b"
    assert opener.still_open == ["/b"]


async def test_device_whose_new_table_refuses_to_resume_serves_with_the_old_one() -> (
    None
):
    device, registry, opener = await make("0 8 probe /c /d", a=8192, c=4096, d=4096)
    await registry.load("x", "0 16 linear /a 0\n16 8 probe /a /d refuse")
    ProbeTarget.lives.clear()
    with pytest.raises(
        TableError, match="goes on with the table that it had"
    ) as caught:
        await device.resume()
    assert caught.value.errno == errnos.EBUSY
    assert device.state is State.ACTIVE
    assert device.size == 4096
    assert device.table() == [(0, 8, "probe", "/c /d")]
    assert device.table(inactive=True)[1] == (16, 8, "probe", "/a /d refuse")
    assert submit(device, OP_READ, 0, 512).status == 0
    assert device.losses == 0
    with pytest.raises(TableError, match="goes on with the table that it had"):
        await device.resume()
    await device.clear()
    assert sorted(opener.still_open) == ["/c", "/d"]


async def test_bios_that_wait_for_a_table_that_is_refused_go_to_the_old_one() -> None:
    device, registry, _ = await make("0 8 linear /c 0", a=4096, b=4096, c=4096)
    await registry.load("x", "0 8 probe /a /b refuse")
    resuming = asyncio.ensure_future(device.resume())
    await device.suspend()  # has begun; the verbs run one after another
    with pytest.raises(TableError, match="will not"):
        await resuming
    bio = submit(device, OP_READ, 0, 512)
    with pytest.raises(TableError, match="is still suspended, without it"):
        await device.resume()
    assert bio.status < 0
    assert device.state is State.SUSPENDED
    await device.clear()
    await device.resume()
    assert bio.status == 0


async def test_device_without_a_table_is_without_one_when_its_first_is_refused() -> (
    None
):
    registry, opener = make_registry(a=4096, b=4096)
    device = await registry.create("x", None)
    await registry.load("x", "0 8 probe /a /b refuse")
    with pytest.raises(TableError, match="is as it was before"):
        await device.resume()
    assert (device.state, device.active, device.size) == (State.ACTIVE, None, 0)
    assert submit(device, OP_READ, 0, 512).status == errnos.EIO
    await registry.remove("x")
    assert opener.still_open == []


async def test_device_is_left_suspended_if_no_table_can_be_resumed() -> None:
    device, registry, _ = await make("0 8 probe /c /d", a=4096, b=4096, c=4096, d=4096)
    await registry.load("x", "0 8 probe /a /b refuse")
    assert device.active is not None
    probe = device.active.targets[0]
    assert isinstance(probe, ProbeTarget)
    probe.args = ("/c", "/d", "refuse")
    with pytest.raises(TableError, match="cannot be resumed either") as caught:
        await device.resume()
    assert "load a table that works, and resume it" in str(caught.value)
    assert device.state is State.SUSPENDED
    bio = submit(device, OP_READ, 0, 512)
    await registry.load("x", "0 8 linear /c 0")
    await device.resume()
    assert bio.status == 0


async def test_targets_beside_the_one_that_refuses_to_resume_end_cleanly() -> None:
    device, registry, _ = await make("0 8 linear /c 0", a=4096, b=4096, c=4096, d=4096)
    await registry.load("x", "0 8 probe /a /b\n8 8 probe /d /a refuse")
    ProbeTarget.lives.clear()
    with pytest.raises(TableError, match="will not"):
        await device.resume()
    assert ProbeTarget.lives == ["preresume", "preresume", "postsuspend"]


async def test_failing_map_fails_this_device_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device, registry, _ = await make("0 8 buggy", a=4096)
    other = await registry.create("y", "0 8 linear /a 0")
    with caplog.at_level(logging.ERROR):
        assert submit(device, OP_READ, 0, 512).status == errnos.EIO
    assert "a bug" in caplog.text
    assert submit(device, OP_FLUSH).status == errnos.EIO
    assert submit(other, OP_READ, 0, 512).status == 0
    assert await device.status() == [(0, 8, "buggy", "Fail")]
    assert device.event_nr == 1
    await registry.load("x", "0 8 zero")
    await device.resume()
    assert submit(device, OP_READ, 0, 512).status == 0


async def test_failed_device_gives_up_waiting_for_lost_bios() -> None:
    device, registry, opener = await make("0 8 linear /a 0\n8 8 buggy", a=4096, b=4096)
    opener.open["/a"].hold = True
    submit(device, OP_READ, 0, 512)
    assert submit(device, OP_READ, 4096, 512).status == errnos.EIO
    remove = asyncio.create_task(registry.remove("x"))
    await asyncio.sleep(0)
    assert isinstance(registry.clock, SimClock)
    registry.clock.advance(10)
    await remove
    # A disk that may still be written to stays open: its descriptor must not become another file's.
    assert opener.still_open == ["/a"]


async def test_wait_returns_when_an_event_comes() -> None:
    device, registry, _ = await make("0 8 probe /a /b", a=4096, b=4096)
    assert await device.events.wait(7) == 0
    waiting = asyncio.create_task(device.events.wait())
    await asyncio.sleep(0)
    await device.message(0, ["event"])
    assert await waiting == 1
    waiting = asyncio.create_task(device.events.wait())
    await asyncio.sleep(0)
    await registry.remove("x")
    assert await waiting == 2


async def test_removed_device_fails_what_still_comes() -> None:
    device, registry, _ = await make("0 8 zero")
    await device.suspend()
    queued = submit(device, OP_READ, 0, 512)
    await registry.remove("x")
    assert queued.status == errnos.EIO
    assert submit(device, OP_READ, 0, 512).status == errnos.EIO
