# SPDX-License-Identifier: Apache-2.0
"""The fetcher repeats failed requests, for a limited time, and gives up at some errors at once. Time is simulated."""

import asyncio
import logging
import random

import pytest

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.health import Health
from nbdtarget.devices.ranged import fetcher as module
from nbdtarget.devices.ranged.fetcher import Fetcher
from nbdtarget.devices.ranged.slots import Slots
from nbdtarget.devices.ranged.store import (
    SourceAway,
    SourceChanged,
    SourceDenied,
    SourceError,
    SourceUnfit,
    Take,
)
from nbdtarget.devices.ranged.traffic import Traffic
from tests.support.image_server import image_of
from tests.support.ranged import MemoryStore, in_simulated_time

IMAGE = image_of(1 << 20)


class Rig:
    """A fetcher over a store in memory. `trouble` is raised at the requests with these numbers."""

    def __init__(
        self,
        trouble: dict[int, SourceError] | None = None,
        *,
        source_timeout_s: float = 3600.0,
    ) -> None:
        self.store = MemoryStore(IMAGE)
        self.trouble = trouble or {}
        self.store.trouble = self._trouble
        self.health = Health()
        self.traffic = Traffic()
        self.changes: list[str] = []
        self.slots = Slots(8, width_max=32)
        self.got = bytearray()
        self.fetcher = Fetcher(
            "source",
            self.store,
            self.store.pin,
            self.health,
            self.traffic,
            source_timeout_s=source_timeout_s,
            changed=self.changes.append,
            jitter=random.Random(1),
        )

    def _trouble(self, nr: int) -> None:
        if error := self.trouble.get(nr, self.trouble.get(0)):
            raise error

    async def fetch(self, begin: int = 0, end: int = len(IMAGE)) -> None:
        await self.fetcher.fetch(
            begin, end, self.got.extend, self.slots, is_urgent=False
        )

    @property
    def now_s(self) -> float:
        return asyncio.get_running_loop().time()


@pytest.mark.parametrize(
    "error", [SourceAway("status 500"), SourceUnfit("no ranges")], ids=["away", "unfit"]
)
def test_failures_are_tried_again_and_the_source_may_be_back(
    error: SourceError,
) -> None:
    async def work() -> None:
        rig = Rig(dict.fromkeys(range(1, 9), error))
        events: list[str] = []
        rig.health.watchers.append(lambda: events.append(rig.health.last_error))
        await rig.fetch()
        assert rig.got == IMAGE
        assert rig.traffic.retries == 8
        assert rig.traffic.requests == 9
        # The log says once that the source is away, and once that it is back.
        assert events == [error.reason, ""]
        assert rig.traffic.away_since_s == 0.0
        assert rig.slots.nr_used == 0

    in_simulated_time(work())


def test_two_failures_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        rig = Rig({1: SourceAway("x"), 2: SourceAway("x")})
        await rig.fetch()
        assert rig.health.last_error == ""

    in_simulated_time(work())
    assert not caplog.records


def test_source_timeout_bounds_the_wait() -> None:
    async def work() -> None:
        rig = Rig({0: SourceAway("status 503")}, source_timeout_s=100.0)
        with pytest.raises(DeviceError):
            await rig.fetch()
        assert rig.now_s == pytest.approx(100.0, abs=0.01)
        assert rig.health.last_error == "status 503"
        assert rig.changes == []
        del rig.trouble[0]
        await rig.fetch()  # the next one is tried as if nothing had been
        assert rig.got == IMAGE

    in_simulated_time(work())


def test_source_timeout_is_not_stretched_by_what_the_server_asks_for() -> None:
    async def work() -> None:
        rig = Rig({0: SourceAway("later", 3600.0)}, source_timeout_s=60.0)
        with pytest.raises(DeviceError):
            await rig.fetch()
        assert rig.now_s == pytest.approx(60.0, abs=0.01)
        # A fetch that begins meanwhile asks nothing before its time, and waits no longer either.
        with pytest.raises(DeviceError):
            await rig.fetch()
        assert rig.now_s == pytest.approx(120.0, abs=0.01)
        assert rig.traffic.requests == 1
        assert rig.slots.nr_used == 0

    in_simulated_time(work())


