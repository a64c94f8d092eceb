# SPDX-License-Identifier: Apache-2.0
"""Commands that change devices: suspend, resume, remove, remove_all, rename, message, wait."""

import errno as errnos
import sys
import time
from typing import Annotated, Final

import typer

from nbdtarget.cli.common import (
    Control,
    Json,
    Name,
    NamesNeeded,
    Timeout,
    Uuid,
    ask,
    device_names,
    print_json,
)
from nbdtarget.common.errors import TableError
from nbdtarget.common.words import split_words
from nbdtarget.control import messages as m

__all__ = ["register"]

RETRIES_MAX: Final = 25
RETRY_S: Final = 0.2


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(suspend)
    app.command()(resume)
    app.command()(remove)
    app.command("remove_all")(remove_all)
    app.command()(rename)
    # An option that is unknown here is a word of the message, also without `--` before it.
    app.command(context_settings={"ignore_unknown_options": True})(message)
    app.command()(wait)


def suspend(
    names: NamesNeeded = None,
    noflush: Annotated[
        bool,
        typer.Option(
            "--noflush",
            help="Do not flush. Requests that are queued while the device is suspended are sent to"
            " the next table.",
        ),
    ] = False,
    nolockfs: Annotated[
        bool,
        typer.Option(
            "--nolockfs", help="Accepted as by dmsetup; no file system is ever frozen."
        ),
    ] = False,
    timeout: Timeout = None,
    uuid: Uuid = None,
    control: Control = None,
) -> None:
    """Suspend devices, so that requests wait.

    New requests are held back, those in flight are finished, and then everything is committed.
    """
    for name in _named(names, uuid, control):
        ask(control, "suspend", m.Suspend(name, noflush, timeout), m.Done, about=name)


def resume(
    names: NamesNeeded = None,
    noflush: Annotated[bool, typer.Option("--noflush", hidden=True)] = False,
    nolockfs: Annotated[bool, typer.Option("--nolockfs", hidden=True)] = False,
    timeout: Timeout = None,
    uuid: Uuid = None,
    control: Control = None,
) -> None:
    """Resume devices. An inactive table, if there is one, becomes live first."""
    for name in _named(names, uuid, control):
        ask(control, "resume", m.Resume(name, timeout), m.Done, about=name)


def _named(
    names: list[str] | None, uuid: str | None, control: str | None
) -> tuple[str, ...]:
    named = device_names(names, uuid, control)
    if not named:
        raise typer.BadParameter(
            "Missing argument 'NAME...': name a device, or give --uuid"
        )
    return named


def remove(
    names: NamesNeeded = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            "-f",
            help="First replace the table by one that fails all I/O.",
        ),
    ] = False,
    deferred: Annotated[
        bool,
        typer.Option(
            "--deferred",
            help="If the device is in use, remove it as soon as it is not.",
        ),
    ] = False,
    retry: Annotated[
        bool,
        typer.Option("--retry", help="If the device is in use, try for five seconds."),
    ] = False,
    timeout: Timeout = None,
    uuid: Uuid = None,
    control: Control = None,
) -> None:
    """Remove devices that are not in use. Their writes are committed first.

    The disks and files below a device stay as they are.
    """
    for name in _named(names, uuid, control):
        request = m.Remove(name, force, deferred, timeout)
        for tries_left in range(RETRIES_MAX if retry else 0, -1, -1):
            try:
                ask(control, "remove", request, m.Done, about=name)
                break
            except TableError as error:
                if error.errno != errnos.EBUSY or not tries_left:
                    raise
                time.sleep(RETRY_S)


def remove_all(
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            "-f",
            help="First replace each table by one that fails all I/O.",
        ),
    ] = False,
    timeout: Timeout = None,
    control: Control = None,
) -> None:
    """Remove every device that is not in use.

    Devices that are in use are named, and stay.
    """
    done = ask(control, "remove_all", m.RemoveAll(force, timeout), m.Done)
    for name in done.busy:
        print(
            f"nbdtarget: remove_all: {name} is in use and was not removed",
            file=sys.stderr,
        )


def rename(
    name: Name,
    new_name: Annotated[
        str,
        typer.Argument(
            metavar="NEW_NAME_OR_UUID", help="The new name, or with --setuuid the UUID."
        ),
    ],
    setuuid: Annotated[
        bool,
        typer.Option(
            "--setuuid", help="Set the UUID of a device that has none, not the name."
        ),
    ] = False,
    control: Control = None,
) -> None:
    """Rename a device and its export, or set a UUID.

    A UUID can be set only for a device that has none. Clients that are connected stay connected.
    """
    if setuuid:
        uuid = m.SetUuid(name, new_name)
        ask(control, "set_uuid", uuid, m.Done, about=name, command="rename")
    else:
        ask(control, "rename", m.Rename(name, new_name), m.Done, about=name)


def message(
    name: Name,
    sector: Annotated[
        int,
        typer.Argument(
            metavar="SECTOR",
            help="A sector of the device, which selects the target; 0 if the table has one line.",
        ),
    ],
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="WORD...", help="The message, for example `migration_rate 10M'."
        ),
    ],
    json: Json = False,
    control: Control = None,
) -> None:
    """Send a message to a target, and print the answer.

    The message `help' is refused with a list of the messages that the target takes.

    Example: nbdtarget message disk 0 help
    """
    # As with dmsetup, one quoted argument may hold several words, and a backslash keeps a blank.
    split = tuple(word for argument in words for word in split_words(argument))
    answer = ask(
        control, "message", m.Message(name, sector, split), m.MessageAnswer, about=name
    )
    if json:
        print_json(answer)
    elif answer.text is not None:
        print(answer.text)


def wait(
    name: Name,
    event_nr: Annotated[
        int | None,
        typer.Argument(
            metavar="[EVENT_NR]", help="An event number; default: the present one."
        ),
    ] = None,
    noflush: Annotated[bool, typer.Option("--noflush", hidden=True)] = False,
    json: Json = False,
    control: Control = None,
) -> None:
    """Wait for the next event of a device.

    This returns when the event number is not EVENT_NR. For example, the end of a hydration and a failed write-back are events.
    """
    answer = ask(control, "wait", m.Wait(name, event_nr), m.WaitAnswer, about=name)
    if json:
        print_json(answer)
