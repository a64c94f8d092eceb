# SPDX-License-Identifier: Apache-2.0
import pytest

from nbdtarget.cli.progress import common
from nbdtarget.cli.progress.common import Lines, Nowhere, open_display


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def now_ns(self) -> int:
        return int(self.now_s * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(common, "monotonic_ns", clock.now_ns)
    return clock


def test_plain_lines_come_once_a_period(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines(10)
    for second in range(25):
        clock.now_s = 100.0 + second
        lines.show(f"after {second} s")
    assert capsys.readouterr().err.splitlines() == [
        f"nbdtarget: after {second} s" for second in (0, 10, 20)
    ]


def test_plain_line_that_says_nothing_new_is_left_out(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines(10)
    lines.show("the same")
    clock.now_s += 60
    lines.show("the same")
    assert capsys.readouterr().err == "nbdtarget: the same\n"


def test_command_without_lines_shows_nothing_in_a_pipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with open_display("writing back", period_s=None) as display:
        display.show("", 1, 2)
        assert isinstance(display, Nowhere)
    assert capsys.readouterr().err == ""
