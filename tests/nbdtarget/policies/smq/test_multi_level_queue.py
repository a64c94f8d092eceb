# SPDX-License-Identifier: Apache-2.0
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdtarget.policies.smq.multi_level_queue import (
    NR_LEVELS,
    AgedQueue,
    Links,
    MultiLevelQueue,
)
from tests.support.plain_smq import PlainQueue

UNLIMITED = 1 << 30


def new_queue(nr: int, *, top: tuple[int, int] = (0, 0)) -> MultiLevelQueue:
    return MultiLevelQueue(
        Links(nr, MultiLevelQueue.NR_MARKS),
        nr_top_levels=top[0],
        nr_in_top_levels=top[1],
    )


def new_aged_queue(nr: int) -> AgedQueue:
    return AgedQueue(Links(nr, AgedQueue.NR_MARKS))


def levels(queue: MultiLevelQueue | PlainQueue) -> list[list[int]]:
    return [list(queue.entries(level)) for level in range(NR_LEVELS)]


def test_push_puts_at_the_tail_and_push_front_at_the_head() -> None:
    queue = new_queue(3)
    queue.push(0, 5)
    queue.push(1, 5)
    queue.push_front(2, 5)
    assert list(queue.entries(5)) == [2, 0, 1]
    assert len(queue) == 3


def test_requeue_swaps_with_the_oldest_of_the_new_level() -> None:
    queue = new_queue(4)
    for entry, level in ((0, 10), (1, 10), (2, 11), (3, 11)):
        queue.push(entry, level)
    queue.requeue(0, 1)
    assert list(queue.entries(10)) == [1, 2]
    assert list(queue.entries(11)) == [3, 0]


def test_requeue_by_nothing_only_makes_it_the_newest() -> None:
    queue = new_queue(2)
    queue.push(0, 10)
    queue.push(1, 10)
    queue.requeue(0, 0)
    assert list(queue.entries(10)) == [1, 0]


def test_requeue_stops_at_the_top_level_and_swaps_nothing_there() -> None:
    queue = new_queue(2)
    queue.push(0, 63)
    queue.push(1, 63)
    queue.requeue(0, 4)
    assert list(queue.entries(63)) == [1, 0]


@pytest.mark.parametrize(
    ("periods_before_victim", "expected"),
    [(0, [0, 1, 9]), (1, [0, 9, 1]), (2, [9, 0, 1])],
    ids=["young", "between", "old"],
)
def test_swapped_down_entry_keeps_its_age_class(
    periods_before_victim: int, expected: list[int]
) -> None:
    # Level 10 holds an entry from between the periods (0) and a young one (1).
    queue = new_aged_queue(10)
    queue.push(9, 11)
    for _ in range(periods_before_victim - 1):
        queue.end_period()
    queue.push(0, 10)
    if periods_before_victim:
        queue.end_period()
    else:
        queue.end_period()
        queue.remove(9)
        queue.push(9, 11)
    queue.push(1, 10)
    queue.push(2, 10)
    queue.requeue(2, 1)
    assert list(queue.entries(10)) == expected
    assert list(queue.entries(11)) == [2]


def test_peek_not_past_sentinels_sees_only_what_is_ahead_of_the_first() -> None:
    queue = new_aged_queue(2)
    queue.push(0, 3)
    queue.push_front(1, 7)
    assert queue.peek() == 0
    assert queue.peek(past_sentinels=False) == 1
    assert queue.peek(3) == -1


@pytest.mark.parametrize(("periods", "is_old"), [(0, False), (1, False), (2, True)])
def test_entry_is_old_after_two_ends_of_period(periods: int, is_old: bool) -> None:
    queue = new_aged_queue(1)
    queue.push(0, 3)
    for _ in range(periods):
        queue.end_period()
    assert (queue.peek(past_sentinels=False) == 0) is is_old


def test_lonely_entry_rises_through_levels_without_a_share() -> None:
    queue = new_queue(1, top=(8, 16))
    queue.push(0, 0)
    queue.start_redistribution()
    queue.redistribute(UNLIMITED)
    assert queue.level_of(0) == 56


