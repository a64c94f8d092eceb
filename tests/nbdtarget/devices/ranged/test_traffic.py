# SPDX-License-Identifier: Apache-2.0
"""The counters of a device's traffic, over a store in memory."""

import pytest

from nbdtarget.devices.ranged import traffic as module
from nbdtarget.devices.ranged.device import RangedDevice
from nbdtarget.devices.ranged.options import SourceOptions
from nbdtarget.devices.ranged.store import SourceAway
from tests.support.image_server import image_of
from tests.support.ranged import MemoryStore, in_simulated_time


def test_time_away_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module, "wall_clock_s", lambda: now[0])
    traffic = module.Traffic()
    assert not traffic.came_back()
    assert traffic.went_away()
    now[0] = 103.0
    assert not traffic.went_away()
    assert (traffic.away_since_s, traffic.away_s) == (100.0, 3.0)
    assert traffic.came_back()
    now[0] = 200.0
    assert (traffic.away_since_s, traffic.away_s) == (0.0, 3.0)
    traffic.went_away()
    now[0] = 150.0  # the clock was set back
    assert traffic.away_s == 3.0
    traffic.came_back()
    assert traffic.away_s == 3.0


def test_requests_bytes_and_failures_are_counted() -> None:
    async def work() -> None:
        store = MemoryStore(image_of(1 << 20))

        def trouble(nr: int) -> None:
            if nr == 1:
                raise SourceAway("status 500")

        store.trouble = trouble
        device = RangedDevice(
            "https://h/a", "https://h/a", store, store.pin, SourceOptions()
        )
        await device.read(0, 4096)
        traffic = device.traffic
        assert (traffic.requests, traffic.retries) == (2, 1)
        assert traffic.failures == {"away": 1}
        await device.read(256 << 10, 4096)
        assert traffic.requests >= 3
        assert traffic.bytes_received == sum(e - b for b, e, *_ in store.noted[1:])
        assert traffic.renewals == 0
        assert traffic.away_since_s == 0.0
        await device.close()

    in_simulated_time(work())
