# SPDX-License-Identifier: Apache-2.0
"""The messages on the control socket: one request and one answer for each verb.

HTTP over a unix socket, `POST /v1/VERB`, JSON both ways. An answer with status 200 is the
verb's own; any other is a `Failure`. A request with a field that the server does not know
is refused, so that no option is ever silently ignored.

The descriptions of the fields are those of the OpenAPI document. Both sides import this module and nothing
heavier, because a command must start fast.
"""

from typing import Annotated, Final

import msgspec

from nbdtarget.common.permissions import Permission
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
from nbdtarget.control.figures import (
    Events,
    EventsAnswer,
    Figures,
    FiguresAnswer,
    History,
    HistoryAnswer,
    Map,
    MapAnswer,
)

__all__ = [
    "LOOKING_VERBS",
    "READING_VERBS",
    "VERBS",
    "Access",
    "AccessAnswer",
    "Answer",
    "BelowLine",
    "Certificate",
    "Clear",
    "Create",
    "Deps",
    "DeviceDeps",
    "DeviceLines",
    "DevicesAnswer",
    "Done",
    "ExportAccess",
    "Failure",
    "Info",
    "InfoAnswer",
    "InfoLine",
    "LinesAnswer",
    "Load",
    "Measure",
    "Message",
    "MessageAnswer",
    "Remove",
    "RemoveAll",
    "Rename",
    "Request",
    "Resume",
    "SetAccess",
    "SetGeometry",
    "SetUuid",
    "Status",
    "Suspend",
    "Table",
    "TableLine",
    "TargetType",
    "Targets",
    "TargetsAnswer",
    "Uncache",
    "UncacheAnswer",
    "Upgrade",
    "UpgradeAnswer",
    "Version",
    "VersionAnswer",
    "Wait",
    "WaitAnswer",
    "WipeTable",
    "told",
]


TargetTypeName = Annotated[
    str | None,
    told("Type of targets, for example `cache`: only their lines. null: all lines."),
]
TABLE: Final = (
    "The table: one line for each target, separated by newlines. A line is `START LENGTH TYPE"
    " ARGUMENTS...`, with START and LENGTH in sectors of 512 bytes. The first line starts at 0, and"
    " each line starts where the one before it ends. A backslash before a blank keeps it in a word."
)
TableText = Annotated[str, told(TABLE)]
ReadOnly = Annotated[bool, told("Load the table read-only: clients may not write.")]
Directory = Annotated[
    str, told("Absolute directory that relative paths in the table start from.")
]
Permissions = Annotated[
    tuple[Permission, ...],
    told(
        "Actions that are allowed although they would be refused: `overwrite` data on a disk, take a disk that"
        " has `moved`, or an `other-disk` than the one the metadata names."
    ),
]
Timeout = Annotated[
    float | None,
    told(
        "Seconds to wait for disks that do not answer. After that the verb fails with ETIMEDOUT, and the"
        " device goes on as before. 0 waits for ever, null for 60 s."
    ),
]
Inactive = Annotated[bool, told("Answer for the inactive tables, not the live ones.")]


class Failure(Answer):
    """The verb has failed."""

    reason: Annotated[str, told("The reason, in one line.")]
    errno: Annotated[
        int, told("Positive errno, as device-mapper's ioctl would return it.")
    ]


class Done(Answer):
    """The verb has been carried out."""

    busy: Annotated[
        tuple[str, ...],
        told("Names of the devices that `remove_all` did not remove: they are in use."),
    ] = ()


class Create(Request):
    """A new mapped device, which is an export as soon as it has a table."""

    name: Name
    table: Annotated[str | None, told(f"{TABLE} null: a device without a table.")]
    uuid: Uuid = ""
    readonly: ReadOnly = False
    directory: Directory = "/"
    minor: Annotated[int | None, told("Minor number; null: the next free one.")] = None
    permissions: Permissions = ()
    rotational: Annotated[
        bool | None,
        told(
            "Whether clients are told that the disk is rotational; null: as the disks."
        ),
    ] = None
    persist: Annotated[
        bool,
        told("The device is there again after a restart of a server that keeps state."),
    ] = False


