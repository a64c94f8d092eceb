# SPDX-License-Identifier: Apache-2.0
"""RangedDevice over a store in memory: reads, ends, a replaced image, a source that is away."""

import asyncio
import errno
import logging

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE, PENDING, Bio
from nbdtarget.common.errors import DeviceError, ResolveError
from nbdtarget.devices.health import HealthState
from nbdtarget.devices.ranged import device as module
from nbdtarget.devices.ranged.device import RangedDevice, open_ranged, refuse_writing
from nbdtarget.devices.ranged.options import SourceOptions
from nbdtarget.devices.ranged.pin import Pin
from nbdtarget.devices.ranged.retry import RETRY_S_MAX
from nbdtarget.devices.ranged.store import (
    SourceAway,
    SourceChanged,
    SourceDenied,
    SourceError,
    SourceUnfit,
)
from tests.support.image_server import image_of
from tests.support.patience import until
from tests.support.ranged import MemoryStore, in_simulated_time

MIB = 1 << 20
IMAGE = image_of(12 * MIB + 100)
NAME = "https://me:pw@h/a.img?sig=secret"


async def opened(
    store: MemoryStore, *, options: SourceOptions | None = None
) -> RangedDevice:
    return await open_ranged(NAME, "https://h/a.img", store, options or SourceOptions())


def bio_of(offset: int, length: int, op: int = OP_READ) -> Bio:
    return Bio(op, offset, length, memoryview(bytearray(length)), 0, lambda _: None)


async def until_ended(*bios: Bio) -> None:
    await until(lambda: all(bio.status != PENDING for bio in bios))


def test_content_size_and_evidence() -> None:
    async def work() -> None:
        store = MemoryStore(IMAGE)
        device = await opened(store)
        assert device.size == len(IMAGE) + 412  # whole sectors
        assert bytes(await device.read(0, device.size)) == IMAGE + bytes(412)
        bios = [bio_of(nr * MIB, MIB) for nr in range(3, 9)]
        for bio in bios:
            device.submit_ahead(bio)
        await until_ended(*bios)
        assert all(
            bytes(bio.payload or b"") == IMAGE[bio.offset :][:MIB] for bio in bios
        )
        found = await device.identify("source")
        assert found.kind == "url"
        assert found.is_pinned
        assert set(found.ids) == {
            "url=https://h/a.img",
            f"size={len(IMAGE)}",
            'etag="one"',
        }
        assert "secret" not in repr(found) + device.name
        assert "pw" not in repr(found) + device.name
        await device.close()
        assert store.is_closed

    in_simulated_time(work())


def test_first_read_does_not_wait_for_the_requests_of_a_copy() -> None:
    """A fresh clone asks for eight large ranges at once: a client's read is sent before most of them, and is answered one latency later."""

    async def work() -> None:
        store = MemoryStore(IMAGE)
        store.latency_s = 0.03
        device = await opened(store)
        begun_s = asyncio.get_running_loop().time()
        bios = [bio_of(nr * MIB, MIB) for nr in range(0, 12, 2)]
        for bio in bios:
            device.submit_ahead(bio)
        await asyncio.sleep(0)  # the first of them begins
        read = bio_of(11 * MIB, 4096)
        device.submit(read)
        await until_ended(read)
        took_s = asyncio.get_running_loop().time() - begun_s
        assert took_s == pytest.approx(0.03)
        assert [each[2] for each in store.noted].index(True) <= 2
        await until_ended(*bios)
        assert len(store.noted) == len(bios) + 1
        await device.close()

    in_simulated_time(work())


def test_first_bytes_came_with_the_opening() -> None:
    async def work() -> None:
        store = MemoryStore(IMAGE)
        device = await opened(store)
        await device.read(0, 65536)
        assert store.noted == []
        await device.close()

    in_simulated_time(work())


@pytest.mark.parametrize(
    ("offset", "length", "op", "status"),
    [
        (len(IMAGE) + 412, 512, OP_READ, errno.EINVAL),
        (0, 512, OP_WRITE, errno.EPERM),
        (0, 0, OP_READ, 0),
    ],
)
def test_bios_that_are_not_carried_out(
    offset: int, length: int, op: int, status: int
) -> None:
    async def work() -> None:
        device = await opened(MemoryStore(IMAGE))
        for submit in (device.submit, device.submit_ahead):
            bio = bio_of(offset, length, op)
            submit(bio)
            assert bio.status == status
        await device.flush()
        await device.prefetch(0, 512)
        await device.close()

    in_simulated_time(work())


