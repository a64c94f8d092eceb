# SPDX-License-Identifier: Apache-2.0
"""The last five minutes: what was kept, and what was seen since."""

from nbdtarget.control.figures import (
    FiguresAnswer,
    HistoryAnswer,
    Moment,
    OperationFigures,
)
from nbdtarget.monitor.minutes import SPAN_S, Minutes
from nbdtarget.monitor.rates import rates_of
from tests.support.figures import figures_of

NOW_S = 1_000_000.0


def reads(nr: int) -> dict[str, OperationFigures]:
    return {"read": OperationFigures(nr, nr * 4096, nr * 0.001)}


def now_with(nr: int, time_s: float = NOW_S, **more: OperationFigures) -> FiguresAnswer:
    figures = figures_of()
    figures.time_s = time_s
    figures.devices[0].operations.update(reads(nr) | more)
    return figures


def kept(*moments: tuple[float, int]) -> HistoryAnswer:
    """Args: seconds ago, reads by then."""
    return HistoryAnswer(
        5.0, tuple(Moment(NOW_S - ago, reads(nr)) for ago, nr in moments)
    )


def test_cells_are_requests_a_second() -> None:
    minutes = Minutes()
    minutes.recall("d", kept((20, 100), (15, 100), (10, 150), (5, 650)))
    minutes.add(now_with(650))
    cells = minutes.per_s("d", 60)
    assert cells[:56] == [None] * 56
    assert cells[56:] == [0, 10, 100, 0]


def test_between_two_moments_requests_came_evenly() -> None:
    minutes = Minutes()
    minutes.recall("d", kept((300, 0)))
    minutes.add(now_with(600))
    assert minutes.per_s("d", 10) == [2.0] * 10


def test_of_an_unknown_device_nothing_is_known() -> None:
    assert Minutes().per_s("d", 3) == [None] * 3


def test_a_server_that_was_started_anew_begins_anew() -> None:
    minutes = Minutes()
    minutes.recall("d", kept((10, 5000), (5, 6000)))
    minutes.add(now_with(7))
    minutes.add(now_with(57, NOW_S + 5))
    assert minutes.per_s("d", 60)[-2:] == [None, 10]


def test_devices_that_are_gone_and_old_moments_are_forgotten() -> None:
    minutes = Minutes()
    minutes.add(now_with(0))
    minutes.add(now_with(600, NOW_S + 3 * SPAN_S))
    assert minutes.per_s("d", 2) == [None, None]
    minutes.add(figures_of(name="other"))
    assert minutes.per_s("d", 2) == [None, None]


def test_the_first_look_has_rates() -> None:
    minutes = Minutes()
    minutes.recall("d", kept((9, 0), (4, 100)))
    write = OperationFigures(8, 4096, 0.5)
    zeroes = OperationFigures(1000, 4096, 0.5)
    now = now_with(500, write=write, write_zeroes=zeroes)
    before = minutes.before(now)
    assert before is not None
    assert before.time_s == NOW_S - 4
    rates = rates_of(now.devices[0], before.devices[0], now.time_s - before.time_s)
    assert rates["read"].per_s == 100
    assert rates["write"].per_s == 2  # there was none by then
    assert rates["write_zeroes"].per_s == 0  # of which nothing is kept


def test_a_moment_ago_is_too_near_for_rates() -> None:
    minutes = Minutes()
    minutes.recall("d", kept((5.1, 0), (0.1, 100)))
    before = minutes.before(now_with(100))
    assert before is not None
    assert before.time_s == NOW_S - 5.1


def test_without_anything_kept_a_first_look_has_no_rates() -> None:
    minutes = Minutes()
    assert minutes.before(now_with(1)) is None
    minutes.recall("d", HistoryAnswer(5.0, ()))
    assert minutes.before(now_with(1)) is None


def test_servers_keep_their_moments_at_other_times() -> None:
    minutes = Minutes()
    now = now_with(500)
    other = figures_of(name="e").devices[0]
    other.operations.update(reads(900))
    now.devices += (other,)
    minutes.recall("d", kept((4, 100)))
    minutes.recall("e", kept((2, 100)))
    before = minutes.before(now)
    assert before is not None
    assert before.time_s == NOW_S - 4
    assert [each.operations["read"].nr for each in before.devices] == [100, 900]
