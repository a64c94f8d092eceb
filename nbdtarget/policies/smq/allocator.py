# SPDX-License-Identifier: Apache-2.0
"""Which cache blocks are free. They are allocated in the order in which they became free.

Blocks that were never allocated come first, as 0, 1, 2 and so on. They are in no list, a cursor finds
them, and so a cache of any size is ready at once. A freed block goes to the tail of a list, which is used
after all of those.
"""

from typing import Final

from nbdtarget.policies.smq.multi_level_queue import Links

__all__ = ["Allocator"]

_FRESH: Final = 0
_ALLOCATED: Final = 1
_FREED: Final = 2


class Allocator:
    """Which of the entries of `links` are in use. Freed ones are linked into a list of this object.

    Attributes:
        nr_allocated: entries in use.
    """

    NR_MARKS: Final = 1

    def __init__(self, links: Links) -> None:
        self.nr_allocated = 0
        self._links = links
        self._head = links.new_mark()
        self._states = bytearray(links.nr_entries)
        self._fresh = 0  # every entry below this has been allocated before

    @property
    def nr_free(self) -> int:
        return len(self._states) - self.nr_allocated

    def is_allocated(self, entry: int) -> bool:
        return self._states[entry] == _ALLOCATED

    def allocate(self) -> int:
        """Take the entry that has been free for the longest time. There must be one."""
        entry = self._states.find(_FRESH, self._fresh)
        self._fresh = entry if entry >= 0 else len(self._states)
        if entry < 0:
            entry = self._links.next[self._head]
            assert entry != self._head, "there is a free entry"
        self.allocate_particular(entry)
        return entry

    def allocate_particular(self, entry: int) -> None:
        """Take this entry, which must be free."""
        assert self._states[entry] != _ALLOCATED
        if self._states[entry] == _FREED:
            self._links.unlink(entry)
        self._states[entry] = _ALLOCATED
        self.nr_allocated += 1

    def free(self, entry: int) -> None:
        """Give an entry back, which must be in use."""
        assert self._states[entry] == _ALLOCATED
        self._states[entry] = _FREED
        self._links.link_before(self._head, entry)
        self.nr_allocated -= 1
