# SPDX-License-Identifier: Apache-2.0
"""An offline writeback on a terminal. Apart, because only a terminal needs rich."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

__all__ = ["WritebackBar"]


class WritebackBar:
    """A bar with bytes, rate and time left; shown as soon as there is something to copy."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("writing back"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=None)
        self._is_shown = False

    def update(self, done: int, total: int) -> None:
        if not self._is_shown:
            self._is_shown = True
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        if self._is_shown:
            self._bar.stop()
