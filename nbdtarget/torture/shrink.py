# SPDX-License-Identifier: Apache-2.0
"""Of a cut after which the check fails, look for a smaller loss after which it fails, too.

The loss is taken in units of whole writes: the sectors in which the cut differs from a disk that has lost nothing, by the write
that they should hold. Halves of the units are given back, then quarters, and so on (the steps of delta debugging), as long as the
check goes on failing without them.
"""

from collections.abc import Callable
from typing import Final

from nbdtarget.torture.cuts import Cut, keep_all
from nbdtarget.torture.recording import Epoch

__all__ = ["SHRINK_TRIALS_MAX", "lost_writes", "shrink"]

SHRINK_TRIALS_MAX: Final = 60


def lost_writes(cut: Cut, epoch: Epoch) -> dict[int, list[int]]:
    """Return the sectors that are not as they should be, by the number of the write that they should hold."""
    state = cut.state
    lost: dict[int, list[int]] = {}
    for sector, write in sorted(keep_all(epoch).items()):
        if state.get(sector) != write:
            lost.setdefault(write, []).append(sector)
    return lost


def shrink(cut: Cut, epoch: Epoch, fails: Callable[[Cut], bool]) -> Cut:
    """Return a cut that loses fewer writes and fails, too; `cut` itself, if none is found.

    Args: fails: makes a trial; it is called SHRINK_TRIALS_MAX times at most.
    """
    nr_trials = 0
    how = f"{cut.how}; then made smaller"

    def without(given_back: list[int]) -> Cut:
        lost = lost_writes(cut, epoch)
        state = cut.state
        for write in given_back:
            state.update(dict.fromkeys(lost[write], write))
        return Cut.of(cut.flush, how, state)

    step = max(1, len(lost_writes(cut, epoch)) // 2)
    while True:
        units = list(lost_writes(cut, epoch))
        has_shrunk = False
        for at in range(0, len(units), step):
            part = units[at : at + step]
            if len(part) == len(lost_writes(cut, epoch)):
                continue  # nothing would be lost
            if nr_trials == SHRINK_TRIALS_MAX:
                return cut
            nr_trials += 1
            smaller = without(part)
            if fails(smaller):
                cut, has_shrunk = smaller, True
        if not has_shrunk and step == 1:
            return cut
        step = max(1, step // 2)
