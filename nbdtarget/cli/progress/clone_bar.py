# SPDX-License-Identifier: Apache-2.0
"""Hydration on a terminal. Apart, because only a terminal needs rich."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from nbdtarget.cli.progress.clone import Reporter
from nbdtarget.porcelain.clone import CloneOptions, ClonePlan

__all__ = ["BarReporter"]


class BarReporter(Reporter):
    """For a terminal: a bar with bytes, rate and time left."""

    def __init__(self, options: CloneOptions) -> None:
        super().__init__(options)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("hydrating", total=None, start=False)

    def serving(self, plan: ClonePlan, uris: list[str]) -> None:
        super().serving(plan, uris)
        if self.options.hydration:
            self._bar.start()

    def progress(self, done: int, size: int) -> None:
        if not self._bar.tasks[0].started:
            self._bar.start_task(self._task)
        self._bar.update(self._task, completed=done, total=size)

    def hydrated(self) -> None:
        self._bar.stop()
        super().hydrated()

    def stopping(self) -> None:
        self._bar.stop()
