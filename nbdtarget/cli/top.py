# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget top`: the table of `status`, drawn anew again and again, with the clients and the last events below it."""

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Final

import typer

from nbdtarget.cli.common import Control, Names, addresses, ask
from nbdtarget.cli.events import event_line
from nbdtarget.common.clock import blocking_sleep
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control.client import ControlClient, no_server
from nbdtarget.control.figures import (
    Event,
    Events,
    EventsAnswer,
    Figures,
    FiguresAnswer,
)
from nbdtarget.control.paths import control_token, serve_control_path

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["register"]

EVENTS_SHOWN: Final = 8
CLIENTS_SHOWN: Final = 8

Interval = Annotated[
    float,
    typer.Option(
        "--interval", "-d", metavar="SECONDS", min=0.2, help="Time between two looks."
    ),
]
Count = Annotated[
    int | None,
    typer.Option(
        "--count", "-n", metavar="NUMBER", min=1, help="End after so many looks."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(top)


def top(
    names: Names = None,
    interval: Interval = 1.0,
    count: Count = None,
    control: Control = None,
) -> None:
    """Show devices, rates, clients and events on a terminal, until Ctrl-C.

    The figures are those of `status' and of the page in a browser (`page').
    """
    # Here, because other commands must start fast: rich takes 30 ms.
    from rich.console import Console
    from rich.live import Live

    if not addresses(control):
        raise no_server(serve_control_path())
    console = Console()
    with (
        suppress(KeyboardInterrupt),
        Live(console=console, screen=console.is_terminal, auto_refresh=False) as live,
    ):
        for nr, (before, now) in enumerate(_looks(names, control, interval), 1):
            live.update(_drawn(before, now, _last_events(control)), refresh=True)
            if nr == count:
                return


def _looks(
    names: list[str] | None, control: str | None, interval: float
) -> Iterator[tuple[FiguresAnswer | None, FiguresAnswer]]:
    request = Figures(tuple(names or ()))
    before = None
    while True:
        now = ask(control, "figures", request, FiguresAnswer)
        yield before, now
        before = now
        blocking_sleep(interval)


def _last_events(control: str | None) -> list[Event]:
    found: list[Event] = []
    for address in addresses(control):
        with suppress(NbdTargetError):  # it has just ended: the figures say so
            client = ControlClient(address, control_token())
            found += client.ask("events", Events(0), EventsAnswer).events
    return sorted(found, key=lambda event: event.time_s)[-EVENTS_SHOWN:]


def _drawn(
    before: FiguresAnswer | None, now: FiguresAnswer, events: list[Event]
) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    from nbdtarget.cli.status_table import draw

    clients = [
        f"{each.peer} on {each.device or '(handshake)'} ({each.identity}), {each.in_flight} in flight"
        for each in now.clients
    ]
    if len(clients) > CLIENTS_SHOWN:
        more = len(clients) - CLIENTS_SHOWN
        clients = [*clients[:CLIENTS_SHOWN], f"and {more} more"]
    return Group(
        draw(before, now),
        Text(f"\n{len(now.clients)} clients", style="bold"),
        *map(Text, clients),
        Text("\nEvents", style="bold"),
        *(
            Text(event_line(event), style=_STYLES.get(event.level, ""))
            for event in events
        ),
    )


_STYLES: Final = {"warning": "yellow", "error": "red", "critical": "bold red"}
