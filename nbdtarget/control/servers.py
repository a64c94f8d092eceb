# SPDX-License-Identifier: Apache-2.0
"""Which server a command asks if the user does not say: one of the control sockets of this user.

Theory of operation. Each `clone` and `cache` has a control socket of its own, named after its export, and `serve`
has another (`nbdtarget.control.paths`). With one socket there is nothing to choose. With several, a
command about NAME asks the two likeliest servers, the one of the socket called NAME and `serve`, and if neither has
such a device (for example, the device of a `clone` was renamed), all others. A command without a name goes to
all servers if it only reads, else to `serve`, or to the only server there is.

Looking is quick: all servers are asked at the same time, and only for the names of their devices, which no
disk can delay. A server that does not answer within LOOK_S_MAX is left out, and the user is told. A socket that
no server listens on was left behind by a server that was killed, and is ignored; the next
server that starts removes it.

Nothing heavy is imported here, because every command passes through here.
"""

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.control.client import (
    ControlClient,
    NoServerError,
    SilentServerError,
)
from nbdtarget.control.messages import Info, InfoAnswer
from nbdtarget.control.paths import (
    job_control_path,
    known_controls,
    serve_control_path,
)

__all__ = [
    "LOOK_S_MAX",
    "AmbiguousServerError",
    "Look",
    "default_server",
    "look",
    "server_of",
]

LOOK_S_MAX: Final = 5.0
ASKED_AT_ONCE_MAX: Final = 32


class AmbiguousServerError(NbdTargetError):
    """More than one server could be asked; the message names them."""


class Look(NamedTuple):
    """Which servers there are.

    Attributes:
        servers: those that answered, with the names of their devices.
        silent: those that did not answer, with the reason.
    """

    servers: dict[Path, tuple[str, ...]]
    silent: dict[Path, str]

    def having(self, name: str) -> list[Path]:
        return [path for path, names in self.servers.items() if name in names]


def look(paths: Sequence[Path]) -> Look:
    """Ask all servers for their devices, at the same time."""
    found: dict[Path, tuple[str, ...]] = {}
    silent: dict[Path, str] = {}
    left = list(reversed(paths))

    def work() -> None:
        while left:
            try:
                path = left.pop()
            except IndexError:  # another thread was faster
                return
            try:
                answer = ControlClient(path).ask(
                    "info", Info(), InfoAnswer, timeout_s=LOOK_S_MAX
                )
            except SilentServerError as error:
                silent[path] = str(error)
            except NoServerError:
                pass  # left behind
            except TableError as error:
                silent[path] = f"{path}: {error}"
            else:
                found[path] = tuple(device.name for device in answer.devices)

    threads = [
        threading.Thread(target=work, daemon=True)
        for _ in range(min(len(paths), ASKED_AT_ONCE_MAX) - 1)
    ]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    in_order = {path: found[path] for path in paths if path in found}
    return Look(in_order, silent)


def server_of(name: str) -> Path:
    """The control socket of the server that has the device `name`.

    If no server has it, some server is returned, which then says so itself.
    Raises: AmbiguousServerError; NbdTargetError: a server that may have it does not answer.
    """
    name = name.removeprefix("/dev/mapper/")
    known = known_controls()
    if len(known) == 1:
        return known[0]
    likely = [
        path for path in (job_control_path(name), serve_control_path()) if path in known
    ]
    found = look(likely)
    having = found.having(name)
    if not having:
        others = look([path for path in known if path not in likely])
        having = others.having(name)
        found = Look(
            {**found.servers, **others.servers}, {**found.silent, **others.silent}
        )
    if len(having) > 1:
        raise AmbiguousServerError(
            f"{name} is on {len(having)} servers: {_paths(having)}; say which one is meant"
            " with --control"
        )
    if having:
        return having[0]
    if found.silent:
        raise NbdTargetError("; ".join(found.silent.values()))
    return next(iter(found.servers), serve_control_path())


def default_server() -> Path:
    """The server for commands that are not about an existing device: `serve`, or the only one.

    Raises: AmbiguousServerError.
    """
    known = known_controls()
    if len(known) < 2:
        return known[0] if known else serve_control_path()
    found = look(known)
    alive = [*found.servers, *found.silent]
    if serve_control_path() in alive:
        return serve_control_path()
    if len(alive) > 1:
        raise AmbiguousServerError(
            f"{len(alive)} servers are running, and none of them is `nbdtarget serve`:"
            f" {_paths(alive)}; say which one is meant with --control"
        )
    return alive[0] if alive else serve_control_path()


def _paths(paths: Iterable[Path]) -> str:
    return ", ".join(map(str, paths))
