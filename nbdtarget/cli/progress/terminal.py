# SPDX-License-Identifier: Apache-2.0
"""Progress on a terminal. Apart, because only a terminal needs rich.

Both displays take one line, however narrow the terminal is: what is wrapped cannot be drawn over. A bar leaves out
the columns for which there is no room, and finds that out anew each time, as windows change their sizes.
"""

from collections.abc import Iterable
from typing import Final

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

__all__ = ["Bar", "LiveLine"]

# Columns of characters that a terminal must have.
WIDTH_OF_ALL: Final = 72
WIDTH_OF_BYTES: Final = 40
BAR_WIDTH: Final = 10  # where not all columns have room; rich's own is 40, and shrinks


class _OneLine(Progress):
    """The bar, with as many of its columns as have room in one line."""

    def __init__(self, console: Console) -> None:
        what = TextColumn(
            "{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")
        )
        count = DownloadColumn(
            binary_units=True, table_column=Column(no_wrap=True, overflow="ellipsis")
        )
        rate, rest = TransferSpeedColumn(), TimeRemainingColumn()
        # By the width from which on they are shown, the widest first.
        self._sets: tuple[tuple[int, tuple[ProgressColumn, ...]], ...] = (
            (WIDTH_OF_ALL, (what, BarColumn(), count, rate, rest)),
            (WIDTH_OF_BYTES, (what, BarColumn(BAR_WIDTH), count)),
            (0, (what, TaskProgressColumn())),
        )
        self._terminal = console
        super().__init__(console=console)

    def get_renderables(self) -> Iterable[RenderableType]:
        width = self._terminal.width
        self.columns = next(columns for least, columns in self._sets if width >= least)
        yield self.make_tasks_table(self.tasks)


class Bar:
    """A bar with bytes, rate and time left; drawn as soon as it is known how much there is to do."""

    def __init__(self, description: str, console: Console | None = None) -> None:
        self._progress = _OneLine(console or Console(stderr=True))
        self._task = self._progress.add_task(description, total=None, start=False)
        self._is_shown = False

    def show(self, line: str, done: int = 0, total: int = 0) -> None:
        if not total:
            return
        self._progress.update(self._task, completed=done, total=total)
        if not self._is_shown:
            self._is_shown = True
            self._progress.start_task(self._task)
            self._progress.start()

    def stop(self) -> None:
        if self._is_shown:
            self._progress.stop()


class LiveLine:
    """The words, in one line that is drawn again when it has changed."""

    def __init__(self, console: Console | None = None) -> None:
        self._last = ""
        self._is_shown = False
        self._live = Live(
            Text(), console=console or Console(stderr=True), auto_refresh=False
        )

    def show(self, line: str, done: int = 0, total: int = 0) -> None:
        if line == self._last:
            return
        self._last = line
        if not self._is_shown:
            self._is_shown = True
            self._live.start()
        text = Text(line, no_wrap=True, overflow="ellipsis")
        self._live.update(text, refresh=True)

    def stop(self) -> None:
        if self._is_shown:
            self._live.stop()
