# SPDX-License-Identifier: Apache-2.0
import re
import sys
from io import StringIO

import pytest
from rich.console import Console

from nbdtarget.cli.progress.common import open_display
from nbdtarget.cli.progress.terminal import Bar, LiveLine

# Sequences that move the cursor or change a colour.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def console(width: int) -> tuple[Console, StringIO]:
    drawn = StringIO()
    return Console(file=drawn, width=width, force_terminal=True), drawn


def lines(drawn: StringIO) -> list[str]:
    """Return the lines that a user sees, each as often as it was drawn."""
    text = CONTROL.sub("", drawn.getvalue()).replace("\r", "\n")
    return [line.rstrip() for line in text.split("\n") if line.strip()]


@pytest.mark.parametrize("width", [10, 20, 39, 40, 60, 71, 72, 80, 200])
def test_bar_takes_one_line_however_narrow_the_terminal_is(width: int) -> None:
    on, drawn = console(width)
    bar = Bar("writing back", on)
    bar.show("", 1 << 30, 4 << 30)
    bar.stop()
    seen = lines(drawn)
    assert seen
    assert all(line.startswith("writing"[: width // 3]) for line in seen)
    assert max(map(len, seen)) <= width


@pytest.mark.parametrize(
    ("width", "words"),
    [
        (100, ("1.0/4.0 GiB", "-:--:--")),
        (60, ("1.0/4.0 GiB",)),
        (30, ("25%",)),
    ],
)
def test_bar_shows_what_there_is_room_for(width: int, words: tuple[str, ...]) -> None:
    on, drawn = console(width)
    bar = Bar("hydrating", on)
    bar.show("", 1 << 30, 4 << 30)
    bar.stop()
    seen = lines(drawn)
    assert all(word in seen[-1] for word in words)


def test_bar_is_not_drawn_before_the_total_is_known() -> None:
    on, drawn = console(80)
    bar = Bar("hydrating", on)
    bar.show("", 0, 0)
    bar.stop()
    assert drawn.getvalue() == ""


def test_words_are_cut_and_not_wrapped() -> None:
    on, drawn = console(20)
    line = LiveLine(on)
    line.show("used 512/1024 blocks (50 %), dirty 3")
    line.stop()
    assert set(lines(drawn)) == {"used 512/1024 block…"}


def test_words_are_drawn_again_only_when_they_have_changed() -> None:
    on, drawn = console(80)
    line = LiveLine(on)
    line.show("dirty 3")
    before = drawn.getvalue()
    line.show("dirty 3")
    after = drawn.getvalue()
    line.show("dirty 2")
    line.stop()
    assert after == before
    assert "dirty 2" in drawn.getvalue()


def test_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    with open_display("hydrating") as display:
        display.show("hydrated 1 of 4 MiB (25 %)", 1 << 20, 4 << 20)
    assert terminal.getvalue() == "nbdtarget: hydrated 1 of 4 MiB (25 %)\n"


def test_colours_are_left_out_where_they_are_not_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    with open_display("hydrating") as display:
        display.show("", 1 << 20, 4 << 20)
    assert "1.0/4.0 MiB" in terminal.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", terminal.getvalue())
