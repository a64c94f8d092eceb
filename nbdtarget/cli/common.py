# SPDX-License-Identifier: Apache-2.0
"""Shared by several commands: options, the request to the server, printing JSON."""

import errno as errnos
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec
import typer
from msgspec.structs import replace

from nbdtarget.common.errors import TableError
from nbdtarget.control.client import ControlClient, no_server
from nbdtarget.control.figures import Figures
from nbdtarget.control.messages import (
    Answer,
    Create,
    Deps,
    Info,
    InfoAnswer,
    LinesAnswer,
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
    "Verbose",
    "address_for",
    "addresses",
    "ask",
    "caller_directory",
    "command_error",
    "device_names",
    "print_json",
]

A = TypeVar("A", bound=Answer)

# These requests change nothing and are about all devices unless some are named: all servers are asked.
ALL_SERVERS: Final = (Status, Table, Measure, Info, Deps, Figures)

Control = Annotated[
    str | None,
    typer.Option(
        "--control",
        metavar="ADDR",
        help="Control socket of the server: a path or tcp:HOST:PORT. Default: $NBDTARGET_CONTROL,"
        " else a socket in the runtime directory (control.sock of `serve', control/NAME.sock of"
        " the others).",
    ),
]
Moved = Annotated[
    bool,
    typer.Option(
        "--moved",
        help="Accept that the disks have other names than the metadata says; they must be the same disks.",
    ),
]
AcceptOtherDisk = Annotated[
    bool,
    typer.Option(
        "--accept-other-disk",
        help="Accept a disk that is not the one the metadata names, or that cannot be recognised."
        " With the wrong disk, data is lost.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Log what happens, on stderr.")
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a mapped device.")]
Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME]...", help="Names of mapped devices; default: all of them."
    ),
]
NamesNeeded = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME...",
        help="Names of mapped devices: at least one, or --uuid.",
        show_default=False,
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        min=0,
        help="Time to wait for disks that do not answer. After it the command fails, and the device"
        " goes on as before. 0 waits for ever. Default: 60.",
    ),
]
Uuid = Annotated[
    str | None,
    typer.Option("--uuid", "-u", metavar="UUID", help="The device with this UUID."),
]


def ask(
    control: str | None,
    verb: str,
    request: Request,
    answer_type: type[A],
    *,
    about: str = "",
    command: str = "",
) -> A:
    """Ask the server. A failure names the command that was typed, and the device.

    Args: command: its words, if it is not called as the verb is.
    Raises: NoServerError, TableError.
    """
    try:
        if isinstance(request, ALL_SERVERS) and not is_control_given(control):
            return _ask_all(verb, request, answer_type)
        address = address_for(control, request)
        return ControlClient(address, control_token()).ask(verb, request, answer_type)
    except TableError as error:
        raise command_error(command or verb, about, error) from error


def address_for(control: str | None, request: Request) -> ControlAddress:
    """The control socket to ask; see `nbdtarget.control.servers`. Raises: NbdTargetError."""
    if is_control_given(control):
        return control_address(control)
    name = None if isinstance(request, Create) else getattr(request, "name", None)
    return default_server() if name is None else server_of(name)


def addresses(control: str | None) -> list[ControlAddress]:
    """Return all control sockets that may be meant."""
    if is_control_given(control):
        return [control_address(control)]
    return [*known_controls()]


def _ask_all(
    verb: str,
    request: Status | Table | Measure | Info | Deps | Figures,
    answer_type: type[A],
) -> A:
    """Ask the servers that have the devices, or all servers, and join their answers."""
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
            print(f"nbdtarget: {reason}; it is left out here", file=sys.stderr)
        wanted = dict.fromkeys(found.servers, ())
        if not wanted:
            raise no_server(serve_control_path())
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
    joined: dict[str, Any] = {"devices": tuple(devices)}
    if isinstance(answers[0], LinesAnswer):
        # All answers are of the type of the first one, which mypy does not know.
        certificates = [each for a in answers for each in a.certificates]  # type: ignore[attr-defined]
        joined["certificates"] = tuple(certificates)
    return replace(answers[0], **joined)


def device_names(
    names: list[str] | None, uuid: str | None, control: str | None
) -> tuple[str, ...]:
    """The devices that were named, or the one of the UUID.

    Raises: TableError: no device has the UUID.
    """
    if uuid is None:
        return tuple(names or ())
    if names:
        raise typer.BadParameter("Give either names or --uuid, not both")
    for device in ask(control, "info", Info(), InfoAnswer).devices:
        if device.uuid == uuid:
            return (device.name,)
    raise TableError(f"UUID {uuid}: Device does not exist", errnos.ENXIO)


def command_error(command: str, about: str, error: TableError) -> TableError:
    """Return the same error with the command and the device before it.

    The name of the errno follows, because scripts look for it.
    """
    subject = f"{command} {about}".rstrip()
    reason = error.reason
    meaning = os.strerror(error.errno)
    if meaning.lower() not in reason.lower():
        reason = f"{reason} ({meaning})"
    return TableError(f"{subject}: {reason}", error.errno)


def caller_directory() -> str:
    """Return the directory that relative paths start from."""
    return os.getcwd()


def print_json(answer: Answer | Request) -> None:
    """Print one line of JSON."""
    sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
