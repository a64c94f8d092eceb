# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget upgrade`: a new process goes on with the disks and the clients of a server."""

import typer

from nbdtarget.cli.common import Control, Json, ask, print_json
from nbdtarget.control import messages as m

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(upgrade)


def upgrade(control: Control = None, json: Json = False) -> None:
    """Replace a server by a new process of the same program, for example after an update.

    The server starts its own program again, with the same arguments, and hands its devices and its clients over. Clients
    notice a short pause, and no error. If the new process cannot start, the server goes on as before.

    Example: nbdtarget upgrade
    """
    answer = ask(control, "upgrade", m.Upgrade(), m.UpgradeAnswer)
    if json:
        print_json(answer)
    else:
        print(f"process {answer.pid} serves now")
