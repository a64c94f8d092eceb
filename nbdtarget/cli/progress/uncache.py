# SPDX-License-Identifier: Apache-2.0
"""What `uncache` shows: a bar on a terminal, else a plain line now and then, on stderr."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from nbdtarget.cli.progress.clone import print_event, say
from nbdtarget.common.clock import monotonic_ns
from nbdtarget.porcelain.uncache import CacheLine, Draining, UncacheReporter

__all__ = ["Reporter", "make_reporter"]

LINE_PERIOD_S: Final = 5.0


class Reporter:
    """Says in plain lines what is going on; the base of the others."""

    def __init__(self, name: str) -> None:
        self.name = name

    def draining(self, now: Draining) -> None:
        """Nothing, here."""

    def stuck(self, now: Draining, for_s: float) -> None:
        errors = f", {now.errors} copies have failed" if now.errors else ""
        last = f", the last: {now.last_error}" if now.last_error else ""
        say(
            f"{self.name}: no block has been flushed for {for_s:.0f} s"
            f" ({now.dirty_blocks} left{errors}{last}); still trying"
        )

    def interrupted(self, now: Draining | None) -> None:
        if now is None:
            say(f"{self.name}: stopped, nothing has been changed")
            return
        say(
            f"{self.name}: stopped, {now.dirty_blocks} blocks must still be flushed; it"
            " goes on serving in writethrough, with the policy cleaner; the same"
            " command goes on"
        )

    def uncached(self, line: CacheLine) -> None:
        print(
            f"{self.name} is {line.origin} alone; {line.cache} and {line.metadata} are"
            " not used any more"
        )


class _LinesReporter(Reporter):
    """For a log file: a line every few seconds, while there is something to flush."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._next_s = 0.0

    def draining(self, now: Draining) -> None:
        now_s = monotonic_ns() / 1e9
        if now.dirty_blocks and now_s >= self._next_s:
            self._next_s = now_s + LINE_PERIOD_S
            say(f"{self.name}: {now.dirty_blocks} blocks must still be flushed")


class _JsonReporter(Reporter):
    """One JSON object a line on stdout."""

    def draining(self, now: Draining) -> None:
        print_event(event="draining", **_fields(now))

    def stuck(self, now: Draining, for_s: float) -> None:
        print_event(event="stuck", **_fields(now), for_s=round(for_s, 1))

    def interrupted(self, now: Draining | None) -> None:
        print_event(event="interrupted", **({} if now is None else _fields(now)))

    def uncached(self, line: CacheLine) -> None:
        print_event(
            event="uncached",
            name=self.name,
            origin=line.origin,
            cache=line.cache,
            metadata=line.metadata,
        )


def _fields(now: Draining) -> dict[str, object]:
    return {name: getattr(now, name) for name in now.__struct_fields__}


@contextmanager
def make_reporter(name: str, *, json: bool) -> Iterator[UncacheReporter]:
    """The reporter that suits where our output goes."""
    if json:
        yield _JsonReporter(name)
    elif sys.stderr.isatty():
        from nbdtarget.cli.progress.uncache_bar import BarReporter  # rich: 30 ms

        bar = BarReporter(name)
        try:
            yield bar
        finally:
            bar.stop()
    else:
        yield _LinesReporter(name)
