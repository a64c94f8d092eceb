# SPDX-License-Identifier: Apache-2.0
"""Which reads are remembered, and in which order."""

from nbdtarget.targets.clone.read_queue import ReadQueue


def drained(queue: ReadQueue) -> list[tuple[int, int]]:
    ranges = []
    while queue:
        ranges.append(queue.front())
        queue.drop(ranges[-1][0])
    return ranges


def test_what_was_read_last_is_first() -> None:
    queue = ReadQueue()
    for begin in (5, 1, 9):
        queue.push(begin, begin + 2)
    assert drained(queue) == [(9, 11), (1, 3), (5, 7)]


def test_what_is_read_again_stands_once_and_in_front() -> None:
    queue = ReadQueue()
    for begin, end in [(1, 2), (3, 9), (1, 2), (3, 4)]:
        queue.push(begin, end)
    assert drained(queue) == [(3, 9), (1, 2)]


def test_full_queue_forgets_what_was_read_longest_ago() -> None:
    queue = ReadQueue(ranges_max=3)
    for begin in (1, 2, 3, 1, 4):
        queue.push(begin, begin + 1)
    assert drained(queue) == [(4, 5), (1, 2), (3, 4)]
