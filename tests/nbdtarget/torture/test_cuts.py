# SPDX-License-Identifier: Apache-2.0
"""Power cuts: the same seed chooses the same ones, and each leaves what a disk may leave."""

import pytest

from nbdtarget.torture.cuts import Cut, choose_cuts, keep_all, prefix
from nbdtarget.torture.recording import Epoch, Write


def write(nr: int, sector: int, nr_sectors: int = 8, *, fua: bool = False) -> Write:
    return Write(nr, sector, nr_sectors, 0, fua)


def epochs(nr: int) -> list[Epoch]:
    return [
        Epoch(each, tuple(write(3 * each + i, 16 * i) for i in range(3)), each)
        for each in range(1, nr + 1)
    ]


def test_state_is_kept_as_runs_and_comes_back() -> None:
    state = {5: 1, 6: 1, 7: 2, 9: 2}
    cut = Cut.of(3, "how", state)
    assert cut.holds == ((5, 2, 1), (7, 1, 2), (9, 1, 2))
    assert cut.state == state


def test_later_write_to_a_sector_is_what_it_holds_if_nothing_is_lost() -> None:
    epoch = Epoch(1, (write(1, 0, 4), write(2, 2, 4)), 0)
    assert keep_all(epoch) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 2, 5: 2}
    assert prefix(epoch, 1) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_same_seed_chooses_the_same_cuts_in_the_order_of_the_log() -> None:
    cuts = choose_cuts(epochs(40), 30, 7)
    assert cuts == choose_cuts(epochs(40), 30, 7)
    assert cuts != choose_cuts(epochs(40), 30, 8)
    assert [cut.flush for cut in cuts] == sorted(cut.flush for cut in cuts)
    lost_all = [cut for cut in cuts if not cut.holds]
    assert len(lost_all) >= 15
    assert lost_all[-1].flush == 40


def test_every_flush_is_tried_if_there_are_cuts_for_it() -> None:
    cuts = choose_cuts(epochs(10), 100, 0)
    assert {cut.flush for cut in cuts if not cut.holds} == set(range(1, 11))
    assert len({(cut.flush, cut.holds) for cut in cuts}) == len(cuts)


def test_each_cut_holds_only_what_was_written() -> None:
    for cut in choose_cuts(epochs(5), 200, 1):
        epoch = epochs(5)[cut.flush - 1]
        for sector, nr in cut.state.items():
            (found,) = [each for each in epoch.writes if each.nr == nr]
            assert found.sector <= sector < found.sector + found.nr_sectors


@pytest.mark.parametrize("tear_size", [512, 4096])
def test_writes_are_torn_at_the_size_that_is_said(tear_size: int) -> None:
    cuts = choose_cuts(epochs(5), 200, 1, tear_size=tear_size)
    runs = [(first, nr) for cut in cuts for first, nr, _ in cut.holds]
    assert any(first % 8 or nr % 8 for first, nr in runs) == (tear_size == 512)


def test_prefixes_are_tried_after_every_few_writes() -> None:
    epoch = Epoch(1, tuple(write(nr, 8 * nr) for nr in range(1, 8)), 0)
    cuts = choose_cuts([epoch], 1, 0, every=3)
    assert [len(cut.state) // 8 for cut in cuts] == [0, 3, 6]


def test_write_with_fua_always_survives() -> None:
    epoch = Epoch(1, (write(1, 0), write(2, 8, fua=True), write(3, 16)), 0)
    for cut in choose_cuts([epoch], 50, 3, every=1):
        assert {cut.state[sector] for sector in range(8, 16)} == {2}


def test_epochs_without_writes_are_cut_once() -> None:
    cuts = choose_cuts([Epoch(1, (), 0), Epoch(2, (), 5)], 10, 0)
    assert [(cut.flush, cut.holds) for cut in cuts] == [(1, ()), (2, ())]
