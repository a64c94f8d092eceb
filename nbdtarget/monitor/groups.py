# SPDX-License-Identifier: Apache-2.0
"""`Groups`: the things that metrics tell of, sorted once: devices, what their clients have asked for, targets, lower disks.

The metrics of a group have the same labels in the same order. So these are made, and written, once for all of them, and a line costs little more than its number.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, cached_property, lru_cache
from typing import Final, Generic, NamedTuple, TypeVar

from nbdtarget.control.fields import BelowLine, Remote
from nbdtarget.control.figures import (
    DeviceFigures,
    FiguresAnswer,
    OperationFigures,
    TargetFigures,
)

__all__ = ["UP", "Column", "Group", "Groups", "label_text"]

UP: Final = "ok"  # the state of a lower disk that has no trouble
TEXTS_MAX: Final = 16384  # that are kept for the next time

T = TypeVar("T")
Keys = tuple[str, ...]  # the values of the labels

_ESCAPES: Final = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


@lru_cache(maxsize=TEXTS_MAX)
def label_text(names: Keys, values: Keys) -> str:
    """Return labels as they are written."""
    escaped = [
        value.translate(_ESCAPES)
        if "\\" in value or '"' in value or "\n" in value
        else value
        for value in values
    ]
    return _template(names) % tuple(escaped)


@cache
def _template(names: Keys) -> str:
    return "{" + ",".join(f'{name}="%s"' for name in names) + "}"


class Column(NamedTuple):
    """One metric: the labels of its lines, these as they are written, and its values; None: there is no such line."""

    keys: list[Keys]
    texts: list[str]
    values: Iterable[float | None]


class Group(Generic[T]):
    """Things of one kind.

    Attributes:
        keys: the values of the labels of each.
        texts: all labels of each, as they are written.
    """

    __slots__ = ("keys", "texts", "things")

    def __init__(self, keys: list[Keys], texts: list[str], things: list[T]) -> None:
        self.keys, self.texts, self.things = keys, texts, things

    @classmethod
    def labelled(cls, names: Keys, found: Iterable[tuple[Keys, T]]) -> "Group[T]":
        """Return a group of things with the values of their labels. Args: names: of the labels."""
        group = cls([], [], [])
        for keys, thing in found:
            group.keys.append(keys)
            group.texts.append(label_text(names, keys))
            group.things.append(thing)
        return group

    def column(self, value: Callable[[T], float | None]) -> Column:
        """Return one metric of all things."""
        return Column(self.keys, self.texts, map(value, self.things))


class Groups:
    """See the module head."""

    def __init__(self, figures: FiguresAnswer) -> None:
        self.figures = figures
        self._operations: dict[str, Group[OperationFigures]] = {}
        self._targets: dict[str, Group[TargetFigures]] = {}

    @cached_property
    def devices(self) -> Group[DeviceFigures]:
        """All devices, by `device`."""
        found = (((device.name,), device) for device in self.figures.devices)
        return Group.labelled(("device",), found)

    @cached_property
    def infos(self) -> Group[DeviceFigures]:
        """All devices, by `device`, `uuid` and `targets`."""
        found = (
            ((device.name, device.uuid, _types(device)), device)
            for device in self.figures.devices
        )
        return Group.labelled(("device", "uuid", "targets"), found)

    def operation(self, name: str) -> Group[OperationFigures]:
        """Return the requests of clients, by device. Devices without any are missing."""
        group = self._operations.get(name)
        if group is None:
            group = self._operations[name] = Group([], [], [])
            devices = self.devices
            for keys, text, device in zip(
                devices.keys, devices.texts, devices.things, strict=True
            ):
                found = device.operations.get(name)
                if found is not None:
                    group.keys.append(keys)
                    group.texts.append(text)
                    group.things.append(found)
        return group

    def targets(self, types: str) -> Group[TargetFigures]:
        """Targets of some types (divided by spaces), by `device` and `start`."""
        group = self._targets.get(types)
        if group is None:
            wanted = types.split()
            found = (
                ((device.name, str(target.start)), target)
                for device in self.figures.devices
                for target in device.targets
                if target.type in wanted
            )
            group = self._targets[types] = Group.labelled(("device", "start"), found)
        return group

    @cached_property
    def lower_disks(self) -> Group[BelowLine]:
        """The disks that devices stand on, by `device` and `disk`."""
        found = (
            ((device.name, disk.name), disk)
            for device in self.figures.devices
            for disk in _of_one_name(device.below)
        )
        return Group.labelled(("device", "disk"), found)

    @cached_property
    def remote_disks(self) -> Group[Remote]:
        """Return the disks of other machines."""
        group: Group[Remote] = Group([], [], [])
        disks = self.lower_disks
        for keys, text, disk in zip(disks.keys, disks.texts, disks.things, strict=True):
            if disk.remote is not None:
                group.keys.append(keys)
                group.texts.append(text)
                group.things.append(disk.remote)
        return group


def _types(device: DeviceFigures) -> str:
    return "+".join(dict.fromkeys([target.type for target in device.targets]))


def _of_one_name(disks: tuple[BelowLine, ...]) -> Iterable[BelowLine]:
    """Two disks may have one name, for example memory:1M. Prometheus refuses a line that comes twice, so they count as one."""
    if len(disks) < 2:
        return disks
    found: dict[str, BelowLine] = {}
    for disk in disks:
        other = found.get(disk.name)
        found[disk.name] = disk if other is None else _sum(other, disk)
    return found.values()


def _sum(one: BelowLine, other: BelowLine) -> BelowLine:
    return BelowLine(
        one.name,
        other.state if one.state == UP else one.state,
        errors=dict(Counter(one.errors) + Counter(other.errors)),
        remote=_sum_of_remote(one.remote, other.remote),
    )


def _sum_of_remote(one: Remote | None, other: Remote | None) -> Remote | None:
    if one is None or other is None:
        return one or other
    return Remote(
        one.requests + other.requests,
        one.retries + other.retries,
        one.received_bytes + other.received_bytes,
        one.away_s + other.away_s,
    )
