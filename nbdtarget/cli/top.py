# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget top`: the table of `status`, drawn anew again and again, with the last minutes, the clients and the last events below it.

The first screen has rates and minutes already: the server has kept them (verb `history`).
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Final

import typer

from nbdtarget.cli.common import Control, Names, addresses, ask
from nbdtarget.cli.ending import in_order
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
    History,
    HistoryAnswer,
)
from nbdtarget.control.paths import control_token, serve_control_path
from nbdtarget.monitor.minutes import SPAN_S, Minutes

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["register", "sparkline"]

EVENTS_SHOWN: Final = 8
CLIENTS_SHOWN: Final = 8
MINUTES_SHOWN: Final = 8  # devices
HISTORIES_MAX: Final = 64  # that are asked for
CELLS: Final = 60
BARS: Final = "▁▂▃▄▅▆▇█"
PLAIN_BARS: Final = "_.-:=+*#"  # for a terminal without Unicode

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
    """Show devices, rates, the last minutes, clients and events on a terminal, until Ctrl-C.

    The figures are those of `status' and of the page in a browser (`page').
    """
    # Here, because other commands must start fast: rich takes 30 ms.
    from rich.console import Console
    from rich.live import Live

    if not addresses(control):
        raise no_server(serve_control_path())
    console = Console()
    # In order: else the terminal would stay as it is, without a cursor.
    with (
        suppress(KeyboardInterrupt),
        in_order(),
        Live(console=console, screen=console.is_terminal, auto_refresh=False) as live,
    ):
        bars = BARS if console.encoding.startswith("utf") else PLAIN_BARS
        minutes = Minutes()
        for nr, (earlier, now) in enumerate(_looks(names, control, interval), 1):
            before = earlier
            if before is None:
                _recall(minutes, now, control)
                before = minutes.before(now)
            minutes.add(now)
            last = _last_minutes(minutes, now, bars)
            live.update(_drawn(before, now, last, _last_events(control)), refresh=True)
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


def _recall(minutes: Minutes, now: FiguresAnswer, control: str | None) -> None:
    """Ask for what the servers have kept, of the devices that were asked for most."""
    nr = {
        device.name: sum(operation.nr for operation in device.operations.values())
        for device in now.devices
        if device.operations
    }
    for name in sorted(nr, key=lambda each: -nr[each])[:HISTORIES_MAX]:
        with suppress(NbdTargetError):  # it was removed, or the server is an older one
            kept = ask(control, "history", History(name), HistoryAnswer)
            minutes.recall(name, kept)


def _last_minutes(minutes: Minutes, now: FiguresAnswer, bars: str) -> list[str]:
    """Return a line for each of the devices that were asked for most in the last minutes."""
    cells = {each.name: minutes.per_s(each.name, CELLS) for each in now.devices}
    total = {name: sum(filter(None, found)) for name, found in cells.items()}
    busiest = sorted(filter(total.get, cells), key=lambda each: -total[each])
    shown = busiest[:MINUTES_SHOWN]
    width = max(map(len, shown), default=0)
    return [
        f"{name:{width}} {sparkline(cells[name], bars)} at most {max(filter(None, cells[name])):,.0f}/s"
        for name in shown
    ]


def sparkline(cells: Sequence[float | None], bars: str) -> str:
    """Draw numbers in a line, the largest with the last of `bars`; a space: nothing is known, or there was none."""
    highest = max(filter(None, cells), default=0.0)
    return "".join(
        bars[min(len(bars) - 1, int(each / highest * len(bars)))] if each else " "
        for each in cells
    )


def _last_events(control: str | None) -> list[Event]:
    found: list[Event] = []
    for address in addresses(control):
        with suppress(NbdTargetError):  # it has just ended: the figures say so
            client = ControlClient(address, control_token())
            found += client.ask("events", Events(0), EventsAnswer).events
    return sorted(found, key=lambda event: event.time_s)[-EVENTS_SHOWN:]


def _drawn(
    before: FiguresAnswer | None,
    now: FiguresAnswer,
    minutes: list[str],
    events: list[Event],
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
        Text(f"\nRequests a second, the last {SPAN_S / 60:.0f} minutes", style="bold"),
        *(Text(line, no_wrap=True, overflow="crop") for line in minutes),
        Text(f"\n{len(now.clients)} clients", style="bold"),
        *map(Text, clients),
        Text("\nEvents", style="bold"),
        *(
            Text(event_line(event), style=_STYLES.get(event.level, ""))
            for event in events
        ),
    )


_STYLES: Final = {"warning": "yellow", "error": "red", "critical": "bold red"}
