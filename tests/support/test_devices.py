# SPDX-License-Identifier: Apache-2.0
"""The devices of the crash suites: they must lose exactly what a disk may lose."""

import asyncio
import errno

import pytest

from nbdtarget.bio import FUA, OP_FLUSH, OP_READ, OP_WRITE, Bio
from nbdtarget.common.errors import DeviceError
from nbdtarget.targets.powercut.volatile_cache import Fate
from tests.support.clock import SimClock
from tests.support.devices import (
    BadRange,
    CrashDevice,
    FailAfter,
    FailFlush,
    FaultDevice,
    Slow,
    SlowDevice,
)
from tests.support.model import DiskModel

SIZE = 8 * 512
A = b"A" * 512
B = b"B" * 512
ZERO = bytes(512)


async def turns(number: int = 20) -> None:
    """Let the event loop turn."""
    for _ in range(number):
        await asyncio.sleep(0)


async def test_read_returns_what_was_written() -> None:
    device = CrashDevice(SIZE)
    await device.write(100, b"hello")
    assert bytes(await device.read(99, 7)) == b"\0hello\0"


async def test_unflushed_write_may_be_there_or_not() -> None:
    device = CrashDevice(SIZE)
    await device.write(0, A)
    assert {image[:512] for image in device.crash_images()} == {A, ZERO}


async def test_flushed_write_survives_each_image() -> None:
    device = CrashDevice(SIZE)
    await device.write(0, A)
    await device.flush()
    await device.write(512, B)
    assert {image[:512] for image in device.crash_images()} == {A}
    assert device.nr_pending == 1


async def test_fua_write_survives_and_nothing_older_returns() -> None:
    device = CrashDevice(SIZE)
    await device.write(0, A + A)
    await device.write(0, B, fua=True)
    assert {image[:512] for image in device.crash_images()} == {B}
    assert {image[512:1024] for image in device.crash_images()} == {A, ZERO}
    await device.flush()
    assert device.stable_image()[:1024] == B + A


async def test_torn_write_leaves_part_of_its_sectors() -> None:
    device = CrashDevice(SIZE)
    await device.write(0, A * 4)
    images = {image[: 4 * 512] for image in device.crash_images()}
    assert A + ZERO * 3 in images
    assert all(image[at : at + 512] in (A, ZERO) for image in images for at in (0, 512))


async def test_part_of_a_sector_is_never_mixed() -> None:
    device = CrashDevice(SIZE)
    await device.write(0, b"x")
    await device.write(1, b"y")
    starts = {image[:2] for image in device.crash_images()}
    assert starts == {b"\0\0", b"x\0", b"xy"}


async def test_flush_covers_only_what_had_ended_when_it_was_submitted() -> None:
    device = CrashDevice(SIZE, inline_chance=0.0)
    flush = Bio(OP_FLUSH, 0, 0, None, 0, lambda _: None)
    device.submit(flush)
    device.inline_chance = 1.0
    await device.write(0, A)
    await turns()
    assert device.stable_image()[:512] == ZERO


async def test_deferred_write_owns_its_borrowed_payload() -> None:
    device = CrashDevice(SIZE, inline_chance=0.0)
    buffer = bytearray(A)
    ended: list[Bio] = []
    device.submit(
        Bio(OP_WRITE, 0, 512, memoryview(buffer), 0, ended.append, borrowed=True)
    )
    buffer[:] = B
    await turns()
    assert device.image()[:512] == A


async def test_write_under_way_is_at_risk() -> None:
    device = CrashDevice(SIZE, inline_chance=0.0)
    device.submit(Bio(OP_WRITE, 0, 512, memoryview(A), 0, lambda _: None))
    assert {image[:512] for image in device.crash_images()} == {A, ZERO}
    await asyncio.sleep(0)


async def test_deferred_bios_end_in_an_order_drawn_from_the_seed() -> None:
    async def order(seed: int) -> list[int]:
        device = CrashDevice(SIZE, seed, inline_chance=0.0)
        ended: list[int] = []

        def endio(bio: Bio) -> None:
            ended.append(bio.offset)

        for nr in range(8):
            view = memoryview(bytearray(512))
            device.submit(Bio(OP_READ, nr * 512, 512, view, 0, endio))
        await turns()
        return ended

    assert await order(1) == await order(1)
    assert await order(1) != await order(2)