def test_source_timeout_bounds_the_wait_for_a_slot() -> None:
    async def work() -> None:
        rig = Rig(source_timeout_s=20.0)
        rig.slots = Slots(1, width_max=1)
        rig.store.latency_s = 50.0  # longer than the second one waits
        first = asyncio.create_task(rig.fetch())
        await asyncio.sleep(1.0)
        with pytest.raises(DeviceError):
            await rig.fetch()
        assert rig.now_s == pytest.approx(21.0, abs=0.01)
        await first
        assert rig.got == IMAGE
        assert rig.slots.nr_used == 0

    in_simulated_time(work())


def test_progress_begins_the_time_anew() -> None:
    """A source that breaks off each answer, but sends a little, is slow and not away."""

    async def work() -> None:
        rig = Rig(source_timeout_s=20.0)

        async def a_piece(begin: int, end: int, *_: object, **__: object) -> None:
            await asyncio.sleep(15.0)
            rig.store.noted.append((begin, end, False, rig.now_s))
            take(IMAGE[begin : begin + (256 << 10)])
            if begin + (256 << 10) < end:
                raise SourceAway("the server hung up")

        attempts: list[Take] = []

        def take(data: bytes) -> None:
            attempts[-1](data)

        async def get(
            begin: int, end: int, pin: object, take: Take, *, is_urgent: bool
        ) -> None:
            attempts.append(take)
            await a_piece(begin, end)

        rig.store.get = get  # type: ignore[method-assign]
        await rig.fetch()
        assert rig.got == IMAGE
        assert [begin >> 18 for begin, *_ in rig.store.noted] == [0, 1, 2, 3]
        assert rig.now_s > 60.0

    in_simulated_time(work())


def test_retry_after_holds_for_all_fetches() -> None:
    async def work() -> None:
        rig = Rig({1: SourceAway("status 429", 50.0, is_overload=True)})
        first = asyncio.create_task(rig.fetch(0, 4096))
        await asyncio.sleep(0.001)
        await rig.fetch(4096, 8192)
        assert [noted[3] >= 50.0 for noted in rig.store.noted] == [False, True, True]
        await first

    in_simulated_time(work())


def test_overload_halves_what_is_under_way() -> None:
    async def work() -> None:
        rig = Rig(dict.fromkeys(range(1, 9), SourceAway("503", is_overload=True)))
        rig.store.latency_s = 1.0
        fetches = asyncio.gather(
            *(rig.fetch(nr << 12, (nr + 1) << 12) for nr in range(16))
        )
        await asyncio.sleep(1.5)
        # Eight were under way and were refused: one overload, not eight.
        assert rig.store.nr_open_max == 8
        assert rig.slots.width == rig.store.nr_open == 4
        await fetches

    in_simulated_time(work())


def test_source_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S_MAX", 60.0)

    async def work() -> None:
        rig = Rig(source_timeout_s=1000.0)
        rig.store.bytes_per_s = 1.0
        task = asyncio.create_task(rig.fetch(0, 4096))
        await asyncio.sleep(200.0)
        assert rig.traffic.failures["away"] >= 2
        rig.store.bytes_per_s = 0.0
        await task
        assert rig.got == IMAGE[:4096]

    in_simulated_time(work())


def test_change_ends_everything_and_nothing_more_is_asked() -> None:
    async def work() -> None:
        rig = Rig({2: SourceChanged("it was replaced")})
        await rig.fetch(0, 4096)
        for _ in range(3):
            with pytest.raises(DeviceError):
                await rig.fetch(4096, 8192)
        assert rig.changes == ["it was replaced"]
        assert len(rig.store.noted) == 2
        assert rig.got == IMAGE[:4096]
        assert rig.traffic.failures == {"changed": 1}

    in_simulated_time(work())


