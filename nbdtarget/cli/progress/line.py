# SPDX-License-Identifier: Apache-2.0
"""A cache on a terminal: one line, which changes. Apart, because only a terminal needs rich."""

from rich.console import Console
from rich.live import Live
from rich.text import Text

from nbdtarget.cli.progress.cache import Reporter, describe_status
from nbdtarget.porcelain.cache import CacheOptions, CachePlan, CacheStatus

__all__ = ["LineReporter"]


class LineReporter(Reporter):
    """For a terminal: what `status` says, in one line that is drawn again when it has changed."""

    def __init__(self, options: CacheOptions) -> None:
        super().__init__(options)
        self._last = ""
        self._live = Live(Text(), console=Console(stderr=True), auto_refresh=False)

    def serving(self, plan: CachePlan, uris: list[str]) -> None:
        super().serving(plan, uris)
        self._live.start()

    def status(self, status: CacheStatus) -> None:
        line = describe_status(status)
        if line != self._last:
            self._last = line
            # Cut, not wrapped: it must stay one line to be drawn over.
            text = Text(line, no_wrap=True, overflow="ellipsis")
            self._live.update(text, refresh=True)

    def stopping(self) -> None:
        self._live.stop()
