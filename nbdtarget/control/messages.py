# SPDX-License-Identifier: Apache-2.0
"""What goes over the control socket: one request and one answer for each verb.

HTTP over a unix socket, `POST /v1/VERB`, JSON both ways. An answer with status 200 is the
verb's own; any other is a `Failure`. A request that the server does not know in all its
fields is refused, so that no option is ever silently ignored.

Both sides import this and nothing heavier: a command must start fast.
"""

from typing import Final

import msgspec

from nbdtarget.common.permissions import Permission

__all__ = [
    "READING_VERBS",
    "VERBS",
    "Answer",
    "BelowLine",
    "Clear",
    "Create",
    "Deps",
    "DeviceDeps",
    "DeviceLines",
    "DevicesAnswer",
    "Done",
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
    "SetGeometry",
    "SetUuid",
    "Status",
    "Suspend",
    "Table",
    "TableLine",
    "TargetType",
    "Targets",
    "TargetsAnswer",
    "Version",
    "VersionAnswer",
    "Wait",
    "WaitAnswer",
    "WipeTable",
]


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What a verb is given."""


class Answer(msgspec.Struct):
    """What a verb gives back. New fields need defaults: an old client skips them."""


class Failure(Answer):
    """The verb failed; `errno` is what the ioctl would have returned, positive."""

    reason: str
    errno: int


class Done(Answer):
    """Nothing to say. `busy` names devices that remove_all had to leave."""

    busy: tuple[str, ...] = ()


class Create(Request):
    """`table` None: a device without a table. `directory`: where relative paths are meant.

    `permissions`: what would be refused and is allowed, see `nbdtarget.common.permissions`.
    `rotational`: whether clients are told that the disk has to seek; null: as the disks below are.
    """

    name: str
    table: str | None
    uuid: str = ""
    readonly: bool = False
    directory: str = "/"
    minor: int | None = None
    permissions: tuple[Permission, ...] = ()
    rotational: bool | None = None


class Load(Request):
    """As `Create`, into the inactive slot.

    `keep_open`: a name under which the live table has a disk open means that open disk, also
    `memory:SIZE`; if it is the name of another disk by now, the table is refused.
    """

    name: str
    table: str
    readonly: bool = False
    directory: str = "/"
    permissions: tuple[Permission, ...] = ()
    keep_open: bool = False


class Clear(Request):
    name: str


class Suspend(Request):
    """`timeout_s`: how long to wait for devices below that do not answer; 0: for ever; None: a minute.

    If they do not answer, it fails with ETIMEDOUT, and the device goes on as before. So do the
    other verbs with a `timeout_s`.
    """

    name: str
    noflush: bool = False
    timeout_s: float | None = None


class Resume(Request):
    """`timeout_s`: as of `Suspend`, for the table that is live before."""

    name: str
    timeout_s: float | None = None


class Remove(Request):
    """`deferred`: if it is held open, when nobody holds it any more."""

    name: str
    force: bool = False
    deferred: bool = False
    timeout_s: float | None = None


class RemoveAll(Request):
    force: bool = False
    timeout_s: float | None = None


class Rename(Request):
    name: str
    new_name: str


class SetUuid(Request):
    """Once, for a device that has none."""

    name: str
    uuid: str


class SetGeometry(Request):
    """`start`: the first sector, on the disk that it is a part of. NBD clients are not told."""

    name: str
    cylinders: int
    heads: int
    sectors: int
    start: int


class WipeTable(Request):
    name: str
    timeout_s: float | None = None


class Message(Request):
    name: str
    sector: int
    words: tuple[str, ...]


class MessageAnswer(Answer):
    text: str | None


class Wait(Request):
    """`event_nr` None: the present one."""

    name: str
    event_nr: int | None = None


class WaitAnswer(Answer):
    event_nr: int


class Status(Request):
    """No names: all devices. `target`: only lines of that type."""

    names: tuple[str, ...] = ()
    target: str | None = None
    noflush: bool = False


class Table(Request):
    """As `Status`; `inactive`: the other slot."""

    names: tuple[str, ...] = ()
    target: str | None = None
    inactive: bool = False


class Measure(Request):
    """As `Table`."""

    names: tuple[str, ...] = ()
    target: str | None = None
    inactive: bool = False


class TableLine(Answer):
    """One target. `start` and `length` in sectors; `params` is what follows the type.

    `fields`, of a status: what the target tells by name; the kernel's words may not have it all.
    """

    start: int
    length: int
    type: str
    params: str
    fields: dict[str, bool | int | float | str | None] = {}


class BelowLine(Answer):
    """One device that a live table stands on, however many tables lie between.

    `state` "ok"; "latched": a write or a flush failed, and no FLUSH succeeds until it is opened
    again; "lost": it does not answer any more. `errno` and `since_s` (Unix time) of the latter two.
    `errors`: how many requests have failed since it was opened, by operation; `last_error`: the last
    one of them. `losses`: how often writes that were not flushed yet may have been lost.
    """

    name: str
    state: str = "ok"
    errno: int = 0
    since_s: float = 0.0
    errors: dict[str, int] = {}
    last_error: str = ""
    losses: int = 0


class DeviceLines(Answer):
    """`failure`: why the device has no table although it is meant to have one, or "".

    `below`, `losses`, of a status: as of `InfoLine`.
    """

    name: str
    lines: tuple[TableLine, ...]
    failure: str = ""
    below: tuple[BelowLine, ...] = ()
    losses: int = 0


class LinesAnswer(Answer):
    devices: tuple[DeviceLines, ...]


class Info(Request):
    """No names: all devices. `target`: only devices with a target of that type."""

    names: tuple[str, ...] = ()
    target: str | None = None


class InfoLine(Answer):
    """One device. `size` in bytes; `failed`: a bug stopped it, see the server's log.

    `deps` are the devices that the live table stands on, `mapped_deps` those of them that are
    mapped devices, by their names; `used_by`: mapped devices whose live table stands on it.
    `failure`: why it has no table although it is meant to have one, or "".
    `below`: the devices that the live table stands on in the end. `losses`: how often clients'
    writes that were not flushed yet may have been lost; the next FLUSH of each has said so.
    `rotational`: what clients are told; `said_rotational`: if it is not what the disks below are.
    `geometry`: cylinders, heads, sectors and start sector, if `set_geometry` gave it one.
    """

    name: str
    uuid: str
    state: str
    read_only: bool
    failed: bool
    live: bool
    inactive: bool
    open_count: int
    event_nr: int
    major: int
    minor: int
    nr_targets: int
    size: int
    deps: tuple[str, ...] = ()
    mapped_deps: tuple[str, ...] = ()
    used_by: tuple[str, ...] = ()
    deferred_remove: bool = False
    failure: str = ""
    below: tuple[BelowLine, ...] = ()
    losses: int = 0
    rotational: bool = False
    said_rotational: bool | None = None
    geometry: tuple[int, int, int, int] | None = None


class InfoAnswer(Answer):
    devices: tuple[InfoLine, ...]


class Deps(Request):
    names: tuple[str, ...] = ()


class DeviceDeps(Answer):
    name: str
    deps: tuple[str, ...]


class DevicesAnswer(Answer):
    devices: tuple[DeviceDeps, ...]


class Targets(Request):
    pass


class TargetType(Answer):
    name: str
    version: tuple[int, int, int]


class TargetsAnswer(Answer):
    targets: tuple[TargetType, ...]


class Version(Request):
    pass


class VersionAnswer(Answer):
    """`uris`: where the server's exports are."""

    version: str
    pid: int
    uris: tuple[str, ...] = ()


VERBS: Final[dict[str, tuple[type[Request], type[Answer]]]] = {
    "clear": (Clear, Done),
    "create": (Create, Done),
    "deps": (Deps, DevicesAnswer),
    "info": (Info, InfoAnswer),
    "load": (Load, Done),
    "measure": (Measure, LinesAnswer),
    "message": (Message, MessageAnswer),
    "remove": (Remove, Done),
    "remove_all": (RemoveAll, Done),
    "rename": (Rename, Done),
    "resume": (Resume, Done),
    "set_geometry": (SetGeometry, Done),
    "set_uuid": (SetUuid, Done),
    "status": (Status, LinesAnswer),
    "suspend": (Suspend, Done),
    "table": (Table, LinesAnswer),
    "targets": (Targets, TargetsAnswer),
    "version": (Version, VersionAnswer),
    "wait": (Wait, WaitAnswer),
    "wipe_table": (WipeTable, Done),
}

# They change nothing, and all of their requests' fields have defaults.
READING_VERBS: Final = (
    "deps",
    "info",
    "measure",
    "status",
    "table",
    "targets",
    "version",
)