def test_denied_source_is_renewed_once_for_all() -> None:
    async def work() -> None:
        rig = Rig(dict.fromkeys(range(1, 5), SourceDenied("status 403")))
        rig.store.latency_s = 0.5
        rig.store.renew_answers = [True, True]
        await asyncio.gather(*(rig.fetch(nr << 12, (nr + 1) << 12) for nr in range(4)))
        assert rig.traffic.renewals == 1
        assert rig.traffic.failures["denied"] == 4
        assert rig.now_s == 1.0  # no waiting: the new URL is good

    in_simulated_time(work())


def test_renewal_that_does_not_help_is_tried_slowly() -> None:
    async def work() -> None:
        rig = Rig({0: SourceDenied("status 403")}, source_timeout_s=60.0)
        rig.store.renew_answers = [True] * 1000
        with pytest.raises(DeviceError):
            await rig.fetch()
        # Not a storm: at most one renewal in five seconds.
        assert 2 <= rig.traffic.renewals <= 60 / module.RENEW_S_MIN + 1
        assert rig.traffic.requests < 60
        assert rig.health.last_error == "status 403"

    in_simulated_time(work())


def test_credentials_that_live_two_seconds_are_renewed_again_and_again() -> None:
    async def work() -> None:
        rig = Rig()
        valid_until_s = 2.0
        rig.store.latency_s = 0.4

        def check(_: int) -> None:
            if rig.now_s > valid_until_s:
                raise SourceDenied("ExpiredToken")

        async def renew() -> bool:
            nonlocal valid_until_s
            valid_until_s = rig.now_s + 2.0
            return True

        rig.store.trouble = check
        rig.store.renew = renew  # type: ignore[method-assign]
        for nr in range(50):
            await rig.fetch(nr << 12, (nr + 1) << 12)
        assert rig.got == IMAGE[: 50 << 12]
        assert rig.traffic.renewals >= 7
        assert rig.health.last_error == ""

    in_simulated_time(work())


@pytest.mark.parametrize("is_short", [True, False])
def test_answers_that_end_early_are_continued(is_short: bool) -> None:
    """The second request asks for what the first did not bring, and nothing comes twice."""

    async def work() -> None:
        rig = Rig()

        async def half(
            begin: int, end: int, pin: object, take: Take, *, is_urgent: bool
        ) -> None:
            rig.store.noted.append((begin, end, is_urgent, 0.0))
            stop = (begin + end + 1) // 2 if len(rig.store.noted) < 4 else end
            take(IMAGE[begin:stop])
            if not is_short and stop < end:
                raise SourceAway("the server hung up")

        rig.store.get = half  # type: ignore[method-assign]
        await rig.fetch(0, 4096)
        assert rig.got == IMAGE[:4096]
        assert [noted[0] for noted in rig.store.noted] == [0, 2048, 3072, 3584]

    in_simulated_time(work())


def test_log_has_a_line_for_away_and_one_for_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        rig = Rig(dict.fromkeys(range(1, 40), SourceAway("the server hung up")))
        await asyncio.gather(*(rig.fetch(nr << 12, (nr + 1) << 12) for nr in range(4)))

    with caplog.at_level(logging.WARNING):
        in_simulated_time(work())
    assert caplog.messages == [
        "source: the server hung up; trying again and again",
        "source: it answers again",
    ]


def test_closed_fetcher_asks_for_nothing() -> None:
    async def work() -> None:
        rig = Rig({0: SourceAway("x")})
        task = asyncio.create_task(rig.fetch())
        await asyncio.sleep(1.0)
        rig.fetcher.is_over = True
        with pytest.raises(DeviceError):
            await task
        assert rig.changes == []

    in_simulated_time(work())