class Load(Request):
    """A table for the inactive slot of a device; `resume` makes it live."""

    name: Name
    table: TableText
    readonly: ReadOnly = False
    directory: Directory = "/"
    permissions: Permissions = ()
    keep_open: Annotated[
        bool,
        told(
            "A name under which the live table has a disk open means that open disk, also for"
            " `memory:SIZE`. If the name means another disk by now, the table is refused."
        ),
    ] = False


class Clear(Request):
    """A device whose inactive table is dropped."""

    name: Name


class Suspend(Request):
    """A device that is suspended: requests wait until it is resumed."""

    name: Name
    noflush: Annotated[
        bool,
        told("Do not flush; requests that are queued are sent to the next table."),
    ] = False
    timeout_s: Timeout = None


class Resume(Request):
    """A device that is resumed. An inactive table becomes live first."""

    name: Name
    timeout_s: Timeout = None


class Remove(Request):
    """A device that is removed."""

    name: Name
    force: Annotated[
        bool, told("First replace the table by one that fails all I/O.")
    ] = False
    deferred: Annotated[
        bool, told("If the device is in use, remove it as soon as it is not.")
    ] = False
    timeout_s: Timeout = None


class RemoveAll(Request):
    """All devices that are not in use are removed."""

    force: Annotated[
        bool, told("First replace each table by one that fails all I/O.")
    ] = False
    timeout_s: Timeout = None


class Rename(Request):
    """A device that gets another name."""

    name: Name
    new_name: Annotated[str, told("The new name.")]


class SetUuid(Request):
    """A device that has no UUID, and gets one."""

    name: Name
    uuid: Uuid


class SetGeometry(Request):
    """A disk geometry for a device. NBD clients are not told."""

    name: Name
    cylinders: Annotated[int, told("Number of cylinders.")]
    heads: Annotated[int, told("Number of heads.")]
    sectors: Annotated[int, told("Number of sectors of a track.")]
    start: Annotated[
        int, told("First sector of the device, on the disk that it is a part of.")
    ]


class WipeTable(Request):
    """A device whose table is replaced by one that fails all I/O."""

    name: Name
    timeout_s: Timeout = None


class Message(Request):
    """A message to a target. An unknown one is refused with a list of those that the target takes."""

    name: Name
    sector: Annotated[
        int,
        told("A sector of the device, which selects the target: 0 for the first line."),
    ]
    words: Annotated[
        tuple[str, ...], told("The message, for example `migration_rate` and `10M`.")
    ]


class MessageAnswer(Answer):
    """The answer of the target."""

    text: Annotated[
        str | None, told("The answer of the target, which may have lines; null: none.")
    ]


class Wait(Request):
    """A device whose next event is waited for. The answer may take any time."""

    name: Name
    event_nr: Annotated[
        int | None,
        told("Wait until the event number is not this one; null: the present one."),
    ] = None


class WaitAnswer(Answer):
    """There was an event."""

    event_nr: Annotated[int, told("The event number by now.")]


class Status(Request):
    """Devices whose status is asked for."""

    names: Names = ()
    target: TargetTypeName = None
    noflush: Annotated[bool, told("Do not have the targets commit first.")] = False


class Table(Request):
    """Devices whose tables are asked for."""

    names: Names = ()
    target: TargetTypeName = None
    inactive: Inactive = False


class Measure(Request):
    """Devices for whose tables it is asked what the kernel would measure for IMA."""

    names: Names = ()
    target: TargetTypeName = None
    inactive: Inactive = False