def test_replaced_image_ends_all_reads_at_once_and_for_good(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        store = MemoryStore(IMAGE)
        store.latency_s = 1.0
        device = await opened(store)
        events: list[HealthState] = []
        device.health.watchers.append(lambda: events.append(device.health.state))
        good = [bio_of(nr * 2 * MIB, MIB) for nr in range(1, 4)]
        for bio in good:
            device.submit_ahead(bio)
        await until_ended(*good)
        store.bytes_per_s = MIB
        nr_before = len(store.noted)

        def trouble(nr: int) -> None:
            if nr == nr_before + 2:
                raise SourceChanged('it was replaced: its etag is "two", not "one"')

        store.trouble = trouble
        bios = [bio_of(nr * 2 * MIB + MIB, MIB // 2) for nr in range(5)]
        for nr, bio in enumerate(bios):
            (device.submit if nr % 2 else device.submit_ahead)(bio)
        await until_ended(*bios)
        assert {bio.status for bio in bios} <= {0, errno.EIO}
        assert [bio.status for bio in bios].count(errno.EIO) >= 3
        assert device.health.state is HealthState.LOST
        assert events == [HealthState.LOST]
        assert device.changed == 'it was replaced: its etag is "two", not "one"'
        assert device.health.last_error == device.changed
        # Even data that was fetched before cannot be read: a disk must not be half readable.
        asked = len(store.noted)
        for at in (0, 2 * MIB, 11 * MIB):
            with pytest.raises(DeviceError):
                await device.read(at, 512)
        assert len(store.noted) == asked
        await device.flush()
        await device.close()

    with caplog.at_level(logging.ERROR):
        in_simulated_time(work())
    assert caplog.messages == [
        'https://***@h/a.img?***: it was replaced: its etag is "two", not "one"; nothing more is read from it'
    ]


def test_bios_wait_for_a_source_that_is_away() -> None:
    async def work() -> None:
        store = MemoryStore(IMAGE)
        device = await opened(store)

        def trouble(_: int) -> None:
            raise SourceAway("cannot connect")

        store.trouble = trouble
        bios = [bio_of(MIB, 4096), bio_of(4 * MIB, MIB)]
        device.submit(bios[0])
        device.submit_ahead(bios[1])
        await asyncio.sleep(7200.0)
        assert [bio.status for bio in bios] == [PENDING, PENDING]
        assert device.health.state is HealthState.OK
        assert device.health.last_error == "cannot connect"
        assert device.traffic.away_since_s
        store.trouble = None
        await asyncio.sleep(2 * RETRY_S_MAX)
        assert [bio.status for bio in bios] == [0, 0]
        assert device.health.last_error == ""
        await device.close()

    in_simulated_time(work())


@pytest.mark.parametrize("way", ["give_up_reads", "close"])
def test_a_stop_does_not_wait_for_a_source_that_is_away(way: str) -> None:
    async def work() -> None:
        store = MemoryStore(IMAGE)
        device = await opened(store)

        def trouble(_: int) -> None:
            raise SourceAway("cannot connect")

        store.trouble = trouble
        bios = [bio_of(nr * MIB + MIB, 4096) for nr in range(10)]
        for nr, bio in enumerate(bios):
            (device.submit if nr % 2 else device.submit_ahead)(bio)
        await asyncio.sleep(100.0)
        if way == "close":
            await device.close()
        else:
            assert device.nr_in_flight >= 1
            device.give_up_reads()
        await asyncio.sleep(0.001)
        assert {bio.status for bio in bios} == {errno.EIO}
        if way != "close":
            store.trouble = None
            assert bytes(await device.read(MIB, 512)) == IMAGE[MIB : MIB + 512]
            await device.close()

    in_simulated_time(work())


@pytest.mark.parametrize(
    ("pin", "says"),
    [
        (Pin(0, '"a"'), "a disk cannot have 0 bytes"),
        (Pin(1 << 63, '"a"'), f"a disk cannot have {1 << 63} bytes"),
        (Pin(5), module.NO_VALIDATOR),
    ],
    ids=["empty", "huge", "no validator"],
)
def test_images_that_cannot_be_pinned_are_refused(pin: Pin, says: str) -> None:
    async def work() -> None:
        store = MemoryStore(b"x" * 5)
        store.pin = pin
        with pytest.raises(ResolveError) as caught:
            await opened(store)
        assert str(caught.value) == f"https://***@h/a.img?***: {says}"
        assert store.is_closed

    in_simulated_time(work())


def test_weak_pins_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        for pin, options in (
            (Pin(5, "", "Mon"), SourceOptions()),
            (Pin(5), SourceOptions(is_pinned_by_size=True)),
            (Pin(5, '"a"'), SourceOptions(is_pinned_by_size=True)),
            (Pin(5, '"a"'), SourceOptions()),
        ):
            store = MemoryStore(b"x" * 5)
            store.pin = pin
            device = await opened(store, options=options)
            assert (await device.identify("source")).is_pinned is (
                not options.is_pinned_by_size and pin.is_strong
            )
            await device.close()

    with caplog.at_level(logging.WARNING):
        in_simulated_time(work())
    assert [
        message.partition("only ")[2].partition(" can")[0]
        for message in caplog.messages
    ] == [
        "size and time of last modification",
        "its size",
        "its size",
    ]


class _FailingStore(MemoryStore):
    def __init__(self, *errors: SourceError) -> None:
        super().__init__(IMAGE)
        self.errors = list(errors)

    async def open(self, take: object) -> Pin:
        if self.errors:
            raise self.errors.pop(0)
        return await super().open(take)  # type: ignore[arg-type]


def test_opening_tries_a_source_that_is_away_for_a_while() -> None:
    async def work() -> None:
        device = await opened(_FailingStore(*[SourceAway("status 503")] * 5))
        await device.close()
        with pytest.raises(ResolveError, match="status 503"):
            await opened(_FailingStore(*[SourceAway("status 503")] * 10000))
        assert asyncio.get_running_loop().time() < 2 * module.OPEN_S_MAX

    in_simulated_time(work())


def test_opening_refuses_what_does_not_fit_at_once() -> None:
    async def work() -> None:
        with pytest.raises(ResolveError, match="no ranges"):
            await opened(_FailingStore(SourceUnfit("no ranges")))
        with pytest.raises(ResolveError, match="status 403"):
            await opened(_FailingStore(SourceDenied("status 403")))
        store = _FailingStore(SourceDenied("status 403"))
        store.renew_answers = [True]
        await (await opened(store)).close()
        assert asyncio.get_running_loop().time() == 0.0

    in_simulated_time(work())


def test_remote_images_are_not_written_to() -> None:
    refuse_writing(NAME, read_only=True)
    with pytest.raises(ResolveError, match="can only be read") as caught:
        refuse_writing(NAME, read_only=False)
    assert caught.value.errno == errno.EROFS
    assert "secret" not in str(caught.value)
