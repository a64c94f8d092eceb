# SPDX-License-Identifier: Apache-2.0
"""`Poller`: a connection polls only when it is alone, at depth 1, and when polling has paid off lately."""

from collections.abc import Callable

import pytest

from nbdtarget.server import poller as module
from nbdtarget.server.poller import (
    LATE_FORGIVEN,
    LATE_NS,
    LATE_SKIP_MAX,
    LATE_SKIP_MIN,
    POLL_REST,
    POLL_SKIP_MAX,
    POLL_STREAK,
    Lateness,
    Poller,
    Polling,
)


class Time:
    """Nanoseconds, as the test says. Giving the processor away takes `gone_ns`."""

    def __init__(self) -> None:
        self.now_ns = 1
        self.gone_ns = 10

    def read(self) -> int:
        return self.now_ns

    def give_away(self) -> None:
        self.now_ns += self.gone_ns


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    it = Time()
    monkeypatch.setattr(module, "perf_counter_ns", it.read)
    monkeypatch.setattr(module, "_sched_yield", it.give_away)
    return it


def _warm(poller: Poller) -> None:
    for _ in range(POLL_STREAK):
        assert not poller.begin()


@pytest.mark.usefixtures("time")
def test_polls_after_a_streak_of_its_own() -> None:
    polling = Polling()
    one, other = Poller(polling, 50), Poller(polling, 50)
    _warm(one)
    assert one.begin()
    assert not other.begin()
    _warm(one)


@pytest.mark.parametrize(
    "spoil", [lambda it: it.not_alone(), lambda it: it.close()], ids=["batch", "closed"]
)
def test_a_streak_ends(spoil: Callable[[Poller], None]) -> None:
    poller = Poller(Polling(), 50)
    _warm(poller)
    assert poller.begin()
    spoil(poller)
    assert not poller.begin()


def test_polling_can_be_switched_off() -> None:
    poller = Poller(Polling(), 0)
    _warm(poller)
    for _ in range(10):
        assert not poller.begin()


def test_looks_until_the_time_is_over(time: Time) -> None:
    poller = Poller(Polling(), 1)
    nr = 0
    while poller.look_again():
        nr += 1
        assert poller.is_looking
    assert nr == 101  # the first look begins the time
    assert time.now_ns > 1000


def test_a_processor_that_was_busy_is_a_miss(time: Time) -> None:
    poller = Poller(Polling(), 50)
    assert poller.look_again()
    time.now_ns += 25_000
    assert not poller.look_again()


def test_polling_backs_off_with_each_miss(
    time: Time,
) -> None:
    poller = Poller(Polling(), 1)
    for _ in range(2 * POLL_STREAK):
        poller.begin()
    time.gone_ns = 2000
    skipped = []
    for _ in range(12):
        assert poller.begin()
        assert poller.look_again()
        assert not poller.look_again()
        nr = 0
        while not poller.begin():
            nr += 1
        skipped.append(nr)
    # `begin` that polls again is the one above, so each round starts in the middle of the next.
    assert skipped[:6] == [1, 3, 7, 15, 31, 63]
    assert skipped[-1] == POLL_SKIP_MAX
    assert poller.look_again()
    poller.hit()
    for _ in range(POLL_REST):
        assert not poller.begin()
    assert poller.begin()
    assert poller.look_again()
    assert not poller.look_again()
    assert not poller.begin()
    assert poller.begin()


@pytest.mark.usefixtures("time")
def test_polling_rests_after_what_it_has_found() -> None:
    """A server that always polls uses twice as much of the processor for a request."""
    poller = Poller(Polling(), 50)
    _warm(poller)
    assert poller.begin()
    for _ in range(5):
        assert poller.look_again()
        poller.hit()
    for _ in range(5 * POLL_REST):
        assert not poller.begin()
    assert poller.begin()


def test_a_look_that_comes_back_very_late_is_the_last_for_long(time: Time) -> None:
    poller = Poller(Polling(), 50)
    _warm(poller)
    assert poller.begin()
    time.gone_ns = LATE_NS + 1
    assert poller.look_again()
    poller.hit()  # the client has sent its request meanwhile
    for _ in range(LATE_SKIP_MIN + POLL_REST):
        assert not poller.begin()
    assert poller.begin()
    assert poller.look_again()
    assert not poller.look_again()  # it has found nothing, and looks no more
    for _ in range(2 * LATE_SKIP_MIN + 1):
        assert not poller.begin()
    assert poller.begin()


def test_lateness_is_forgiven_after_many_hits() -> None:
    late = Lateness()
    found = [late.note_late() for _ in range(10)]
    assert found == [min(LATE_SKIP_MIN << nr, LATE_SKIP_MAX) for nr in range(10)]
    late.note_hits(LATE_FORGIVEN - 1)
    assert late.note_late() == LATE_SKIP_MAX
    late.note_hits(LATE_FORGIVEN)
    late.note_hits(LATE_FORGIVEN)
    assert late.note_late() == LATE_SKIP_MAX // 2