async def test_cut_power_stops_everything() -> None:
    device = CrashDevice(SIZE)
    device.cut_power()
    with pytest.raises(DeviceError):
        await device.write(0, A)
    assert device.image() == bytes(SIZE)


async def test_reopen_holds_the_image() -> None:
    device = CrashDevice(SIZE)
    await device.write(0, A)
    again = device.reopen(device.crash(5))
    assert again.image() == device.crash(5)
    assert again.nr_pending == 0


@pytest.mark.parametrize("seed", range(20))
async def test_crash_is_always_within_the_model(seed: int) -> None:
    device = CrashDevice(SIZE, seed, inline_chance=0.5)
    model = DiskModel(bytes(SIZE))
    for step in range(12):
        data = bytes([step + 1]) * 700
        fua = step % 5 == 4
        started = model.start_write(step * 211, data, 700, f"w{step}")
        await device.write(step * 211, data, fua=fua)
        model.end_write(started, ok=True, fua=fua)
        if step % 4 == 3:
            promised = model.start_flush()
            await device.flush()
            model.end_flush(promised, ok=True)
    for image in device.crash_images(samples=30):
        model.check_survivor(image)


async def test_bounds_are_refused() -> None:
    device = CrashDevice(SIZE, read_only=True)
    with pytest.raises(DeviceError) as caught:
        await device.write(0, A)
    assert caught.value.errno == errno.EPERM


async def test_fault_fails_the_nth_and_all_after() -> None:
    device = FaultDevice(CrashDevice(SIZE), 1)
    await device.write(0, A)
    for _ in range(2):
        with pytest.raises(DeviceError):
            await device.read(0, 512)
    assert (device.count, device.failed) == (3, 2)


async def test_fault_not_sticky_fails_once() -> None:
    device = FaultDevice(
        CrashDevice(SIZE),
        1,
        sticky=False,
        ops=frozenset({OP_WRITE}),
        errno=errno.ENOSPC,
    )
    await device.write(0, A)
    await device.flush()
    with pytest.raises(DeviceError) as caught:
        await device.write(512, A)
    assert caught.value.errno == errno.ENOSPC
    await device.write(512, B)


@pytest.mark.parametrize("fua", [False, True])
async def test_fault_of_flush_or_fua_latches(fua: bool) -> None:
    device = FaultDevice(CrashDevice(SIZE), 0, sticky=False)
    bio = Bio(OP_FLUSH, 0, 0, None, 0, lambda _: None)
    if fua:
        bio = Bio(OP_WRITE, 0, 512, memoryview(A), FUA, lambda _: None)
    device.submit(bio)
    assert bio.status == errno.EIO
    await device.write(0, A)
    with pytest.raises(DeviceError):
        await device.flush()
    device.clear()
    await device.flush()


async def test_slow_starts_after_its_delay() -> None:
    clock = SimClock()
    device = SlowDevice(CrashDevice(SIZE), clock, 2.0)
    ended: list[Bio] = []
    device.submit(Bio(OP_WRITE, 0, 512, memoryview(A), 0, ended.append))
    clock.advance(1.9)
    assert not ended
    assert device.in_flight == 1
    clock.advance(0.1)
    assert ended
    assert ended[0].status == 0


async def test_write_tears_only_at_the_border() -> None:
    device = CrashDevice(16 * 512, border=4096)
    await device.write(0, A * 16)
    starts = {(image[:512], image[4096:4608]) for image in device.crash_images()}
    assert starts == {(one, other) for one in (A, ZERO) for other in (A, ZERO)}
    for image in device.crash_images():
        assert image[:4096] in (A * 8, ZERO * 8)


async def test_border_outlives_a_reopen() -> None:
    device = CrashDevice(SIZE, border=4096)
    assert device.reopen(device.crash(1)).border == 4096


