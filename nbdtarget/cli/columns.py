# SPDX-License-Identifier: Apache-2.0
"""`info -c`: devices in columns, in the form of dmsetup's reports.

A column is as wide as its widest value, and has a minimum width. With `--noheadings` or a
separator nothing is padded, for scripts.
"""

import operator as operators
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from nbdtarget.cli.health import worst_state
from nbdtarget.cli.names import (
    LvmName,
    mangled,
    split_lvm_name,
    subsystem_of,
    unmangled,
)
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control.messages import InfoLine

__all__ = ["FIELDS", "attributes", "describe_fields", "report"]

DEFAULT_FIELDS: Final = "name,major,minor,attr,open,segments,events,uuid"
READ_AHEAD_SECTORS: Final = 256  # what the kernel shows; nothing here reads ahead


class Field(NamedTuple):
    """A column. `value` of a number is right-aligned, and sorts as a number."""

    heading: str
    width: int
    value: Callable[[InfoLine], str | int]
    help: str


def attributes(device: InfoLine) -> str:
    """(L)ive, (I)nactive, (s)uspended, (r)ead-only, read-(w)rite."""
    return (
        ("L" if device.live else "-")
        + ("I" if device.inactive else "-")
        + ("s" if device.state != "ACTIVE" else "-")
        + ("r" if device.read_only else "w")
    )


def _tables(device: InfoLine) -> str:
    if device.live:
        return "Both" if device.inactive else "Live"
    return "Inactive" if device.inactive else "None"


def _of_lvm(part: Callable[[LvmName], str]) -> Callable[[InfoLine], str]:
    """Return a function for a part of the names of devices that LVM made; others have none."""

    def value(device: InfoLine) -> str:
        is_lvms = subsystem_of(device.uuid) == "LVM"
        return part(split_lvm_name(device.name)) if is_lvms else ""

    return value


FIELDS: Final[dict[str, Field]] = {
    "name": Field("Name", 16, lambda d: d.name, "Name of mapped device."),
    "mangled_name": Field(
        "MangledName",
        16,
        lambda d: mangled(d.name),
        "Name in the form for device nodes.",
    ),
    "unmangled_name": Field(
        "UnmangledName", 16, lambda d: unmangled(d.name), "Name with \\xNN replaced."
    ),
    "uuid": Field("UUID", 32, lambda d: d.uuid, "Unique (optional) identifier."),
    "mangled_uuid": Field(
        "MangledUUID",
        32,
        lambda d: mangled(d.uuid),
        "UUID in the form for device nodes.",
    ),
    "unmangled_uuid": Field(
        "UnmangledUUID", 32, lambda d: unmangled(d.uuid), "UUID with \\xNN replaced."
    ),
    "subsystem": Field(
        "Subsys",
        6,
        lambda d: subsystem_of(d.uuid),
        "Userspace subsystem responsible for this device.",
    ),
    "vg_name": Field("VG", 4, _of_lvm(lambda n: n.vg), "LVM Volume Group name."),
    "lv_name": Field("LV", 4, _of_lvm(lambda n: n.lv), "LVM Logical Volume name."),
    "lv_layer": Field("LVLayer", 7, _of_lvm(lambda n: n.layer), "LVM device layer."),
    "read_ahead": Field("RAhead", 6, lambda d: READ_AHEAD_SECTORS, "Read ahead value."),
    "blkdevname": Field(
        "BlkDevName", 16, lambda d: f"dm-{d.minor}", "Name of block device."
    ),
    "attr": Field("Stat", 4, attributes, (attributes.__doc__ or "").rstrip(".")),
    "tables_loaded": Field(
        "Tables", 6, _tables, "Which of the live and inactive slots are filled."
    ),
    "suspended": Field(
        "Suspended",
        9,
        lambda d: "Active" if d.state == "ACTIVE" else "Suspended",
        "Whether the device is suspended.",
    ),
    "readonly": Field(
        "Read-only",
        9,
        lambda d: "Read-only" if d.read_only else "Writeable",
        "Whether the device is read-only or writeable.",
    ),
    "devno": Field(
        "DevNo", 5, lambda d: f"{d.major}:{d.minor}", "Major and minor numbers."
    ),
    "major": Field("Maj", 3, lambda d: d.major, "Major number."),
    "minor": Field("Min", 3, lambda d: d.minor, "Minor number."),
    "open": Field("Open", 4, lambda d: d.open_count, "Number of openers."),
    "segments": Field(
        "Targ", 4, lambda d: d.nr_targets, "Number of targets in the live table."
    ),
    "events": Field("Event", 6, lambda d: d.event_nr, "Number of the latest event."),
    "device_count": Field(
        "#Devs", 5, lambda d: len(d.deps), "Number of devices used by this one."
    ),
    "devs_used": Field(
        "DevNamesUsed",
        16,
        lambda d: ",".join(d.mapped_deps),
        "Names of mapped devices used by this one.",
    ),
    "blkdevs_used": Field(
        "BlkDevNamesUsed",
        16,
        lambda d: ",".join(d.deps),
        "Names of all devices used by this one.",
    ),
    "device_ref_count": Field(
        "#Refs",
        5,
        lambda d: len(d.used_by),
        "Number of mapped devices that use this one.",
    ),
    "names_using_dev": Field(
        "RefNames",
        8,
        lambda d: ",".join(d.used_by),
        "Names of mapped devices that use this one.",
    ),
    "health": Field(
        "Health",
        7,
        lambda d: worst_state(d.below),
        "ok, latched or lost: the worst of the devices below.",
    ),
    "losses": Field(
        "Losses",
        6,
        lambda d: d.losses,
        "How many times unflushed writes may have been lost.",
    ),
    "size": Field("Size", 10, lambda d: d.size, "Size in bytes."),
    "geometry": Field(
        "Geometry",
        8,
        lambda d: "" if d.geometry is None else ",".join(map(str, d.geometry)),
        "Cylinders, heads, sectors and start that `setgeometry' has set.",
    ),
}


