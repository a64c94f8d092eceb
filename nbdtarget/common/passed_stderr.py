# SPDX-License-Identifier: Apache-2.0
"""stderr of a process that another server has started to hand over to it.

Until it has taken over, its descriptor 2 is a pipe, which the other server reads: so that one can say why a new program has failed. What
comes is passed on, and the descriptor that $NBDTARGET_HANDOVER_STDERR names is where it will go later. What is written, and
how, depends on that one: whether it is a terminal, or the journal.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

__all__ = ["STDERR_VARIABLE", "keep_from_children", "restore_stderr", "stderr_to_be"]

STDERR_VARIABLE: Final = "NBDTARGET_HANDOVER_STDERR"


def stderr_to_be(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the descriptor that will be stderr; None: what is there stays."""
    said = environment.get(STDERR_VARIABLE, "")
    return int(said) if said.isascii() and said.isdecimal() else None


def keep_from_children() -> None:
    """Let the descriptor be this process's alone."""
    fd = stderr_to_be()
    if fd is not None:
        os.set_inheritable(fd, False)


def restore_stderr() -> None:
    """From now on stderr is what it will stay. Later calls, and children, see nothing of it."""
    fd = stderr_to_be()
    os.environ.pop(STDERR_VARIABLE, None)
    if fd is not None:
        with suppress(OSError):  # it was closed: then lines go nowhere, as before
            os.dup2(fd, 2)
            os.close(fd)
