# SPDX-License-Identifier: Apache-2.0
"""`Figures`: everything that a running server can tell in numbers, at one moment. Metrics, the page and `top` all show these.

Numbers of requests, bytes and times only grow, so that each reader makes rates of them by itself, over any time.
"""

from typing import Annotated

from msgspec import field

from nbdtarget.control.fields import (
    Answer,
    BelowLine,
    Certificate,
    FailureText,
    Losses,
    Name,
    Names,
    Request,
    Uuid,
    told,
)

__all__ = [
    "Bound",
    "ClientFigures",
    "DeviceFigures",
    "Event",
    "Events",
    "EventsAnswer",
    "Figures",
    "FiguresAnswer",
    "Histogram",
    "History",
    "HistoryAnswer",
    "Map",
    "MapAnswer",
    "Moment",
    "OperationFigures",
    "TargetFigures",
]


class Figures(Request):
    """Devices whose figures are asked for; those of the server always come along."""

    names: Names = ()


class OperationFigures(Answer):
    """The requests of clients for one operation since the server was started."""

    nr: Annotated[int, told("Requests that were carried out.")] = 0
    nr_bytes: Annotated[int, told("Bytes of these requests.")] = 0
    time_s: Annotated[float, told("Seconds that they have taken, added up.")] = 0.0
    nr_failed: Annotated[int, told("Requests that were answered with an error.")] = 0


class Histogram(Answer):
    """How long something took."""

    counts: Annotated[
        tuple[int, ...],
        told(
            "How many took at most each of the bounds, and longer than the one before; the last: longer than all."
        ),
    ] = ()
    sum_s: Annotated[float, told("Seconds, added up.")] = 0.0


class TargetFigures(Answer):
    """One target of a live table."""

    start: Annotated[int, told("First sector of the target.")]
    length: Annotated[int, told("Number of sectors of the target.")]
    type: Annotated[str, told("Type of the target.")]
    fields: Annotated[
        dict[str, bool | int | float | str | None],
        told("The fields of the target's status."),
    ]


class DeviceFigures(Answer):
    """One device."""

    name: Name
    uuid: Uuid
    size: Annotated[int, told("Size in bytes.")]
    suspended: Annotated[bool, told("Requests wait until it is resumed.")]
    failed: Annotated[
        bool, told("A bug has stopped it, or its table could not be opened.")
    ]
    failure: FailureText
    event_nr: Annotated[int, told("Number of events so far.")]
    connections: Annotated[int, told("Clients that are attached.")]
    in_flight: Annotated[int, told("Requests of these clients that are in flight.")]
    operations: Annotated[
        dict[str, OperationFigures],
        told("By operation; those that no client has asked for are missing."),
    ]
    targets: Annotated[tuple[TargetFigures, ...], told("Of the live table.")]
    deps: Annotated[
        tuple[str, ...], told("Disks and devices that the live table uses.")
    ]
    below: Annotated[tuple[BelowLine, ...], told("The state of these disks.")]
    losses: Losses
    uncaching: Annotated[
        bool, told("Its cache is being written back, and will be removed.")
    ] = False
    bytes_in_flight: Annotated[
        int,
        told(
            "Memory that requests of its clients, and replies that they have not taken, hold."
        ),
    ] = 0


class ClientFigures(Answer):
    """One connection."""

    peer: Annotated[str, told("Where it comes from.")]
    device: Annotated[
        str, told("Device that it is attached to; empty in the handshake.")
    ]
    identity: Annotated[str, told("Who it has shown to be.")]
    in_flight: Annotated[int, told("Its requests that are in flight.")]
    operations: Annotated[dict[str, OperationFigures], told("By operation.")]


class Bound(Answer):
    """One bound of the server."""

    name: Annotated[str, told("Its name in the configuration file.")]
    maximum: Annotated[
        float, told("The bound: a number, bytes or seconds, as the name says.")
    ]
    used: Annotated[
        int | None,
        told(
            "How much of it is used now; of a bound for each connection, address or export: by the one that uses most of it."
            " Of `connections_max`: the larger number of those from TCP and vsock, and those of unix sockets. null: it is a time, or"
            " a bound for a single request or handshake, or the kernel does not tell."
        ),
    ] = None
    met: Annotated[
        int | None,
        told(
            "How often it was met since the server started: a client was refused, ended or had to wait; null: the kernel does not tell."
        ),
    ] = None


