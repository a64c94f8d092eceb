# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget events`: what has happened in the servers, and what happens next."""

import sys
import threading
from collections.abc import Iterator
from datetime import datetime
from queue import SimpleQueue
from typing import Annotated, Final

import msgspec
import typer

from nbdtarget.cli.common import Control, Json, addresses
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control.client import ControlClient, no_server
from nbdtarget.control.figures import Event, Events, EventsAnswer
from nbdtarget.control.paths import (
    ControlAddress,
    control_token,
    serve_control_path,
)

__all__ = ["event_line", "register"]

WAIT_S: Final = 20.0

Follow = Annotated[
    bool,
    typer.Option("--follow", "-f", help="Print events as they happen, until Ctrl-C."),
]
Device = Annotated[
    str | None,
    typer.Argument(metavar="[NAME]", help="A mapped device; default: all of them."),
]
Last = Annotated[
    int | None,
    typer.Option(
        "--last",
        "-n",
        metavar="NUMBER",
        min=0,
        help="Print only so many of those that were.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(events)


def events(
    name: Device = None,
    follow: Follow = False,
    last: Last = None,
    json: Json = False,
    control: Control = None,
) -> None:
    """Print what has happened: the last lines of the logs of the servers.

    Without --follow this prints the events that the servers have kept, at most 500 each, and ends.
    """
    sources = [_Source(address) for address in addresses(control)]
    if not sources:
        raise no_server(serve_control_path())
    kept = [event for source in sources for event in source.next(0.0)]
    kept = sorted(
        (each for each in kept if _is_about(each, name)), key=lambda it: it.time_s
    )
    for event in kept if last is None else kept[len(kept) - last :]:
        _print(event, json=json)
    if follow:
        for event in _as_they_happen(sources):
            if _is_about(event, name):
                _print(event, json=json)


class _Source:
    """One server, and up to which event it was read."""

    def __init__(self, address: ControlAddress) -> None:
        self._client = ControlClient(address, control_token())
        self._known = 0

    def next(self, wait_s: float) -> tuple[Event, ...]:
        """Return what happened since the last call. Raises: NoServerError, TableError."""
        request = Events(self._known, wait_s)
        answer = self._client.ask("events", request, EventsAnswer)
        self._known = answer.last
        if answer.lost:
            print(f"nbdtarget: {answer.lost} events were not kept", file=sys.stderr)
        return answer.events


def _as_they_happen(sources: list[_Source]) -> Iterator[Event]:
    """Each server is asked by a thread of its own. Raises: what the last server that ends has ended with."""
    found: SimpleQueue[tuple[Event, ...] | NbdTargetError] = SimpleQueue()

    def follow(source: _Source) -> None:
        try:
            while True:
                found.put(source.next(WAIT_S))
        except NbdTargetError as error:
            found.put(error)

    for source in sources:
        threading.Thread(target=follow, args=(source,), daemon=True).start()
    left = len(sources)
    while left:
        what = found.get()
        if isinstance(what, NbdTargetError):
            left -= 1
            if not left:
                raise what
            print(f"nbdtarget: {what}", file=sys.stderr)
        else:
            yield from what


def _is_about(event: Event, name: str | None) -> bool:
    return name is None or event.device == name.removeprefix("/dev/mapper/")


def _print(event: Event, *, json: bool) -> None:
    line = msgspec.json.encode(event).decode() if json else event_line(event)
    print(line, flush=True)


def event_line(event: Event) -> str:
    """Return one line, with the time of this machine's zone."""
    when = datetime.fromtimestamp(event.time_s).astimezone()
    about = f"{event.device}: " if event.device else ""
    return f"{when:%Y-%m-%d %H:%M:%S} {event.level:<8} {about}{event.text}"
