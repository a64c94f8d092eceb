# SPDX-License-Identifier: Apache-2.0
"""The line about the devices, and when the service manager hears it."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nbdtarget.daemon import service_reports
from nbdtarget.daemon.notify import Notifier
from nbdtarget.daemon.service_reports import ServiceReports, status_line
from nbdtarget.dm.mapped_device import MappedDevice
from tests.support.patience import PATIENCE_S


def device(
    name: str, *fields: dict[str, Any], has_failed: bool = False, failure: str = ""
) -> MappedDevice:
    """Return a stand-in for a device whose targets have these `fields`. Without fields it has no table."""

    def target(fields: dict[str, Any]) -> Any:
        return SimpleNamespace(status_fields=lambda: fields)

    table = SimpleNamespace(
        targets=[target(each) for each in fields], failed=has_failed
    )
    made = SimpleNamespace(
        dm_name=name,
        active=table if fields else None,
        has_table=bool(fields),
        failure=failure,
    )
    return cast(MappedDevice, made)


def clone(hydrated: int, regions: int) -> dict[str, Any]:
    return {"regions_hydrated": hydrated, "regions_total": regions}


LINEAR: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("devices", "nr_clients", "line"),
    [
        ([], 0, "0 devices, 0 clients"),
        ([device("a", LINEAR)], 1, "a is served, 1 client"),
        ([device("web", clone(43, 100))], 2, "web 43 % hydrated, 2 clients"),
        ([device("web", clone(100, 100))], 2, "web is served, 2 clients"),
        # 100 % is said when it is true, and not before.
        ([device("web", clone(999, 1000))], 0, "web 99 % hydrated, 0 clients"),
        (
            [device("two", clone(1, 4), clone(3, 4), LINEAR)],
            0,
            "two 50 % hydrated, 0 clients",
        ),
        (
            [device("db", {"dirty_bytes": 3 << 20}), device("a", LINEAR)],
            0,
            "2 devices, db 3.0 MiB dirty, 0 clients",
        ),
        ([device("a")], 0, "a has no table, 0 clients"),
        ([device("a", LINEAR, has_failed=True)], 0, "a has failed, 0 clients"),
        (
            [device("a", LINEAR), device("b", failure="No such file")],
            0,
            "a is served, 0 clients; not open yet: b",
        ),
        (
            [device(f"d{nr}", clone(0, 8)) for nr in range(6)],
            0,
            "6 devices, d0 0 % hydrated, d1 0 % hydrated, d2 0 % hydrated,"
            " d3 0 % hydrated, 2 more, 0 clients",
        ),
        (
            [device(f"d{nr}", clone(0, 8)) for nr in range(65)],
            0,
            "65 devices, 0 clients",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_line(devices: list[MappedDevice], nr_clients: int, line: str) -> None:
    assert status_line(devices, nr_clients) == line


class Recorder(Notifier):
    """A notifier that keeps what it is told."""

    def __init__(self, watchdog_s: float | None) -> None:
        super().__init__({})
        self._address = b"/there"
        self.watchdog_s = watchdog_s
        self.told: asyncio.Queue[str] = asyncio.Queue()

    def _is_sent(self, message: bytes) -> bool:
        self.told.put_nowait(message.decode().replace("\n", " "))
        return True

    async def next(self) -> str:
        return await asyncio.wait_for(self.told.get(), PATIENCE_S)


async def test_changes_are_told_and_nothing_after_the_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service_reports, "STATUS_PERIOD_S", 0)
    notifier = Recorder(watchdog_s=None)
    words = ["first"]
    reports = ServiceReports(notifier, lambda: words[0])
    reports.ready()
    assert await notifier.next() == "READY=1 STATUS=first"
    words[0] = "second"
    assert await notifier.next() == "STATUS=second"
    reports.ready()
    assert await notifier.next() == "READY=1 STATUS=second"
    await reports.stop()
    words[0] = "third"
    await asyncio.sleep(0)
    assert notifier.told.empty()


async def test_a_watchdog_hears_signs_of_life_again_and_again() -> None:
    notifier = Recorder(watchdog_s=0.001)
    reports = ServiceReports(notifier, lambda: "line")
    reports.ready()
    reports.ready()
    assert await notifier.next() == "READY=1 STATUS=line"
    assert await notifier.next() == "READY=1 STATUS=line"
    for _ in range(3):
        assert await notifier.next() == "WATCHDOG=1"
    await reports.stop()


async def test_without_a_manager_nothing_runs() -> None:
    before = asyncio.all_tasks()
    reports = ServiceReports(Notifier({"WATCHDOG_USEC": "1000"}), lambda: "line")
    reports.ready()
    assert asyncio.all_tasks() == before
    await reports.stop()
