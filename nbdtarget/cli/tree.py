# SPDX-License-Identifier: Apache-2.0
"""`ls --tree`: which device uses which, in the form of dmsetup."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control.messages import InfoLine

__all__ = ["OPTIONS", "draw_tree"]

OPTIONS: Final = (
    "ascii",
    "utf",
    "inverted",
    "device",
    "nodevice",
    "blkdevname",
    "active",
    "rw",
    "open",
    "uuid",
)
_ASCII: Final = ("|-", "`-", "|  ", "   ")
_UTF: Final = ("├─", "└─", "│  ", "   ")
_MAPPER: Final = "/dev/mapper/"


def draw_tree(
    devices: Iterable[InfoLine], options: Iterable[str], *, utf: bool
) -> list[str]:
    """Return the lines.

    Args:
        options: of OPTIONS, as `ls --tree -o` takes them.
        utf: draw with lines and not with ASCII, if no option says which.
    Raises: NbdTargetError: an option is unknown.
    """
    wanted = set(options)
    if unknown := sorted(wanted - set(OPTIONS)):
        raise NbdTargetError(
            f"ls: Tree options not recognised: {', '.join(unknown)}"
            f" (there are: {', '.join(OPTIONS)})"
        )
    by_name = {device.name: device for device in devices}
    below = {
        name: [
            inner
            if (inner := dep.removeprefix(_MAPPER)) in by_name and inner != dep
            else dep
            for dep in device.deps
        ]
        for name, device in sorted(by_name.items())
    }
    if "inverted" in wanted:
        below = _inverted(below)
    is_utf = "utf" in wanted or (utf and "ascii" not in wanted)
    tree = _Tree(by_name, below, wanted, _UTF if is_utf else _ASCII)
    return tree.lines()


def _inverted(below: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    above: dict[str, list[str]] = {}
    for name, deps in below.items():
        for dep in deps:
            above.setdefault(dep, [])
            above[dep].append(name)
    for name in below:
        above.setdefault(name, [])
    return dict(sorted(above.items(), key=lambda item: (item[0] in below, item[0])))


class _Tree:
    def __init__(
        self,
        devices: Mapping[str, InfoLine],
        below: Mapping[str, Sequence[str]],
        options: set[str],
        symbols: tuple[str, str, str, str],
    ) -> None:
        self._devices = devices
        self._below = below
        self._options = options
        self._symbols = symbols
        self._lines: list[str] = []

    def lines(self) -> list[str]:
        held = {name for names in self._below.values() for name in names}
        for name in self._below:
            if name not in held:
                self._lines.append(self._label(name))
                self._children(name, " ")
        return self._lines

    def _children(self, name: str, indent: str) -> None:
        branch, last_branch, line, blank = self._symbols
        children = [
            child
            for child in self._below.get(name, ())
            if child in self._devices or "nodevice" not in self._options
        ]
        for nr, child in enumerate(children):
            is_last = nr == len(children) - 1
            symbol = last_branch if is_last else branch
            self._lines.append(f"{indent}{symbol}{self._label(child)}")
            self._children(child, indent + (blank if is_last else line))

    def _label(self, name: str) -> str:
        options = self._options
        device = self._devices.get(name)
        if device is None:
            return "" if "nodevice" in options else f" ({name})"
        label = name
        if "blkdevname" in options:
            label += f" <dm-{device.minor}>"
        if "nodevice" not in options:
            label += f" ({device.major}:{device.minor})"
        notes = [
            text
            for option, text in (
                ("active", device.state),
                ("rw", "RO" if device.read_only else "RW"),
                ("open", str(device.open_count)),
                ("uuid", device.uuid),
            )
            if option in options
        ]
        return f"{label} [{', '.join(notes)}]" if notes else label
