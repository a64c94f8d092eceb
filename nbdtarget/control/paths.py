# SPDX-License-Identifier: Apache-2.0
"""Where the control socket and the default NBD socket are."""

import os
from pathlib import Path

__all__ = ["control_path", "runtime_directory"]

CONTROL_VARIABLE = "NBDTARGET_CONTROL"


def runtime_directory() -> Path:
    """$XDG_RUNTIME_DIR/nbdtarget; else /run/nbdtarget for root; else ~/.local/state/nbdtarget.

    All three are the user's own: nobody else can put a socket there, or replace ours.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "nbdtarget"
    if os.geteuid() == 0:
        return Path("/run/nbdtarget")
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "nbdtarget"


def control_path(given: str | None) -> Path:
    """The control socket: what was `given`, $NBDTARGET_CONTROL, or the runtime directory's."""
    path = given or os.environ.get(CONTROL_VARIABLE)
    return Path(path) if path else runtime_directory() / "control.sock"