def test_lengths_are_even_and_the_lowest_levels_get_the_rest() -> None:
    queue = new_queue(130)
    for entry in range(130):
        queue.push(entry, 63)
    queue.start_redistribution()
    queue.redistribute(UNLIMITED)
    assert queue.level_lengths() == [3, 3] + [2] * 62


def test_second_redistribution_gives_what_moving_one_by_one_gives() -> None:
    queue, plain = new_queue(100), PlainQueue()
    for step in range(3):
        for entry in range(step * 30, step * 30 + 30):
            queue.push(entry, entry % 7)
            plain.push(entry, entry % 7)
        queue.start_redistribution()
        queue.redistribute(UNLIMITED)
        plain.redistribute()
        assert levels(queue) == levels(plain)


entries_by_level = st.lists(st.integers(0, 63), max_size=150)
few_levels = st.lists(st.sampled_from([0, 1, 30, 62, 63]), max_size=150)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    at=entries_by_level | few_levels, sentinels=st.booleans(), periods=st.integers(0, 2)
)
def test_redistribution_gives_what_moving_one_by_one_gives(
    at: list[int], sentinels: bool, periods: int
) -> None:
    aged = new_aged_queue(len(at) + 1)
    queue = aged if sentinels else new_queue(len(at) + 1, top=(8, 20))
    plain = PlainQueue(sentinels=sentinels, top=(0, 0) if sentinels else (8, 20))
    for entry, level in enumerate(at):
        queue.push(entry, level)
        plain.push(entry, level)
        if sentinels and entry == len(at) // 2:
            for _ in range(periods):
                aged.end_period()
                plain.end_period()
    queue.start_redistribution()
    queue.redistribute(UNLIMITED)
    plain.redistribute()
    assert levels(queue) == levels(plain)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(at=entries_by_level | few_levels, moves_max=st.integers(1, 40))
def test_redistribution_in_steps_ends_as_in_one_call(
    at: list[int], moves_max: int
) -> None:
    at_once, stepwise = new_queue(len(at) + 1), new_queue(len(at) + 1)
    for entry, level in enumerate(at):
        at_once.push(entry, level)
        stepwise.push(entry, level)
    at_once.start_redistribution()
    at_once.redistribute(UNLIMITED)
    stepwise.start_redistribution()
    steps = 0
    while stepwise.is_redistributing:
        assert stepwise.redistribute(moves_max) <= moves_max
        steps += 1
        assert steps <= 2 * len(at) + NR_LEVELS
    assert levels(stepwise) == levels(at_once)


@pytest.mark.parametrize("seed", range(4))
def test_calls_between_steps_lose_nothing(seed: int) -> None:
    rng = random.Random(seed)
    queue = new_aged_queue(400)
    inside = set(range(300))
    for entry in inside:
        queue.push(entry, rng.choice([0, 0, 5, 63]))
    for _ in range(4000):
        match rng.randrange(8):
            case 0:
                queue.start_redistribution()
            case 1 | 2:
                queue.redistribute(rng.randrange(1, 9))
            case 3 if inside:
                entry = rng.choice(sorted(inside))
                inside.remove(entry)
                queue.remove(entry)
            case 4 if len(inside) < 400:
                entry = rng.choice(sorted(set(range(400)) - inside))
                inside.add(entry)
                queue.push(entry, rng.randrange(64))
            case 5:
                queue.end_period()
            case _ if inside:
                entry = rng.choice(sorted(inside))
                before = queue.level_of(entry)
                queue.requeue(entry, 1)
                assert queue.level_of(entry) == min(before + 1, 63)
        assert len(queue) == len(inside) == sum(queue.level_lengths())
        assert queue.peek() in inside or not inside
    while queue.is_redistributing:
        queue.redistribute(50)
    assert {entry for level in levels(queue) for entry in level} == inside


def test_redistribution_of_a_fresh_cache_moves_each_entry_twice_at_most() -> None:
    queue = new_queue(5000)
    for entry in range(5000):
        queue.push(entry, 0)
    queue.start_redistribution()
    assert queue.redistribute(UNLIMITED) <= 2 * 5000
    assert max(queue.level_lengths()) - min(queue.level_lengths()) <= 1
