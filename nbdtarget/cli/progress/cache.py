# SPDX-License-Identifier: Apache-2.0
"""What `cache` and `uncache` show.

As with `clone`: what to paste goes to stdout, the rest to stderr: a line that changes or a bar on a
terminal, else a plain line now and then; with --json one object a line on stdout.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from nbdtarget.cli.progress.clone import LINE_PERIOD_S, print_attach, print_event, say
from nbdtarget.common.clock import monotonic_ns
from nbdtarget.porcelain.cache import (
    CacheOptions,
    CachePlan,
    CacheReporter,
    CacheStatus,
)
from nbdtarget.server.listener import export_uri

__all__ = ["Reporter", "describe_bytes", "describe_status", "make_reporter"]

JSON_PERIOD_S: Final = 1.0


def describe_bytes(nr_bytes: int) -> str:
    """As a person says it: "3.5 GiB"."""
    size, units = float(nr_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def describe_status(status: CacheStatus) -> str:
    """One short line."""
    percent = 100 * status.used_blocks // max(1, status.total_blocks)
    hits = "-" if status.hit_ratio is None else f"{100 * status.hit_ratio:.1f} %"
    return (
        f"used {status.used_blocks}/{status.total_blocks} blocks ({percent} %),"
        f" dirty {status.dirty_blocks} ({describe_bytes(status.dirty_bytes)}),"
        f" hits {hits}, promotions {status.promotions}"
    )


class Reporter:
    """Says in plain lines what is going on; the base of the others."""

    def __init__(self, options: CacheOptions) -> None:
        self.options = options

    def serving(self, plan: CachePlan, uris: list[str]) -> None:
        options = self.options
        what = f"{options.origin} is cached by {options.cache} ({options.mode})"
        print_attach(what, plan.name, uris)

    def unclean(self, nr_dirty: int, nr_bytes: int) -> None:
        say(
            "the cache was not shut down cleanly:"
            f" {nr_dirty} blocks ({describe_bytes(nr_bytes)}) count as dirty"
            + (" and are written back" if nr_dirty else "")
        )

    def given_up(self, nr_blocks: int) -> None:
        """Nothing, here: the log says it."""

    def status(self, status: CacheStatus) -> None:
        """Nothing, here."""

    def uncached(self) -> None:
        say(
            f"uncached: {self.options.origin} alone is the disk; still serving"
            " (Ctrl-C ends)"
        )

    def failed(self, line: str) -> None:
        say(f"the cache cannot record anything any more: {line}")

    def stopping(self) -> None:
        """Nothing, here."""

    def stopped(self, nr_dirty: int, nr_bytes: int) -> None:
        if nr_dirty:
            say(
                f"stopped: {nr_dirty} blocks ({describe_bytes(nr_bytes)}) of"
                f" {self.options.origin} are in {self.options.cache} only; the same"
                " line goes on"
            )

    def not_clean(self, reason: str) -> None:
        say(f"{reason}; do not use {self.options.origin} without its cache")


class _LinesReporter(Reporter):
    """For a log file: a line every ten seconds, if there is news."""

    def __init__(self, options: CacheOptions) -> None:
        super().__init__(options)
        self._next_s = 0.0
        self._last = ""

    def status(self, status: CacheStatus) -> None:
        now_s = monotonic_ns() / 1e9
        line = describe_status(status)
        if line == self._last or now_s < self._next_s:
            return
        self._next_s = now_s + LINE_PERIOD_S
        self._last = line
        say(line)


class _JsonReporter(Reporter):
    """One JSON object a line on stdout; `status` when there is news, once a second at most."""

    def __init__(self, options: CacheOptions) -> None:
        super().__init__(options)
        self._next_s = 0.0
        self._last: CacheStatus | None = None

    def serving(self, plan: CachePlan, uris: list[str]) -> None:
        print_event(
            event="serving",
            name=plan.name,
            size=plan.size,
            table=plan.table,
            uris=[export_uri(uri, plan.name) for uri in uris],
        )

    def unclean(self, nr_dirty: int, nr_bytes: int) -> None:
        print_event(event="unclean", dirty_blocks=nr_dirty, dirty_bytes=nr_bytes)

    def given_up(self, nr_blocks: int) -> None:
        print_event(event="given_up", blocks=nr_blocks)

    def status(self, status: CacheStatus) -> None:
        now_s = monotonic_ns() / 1e9
        if status == self._last or now_s < self._next_s:
            return
        self._next_s = now_s + JSON_PERIOD_S
        self._last = status
        print_event(
            event="status", **{f: getattr(status, f) for f in status.__struct_fields__}
        )

    def uncached(self) -> None:
        print_event(event="uncached")

    def failed(self, line: str) -> None:
        print_event(event="failed", status=line)

    def stopped(self, nr_dirty: int, nr_bytes: int) -> None:
        print_event(event="stopped", dirty_blocks=nr_dirty, dirty_bytes=nr_bytes)

    def not_clean(self, reason: str) -> None:
        print_event(event="not_clean", reason=reason)


@contextmanager
def make_reporter(options: CacheOptions, *, json: bool) -> Iterator[CacheReporter]:
    """The reporter that suits where our output goes."""
    if json:
        yield _JsonReporter(options)
    elif sys.stderr.isatty():
        from nbdtarget.cli.progress.line import LineReporter  # rich: 30 ms

        line = LineReporter(options)
        try:
            yield line
        finally:
            line.stopping()
    else:
        yield _LinesReporter(options)
