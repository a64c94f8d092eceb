# SPDX-License-Identifier: Apache-2.0
"""`Disk`: one mapped device of a server, and what is known of it. Every method is one verb of the control socket."""

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control import messages as m
from nbdtarget.control.status_fields import STATUS_FIELDS, Fields

if TYPE_CHECKING:
    from nbdtarget.api.hosts import Host
    from nbdtarget.api.nbd_client import NbdClient

__all__ = ["Disk", "DiskStatus", "PowerCut", "TargetStatus", "cut_words"]

_CUT_ANSWER: Final = re.compile(
    r"(\w+) (\d+): (\d+) writes of (\d+) sectors at risk, (\d+) sectors survive"
)
FATES: Final = ("drop", "keep", "tear", "mixed")


class TargetStatus(msgspec.Struct, frozen=True):
    """The status of one target of a disk.

    Attributes:
        start, length: sectors of 512 bytes.
        type: for example `clone`.
        line: the status as device-mapper prints it, without these three.
        fields: the same by name and with units, see docs/openapi.json; None: the type has none, or the target has failed.
    """

    start: int
    length: int
    type: str
    line: str
    fields: Fields | None


class DiskStatus(msgspec.Struct, frozen=True):
    """The status of a disk.

    Attributes:
        targets: in order.
        failure: why it has no table although it should have one; else empty.
        losses: how often writes that were not flushed yet may have been lost.
        below: the disks that it stands on, and their health.
    """

    name: str
    targets: tuple[TargetStatus, ...]
    failure: str = ""
    losses: int = 0
    below: tuple[m.BelowLine, ...] = ()

    @property
    def fields(self) -> Any:
        """The fields of the only target; their class depends on its type. Raises: NbdTargetError: there are several, or it has none."""
        if len(self.targets) != 1:
            raise NbdTargetError(
                f"{self.name}: has {len(self.targets)} targets: look at `targets`"
            )
        fields = self.targets[0].fields
        if fields is None:
            raise NbdTargetError(
                f"{self.name}: the target {self.targets[0].type} has no fields: look at"
                " its `line`"
            )
        return fields


class PowerCut(msgspec.Struct, frozen=True):
    """The effect of a power cut.

    Attributes:
        fate: `drop`, `keep`, `tear` or `mixed`.
        seed: of `tear` and `mixed`: the same seed with the same writes at risk leaves the same disk.
        nr_writes_at_risk, nr_sectors_at_risk: what no flush had covered.
        nr_sectors_left: how many of these sectors survived.
    """

    fate: str
    seed: int
    nr_writes_at_risk: int
    nr_sectors_at_risk: int
    nr_sectors_left: int


def cut_words(fate: str, tear: int | None, mixed: int | None) -> tuple[str, ...]:
    """Return the words of a power cut's message. Raises: NbdTargetError: they contradict each other."""
    if fate not in FATES:
        raise NbdTargetError(f"fate {fate!r}: is none of {', '.join(FATES)}")
    given = {"tear": tear, "mixed": mixed}
    seeded = [(name, str(seed)) for name, seed in given.items() if seed is not None]
    if len(seeded) > 1 or (seeded and fate not in ("drop", seeded[0][0])):
        raise NbdTargetError(
            "a power cut has one fate: give either `fate`, or `tear`, or `mixed`"
        )
    return seeded[0] if seeded else (fate,)


