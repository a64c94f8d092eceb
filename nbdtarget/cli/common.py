# SPDX-License-Identifier: Apache-2.0
"""What several commands share: options, the question to the server, JSON out."""

import errno as errnos
import os
import sys
from typing import Annotated, TypeVar

import msgspec
import typer

from nbdtarget.control.client import ControlClient
from nbdtarget.control.messages import Answer, Info, InfoAnswer, Request
from nbdtarget.control.paths import control_address, control_token
from nbdtarget.errors import TableError

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
    "ask",
    "caller_directory",
    "command_error",
    "device_names",
    "print_json",
]

A = TypeVar("A", bound=Answer)

Control = Annotated[
    str | None,
    typer.Option(
        "--control",
        metavar="ADDR",
        help="Control socket of the server, a path or tcp:HOST:PORT; default:"
        " $NBDTARGET_CONTROL, else control.sock in the runtime directory.",
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
    client = ControlClient(control_address(control), control_token())
    try:
        return client.ask(verb, request, answer_type)
    except TableError as error:
        raise command_error(verb, about, error) from error


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
