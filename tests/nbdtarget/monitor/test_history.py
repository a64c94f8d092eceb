# SPDX-License-Identifier: Apache-2.0
"""The last minutes of each device: how many moments are kept, of how many devices, and what they say."""

import pytest

from nbdtarget.devices.base import Device
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.monitor import history
from nbdtarget.monitor.history import MOMENTS_MAX, PERIOD_S, History
from nbdtarget.server.traffic import Accounts
from nbdtarget_protocol.consts import CMD_CACHE, CMD_READ, CMD_WRITE
from tests.support.clock import SimClock
from tests.support.served import Served

MIB = 1 << 20


class Site:
    """Devices, what their clients have asked for, and the history of it."""

    def __init__(self, nr_devices: int = 1) -> None:
        self.clock = SimClock()
        self.accounts = Accounts()
        self.devices: list[Device] = [MemoryDevice(MIB) for _ in range(nr_devices)]
        self.history = History(self.clock, lambda: list(self.devices), self.accounts)
        self.history.start()

    def pass_moments(self, nr: int) -> None:
        for _ in range(nr):
            self.clock.advance(PERIOD_S)


def test_numbers_grow_from_moment_to_moment() -> None:
    site = Site()
    (device,) = site.devices
    site.pass_moments(2)
    assert site.history.of(device).moments == ()
    traffic = site.accounts.open(device)
    site.pass_moments(1)
    traffic.note(CMD_READ, 3, 12288, 1000)
    traffic.note(CMD_CACHE, 1, 4096, 1000)  # no chart shows it
    site.pass_moments(1)
    site.accounts.close(device, traffic)
    site.accounts.open(device).note(CMD_WRITE, 1, 512, 2_000_000_000)
    site.pass_moments(1)
    answer = site.history.of(device)
    assert answer.period_s == PERIOD_S
    first, second, third = answer.moments
    assert first.operations == {}
    assert second.operations.keys() == {"read"}
    read = third.operations["read"]
    assert (read.nr, read.nr_bytes, read.time_s) == (3, 12288, 3e-6)
    assert third.operations["write"].time_s == 2.0
    assert first.time_s < second.time_s < third.time_s


def test_only_the_last_moments_are_kept() -> None:
    site = Site()
    (device,) = site.devices
    traffic = site.accounts.open(device)
    for nr in range(MOMENTS_MAX + 7):
        traffic.note(CMD_READ, 1, 512, 1)
        site.pass_moments(1)
        moments = site.history.of(device).moments
        assert len(moments) == min(nr + 1, MOMENTS_MAX)
        counts = [each.operations["read"].nr for each in moments]
        assert counts == list(range(nr + 2 - len(moments), nr + 2))


def test_only_so_many_devices_are_kept_and_in_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(history, "DEVICES_MAX", 40)
    site = Site(50)
    for device in site.devices:
        site.accounts.open(device).note(CMD_READ, 1, 512, 1)
    site.clock.advance(PERIOD_S)
    kept = [device for device in site.devices if site.history.of(device).moments]
    assert len(kept) == history.DEVICES_AT_ONCE
    site.clock.advance(1.0)
    kept = [device for device in site.devices if site.history.of(device).moments]
    assert len(kept) == 40
    # A device that is gone makes room.
    del site.devices[site.devices.index(kept[0])], kept, device
    site.pass_moments(2)
    kept = [device for device in site.devices if site.history.of(device).moments]
    assert len(kept) == 40


def test_it_ends() -> None:
    site = Site()
    (device,) = site.devices
    site.accounts.open(device)
    site.history.start()  # is one timer all the same
    site.pass_moments(1)
    site.history.stop()
    site.pass_moments(3)
    assert len(site.history.of(device).moments) == 1


async def test_of_a_server(served: Served) -> None:
    assert served.observer is not None
    assert (await served.observer.history("c")).moments == ()
    served.observer._history._look()
    (moment,) = (await served.observer.history("c")).moments
    operations = (await served.figures("c")).devices[0].operations
    assert moment.operations["read"].nr == operations["read"].nr
    assert moment.operations["write"].time_s == operations["write"].time_s
    served.observer.stop()
