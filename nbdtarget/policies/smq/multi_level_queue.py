# SPDX-License-Identifier: Apache-2.0
"""Multi-level queues: how hot each block is, at a constant cost for each access.

Theory of operation. A queue has 64 levels. Each level is a list from its oldest entry to its newest one. An
access moves its entry up, and another one down in exchange. So levels keep their lengths, and the level of
an entry says how often it was used compared with the others. From time to time the levels are made equally
long again (`start_redistribution`).

Entries are numbers, and lists are rings through two arrays of 32-bit numbers. That takes 9 bytes for an entry
with its level, and there are no objects to allocate or to collect. `Links` holds the rings of all queues that
share their entries. Numbers below `nr_entries` are entries. The numbers above are marks: heads of rings, and
sentinels.

Redistribution goes from level 0 upwards. A level that is too short takes the oldest entries of the nearest level
above that has any. A level that is too long pushes its newest entries up, the newest first. If that were done
literally, an entry would be moved once for each level on its way: 32 moves for each block of a new cache. Here an
entry that is pushed up is *carried*: it waits in a ring of its own between its old level and its new one, and
so is moved twice, however far it goes. The result is the same, entry for entry.

A million entries are still too many for one call. So `redistribute` does a limited number of moves, and other
calls may come in between. Meanwhile, an entry that is carried counts as one of the newest of the level that the
redistribution has reached. This is a departure from the kernel, which holds its lock until everything is done.
It only shows in caches that have more entries to move than fit into one step.

Ageing (`AgedQueue`). Each level has two sentinels, the old one and the young one. When a period ends, the old
sentinels move to the tails of their levels and become the young ones. Entries ahead of both sentinels have
not been used for one to two periods.
"""

from array import array
from collections.abc import Iterator
from typing import ClassVar, Final

__all__ = ["NR_LEVELS", "TOP_LEVEL", "AgedQueue", "Links", "MultiLevelQueue"]

NR_LEVELS: Final = 64
TOP_LEVEL: Final = NR_LEVELS - 1

# The level of an entry that is being carried. `level_of` translates it for callers.
_CARRIED: Final = NR_LEVELS


class Links:
    """Rings of entries, marked by heads and sentinels.

    Attributes:
        nr_entries: numbers below this are entries.
        next, prev: the rings.
        levels: the level of each entry and sentinel.
    """

    def __init__(self, nr_entries: int, nr_marks_max: int) -> None:
        nr = nr_entries + nr_marks_max
        self.nr_entries = nr_entries
        self.next = array("I", [0]) * nr
        self.prev = array("I", [0]) * nr
        self.levels = bytearray(nr)
        self._nr_marks = 0
        self._nr_marks_max = nr_marks_max

    def new_mark(self) -> int:
        """Return a new mark, linked to itself: the head of an empty list, or a sentinel for one."""
        assert self._nr_marks < self._nr_marks_max
        mark = self.nr_entries + self._nr_marks
        self._nr_marks += 1
        self.next[mark] = self.prev[mark] = mark
        return mark

    def link_before(self, at: int, entry: int) -> None:
        """Link `entry` in before `at`. Before the head of a list is its tail."""
        before = self.prev[at]
        self.next[entry] = at
        self.prev[entry] = before
        self.next[before] = entry
        self.prev[at] = entry

    def unlink(self, entry: int) -> None:
        before, after = self.prev[entry], self.next[entry]
        self.next[before] = after
        self.prev[after] = before


