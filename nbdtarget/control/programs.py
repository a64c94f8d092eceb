# SPDX-License-Identifier: Apache-2.0
"""A table that comes over TCP may not have a program started on this machine, unless the configuration file allows it.

Disks of the schemes `qemu:`, `nbdkit:` and `helper:` are opened by other programs. A user of a unix socket has an account on this machine.
A client on TCP has a token, and perhaps nothing else here; its tables are looked at before anything is done with them.
"""

import errno as errnos

from nbdtarget.common.errors import TableError
from nbdtarget.common.words import split_words
from nbdtarget.control.messages import Create, Load, Request
from nbdtarget.devices.resolve import starts_programs

__all__ = ["refuse_programs"]


def refuse_programs(request: Request) -> None:
    """Refuse a request whose table names a disk that a program opens. Raises: TableError."""
    if not isinstance(request, Create | Load):
        return
    for line in (request.table or "").splitlines():
        for word in split_words(line):
            if starts_programs(word):
                raise TableError(
                    f"{word}: opening it starts a program, which a control socket on TCP may not do:"
                    " set control_starts_programs in the configuration file if its clients may",
                    errnos.EPERM,
                )