def describe_fields() -> str:
    """Return what `-o help` prints."""
    width = max(map(len, FIELDS))
    return "\n".join(
        f"  {name:<{width}} - {field.help}" for name, field in FIELDS.items()
    )


def report(
    devices: Iterable[InfoLine],
    *,
    default_fields: str = DEFAULT_FIELDS,
    fields: str | None = None,
    sort: str | None = None,
    select: str | None = None,
    headings: bool = True,
    name_prefixes: bool = False,
    separator: str | None = None,
) -> list[str]:
    """Return the lines of a report.

    Args:
        fields: separated by commas; a `+` before them adds them to the default ones.
        sort: separated by commas; a `-` before a field reverses it; default: by name.
        select: conditions, `FIELD=VALUE` or with != > < >= <= or =~ (a regular expression), with
            a comma or && between them. Only devices for which all of them hold are printed.
        name_prefixes: write each value as DM_FIELD='value'.
        separator: stands between values, and turns padding off.
    Raises: NbdTargetError: a field is unknown, or a condition cannot be read.
    """
    names = _field_names(fields, default_fields)
    if select is not None:
        conditions = [_condition(text) for text in re.split(r",|&&", select)]
        devices = [each for each in devices if all(holds(each) for holds in conditions)]
    rows = [
        [FIELDS[name].value(device) for name in names]
        for device in _sorted(devices, sort or "name")
    ]
    if name_prefixes:
        cells = [
            [f"DM_{n.upper()}='{v}'" for n, v in zip(names, row, strict=True)]
            for row in rows
        ]
    else:
        cells = [[str(value) for value in row] for row in rows]
    head = [FIELDS[name].heading for name in names]
    if separator is None and not headings:
        separator = ":"
    if name_prefixes:
        separator, headings = " " if separator is None else separator, False
    if separator is not None:
        lines = [separator.join(row) for row in cells]
        return [separator.join(head), *lines] if headings else lines
    return _aligned(names, head, rows, cells)


def _aligned(
    names: Sequence[str],
    head: Sequence[str],
    rows: Sequence[Sequence[str | int]],
    cells: Sequence[Sequence[str]],
) -> list[str]:
    widths = [
        max(FIELDS[name].width, len(head[nr]), *(len(row[nr]) for row in cells), 0)
        for nr, name in enumerate(names)
    ]
    lines = [" ".join(f"{h:<{w}}" for h, w in zip(head, widths, strict=True))]
    for row, texts in zip(rows, cells, strict=True):
        lines.append(
            " ".join(
                f"{text:>{width}}" if isinstance(value, int) else f"{text:<{width}}"
                for value, text, width in zip(row, texts, widths, strict=True)
            )
        )
    return lines


def _field_names(fields: str | None, default: str) -> list[str]:
    if fields is None:
        fields = default
    elif fields.startswith("+"):
        fields = f"{default},{fields[1:]}"
    return [_checked(name.strip()) for name in fields.split(",")]


def _sorted(devices: Iterable[InfoLine], sort: str) -> list[InfoLine]:
    ordered = list(devices)
    for key in reversed(sort.split(",")):
        name = _checked(key.strip().lstrip("+-"))
        ordered.sort(key=FIELDS[name].value, reverse=key.strip().startswith("-"))
    return ordered


def _condition(text: str) -> Callable[[InfoLine], bool]:
    match = re.fullmatch(r"\s*(\w+)\s*(=~|!=|>=|<=|=|>|<)\s*(.*?)\s*", text)
    if match is None:
        raise NbdTargetError(f"info: -S: {text!r} is not FIELD=VALUE")
    name, operator, wanted = match.groups()
    value_of = FIELDS[_checked(name)].value
    wanted = re.sub(r"""(['"])(.*)\1""", r"\2", wanted)
    if operator == "=~":
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise NbdTargetError(f"info: -S: {wanted!r}: {error}") from None
        return lambda device: pattern.search(str(value_of(device))) is not None
    compare = _OPERATORS[operator]

    def holds(device: InfoLine) -> bool:
        value = value_of(device)
        if not isinstance(value, int):
            if operator in ("=", "!="):
                return compare(value, wanted)
            raise NbdTargetError(f"info: -S: {name} is not a number")
        if not wanted.isdecimal():
            raise NbdTargetError(f"info: -S: {wanted!r} is not a number")
        return compare(value, int(wanted))

    return holds


_OPERATORS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "=": operators.eq,
    "!=": operators.ne,
    ">": operators.gt,
    "<": operators.lt,
    ">=": operators.ge,
    "<=": operators.le,
}


def _checked(name: str) -> str:
    if name not in FIELDS:
        raise NbdTargetError(
            f"info: Unrecognised field: {name} (there are: {', '.join(FIELDS)})"
        )
    return name
