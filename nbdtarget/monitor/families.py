# SPDX-License-Identifier: Apache-2.0
"""Every metric: its name, its type, its labels, what it means, and where in the figures its value stands.

The names are those of Prometheus' own node_exporter where it has the same thing (`node_disk_reads_completed_total` is
`nbdtarget_disk_reads_completed_total` here), so that panels made for it need nothing but the other prefix. Units are seconds and bytes; what only
grows ends in `_total`. There are no ratios: a reader makes them, over any time.

docs/reference/metrics.md has the same list; a test holds the two together.
"""

from collections.abc import Callable
from typing import Final

from nbdtarget.common.units import SECTOR
from nbdtarget.control.fields import BelowLine, Remote
from nbdtarget.control.figures import (
    DeviceFigures,
    FiguresAnswer,
    Histogram,
    OperationFigures,
)
from nbdtarget.monitor.family import COUNTER, GAUGE, HISTOGRAM, Family, Rows
from nbdtarget.monitor.groups import UP, Column, Groups
from nbdtarget.monitor.target_families import TARGET

__all__ = ["DEVICE", "FAMILIES", "SERVER", "TARGET"]

# ---- of the server ----


def _one(value: Callable[[FiguresAnswer], float]) -> Callable[[Groups], Rows]:
    def rows(groups: Groups) -> Rows:
        yield "", (), value(groups.figures)

    return rows


def _by_operation(
    value: Callable[[OperationFigures], float],
) -> Callable[[Groups], Rows]:
    def rows(groups: Groups) -> Rows:
        for name, operation in groups.figures.operations.items():
            yield "", (name,), value(operation)

    return rows


def _build(groups: Groups) -> Rows:
    yield "", (groups.figures.version, "yes" if groups.figures.fast_path else "no"), 1


def _limits(groups: Groups) -> Rows:
    for bound in groups.figures.bounds:
        yield "", (bound.name,), bound.maximum


def _limits_met(groups: Groups) -> Rows:
    for bound in groups.figures.bounds:
        if bound.met is not None:
            yield "", (bound.name,), bound.met


def _limits_used(groups: Groups) -> Rows:
    for bound in groups.figures.bounds:
        if bound.used is not None:
            yield "", (bound.name,), bound.used


def _used(name: str) -> Callable[[Groups], Rows]:
    def rows(groups: Groups) -> Rows:
        for bound in groups.figures.bounds:
            if bound.name == name and bound.used is not None:
                yield "", (), bound.used

    return rows


def _histogram(
    labels: tuple[str, ...], histogram: Histogram, bounds_s: tuple[float, ...]
) -> Rows:
    total = 0
    for nr, bound in zip(histogram.counts, (*bounds_s, "+Inf"), strict=True):
        total += nr
        yield "_bucket", (*labels, str(bound)), total
    yield "_sum", labels, histogram.sum_s
    yield "_count", labels, total


def _durations(groups: Groups) -> Rows:
    for name, histogram in groups.figures.latencies.items():
        yield from _histogram((name,), histogram, groups.figures.latency_bounds_s)


def _lag(groups: Groups) -> Rows:
    yield from _histogram((), groups.figures.loop_lag, groups.figures.loop_lag_bounds_s)


def _certificates(groups: Groups) -> Rows:
    for each in groups.figures.certificates:
        yield "", (each.path,), each.expires_s


def _refusals(groups: Groups) -> Rows:
    for reason, nr in groups.figures.refusals.items():
        yield "", (reason,), nr


