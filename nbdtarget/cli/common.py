# SPDX-License-Identifier: Apache-2.0
"""What several commands share: options, the question to the server, JSON out."""

import errno as errnos
import os
import sys
from pathlib import Path
from typing import Annotated, Final, TypeVar

import msgspec
import typer
from msgspec.structs import replace

from nbdtarget.common.errors import TableError
from nbdtarget.control.client import ControlClient, NoServerError
from nbdtarget.control.messages import (
    Answer,
    Create,
    Deps,
    Info,
    InfoAnswer,
    Measure,
    Request,
    Status,
    Table,
)
from nbdtarget.control.paths import (
    ControlAddress,
    control_address,
    control_token,
    is_control_given,
    known_controls,
    serve_control_path,
)
from nbdtarget.control.servers import default_server, look, server_of

__all__ = [
    "AcceptOtherDisk",
    "Control",
    "Json",
    "Moved",
    "Name",
    "Names",
    "NamesNeeded",
    "Timeout",
    "Uuid",
    "address_for",
    "addresses",
    "ask",
    "caller_directory",
    "command_error",
    "device_names",
    "print_json",
]

A = TypeVar("A", bound=Answer)

# They only tell, and about all devices unless some are named: all servers are asked.
ALL_SERVERS: Final = (Status, Table, Measure, Info, Deps)

Control = Annotated[
    str | None,
    typer.Option(
        "--control",
        metavar="ADDR",
        help="Control socket of the server, a path or tcp:HOST:PORT; default:"
        " $NBDTARGET_CONTROL, else the server in the runtime directory that has the device.",
    ),
]
Moved = Annotated[
    bool,
    typer.Option(
        "--moved",
        help="The disks are those that the metadata names, under other names.",
    ),
]
AcceptOtherDisk = Annotated[
    bool,
    typer.Option(
        "--accept-other-disk",
        help="A disk may be another one than the metadata names: you answer for it.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A mapped device.")]
Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME]...", help="Mapped devices; default: all of them."),
]
NamesNeeded = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME...",
        help="Mapped devices; at least one, or --uuid.",
        show_default=False,
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        min=0,
        help="How long to wait for devices that do not answer; then it fails and the device goes"
        " on as before. Default: 60, 0: for ever.",
    ),
]
Uuid = Annotated[
    str | None,
    typer.Option("--uuid", "-u", metavar="UUID", help="The device of this UUID."),
]


def ask(
    control: str | None,
    verb: str,
    request: Request,
    answer_type: type[A],
    *,
    about: str = "",
) -> A:
    """Ask the server; a failure names the verb and what it was about.

    Raises: NoServerError, TableError.
    """
    try:
        if isinstance(request, ALL_SERVERS) and not is_control_given(control):
            return _ask_all(verb, request, answer_type)
        address = address_for(control, request)
        return ControlClient(address, control_token()).ask(verb, request, answer_type)
    except TableError as error:
        raise command_error(verb, about, error) from error


def address_for(control: str | None, request: Request) -> ControlAddress:
    """The control socket to ask; see `nbdtarget.control.servers`. Raises: NbdTargetError."""
    if is_control_given(control):
        return control_address(control)
    name = None if isinstance(request, Create) else getattr(request, "name", None)
    return default_server() if name is None else server_of(name)


def addresses(control: str | None) -> list[ControlAddress]:
    """All control sockets that may be meant."""
    if is_control_given(control):
        return [control_address(control)]
    return [*known_controls()]


def _ask_all(
    verb: str, request: Status | Table | Measure | Info | Deps, answer_type: type[A]
) -> A:
    """Ask the servers that have the devices, or all, and put their answers together."""
    known = known_controls()
    if len(known) < 2:
        address = known[0] if known else serve_control_path()
        return ControlClient(address).ask(verb, request, answer_type)
    wanted: dict[Path, tuple[str, ...]] = {}
    if request.names:
        for name in request.names:
            path = server_of(name)
            wanted[path] = (*wanted.get(path, ()), name)
    else:
        found = look(known)
        for reason in found.silent.values():
            print(f"nbdtarget: {reason}: left out", file=sys.stderr)
        wanted = dict.fromkeys(found.servers, ())
        if not wanted:
            raise NoServerError(
                f"no server on {serve_control_path()} (start one: nbdtarget serve)"
            )
    answers = [
        ControlClient(path).ask(verb, replace(request, names=names), answer_type)
        for path, names in wanted.items()
    ]
    devices = [device for answer in answers for device in answer.devices]  # type: ignore[attr-defined]
    if request.names:
        order = {
            name.removeprefix("/dev/mapper/"): nr
            for nr, name in enumerate(request.names)
        }
        devices.sort(key=lambda device: order.get(device.name, 0))
    return replace(answers[0], devices=tuple(devices))


def device_names(
    names: list[str] | None, uuid: str | None, control: str | None
) -> tuple[str, ...]:
    """The devices that were named, or the one of the UUID.

    Raises: TableError: no device has the UUID.
    """
    if uuid is None:
        return tuple(names or ())
    if names:
        raise typer.BadParameter("give names or a UUID, not both")
    for device in ask(control, "info", Info(), InfoAnswer).devices:
        if device.uuid == uuid:
            return (device.name,)
    raise TableError(f"UUID {uuid}: Device does not exist", errnos.ENXIO)


def command_error(verb: str, about: str, error: TableError) -> TableError:
    """The same error with the verb, and the device it was about, before it.

    Behind it, what the errno is called: that is what scripts look for.
    """
    subject = f"{verb} {about}".rstrip()
    reason = error.reason
    meaning = os.strerror(error.errno)
    if meaning.lower() not in reason.lower():
        reason = f"{reason} ({meaning})"
    return TableError(f"{subject}: {reason}", error.errno)


def caller_directory() -> str:
    """The directory in which relative paths are meant."""
    return os.getcwd()


def print_json(answer: Answer | Request) -> None:
    """Print one line of JSON."""
    sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
