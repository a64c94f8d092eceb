# SPDX-License-Identifier: Apache-2.0
"""A loss is made smaller as long as the check fails."""

import pytest

from nbdtarget.torture.cuts import Cut, keep_all
from nbdtarget.torture.recording import Epoch, Write
from nbdtarget.torture.shrink import SHRINK_TRIALS_MAX, lost_writes, shrink

EPOCH = Epoch(4, tuple(Write(nr, 8 * nr, 8, 0) for nr in range(1, 33)), 9)
NOTHING = Cut.of(4, "all lost", {})


def test_lost_writes_are_those_whose_sectors_hold_something_else() -> None:
    state = keep_all(EPOCH)
    del state[8], state[9]
    state[16] = 1
    assert lost_writes(Cut.of(4, "", state), EPOCH) == {1: [8, 9], 2: [16]}


@pytest.mark.parametrize("needed", [{1}, {32}, {5, 6}, {3, 30}], ids=str)
def test_only_the_writes_that_matter_are_left(needed: set[int]) -> None:
    trials: list[Cut] = []

    def fails(cut: Cut) -> bool:
        trials.append(cut)
        return needed <= lost_writes(cut, EPOCH).keys()

    found = shrink(NOTHING, EPOCH, fails)
    assert lost_writes(found, EPOCH).keys() == needed
    assert found.how == "all lost; then made smaller"
    assert len(trials) <= SHRINK_TRIALS_MAX
    assert all(lost_writes(cut, EPOCH) for cut in trials)


def test_cut_that_cannot_be_made_smaller_is_left_as_it_is() -> None:
    everything = set(range(1, 33))
    found = shrink(
        NOTHING, EPOCH, lambda cut: everything <= lost_writes(cut, EPOCH).keys()
    )
    assert found is NOTHING


def test_trials_are_bounded() -> None:
    nr_trials = 0

    def fails(cut: Cut) -> bool:
        nonlocal nr_trials
        nr_trials += 1
        return len(lost_writes(cut, EPOCH)) > 20

    shrink(NOTHING, EPOCH, fails)
    assert 0 < nr_trials <= SHRINK_TRIALS_MAX
