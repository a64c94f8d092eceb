# SPDX-License-Identifier: Apache-2.0
from nbdtarget.common.say_rarely import SayRarely
from tests.support.clock import SimClock


def test_first_line_is_due_at_once() -> None:
    assert SayRarely(SimClock()).count() == 1


def test_within_the_period_no_line_is_due() -> None:
    clock = SimClock()
    rarely = SayRarely(clock, 5)
    rarely.count()
    clock.advance(4.9)
    assert rarely.count() == 0


def test_line_after_the_period_counts_what_was_not_said() -> None:
    clock = SimClock()
    rarely = SayRarely(clock, 5)
    answers = [rarely.count() for _ in range(4)]
    clock.advance(5)
    assert [*answers, rarely.count()] == [1, 0, 0, 0, 4]


def test_each_line_begins_a_period_and_a_count() -> None:
    clock = SimClock()
    rarely = SayRarely(clock, 5)
    rarely.count()
    clock.advance(60)
    assert [rarely.count(), rarely.count()] == [1, 0]