class FiguresAnswer(Answer):
    """All figures."""

    time_s: Annotated[float, told("When these figures were taken, in Unix time.")]
    version: Annotated[str, told("Version of the server.")]
    fast_path: Annotated[bool, told("The compiled fast path is in use.")]
    pid: Annotated[int, told("Process number of the server.")]
    devices: Annotated[tuple[DeviceFigures, ...], told("One for each device.")]
    clients: Annotated[tuple[ClientFigures, ...], told("One for each connection.")]
    bounds: Annotated[tuple[Bound, ...], told("The bounds of the server.")]
    waiting: Annotated[int, told("Connections that wait for a bound.")]
    refused: Annotated[
        int, told("Connections that were closed at once, because of a bound.")
    ]
    operations: Annotated[
        dict[str, OperationFigures],
        told("Of all devices together, those that were removed among them."),
    ]
    latencies: Annotated[dict[str, Histogram], told("Times of requests, by operation.")]
    latency_bounds_s: Annotated[
        tuple[float, ...], told("The bounds of these histograms, in seconds.")
    ]
    loop_lag: Annotated[
        Histogram, told("How late the event loop called what was due once a second.")
    ]
    loop_lag_bounds_s: Annotated[
        tuple[float, ...], told("The bounds of that histogram, in seconds.")
    ]
    certificates: Annotated[
        tuple[Certificate, ...], told("Of the server and its disks.")
    ] = ()
    refusals: Annotated[
        dict[str, int],
        told(
            "Clients that were refused because of who they are, by reason: `certificate`, `no_certificate`, `no_tls`, `tls`, `rules`."
        ),
    ] = field(default_factory=dict)


class Events(Request):
    """Events after a certain one, or the next one."""

    since: Annotated[
        int | None,
        told(
            "Number of the last event that is known; 0: all that are kept; null: none of those that were already."
        ),
    ] = None
    wait_s: Annotated[
        float,
        told(
            "How long to wait for an event, if there is none yet: at most 25 seconds."
        ),
    ] = 0.0


class Event(Answer):
    """One line of the log."""

    nr: Annotated[int, told("Its number.")]
    time_s: Annotated[float, told("When it happened, in Unix time.")]
    level: Annotated[str, told("`info`, `warning`, `error` or `critical`.")]
    device: Annotated[str, told("Device that it is about; empty: another thing.")]
    text: Annotated[str, told("The event in words.")]


class EventsAnswer(Answer):
    """Events, the oldest first."""

    events: Annotated[tuple[Event, ...], told("The events.")]
    last: Annotated[
        int, told("Number of the last event that there was, for the next request.")
    ]
    lost: Annotated[
        int, told("How many events after `since` are not kept any more.")
    ] = 0


class History(Request):
    """A device whose last minutes are asked for."""

    name: Name


class Moment(Answer):
    """The requests of clients up to then, since the server was started."""

    time_s: Annotated[float, told("When, in Unix time.")]
    operations: Annotated[
        dict[str, OperationFigures],
        told("`read`, `write`, `flush` and `discard`, as far as there were any."),
    ]


class HistoryAnswer(Answer):
    """Numbers of the last minutes, which only grow: rates are their differences."""

    period_s: Annotated[float, told("Seconds between two moments.")]
    moments: Annotated[
        tuple[Moment, ...],
        told("The oldest first. None: no client has been attached since then."),
    ]


class Map(Request):
    """A device with a clone or a cache, whose map is asked for."""

    name: Name
    cells: Annotated[
        int, told("Number of cells: 1 to 4096. A small disk has fewer.")
    ] = 1024


class MapAnswer(Answer):
    """The copied parts of a clone, or the cached parts of a disk, from its beginning to its end."""

    states: Annotated[
        tuple[str, ...],
        told(
            "Of a clone `copied`, `source`, `copying`; of a cache `origin`, `cached`, `dirty`."
        ),
    ]
    cell_bytes: Annotated[
        int, told("Bytes that a cell stands for; the last one may be shorter.")
    ]
    cells: Annotated[
        tuple[tuple[int, ...], ...],
        told("Of each cell, how much of it is in which state: parts of 255."),
    ]
    totals: Annotated[tuple[int, ...], told("Bytes of the disk in each state.")]
    is_sampled: Annotated[bool, told("Only the beginning of each cell was looked at.")]
