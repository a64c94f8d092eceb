# SPDX-License-Identifier: Apache-2.0
"""Completion of command lines in bash, zsh and fish.

Theory of operation. `nbdtarget completion SHELL` prints a script, which the user's shell reads once. For each TAB
the script runs `nbdtarget` with the line typed so far in the environment, and `_NBDTARGET_COMPLETE` set. Then
`answer` prints the possible words and ends the process; no command runs. Typer does all of this, except
for the names of devices, which are asked for here.

A TAB must not hang. The servers of the runtime directory are asked one after another. A server that does not
answer within ANSWER_S_MAX is left out, and after SILENT_MAX of them no more are asked. A name is offered only if no shell gives
any of its characters a meaning, because the scripts for bash and zsh insert names as they are.

Only `answer` imports what completes: other commands do not pay for it.
"""

import re
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, Final, NamedTuple

import typer

__all__ = ["VARIABLE", "answer", "register"]

VARIABLE: Final = "_NBDTARGET_COMPLETE"
ANSWER_S_MAX: Final = 0.5
SILENT_MAX: Final = 2

_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.,:@%+=][A-Za-z0-9_.,:@%+=-]*")
_NEW_NAMES: Final = ("create", "splitname")  # their NAME need not be a device's


class Shell(Enum):
    """The shells that there is a script for."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


class Word(NamedTuple):
    """One possible word, with the attributes that Typer looks at."""

    value: str
    help: str | None = None
    type: str = "plain"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(completion)


def completion(
    shell: Annotated[
        Shell,
        typer.Argument(
            metavar="bash|zsh|fish", help="The shell that reads the script."
        ),
    ],
) -> None:
    """Print a script that completes command lines.

    It completes commands, options and names of devices.

    For bash: `source <(nbdtarget completion bash)` in ~/.bashrc.
    """
    from typer._completion_shared import get_completion_script

    script = get_completion_script(
        prog_name="nbdtarget", complete_var=VARIABLE, shell=shell.value
    )
    print(script)


def answer(app: typer.Typer) -> None:
    """Print the possible words for the line in the environment, and end the process."""
    from typer._completion_classes import completion_init

    completion_init()
    program: Any = typer.main.get_command(app)
    _complete_names(program)
    program.main([], prog_name="nbdtarget", standalone_mode=False)


def _complete_names(command: Any) -> None:
    """Let each parameter that is the name of a device be completed from the running servers."""
    for parameter in command.params:
        if (
            parameter.metavar in ("NAME", "NAME...", "[NAME]...")
            and command.name not in _NEW_NAMES
        ):
            parameter.shell_complete = _matching_devices
    for below in getattr(command, "commands", {}).values():
        _complete_names(below)


def _matching_devices(context: Any, incomplete: str) -> list[Word]:
    given = context.params.get("control")
    typed = context.params.get("names") or ()
    return [
        Word(name)
        for name in sorted(set(_device_names(given)))
        if name.startswith(incomplete)
        and name not in typed
        and _PLAIN_NAME.fullmatch(name)
    ]


def _device_names(control: str | None) -> Iterator[str]:
    """The names of the devices of all servers that answer soon; no error is ever told."""
    from nbdtarget.cli.common import addresses
    from nbdtarget.common.errors import NbdTargetError
    from nbdtarget.control.client import ControlClient, SilentServerError
    from nbdtarget.control.messages import Info, InfoAnswer
    from nbdtarget.control.paths import control_token

    try:
        token = control_token()
        known = addresses(control)
    except NbdTargetError:
        return
    nr_silent = 0
    for address in known:
        if nr_silent == SILENT_MAX:
            return
        try:
            found = ControlClient(address, token).ask(
                "info", Info(), InfoAnswer, timeout_s=ANSWER_S_MAX
            )
        except SilentServerError:
            nr_silent += 1
        except NbdTargetError:
            continue
        else:
            yield from (device.name for device in found.devices)