class MultiLevelQueue:
    """One queue of 64 levels. See the module head.

    Args:
        nr_top_levels, nr_in_top_levels: the highest `nr_top_levels` levels share `nr_in_top_levels`
            entries, and the others share the rest. 0: all levels are alike.
    """

    NR_MARKS: ClassVar[int] = NR_LEVELS + 1

    def __init__(
        self, links: Links, *, nr_top_levels: int = 0, nr_in_top_levels: int = 0
    ) -> None:
        self.links = links
        self._heads = [links.new_mark() for _ in range(NR_LEVELS + 1)]
        self._counts = [0] * (NR_LEVELS + 1)
        self._nr_entries = 0
        self._nr_top_levels = nr_top_levels
        self._nr_in_top_levels = nr_in_top_levels
        self._targets = [0] * NR_LEVELS
        self._targets_are_for = 0  # how many entries `_targets` were computed for
        # The level that the redistribution has reached, or TOP_LEVEL if none is under way.
        self._at_level = TOP_LEVEL
        self._is_carry_reversed = False
        self._has_turned = (
            False  # this level has all that it keeps; what is left is carried on
        )

    def __len__(self) -> int:
        return self._nr_entries

    def level_of(self, entry: int) -> int:
        """Return the level of an entry of this queue, 0 ... 63."""
        level = self.links.levels[entry]
        return self._at_level if level == _CARRIED else level

    def level_lengths(self) -> list[int]:
        """Return how many entries each level has."""
        lengths = self._counts[:NR_LEVELS]
        lengths[self._at_level] += self._counts[_CARRIED]
        return lengths

    # ---- in and out ----

    def push(self, entry: int, level: int) -> None:
        """Put `entry` at the tail of `level`, as its newest entry."""
        self._push_before(self._heads[level], entry, level)

    def push_front(self, entry: int, level: int) -> None:
        """Put `entry` at the head of `level`, ahead of any sentinel."""
        self._push_before(self.links.next[self._heads[level]], entry, level)

    def remove(self, entry: int) -> None:
        """Take `entry` out of the queue."""
        self.links.unlink(entry)
        self._counts[self.links.levels[entry]] -= 1
        self._nr_entries -= 1

    def requeue(self, entry: int, extra_levels: int) -> None:
        """Make `entry` the newest one of the level that is `extra_levels` above its own.

        If it moves up, the oldest entry of the new level moves down in exchange.
        """
        level = self.level_of(entry)
        new_level = min(level + extra_levels, TOP_LEVEL)
        if new_level > level:
            self._exchange(new_level, level)
        self.remove(entry)
        self._push_before(self._heads[new_level], entry, new_level)

    def peek(self, level_end: int = NR_LEVELS, *, past_sentinels: bool = True) -> int:
        """Return the oldest entry of the lowest level below `level_end` that has one, or -1.

        Args:
            past_sentinels: False: only an entry ahead of all sentinels counts.
        """
        next_, counts, nr_entries = self.links.next, self._counts, self.links.nr_entries
        carried_at = self._at_level if counts[_CARRIED] else NR_LEVELS
        for level in range(level_end):
            if counts[level]:
                entry = next_[self._heads[level]]
                while entry >= nr_entries and past_sentinels:
                    entry = next_[entry]
                if entry < nr_entries:
                    return entry
            if level == carried_at and past_sentinels:
                return self._oldest_carried()
        return -1

    def entries(self, level: int) -> Iterator[int]:
        """Yield the entries of one level, the oldest first, without those that are carried."""
        entry = self.links.next[self._heads[level]]
        while entry != self._heads[level]:
            if entry < self.links.nr_entries:
                yield entry
            entry = self.links.next[entry]

    def _push_before(self, at: int, entry: int, level: int) -> None:
        self.links.link_before(at, entry)
        self.links.levels[entry] = level
        self._counts[level] += 1
        self._nr_entries += 1

    def _exchange(self, level: int, lower_level: int) -> None:
        """Move the oldest entry of `level`, if it has one, down to `lower_level`."""
        if self._counts[level]:
            links = self.links
            entry, passed = links.next[self._heads[level]], 0
            while entry >= links.nr_entries:
                entry = links.next[entry]
                passed += 1
            self.remove(entry)
            self._push_exchanged(entry, lower_level, passed)

    def _push_exchanged(self, entry: int, level: int, sentinels_passed: int) -> None:
        self.push(entry, level)

    # ---- redistribution ----

    @property
    def is_redistributing(self) -> bool:
        return self._at_level < TOP_LEVEL or self._counts[_CARRIED] > 0

    def start_redistribution(self) -> None:
        """Begin to make the levels equally long. No entry moves before `redistribute` is called.

        If a redistribution is under way already, this does nothing.
        """
        if not self.is_redistributing:
            self._set_targets()
            self._at_level = 0
            self._has_turned = False

    def redistribute(self, moves_max: int) -> int:
        """Continue the redistribution by at most `moves_max` moves. Returns how many there were."""
        moves = 0
        while self._at_level < TOP_LEVEL and moves < moves_max:
            level = self._at_level
            target = self._targets[level]
            if not self._has_turned:
                moves += self._put_down(level, target, moves_max - moves)
                if self._counts[_CARRIED] and self._counts[level] < target:
                    break
                # This level has what it needs. The rest is carried on, the newest first.
                self._is_carry_reversed = not self._is_carry_reversed
                self._has_turned = True
            moves += self._pick_up(level, target, moves_max - moves)
            if self._counts[level] > target:
                break
            moves += self._pull_down(level, target, moves_max - moves)
            if self._can_pull(level, target):
                break
            self._at_level += 1
            self._has_turned = False
        if self._at_level == TOP_LEVEL:
            moves += self._put_down(TOP_LEVEL, self._nr_entries, moves_max - moves)
        return moves

    def _set_targets(self) -> None:
        if self._targets_are_for == self._nr_entries:
            return
        self._targets_are_for = self._nr_entries
        nr_low_levels = NR_LEVELS - self._nr_top_levels
        nr_low = max(self._nr_entries - self._nr_in_top_levels, 0)
        self._targets = _spread(nr_low, nr_low_levels)
        self._targets += _spread(self._nr_in_top_levels, self._nr_top_levels)

    def _oldest_carried(self) -> int:
        ring = self.links.prev if self._is_carry_reversed else self.links.next
        return ring[self._heads[_CARRIED]]

    def _put_down(self, level: int, target: int, moves_max: int) -> int:
        """Fill `level` up with carried entries, the oldest first."""
        moves = min(target - self._counts[level], self._counts[_CARRIED], moves_max)
        for _ in range(moves):
            entry = self._oldest_carried()
            self.remove(entry)
            self.push(entry, level)
        return max(moves, 0)

    def _pick_up(self, level: int, target: int, moves_max: int) -> int:
        """Begin to carry the surplus of `level`, the newest entries first."""
        moves = min(self._counts[level] - target, moves_max)
        links, head, carry = self.links, self._heads[level], self._heads[_CARRIED]
        for _ in range(moves):
            entry = links.prev[head]
            while entry >= links.nr_entries:
                entry = links.prev[entry]
            self.remove(entry)
            at = links.next[carry] if self._is_carry_reversed else carry
            self._push_before(at, entry, _CARRIED)
        return max(moves, 0)

    def _can_pull(self, level: int, target: int) -> bool:
        counts = self._counts
        return counts[level] < target and any(counts[level + 1 : NR_LEVELS])

    def _pull_down(self, level: int, target: int, moves_max: int) -> int:
        """Fill `level` up with the oldest entries of the levels above it."""
        links, counts = self.links, self._counts
        above, moves = level + 1, 0
        while counts[level] < target and moves < moves_max:
            while above < NR_LEVELS and not counts[above]:
                above += 1
            if above == NR_LEVELS:
                break
            entry = links.next[self._heads[above]]
            while entry >= links.nr_entries:
                entry = links.next[entry]
            self.remove(entry)
            self.push(entry, level)
            moves += 1
        return moves