SERVER: Final = (
    Family(
        "nbdtarget_build_info",
        GAUGE,
        "Version of the server, and whether the compiled fast path is in use. The value is 1.",
        ("version", "fast_path"),
        _build,
    ),
    Family(
        "nbdtarget_devices",
        GAUGE,
        "Mapped devices.",
        rows=_one(lambda it: len(it.devices)),
    ),
    Family(
        "nbdtarget_devices_failed",
        GAUGE,
        "Mapped devices that do not serve: a bug has stopped them, or their table could not be opened.",
        rows=_one(lambda it: sum(device.failed for device in it.devices)),
    ),
    Family(
        "nbdtarget_connections",
        GAUGE,
        "Connections of NBD clients.",
        rows=_one(lambda it: len(it.clients)),
    ),
    Family(
        "nbdtarget_connections_refused_total",
        COUNTER,
        "Connections that were closed at once, because of a bound.",
        rows=_one(lambda it: it.refused),
    ),
    Family(
        "nbdtarget_clients_refused_total",
        COUNTER,
        "Clients that were refused because of their certificate, because they showed none, because they do not use TLS, because the handshake of TLS failed, or by the rules of an export.",
        ("reason",),
        _refusals,
    ),
    Family(
        "nbdtarget_connections_waiting",
        GAUGE,
        "Connections that wait until others have ended requests, because of a bound.",
        rows=_one(lambda it: it.waiting),
    ),
    Family(
        "nbdtarget_requests_in_flight",
        GAUGE,
        "Requests of clients that are in flight.",
        rows=_used("requests_total_max"),
    ),
    Family(
        "nbdtarget_request_memory_bytes",
        GAUGE,
        "Memory that requests in flight, and replies that clients have not taken, hold.",
        rows=_used("bytes_total_max"),
    ),
    Family(
        "nbdtarget_limit",
        GAUGE,
        "The bounds of the server, by their names in the configuration file; bytes or seconds where the name says so.",
        ("bound",),
        _limits,
    ),
    Family(
        "nbdtarget_limit_used",
        GAUGE,
        "How much of a bound is used; of one for each connection, address or export: by the one that uses most of it.",
        ("bound",),
        _limits_used,
    ),
    Family(
        "nbdtarget_limit_met_total",
        COUNTER,
        "How often a bound of the server was met: a client was refused, ended or had to wait because of it.",
        ("bound",),
        _limits_met,
    ),
    Family(
        "nbdtarget_request_bytes_total",
        COUNTER,
        "Bytes of requests that were carried out, of all devices.",
        ("operation",),
        _by_operation(lambda it: it.nr_bytes),
    ),
    Family(
        "nbdtarget_request_errors_total",
        COUNTER,
        "Requests that were answered with an error, of all devices.",
        ("operation",),
        _by_operation(lambda it: it.nr_failed),
    ),
    Family(
        "nbdtarget_request_duration_seconds",
        HISTOGRAM,
        "Time of a request of any device, from its receipt to its reply.",
        ("operation",),
        _durations,
    ),
    Family(
        "nbdtarget_event_loop_lag_seconds",
        HISTOGRAM,
        "How late the event loop called what was due once a second.",
        rows=_lag,
    ),
    Family(
        "nbdtarget_certificate_expiry_timestamp_seconds",
        GAUGE,
        "Until when everything in a file of certificates, or of withdrawn ones, is valid that the server or one of its disks uses, in Unix time.",
        ("file",),
        _certificates,
    ),
)

# ---- of devices ----


def _of(
    value: Callable[[DeviceFigures], float],
) -> Callable[[Groups], Column]:
    return lambda groups: groups.devices.column(value)


def _io(
    operation: str, value: Callable[[OperationFigures], float]
) -> Callable[[Groups], Column]:
    """Only devices that a client was attached to have such a value."""
    return lambda groups: groups.operation(operation).column(value)


def _lower(
    value: Callable[[BelowLine], float],
) -> Callable[[Groups], Column]:
    return lambda groups: groups.lower_disks.column(value)


def _remote(value: Callable[[Remote], float]) -> Callable[[Groups], Column]:
    return lambda groups: groups.remote_disks.column(value)


def _errors(groups: Groups) -> Rows:
    for device in groups.figures.devices:
        for name, operation in device.operations.items():
            if operation.nr_failed:
                yield "", (device.name, name), operation.nr_failed


def _disk_errors(groups: Groups) -> Rows:
    disks = groups.lower_disks
    for keys, disk in zip(disks.keys, disks.things, strict=True):
        for operation, nr in disk.errors.items():
            yield "", (*keys, operation), nr


def _device(
    name: str,
    kind: str,
    text: str,
    column: Callable[[Groups], Column],
    *labels: str,
) -> Family:
    return Family(name, kind, text, ("device", *labels), column=column)


def _disk(
    name: str, text: str, operation: str, value: Callable[[OperationFigures], float]
) -> Family:
    return _device(f"nbdtarget_disk_{name}", COUNTER, text, _io(operation, value))