async def test_power_cut_keeps_or_drops_all_if_asked() -> None:
    device = CrashDevice(SIZE)
    await device.write(0, A)
    await device.write(512, B)
    assert device.crash(1, Fate.KEEP)[:1024] == A + B
    assert device.crash(1, Fate.DROP) == bytes(SIZE)


async def test_failed_flush_leaves_its_writes_at_risk_and_latches() -> None:
    device = CrashDevice(SIZE, lie=FailFlush(1))
    await device.flush()
    await device.write(0, A)
    for _ in range(2):
        with pytest.raises(DeviceError):
            await device.flush()
    with pytest.raises(DeviceError):
        await device.write(512, B, fua=True)
    assert {image[:512] for image in device.crash_images()} == {A, ZERO}
    assert bytes(await device.read(0, 512)) == A
    assert device.failed == 3
    again = device.reopen(device.crash(0))
    await again.flush()


async def test_lie_counts_from_when_it_is_told() -> None:
    device = CrashDevice(SIZE)
    await device.flush()
    device.lie = FailAfter(2)
    await device.write(0, A)
    await device.read(0, 512)
    for _ in range(2):
        with pytest.raises(DeviceError):
            await device.read(0, 512)
    device.lie = None
    assert bytes(await device.read(0, 512)) == A


async def test_bad_range_fails_what_touches_it() -> None:
    device = CrashDevice(SIZE, lie=BadRange(512, 1024, frozenset({OP_READ})))
    await device.write(0, A * 3)
    await device.read(0, 512)
    await device.read(1024, 512)
    with pytest.raises(DeviceError):
        await device.read(1023, 1)
    device.lie = BadRange(512, 1024)
    with pytest.raises(DeviceError):
        await device.write(0, A * 2)
    await device.flush()


async def test_failed_durable_write_to_a_bad_range_latches() -> None:
    device = CrashDevice(SIZE, lie=BadRange(0, 512))
    with pytest.raises(DeviceError):
        await device.write(0, A, fua=True)
    with pytest.raises(DeviceError):
        await device.flush()
    assert device.image() == bytes(SIZE)


async def test_slow_device_answers_later_and_is_at_risk_meanwhile() -> None:
    clock = SimClock()
    device = CrashDevice(SIZE, lie=Slow(2.0, clock))
    ended: list[Bio] = []
    device.submit(Bio(OP_WRITE, 0, 512, memoryview(A), 0, ended.append))
    clock.advance(1.9)
    assert not ended
    assert (device.nr_pending, device.nr_at_risk) == (0, 1)
    clock.advance(0.1)
    assert ended
    assert device.image()[:512] == A


async def test_watcher_sees_each_bio_start_and_finish() -> None:
    seen: list[tuple[str, int, int]] = []

    class Watch:
        def started(self, device: CrashDevice, bio: Bio) -> None:
            seen.append(("started", bio.op, device.nr_pending))

        def finished(self, device: CrashDevice, bio: Bio, errno: int) -> None:
            seen.append(("finished", bio.op, device.nr_pending))

    device = CrashDevice(SIZE)
    device.watchers.append(Watch())
    await device.write(0, A)
    assert seen == [("started", OP_WRITE, 0), ("finished", OP_WRITE, 1)]


async def test_failed_write_may_have_happened_wholly_or_in_part() -> None:
    seen = set()
    for seed in range(40):
        device = CrashDevice(SIZE, seed, lie=BadRange(0, SIZE, frozenset({OP_WRITE})))
        device.happens = 1.0
        with pytest.raises(DeviceError):
            await device.write(0, A + A)
        seen.add(device.image()[:1024])
    assert seen == {A + A, A + ZERO, ZERO + A, ZERO + ZERO}


async def test_failed_flush_may_have_made_any_of_its_writes_stable() -> None:
    seen = set()
    for seed in range(40):
        device = CrashDevice(SIZE, seed, lie=FailFlush())
        device.happens = 1.0
        await device.write(0, A)
        await device.write(512, B)
        with pytest.raises(DeviceError):
            await device.flush()
        seen.add(device.stable_image()[:1024])
    assert seen == {A + B, A + ZERO, ZERO + B, ZERO + ZERO}