class AgedQueue(MultiLevelQueue):
    """A queue that knows which entries have not been used for a while. See the module head."""

    NR_MARKS: ClassVar[int] = MultiLevelQueue.NR_MARKS + 2 * NR_LEVELS

    def __init__(self, links: Links) -> None:
        super().__init__(links)
        self._old = self._new_sentinels()
        self._young = self._new_sentinels()

    def end_period(self) -> None:
        """End a period: entries that were not used since the end of the one before are old now."""
        self._old, self._young = self._young, self._old
        for level, sentinel in enumerate(self._young):
            self.links.unlink(sentinel)
            self.links.link_before(self._heads[level], sentinel)

    def _new_sentinels(self) -> list[int]:
        sentinels = [self.links.new_mark() for _ in range(NR_LEVELS)]
        for level, sentinel in enumerate(sentinels):
            self.links.link_before(self._heads[level], sentinel)
        return sentinels

    def _push_exchanged(self, entry: int, level: int, sentinels_passed: int) -> None:
        # The entry was not used, it was only pushed out of its level. So it keeps its age.
        if sentinels_passed == 0:
            self._push_before(self._old[level], entry, level)
        elif sentinels_passed == 1:
            self._push_before(self._young[level], entry, level)
        else:
            self.push(entry, level)


def _spread(nr_entries: int, nr_levels: int) -> list[int]:
    """Spread entries as evenly as possible. The lowest levels get the remainder."""
    if not nr_levels:
        return []
    each, left_over = divmod(nr_entries, nr_levels)
    return [each + (level < left_over) for level in range(nr_levels)]
