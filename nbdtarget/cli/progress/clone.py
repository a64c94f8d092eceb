# SPDX-License-Identifier: Apache-2.0
"""The output of `clone`: how to attach, and how far hydration is."""

from contextlib import AbstractContextManager

from nbdtarget.cli.progress.common import (
    Display,
    make_reporter,
    print_event,
    say,
)
from nbdtarget.cli.progress.hints import print_attach
from nbdtarget.common.redaction import redacted
from nbdtarget.porcelain.clone import CloneOptions, ClonePlan, CloneReporter
from nbdtarget.server.listener import export_uri

__all__ = ["JsonReporter", "Reporter", "clone_reporter"]


class Reporter:
    """Reports in words."""

    def __init__(self, options: CloneOptions, display: Display) -> None:
        self.options = options
        self._display = display
        self._is_hydrated = False
        self._copied = ""

    def serving(self, plan: ClonePlan, uris: list[str]) -> None:
        options = self.options
        source = redacted(options.source)
        what = f"{options.dest} is a clone of {source}"
        print_attach(what, plan.name, uris, options.security.tls)

    def progress(self, done: int, size: int) -> None:
        if not self._is_hydrated:
            percent = 100 * done // size
            self._copied = f"{done >> 20} of {size >> 20} MiB"
            line = f"hydrated {self._copied} ({percent} %)"
            self._display.show(line, done, size)

    def hydrated(self) -> None:
        self._is_hydrated = True
        self._copied = ""
        self._display.stop()
        ends_itself = self.options.exit_when_hydrated or self.options.run is not None
        end = "" if ends_itself else "; still serving (Ctrl-C ends)"
        say(f"hydrated: {self.options.dest} alone is the disk{end}")

    def failed(self, status: str) -> None:
        say(f"the clone cannot record any more progress: {status}")

    def source_changed(self, reason: str) -> None:
        source, dest = redacted(self.options.source), self.options.dest
        say(
            f"{source}: {reason}: nothing more is copied. What {dest} has is of the image that it was cloned from;"
            " parts that are missing cannot be read until that image is back"
        )

    def stopping(self) -> None:
        self._display.stop()
        if self._copied:
            say(
                f"stopped: {self._copied} are copied; run the same command again to continue"
            )
            self._copied = ""


class JsonReporter:
    """One JSON object a line on stdout."""

    def __init__(self, options: CloneOptions) -> None:
        self._is_hydrated = False

    def serving(self, plan: ClonePlan, uris: list[str]) -> None:
        exports = [export_uri(uri, plan.name) for uri in uris]
        print_event(
            event="serving",
            name=plan.name,
            size=plan.size,
            table=redacted(plan.table),
            uris=exports,
        )

    def progress(self, done: int, size: int) -> None:
        if not self._is_hydrated:
            print_event(event="progress", done=done, size=size)

    def hydrated(self) -> None:
        self._is_hydrated = True
        print_event(event="hydrated")

    def failed(self, status: str) -> None:
        print_event(event="failed", status=status)

    def source_changed(self, reason: str) -> None:
        print_event(event="source_changed", reason=reason)

    def stopping(self) -> None:
        """Print nothing: the process ends without another message."""


def clone_reporter(
    options: CloneOptions, *, json: bool
) -> AbstractContextManager[CloneReporter]:
    """The reporter that suits where the output goes."""
    return make_reporter(
        Reporter,
        JsonReporter,
        options,
        json=json,
        bar="hydrating",
        is_quiet=options.run is not None,
    )
