# SPDX-License-Identifier: Apache-2.0
"""Each client that flushes a device is told of each of its losses once."""

import errno as errnos

import pytest

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.losses import ConnectionObserver, FlushObserver
from tests.support.dm import RamDevice


@pytest.fixture
def device() -> RamDevice:
    return RamDevice("/a", 4096)


def flush(observer: ConnectionObserver) -> int:
    return observer.end(observer.mark(), 0)


async def test_everybody_who_flushes_learns_of_a_loss_once(device: RamDevice) -> None:
    observers = [FlushObserver(device) for _ in range(3)]
    device.health.note_loss()
    for observer in observers:
        with pytest.raises(DeviceError, match="flush"):
            await observer.flush()
        await observer.flush()


async def test_an_observer_of_several_devices_learns_of_each_devices_loss(
    device: RamDevice,
) -> None:
    other = RamDevice("/b", 4096)
    observer = FlushObserver(device, other, device)
    for lossy in (device, other):
        lossy.health.note_loss()
        with pytest.raises(DeviceError, match="/a, /b: flush"):
            await observer.flush()
        await observer.flush()


async def test_a_flush_that_fails_has_told_of_the_loss_too(device: RamDevice) -> None:
    observer = FlushObserver(device)
    device.health.note_loss()
    device.flush_errno = errnos.ENOSPC
    with pytest.raises(DeviceError, match="No space"):
        await observer.flush()
    device.flush_errno = 0
    await observer.flush()


def test_every_flush_that_was_in_flight_when_the_loss_was_told_fails(
    device: RamDevice,
) -> None:
    observer = FlushObserver(device)
    marks = [observer.mark() for _ in range(2)]
    device.health.note_loss()
    assert [observer.end(mark, 0) for mark in marks] == [errnos.EIO, errnos.EIO]
    assert observer.end(observer.mark(), 0) == 0


def test_a_loss_during_a_flush_fails_it(device: RamDevice) -> None:
    observer = FlushObserver(device)
    mark = observer.mark()
    device.health.note_loss()
    assert observer.end(mark, 0) == errnos.EIO


def test_a_new_connection_does_not_answer_for_what_others_have_been_told(
    device: RamDevice,
) -> None:
    old = ConnectionObserver(device)
    device.health.note_loss()
    assert flush(ConnectionObserver(device)) == 0  # it has written nothing yet
    assert flush(old) == errnos.EIO
    old.close()
    assert flush(ConnectionObserver(device)) == 0


@pytest.mark.parametrize("lost_first", [False, True])
def test_a_client_that_comes_back_over_a_new_connection_is_told(
    device: RamDevice, lost_first: bool
) -> None:
    old = ConnectionObserver(device)
    if lost_first:
        device.health.note_loss()
    old.close()
    if not lost_first:
        device.health.note_loss()
    new = ConnectionObserver(device)
    assert flush(new) == errnos.EIO
    assert flush(new) == 0
    assert flush(ConnectionObserver(device)) == 0  # the debt is paid


def test_flush_of_another_client_covers_closed_connections(
    device: RamDevice,
) -> None:
    other = ConnectionObserver(device)
    ConnectionObserver(device).close()
    assert flush(other) == 0
    device.health.note_loss()
    assert flush(ConnectionObserver(device)) == 0


def test_flush_covers_no_connection_that_closes_during_it(
    device: RamDevice,
) -> None:
    other, closing = ConnectionObserver(device), ConnectionObserver(device)
    mark = other.mark()
    closing.close()
    assert other.end(mark, 0) == 0
    device.health.note_loss()
    assert flush(ConnectionObserver(device)) == errnos.EIO


def test_loss_that_one_closed_connection_missed_is_reported(
    device: RamDevice,
) -> None:
    first, second = ConnectionObserver(device), ConnectionObserver(device)
    device.health.note_loss()
    assert flush(first) == errnos.EIO
    second.close()
    first.close()
    assert flush(ConnectionObserver(device)) == errnos.EIO
