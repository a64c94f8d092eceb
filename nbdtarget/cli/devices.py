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
    # What is no option of ours is a word of the message: also without `--` before it.
    app.command(context_settings={"ignore_unknown_options": True})(message)
    app.command()(wait)


def suspend(
    names: NamesNeeded = None,
    noflush: Annotated[
        bool,
        typer.Option(
            "--noflush",
            help="Flush nothing; I/O that is only held back waits for the next table.",
        ),
    ] = False,
    nolockfs: Annotated[
        bool, typer.Option("--nolockfs", help="As dmsetup's; no file system is frozen.")
    ] = False,
    timeout: Timeout = None,
    uuid: Uuid = None,
    control: Control = None,
) -> None:
    """Stop new I/O, wait for what is in flight, commit."""
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
    """Let I/O go, with the inactive table if there is one."""
    for name in _named(names, uuid, control):
        ask(control, "resume", m.Resume(name, timeout), m.Done, about=name)


def _named(
    names: list[str] | None, uuid: str | None, control: str | None
) -> tuple[str, ...]:
    named = device_names(names, uuid, control)
    if not named:
        raise typer.BadParameter("Missing argument 'NAME...'")
    return named


def remove(
    names: NamesNeeded = None,
    force: Annotated[
        bool,
        typer.Option("--force", "-f", help="First fail all I/O, with an error table."),
    ] = False,
    deferred: Annotated[
        bool,
        typer.Option(
            "--deferred",
            help="If it is in use, remove it when nobody uses it any more.",
        ),
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="If it is in use, try for five seconds.")
    ] = False,
    timeout: Timeout = None,
    uuid: Uuid = None,
    control: Control = None,
) -> None:
    """Commit, and remove devices that nobody holds open."""
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
        typer.Option("--force", "-f", help="First fail all I/O, with error tables."),
    ] = False,
    timeout: Timeout = None,
    control: Control = None,
) -> None:
    """Remove every device that nobody holds open."""
    done = ask(control, "remove_all", m.RemoveAll(force, timeout), m.Done)
    for name in done.busy:
        print(f"nbdtarget: remove_all: {name} is in use: left", file=sys.stderr)


def rename(
    name: Name,
    new_name: Annotated[str, typer.Argument(metavar="NEW_NAME_OR_UUID")],
    setuuid: Annotated[
        bool, typer.Option("--setuuid", help="Give it a UUID instead of a name.")
    ] = False,
    control: Control = None,
) -> None:
    """Rename a device, or give one that has none a UUID."""
    if setuuid:
        ask(control, "set_uuid", m.SetUuid(name, new_name), m.Done, about=name)
    else:
        ask(control, "rename", m.Rename(name, new_name), m.Done, about=name)


def message(
    name: Name,
    sector: Annotated[
        int, typer.Argument(metavar="SECTOR", help="Selects the target; 0 for one.")
    ],
    words: Annotated[list[str], typer.Argument(metavar="WORD...")],
    json: Json = False,
    control: Control = None,
) -> None:
    """Send a message to a target; prints its answer, if it has one."""
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
        typer.Argument(metavar="[EVENT_NR]", help="Default: the present number."),
    ] = None,
    noflush: Annotated[bool, typer.Option("--noflush", hidden=True)] = False,
    json: Json = False,
    control: Control = None,
) -> None:
    """Wait until the device's event counter is not EVENT_NR."""
    answer = ask(control, "wait", m.Wait(name, event_nr), m.WaitAnswer, about=name)
    if json:
        print_json(answer)
