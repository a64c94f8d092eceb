# SPDX-License-Identifier: Apache-2.0
"""Sockets that this process was started with: systemd's socket activation.

    LISTEN_PID      the process they are meant for; another process ignores them
    LISTEN_FDS      how many there are, from descriptor 3 on
    LISTEN_FDNAMES  what each is for, separated by colons; the manager of services takes it from
                    `FileDescriptorName=`

The names are `nbd`, `control` and `metrics`. Any other name means NBD, too, because a manager that was not told a name
passes the name of its own unit or "unknown", and libnbd's tools pass whatever their caller set.

Source: sd_listen_fds(3), systemd.socket(5).
"""

import os
from collections.abc import Mapping
from typing import Final, NamedTuple

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.numbers import maybe_number

__all__ = ["PassedSockets", "passed_sockets"]

FIRST_FD: Final = 3
FDS_MAX: Final = 1024
CONTROL: Final = "control"
METRICS: Final = "metrics"


class PassedSockets(NamedTuple):
    """Descriptors of listening sockets. `control`, `metrics`: of the control socket and of that for metrics, if there is one."""

    nbd: tuple[int, ...] = ()
    control: int | None = None
    metrics: int | None = None


def passed_sockets(environment: Mapping[str, str] = os.environ) -> PassedSockets:
    """Return the sockets that were passed to this very process. Children do not inherit them.

    Raises: NbdTargetError: there are more names or fewer than sockets, or two for `control` or `metrics`.
    """
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return PassedSockets()
    count = maybe_number(environment.get("LISTEN_FDS", ""), FDS_MAX)
    if count is None:
        return PassedSockets()
    fds = range(FIRST_FD, FIRST_FD + count)
    names = environment.get("LISTEN_FDNAMES", "")
    roles = names.split(":") if names else ["nbd"] * len(fds)
    if len(roles) != len(fds):
        raise NbdTargetError(
            f"LISTEN_FDNAMES has {len(roles)} names ({names}) for {len(fds)} sockets"
        )
    single: dict[str, int] = {}
    nbd = []
    for fd, role in zip(fds, roles, strict=True):
        if role not in (CONTROL, METRICS):
            nbd.append(fd)
        elif role in single:
            raise NbdTargetError(
                f"LISTEN_FDNAMES: only one socket can be called {role}"
            )
        else:
            single[role] = fd
    for fd in fds:
        _keep_from_children(fd)
    return PassedSockets(tuple(nbd), single.get(CONTROL), single.get(METRICS))


def _keep_from_children(fd: int) -> None:
    try:
        os.set_inheritable(fd, False)
    except OSError as error:
        raise NbdTargetError(
            f"LISTEN_FDS says that descriptor {fd} is a socket: {error.strerror}"
        ) from None