DEVICE: Final = (
    _device(
        "nbdtarget_device_info",
        GAUGE,
        "UUID of a device, and the types of its targets. The value is 1.",
        lambda groups: groups.infos.column(lambda _: 1),
        "uuid",
        "targets",
    ),
    _device(
        "nbdtarget_device_size_bytes",
        GAUGE,
        "Size of a device.",
        _of(lambda it: it.size),
    ),
    _device(
        "nbdtarget_device_failed",
        GAUGE,
        "1: the device does not serve, because a bug has stopped it or its table could not be opened.",
        _of(lambda it: it.failed),
    ),
    _device(
        "nbdtarget_device_suspended",
        GAUGE,
        "1: requests wait until the device is resumed.",
        _of(lambda it: it.suspended),
    ),
    _device(
        "nbdtarget_device_connections",
        GAUGE,
        "Clients that are attached to a device.",
        _of(lambda it: it.connections),
    ),
    _device(
        "nbdtarget_device_events_total",
        COUNTER,
        "Events of a device: a clone is complete, a disk has failed or came back, a commit failed.",
        _of(lambda it: it.event_nr),
    ),
    _device(
        "nbdtarget_device_losses_total",
        COUNTER,
        "How many times writes that were not flushed yet may have been lost.",
        _of(lambda it: it.losses),
    ),
    _device(
        "nbdtarget_disk_io_now",
        GAUGE,
        "Requests of clients that are in flight.",
        _of(lambda it: it.in_flight),
    ),
    _device(
        "nbdtarget_device_request_memory_bytes",
        GAUGE,
        "Memory that requests of a device's clients, and replies that they have not taken, hold.",
        _of(lambda it: it.bytes_in_flight),
    ),
    _disk("reads_completed_total", "Reads of clients.", "read", lambda it: it.nr),
    _disk(
        "read_bytes_total",
        "Bytes that clients have read.",
        "read",
        lambda it: it.nr_bytes,
    ),
    _disk(
        "read_time_seconds_total",
        "Time that the reads of clients have taken, added up.",
        "read",
        lambda it: it.time_s,
    ),
    _disk("writes_completed_total", "Writes of clients.", "write", lambda it: it.nr),
    _disk(
        "written_bytes_total",
        "Bytes that clients have written.",
        "write",
        lambda it: it.nr_bytes,
    ),
    _disk(
        "write_time_seconds_total",
        "Time that the writes of clients have taken, added up.",
        "write",
        lambda it: it.time_s,
    ),
    _disk("flush_requests_total", "Flushes of clients.", "flush", lambda it: it.nr),
    _disk(
        "flush_requests_time_seconds_total",
        "Time that the flushes of clients have taken, added up.",
        "flush",
        lambda it: it.time_s,
    ),
    _disk(
        "discards_completed_total", "Discards of clients.", "discard", lambda it: it.nr
    ),
    _disk(
        "discarded_sectors_total",
        "Sectors of 512 bytes that clients have discarded.",
        "discard",
        lambda it: it.nr_bytes // SECTOR,
    ),
    _disk(
        "discard_time_seconds_total",
        "Time that the discards of clients have taken, added up.",
        "discard",
        lambda it: it.time_s,
    ),
    _disk(
        "zeroes_completed_total",
        "Requests of clients to write zeroes.",
        "write_zeroes",
        lambda it: it.nr,
    ),
    _disk(
        "zeroed_bytes_total",
        "Bytes that clients have had zeroed.",
        "write_zeroes",
        lambda it: it.nr_bytes,
    ),
    Family(
        "nbdtarget_disk_request_errors_total",
        COUNTER,
        "Requests of clients that were answered with an error.",
        ("device", "operation"),
        _errors,
    ),
    _device(
        "nbdtarget_lower_disk_up",
        GAUGE,
        "0: a disk that the device stands on has failed a write or a flush, or does not answer.",
        _lower(lambda it: it.state == UP),
        "disk",
    ),
    Family(
        "nbdtarget_lower_disk_errors_total",
        COUNTER,
        "Requests that such a disk has failed since it was opened.",
        ("device", "disk", "operation"),
        _disk_errors,
    ),
    _device(
        "nbdtarget_lower_disk_requests_total",
        COUNTER,
        "Requests that were sent for such a disk, if it is one of another machine.",
        _remote(lambda it: it.requests),
        "disk",
    ),
    _device(
        "nbdtarget_lower_disk_retries_total",
        COUNTER,
        "Requests for it that had to be sent again; of an NBD server, attempts to connect again.",
        _remote(lambda it: it.retries),
        "disk",
    ),
    _device(
        "nbdtarget_lower_disk_received_bytes_total",
        COUNTER,
        "Bytes of it that have come.",
        _remote(lambda it: it.received_bytes),
        "disk",
    ),
    _device(
        "nbdtarget_lower_disk_away_seconds_total",
        COUNTER,
        "Time that it has not answered, added up.",
        _remote(lambda it: it.away_s),
        "disk",
    ),
)

FAMILIES: Final = (*SERVER, *DEVICE, *TARGET)
