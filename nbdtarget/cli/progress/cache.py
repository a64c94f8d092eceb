# SPDX-License-Identifier: Apache-2.0
"""The output of `cache`: how to attach, and how the cache is doing."""

from contextlib import AbstractContextManager
from typing import Final

from nbdtarget.cli.progress.common import (
    Display,
    make_reporter,
    print_event,
    say,
)
from nbdtarget.cli.progress.hints import print_attach
from nbdtarget.common.clock import monotonic_ns
from nbdtarget.common.units import describe_bytes
from nbdtarget.porcelain.cache import (
    CacheOptions,
    CachePlan,
    CacheReporter,
    CacheStatus,
)
from nbdtarget.server.listener import export_uri

__all__ = ["JsonReporter", "Reporter", "cache_reporter", "describe_status"]

JSON_PERIOD_S: Final = 1.0


def describe_status(status: CacheStatus) -> str:
    """Return the status as one short line."""
    percent = 100 * status.used_blocks // max(1, status.total_blocks)
    hits = "-" if status.hit_ratio is None else f"{100 * status.hit_ratio:.1f} %"
    return (
        f"used {status.used_blocks}/{status.total_blocks} blocks ({percent} %),"
        f" dirty {status.dirty_blocks} ({describe_bytes(status.dirty_bytes)}),"
        f" hits {hits}, promotions {status.promotions}"
    )


class Reporter:
    """Reports in words."""

    def __init__(self, options: CacheOptions, display: Display) -> None:
        self.options = options
        self._display = display

    def serving(self, plan: CachePlan, uris: list[str]) -> None:
        options = self.options
        what = f"{options.origin} is cached by {options.cache} ({options.mode})"
        print_attach(what, plan.name, uris, self.options.security.tls)

    def unclean(self, nr_dirty: int, nr_bytes: int) -> None:
        say(
            "the cache was not shut down cleanly:"
            f" {nr_dirty} blocks ({describe_bytes(nr_bytes)}) count as dirty"
            + (" and are written back" if nr_dirty else "")
        )

    def given_up(self, nr_blocks: int) -> None:
        """Print nothing: the log says it."""

    def status(self, status: CacheStatus) -> None:
        self._display.show(describe_status(status))

    def uncached(self) -> None:
        say(
            f"uncached: {self.options.origin} alone is the disk; still serving"
            " (Ctrl-C ends)"
        )

    def failed(self, line: str) -> None:
        say(f"the cache cannot record anything any more: {line}")

    def stopping(self) -> None:
        self._display.stop()

    def stopped(self, nr_dirty: int, nr_bytes: int) -> None:
        if nr_dirty:
            say(
                f"stopped: {nr_dirty} blocks ({describe_bytes(nr_bytes)}) of"
                f" {self.options.origin} are in {self.options.cache} only; run the same"
                " command again to continue"
            )

    def not_clean(self, reason: str) -> None:
        say(f"{reason}; do not use {self.options.origin} without its cache")


class JsonReporter:
    """One JSON object a line on stdout; `status` when there is news, once a second at most."""

    def __init__(self, options: CacheOptions) -> None:
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

    def stopping(self) -> None:
        """Print nothing: `stopped` follows."""

    def stopped(self, nr_dirty: int, nr_bytes: int) -> None:
        print_event(event="stopped", dirty_blocks=nr_dirty, dirty_bytes=nr_bytes)

    def not_clean(self, reason: str) -> None:
        print_event(event="not_clean", reason=reason)


def cache_reporter(
    options: CacheOptions, *, json: bool
) -> AbstractContextManager[CacheReporter]:
    """The reporter that suits where the output goes."""
    return make_reporter(
        Reporter, JsonReporter, options, json=json, is_quiet=options.run is not None
    )