class Disk:
    """A mapped device, which is an NBD export under its name.

    Attributes:
        name: of the device and of the export.
        uri: where clients attach.
    """

    def __init__(self, host: "Host", name: str, uri: str) -> None:
        self._host = host
        self.name = name
        self.uri = uri

    def __repr__(self) -> str:
        return f"<Disk {self.name} {self.uri}>"

    def connect(self, *, timeout_s: float = 30.0) -> "NbdClient":
        """Attach with the small blocking NBD client of this package. Raises: NbdError."""
        from nbdtarget.api.nbd_client import NbdClient

        return NbdClient(self.uri, timeout_s=timeout_s)

    async def status(self, *, noflush: bool = False) -> DiskStatus:
        """Return the status; a clone or a cache commits first, unless `noflush`. Raises: TableError."""
        request = m.Status((self.name,), noflush=noflush)
        (lines,) = (await self._host.ask("status", request, m.LinesAnswer)).devices
        return _status_of(lines)

    async def info(self) -> m.InfoLine:
        """Return state, size and users. Raises: TableError."""
        request = m.Info((self.name,))
        (line,) = (await self._host.ask("info", request, m.InfoAnswer)).devices
        return line

    async def table(self) -> str:
        """Return the live table, as it can be loaded again. Raises: TableError."""
        request = m.Table((self.name,))
        (lines,) = (await self._host.ask("table", request, m.LinesAnswer)).devices
        return "\n".join(
            f"{each.start} {each.length} {each.type} {each.params}".rstrip()
            for each in lines.lines
        )

    async def message(self, *words: str | int, sector: int = 0) -> str | None:
        """Send a message to the target at `sector`; return its answer. Raises: TableError: it was refused."""
        request = m.Message(self.name, sector, tuple(map(str, words)))
        return (await self._host.ask("message", request, m.MessageAnswer)).text

    async def power_cut(
        self,
        fate: str = "drop",
        *,
        tear: int | None = None,
        mixed: int | None = None,
        stay_off: bool = False,
    ) -> PowerCut:
        """Cut the power of a `powercut` disk, and switch it on again.

        Args:
            fate: what becomes of the writes that no flush has covered: `drop`, `keep`, `tear` or `mixed`.
            tear, mixed: that fate with this seed; without a seed one is drawn.
            stay_off: leave the power off until `power_on`.
        Raises: TableError: it is no powercut disk, or the power is off.
        """
        verb = "cut" if stay_off else "cycle"
        answer = await self.message(verb, *cut_words(fate, tear, mixed)) or ""
        match = _CUT_ANSWER.fullmatch(answer)
        assert match is not None, answer
        return PowerCut(match[1], *map(int, match.groups()[1:]))

    async def power_on(self) -> None:
        """Switch the power on, after a cut that has left it off. Raises: TableError: it is on."""
        await self.message("on")

    async def reset(self) -> None:
        """Make a `scratch` disk pristine again, while clients stay attached. Raises: TableError: it is none."""
        await self.message("reset")

    async def load(self, table: str, *, keep_open: bool = True) -> None:
        """Replace the table at once, while clients stay attached. Raises: TableError: the old one goes on.

        Args: keep_open: a name under which the old table has a disk open means that open disk, also for `memory:SIZE`.
        """
        request = m.Load(self.name, table, keep_open=keep_open)
        await self._host.ask("load", request, m.Done)
        await self.resume()

    async def suspend(self, *, noflush: bool = False) -> None:
        """Hold back requests, finish those in flight, commit. Raises: TableError."""
        request = m.Suspend(self.name, noflush=noflush)
        await self._host.ask("suspend", request, m.Done)

    async def resume(self) -> None:
        """Let requests go on; a table that was loaded becomes live first. Raises: TableError."""
        await self._host.ask("resume", m.Resume(self.name), m.Done)

    async def uncache(self) -> str:
        """Write a cache back and remove it, while clients go on; the origin alone is the disk then. Returns that in words.

        Durable: the origin has everything. Raises: TableError: it is no cache, or cannot be written back, and goes on.
        """
        request = m.Uncache(self.name)
        return (await self._host.ask("uncache", request, m.UncacheAnswer)).text

    async def wait(self, event_nr: int | None = None) -> int:
        """Wait until the event number is not this one (None: the present one). Returns the number by then."""
        request = m.Wait(self.name, event_nr)
        return (await self._host.ask("wait", request, m.WaitAnswer)).event_nr

    async def remove(self, *, force: bool = False) -> None:
        """Commit, and remove the disk. Raises: TableError: it is in use.

        Args: force: clients that are attached get errors from now on.
        """
        request = m.Remove(self.name, force=force, deferred=force)
        await self._host.ask("remove", request, m.Done)


def _status_of(lines: m.DeviceLines) -> DiskStatus:
    targets = tuple(
        TargetStatus(
            each.start, each.length, each.type, each.params, _maybe_fields(each)
        )
        for each in lines.lines
    )
    return DiskStatus(lines.name, targets, lines.failure, lines.losses, lines.below)


def _maybe_fields(line: m.TableLine) -> Fields | None:
    fields_type = STATUS_FIELDS.get(line.type)
    if fields_type is None or not line.fields:
        return None
    return msgspec.convert(line.fields, fields_type)
