# SPDX-License-Identifier: Apache-2.0
"""The output of `uncache`: how much must still be written back, and what is left in the end."""

from contextlib import AbstractContextManager
from typing import Final

from nbdtarget.cli.progress.common import Display, make_reporter, print_event, say
from nbdtarget.control.uncache import CacheLine, Draining, UncacheReporter

__all__ = ["JsonReporter", "Reporter", "uncache_reporter"]

LINE_PERIOD_S: Final = 5.0


class Reporter:
    """Reports in words."""

    def __init__(self, name: str, display: Display) -> None:
        self.name = name
        self._display = display
        self._total = 0  # dirty bytes, when most were

    def draining(self, now: Draining) -> None:
        # In writeback, a moment ago, there may have been a few more.
        self._total = max(self._total, now.dirty_bytes)
        if now.dirty_blocks or self._total:
            line = f"{self.name}: {_blocks(now)} to write back"
            self._display.show(line, self._total - now.dirty_bytes, self._total)

    def stuck(self, now: Draining, for_s: float) -> None:
        errors = f", {now.errors} copies have failed" if now.errors else ""
        last = f", the last: {now.last_error}" if now.last_error else ""
        say(
            f"{self.name}: no block has been written back for {for_s:.0f} s"
            f" ({now.dirty_blocks} left{errors}{last}); still trying"
        )

    def interrupted(self, now: Draining | None) -> None:
        self._display.stop()
        if now is None:
            say(f"{self.name}: interrupted; nothing has been changed")
            return
        say(
            f"{self.name}: interrupted; {_blocks(now)} left. The device stays in service"
            " (mode writethrough, policy cleaner). Run the same command again to finish"
        )

    def uncached(self, line: CacheLine) -> None:
        self._display.stop()
        print(
            f"{self.name} is {line.origin} alone; {line.cache} and {line.metadata} are"
            " not used any more"
        )


class JsonReporter:
    """One JSON object a line on stdout."""

    def __init__(self, name: str) -> None:
        self.name = name

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


def _blocks(now: Draining) -> str:
    return f"{now.dirty_blocks} dirty block{'' if now.dirty_blocks == 1 else 's'}"


def _fields(now: Draining) -> dict[str, object]:
    return {name: getattr(now, name) for name in now.__struct_fields__}


def uncache_reporter(
    name: str, *, json: bool
) -> AbstractContextManager[UncacheReporter]:
    """The reporter that suits where the output goes."""
    return make_reporter(
        Reporter,
        JsonReporter,
        name,
        json=json,
        bar="writing back",
        period_s=LINE_PERIOD_S,
    )
