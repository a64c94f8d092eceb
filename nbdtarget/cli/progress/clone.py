# SPDX-License-Identifier: Apache-2.0
"""What `clone` shows: how to attach, and how far hydration is. Others show the first so, too.

The URI and the lines to paste go to stdout, progress and complaints to stderr: a bar on
a terminal, else a plain line now and then.
"""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from nbdtarget.cli.outlet import Outlet, process_stderr, process_stdout
from nbdtarget.common.clock import monotonic_ns
from nbdtarget.porcelain.clone import CloneOptions, ClonePlan, CloneReporter
from nbdtarget.server.listener import export_uri

__all__ = [
    "LINE_PERIOD_S",
    "Reporter",
    "client_lines",
    "make_reporter",
    "print_attach",
    "print_event",
    "say",
]

LINE_PERIOD_S: Final = 10.0
_stdout: Final = Outlet(process_stdout, lambda nr: f'{{"event":"lost","lines":{nr}}}')
_stderr: Final = Outlet(process_stderr, lambda nr: f"nbdtarget: {nr} lines were lost")


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


def print_attach(what: str, name: str, uris: list[str]) -> None:
    """Print what is served, its URIs, and a line for each client."""
    exports = [export_uri(uri, name) for uri in uris]
    print(f"{what}: attach to")
    for uri in exports:
        print(f"  {uri}")
    print("for example with one of")
    for line in client_lines(exports[0]):
        print(f"  {line}")
    print(flush=True)


def print_event(**fields: object) -> None:
    """Print one JSON object in a line; never waits for who reads."""
    _stdout.write_line(msgspec.json.encode(fields).decode())


def say(text: str) -> None:
    """Tell the user, beside what scripts read; never waits for who reads."""
    _stderr.write_line(f"nbdtarget: {text}")


class Reporter:
    """Says in plain lines what is going on; the base of the others."""

    def __init__(self, options: CloneOptions) -> None:
        self.options = options
        self._is_hydrated = False

    def serving(self, plan: ClonePlan, uris: list[str]) -> None:
        options = self.options
        print_attach(f"{options.dest} is a clone of {options.source}", plan.name, uris)

    def progress(self, done: int, size: int) -> None:
        """Nothing, here."""

    def hydrated(self) -> None:
        self._is_hydrated = True
        end = "" if self.options.exit_when_hydrated else "; still serving (Ctrl-C ends)"
        say(f"hydrated: {self.options.dest} alone is the disk{end}")

    def failed(self, status: str) -> None:
        say(f"the clone cannot record any more progress: {status}")

    def stopping(self) -> None:
        """Nothing, here."""


class _LinesReporter(Reporter):
    """For a log file: a line when it begins, every ten seconds, and at the end."""

    def __init__(self, options: CloneOptions) -> None:
        super().__init__(options)
        self._next_s = 0.0
        self._last = -1

    def progress(self, done: int, size: int) -> None:
        now_s = monotonic_ns() / 1e9
        if self._is_hydrated or done == self._last or now_s < self._next_s:
            return
        self._next_s = now_s + LINE_PERIOD_S
        self._last = done
        percent = 100 * done // size
        say(f"hydrated {done >> 20} of {size >> 20} MiB ({percent} %)")


class _JsonReporter(Reporter):
    """One JSON object a line on stdout."""

    def serving(self, plan: ClonePlan, uris: list[str]) -> None:
        exports = [export_uri(uri, plan.name) for uri in uris]
        print_event(
            event="serving",
            name=plan.name,
            size=plan.size,
            table=plan.table,
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


@contextmanager
def make_reporter(options: CloneOptions, *, json: bool) -> Iterator[CloneReporter]:
    """The reporter that suits where our output goes."""
    if json:
        yield _JsonReporter(options)
    elif sys.stderr.isatty():
        from nbdtarget.cli.progress.clone_bar import BarReporter  # rich: 30 ms

        bar = BarReporter(options)
        try:
            yield bar
        finally:
            bar.stopping()
    else:
        yield _LinesReporter(options)