class TableLine(Answer):
    """One target of a table."""

    start: Annotated[int, told("First sector of the target; a sector has 512 bytes.")]
    length: Annotated[int, told("Number of sectors of the target.")]
    type: Annotated[str, told("Type of the target, for example `clone`.")]
    params: Annotated[
        str,
        told(
            "The words after the type, as device-mapper prints them: the arguments of a table, or the words of"
            " a status."
        ),
    ]
    fields: Annotated[
        dict[str, bool | int | float | str | None],
        told(
            "Of a status: what the target says, by name and with units. Which fields there are depends on"
            " `type`."
        ),
    ] = msgspec.field(default_factory=dict)


class DeviceLines(Answer):
    """The lines of one device."""

    name: Name
    lines: Annotated[tuple[TableLine, ...], told("One for each target, in order.")]
    failure: FailureText = ""
    below: Annotated[
        tuple[BelowLine, ...], told("Of a status: the disks that the live table uses.")
    ] = ()
    losses: Losses = 0


class LinesAnswer(Answer):
    """Lines of tables."""

    devices: Annotated[tuple[DeviceLines, ...], told("One for each device.")]
    certificates: Annotated[
        tuple[Certificate, ...],
        told("Of a status: the certificates that the server shows to NBD clients."),
    ] = ()


class Info(Request):
    """Devices about which everything but their tables is asked for."""

    names: Names = ()
    target: Annotated[
        str | None,
        told(
            "Type of targets: only devices that have such a target. null: all devices."
        ),
    ] = None


class InfoLine(Answer):
    """One device."""

    name: Name
    uuid: Uuid
    state: Annotated[str, told("`ACTIVE` or `SUSPENDED`.")]
    read_only: Annotated[bool, told("Clients may not write.")]
    failed: Annotated[
        bool, told("A bug has stopped the device; the log of the server says which.")
    ]
    live: Annotated[bool, told("The device has a live table.")]
    inactive: Annotated[bool, told("The device has an inactive table.")]
    open_count: Annotated[
        int, told("How many NBD connections and tables of other devices use it.")
    ]
    event_nr: Annotated[int, told("Number of events so far.")]
    major: Annotated[int, told("Major number.")]
    minor: Annotated[int, told("Minor number.")]
    nr_targets: Annotated[int, told("Number of targets of the live table.")]
    size: Annotated[int, told("Size in bytes.")]
    deps: Annotated[
        tuple[str, ...], told("Names of the disks and devices of the live table.")
    ] = ()
    mapped_deps: Annotated[
        tuple[str, ...], told("Names of those of `deps` that are mapped devices.")
    ] = ()
    used_by: Annotated[
        tuple[str, ...], told("Mapped devices whose live tables use this one.")
    ] = ()
    deferred_remove: Annotated[
        bool, told("It will be removed when it is not in use any more.")
    ] = False
    failure: FailureText = ""
    below: Annotated[
        tuple[BelowLine, ...],
        told("The disks that the live table uses, directly or through other tables."),
    ] = ()
    losses: Losses = 0
    rotational: Annotated[bool, told("Clients are told that the disk has to seek.")] = (
        False
    )
    said_rotational: Annotated[
        bool | None,
        told("The user's own setting; null: it is as the disks below are."),
    ] = None
    geometry: Annotated[
        tuple[int, int, int, int] | None,
        told("Cylinders, heads, sectors and start, if `set_geometry` has set them."),
    ] = None


class InfoAnswer(Answer):
    """Devices."""

    devices: Annotated[tuple[InfoLine, ...], told("One for each device.")]


class Deps(Request):
    """Devices for whose live tables it is asked which disks they use."""

    names: Names = ()


class DeviceDeps(Answer):
    """The disks that one live table uses."""

    name: Name
    deps: Annotated[tuple[str, ...], told("Names of disks and mapped devices.")]


class DevicesAnswer(Answer):
    """The disks that the live tables use."""

    devices: Annotated[tuple[DeviceDeps, ...], told("One for each device.")]


class Access(Request):
    """A request without fields."""


