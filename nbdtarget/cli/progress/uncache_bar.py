# SPDX-License-Identifier: Apache-2.0
"""`uncache` on a terminal. Apart, because only a terminal needs rich."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from nbdtarget.cli.progress.uncache import Reporter
from nbdtarget.porcelain.uncache import CacheLine, Draining

__all__ = ["BarReporter"]


class BarReporter(Reporter):
    """For a terminal: a bar with bytes, rate and time left, until nothing is dirty."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("flushing", total=None)
        self._total = 0

    def draining(self, now: Draining) -> None:
        if not self._total:
            if not now.dirty_bytes:
                return
            self._bar.start()
        # In writeback, a moment ago, there may have been a few more.
        self._total = max(self._total, now.dirty_bytes)
        done = self._total - now.dirty_bytes
        self._bar.update(self._task, total=self._total, completed=done)

    def interrupted(self, now: Draining | None) -> None:
        self.stop()
        super().interrupted(now)

    def uncached(self, line: CacheLine) -> None:
        self.stop()
        super().uncached(line)

    def stop(self) -> None:
        """Leave the terminal as it was found."""
        self._bar.stop()
