# SPDX-License-Identifier: Apache-2.0
"""What the porcelain shows: how to attach, and how far hydration is.

The URI and the lines to paste go to stdout, progress and complaints to stderr: a bar on
a terminal, else a plain line now and then.
"""

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from nbdtarget.porcelain import CloneOptions, ClonePlan, CloneReporter
from nbdtarget.server.listener import export_uri

__all__ = ["client_lines", "make_reporter"]

LINE_PERIOD_S: Final = 10.0


def client_lines(uri: str) -> list[str]:
    """One line to paste for each client."""
    parts = urlsplit(uri)
    name = unquote(parts.path.removeprefix("/"))
    word = shlex.quote(uri)
    drive = shlex.quote(f"file={uri.replace(',', ',,')},format=raw,if=virtio")
    sockets = parse_qs(parts.query).get("socket")
    if sockets:
        where = f"-unix {shlex.quote(sockets[0])}"
    else:
        where = f"{parts.hostname} {parts.port or 10809}"
    return [
        f"nbdinfo {word}",
        f"nbdcopy --progress {word} copy.img",
        f"qemu-img info {word}",
        f"qemu-system-x86_64 -m 1G -drive {drive}",
        f"sudo nbd-client {where} -N {shlex.quote(name)} /dev/nbd0",
    ]


class _Reporter:
    """Says in plain lines what is going on; the base of the others."""

    def __init__(self, options: CloneOptions) -> None:
        self._options = options
        self._is_hydrated = False

    def serving(self, plan: ClonePlan, uris: list[str]) -> None:
        exports = [export_uri(uri, plan.name) for uri in uris]
        print(f"{self._options.dest} is a clone of {self._options.source}: attach to")
        for uri in exports:
            print(f"  {uri}")
        print("for example with one of")
        for line in client_lines(exports[0]):
            print(f"  {line}")
        print(flush=True)

    def progress(self, done: int, size: int) -> None:
        """Nothing, here."""

    def hydrated(self) -> None:
        self._is_hydrated = True
        end = (
            "" if self._options.exit_when_hydrated else "; still serving (Ctrl-C ends)"
        )
        self._say(f"hydrated: {self._options.dest} alone is the disk{end}")

    def failed(self, status: str) -> None:
        self._say(f"the clone cannot record any more progress: {status}")

    def stopping(self) -> None:
        """Nothing, here."""

    def _say(self, text: str) -> None:
        print(f"nbdtarget: {text}", file=sys.stderr, flush=True)


class _LinesReporter(_Reporter):
    """For a log file: a line when it begins, every ten seconds, and at the end."""

    def __init__(self, options: CloneOptions) -> None:
        super().__init__(options)
        self._next_s = 0.0
        self._last = -1

    def progress(self, done: int, size: int) -> None:
        now_s = time.monotonic()
        if self._is_hydrated or done == self._last or now_s < self._next_s:
            return
        self._next_s = now_s + LINE_PERIOD_S
        self._last = done
        percent = 100 * done // size
        self._say(f"hydrated {done >> 20} of {size >> 20} MiB ({percent} %)")


class _BarReporter(_Reporter):
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
        if self._options.hydration:
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


class _JsonReporter(_Reporter):
    """One JSON object a line on stdout."""

    def serving(self, plan: ClonePlan, uris: list[str]) -> None:
        exports = [export_uri(uri, plan.name) for uri in uris]
        self._print(
            event="serving",
            name=plan.name,
            size=plan.size,
            table=plan.table,
            uris=exports,
        )

    def progress(self, done: int, size: int) -> None:
        if not self._is_hydrated:
            self._print(event="progress", done=done, size=size)

    def hydrated(self) -> None:
        self._is_hydrated = True
        self._print(event="hydrated")

    def failed(self, status: str) -> None:
        self._print(event="failed", status=status)

    def _print(self, **fields: object) -> None:
        print(msgspec.json.encode(fields).decode(), flush=True)


@contextmanager
def make_reporter(options: CloneOptions, *, json: bool) -> Iterator[CloneReporter]:
    """The reporter that suits where our output goes."""
    if json:
        yield _JsonReporter(options)
    elif sys.stderr.isatty():
        bar = _BarReporter(options)
        try:
            yield bar
        finally:
            bar.stopping()
    else:
        yield _LinesReporter(options)