class ExportAccess(Answer):
    """The rules of one export."""

    name: Name
    rules: Annotated[
        tuple[str, ...] | None,
        told("The first rule that holds decides. null: everybody may read and write."),
    ]


class AccessAnswer(Answer):
    """The rules of all exports: which clients may attach to them."""

    exports: Annotated[
        tuple[ExportAccess, ...],
        told("One for each export that there is, or that has rules."),
    ]
    default: Annotated[
        tuple[str, ...] | None,
        told(
            "Rules of exports that have none of their own. null: everybody may read and write."
        ),
    ] = None


class SetAccess(Request):
    """The rules of an export, whether it exists already or not."""

    name: Name
    rules: Annotated[
        tuple[str, ...] | None,
        told(
            "For example `rw cert:alice`. null: the rules of the configuration file hold again."
        ),
    ] = None


class Targets(Request):
    """A request without fields."""


class TargetType(Answer):
    """One type of targets."""

    name: Annotated[str, told("Name of the type.")]
    version: Annotated[tuple[int, int, int], told("Major, minor and patch.")]


class TargetsAnswer(Answer):
    """The types of targets that the server has."""

    targets: Annotated[tuple[TargetType, ...], told("One for each type.")]


class Uncache(Request):
    """A device whose cache is written back and removed, while clients go on. The answer comes when that is done."""

    name: Name
    stop: Annotated[
        bool,
        told(
            "Stop a request that is being carried out: the cache stays in service, and writes back what is dirty."
        ),
    ] = False


class UncacheAnswer(Answer):
    """The job has ended, or was told to end."""

    is_done: Annotated[bool, told("The origin alone is the disk now.")]
    text: Annotated[str, told("The same in words.")]


class Upgrade(Request):
    """A request without fields."""


class UpgradeAnswer(Answer):
    """The new process serves now."""

    pid: Annotated[int, told("Process number of the new process.")]


class Version(Request):
    """A request without fields."""


class VersionAnswer(Answer):
    """The version and the addresses of the server."""

    version: Annotated[str, told("Version of the server.")]
    pid: Annotated[int, told("Process number of the server.")]
    uris: Annotated[
        tuple[str, ...],
        told("Where clients connect: NBD URIs with `{name}` for an export's name."),
    ] = ()


VERBS: Final[dict[str, tuple[type[Request], type[Answer]]]] = {
    "access": (Access, AccessAnswer),
    "clear": (Clear, Done),
    "create": (Create, Done),
    "deps": (Deps, DevicesAnswer),
    "events": (Events, EventsAnswer),
    "figures": (Figures, FiguresAnswer),
    "history": (History, HistoryAnswer),
    "info": (Info, InfoAnswer),
    "load": (Load, Done),
    "map": (Map, MapAnswer),
    "measure": (Measure, LinesAnswer),
    "message": (Message, MessageAnswer),
    "remove": (Remove, Done),
    "remove_all": (RemoveAll, Done),
    "rename": (Rename, Done),
    "resume": (Resume, Done),
    "set_access": (SetAccess, Done),
    "set_geometry": (SetGeometry, Done),
    "set_uuid": (SetUuid, Done),
    "status": (Status, LinesAnswer),
    "suspend": (Suspend, Done),
    "table": (Table, LinesAnswer),
    "targets": (Targets, TargetsAnswer),
    "uncache": (Uncache, UncacheAnswer),
    "upgrade": (Upgrade, UpgradeAnswer),
    "version": (Version, VersionAnswer),
    "wait": (Wait, WaitAnswer),
    "wipe_table": (WipeTable, Done),
}

# These verbs change nothing, and all fields of their requests have defaults.
READING_VERBS: Final = (
    "access",
    "deps",
    "figures",
    "info",
    "measure",
    "status",
    "table",
    "targets",
    "version",
)

# Those that change nothing: what a client may do that may only look.
LOOKING_VERBS: Final = frozenset({*READING_VERBS, "events", "history", "map", "wait"})
