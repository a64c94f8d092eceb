# SPDX-License-Identifier: Apache-2.0
"""Crash devices that are opened more than once in one boot: they hang, go, and come back.

Theory of operation. A `CrashDevice` is the disk; an `Opening` is what `open` gives of it: a
descriptor, or a connection to a server. What goes wrong with an opening is that opening's alone,
as the contract of `Device` says: it latches after a failed FLUSH or FUA write, and is lost
when the disk goes; who opens the disk again gets one that is neither.

    hang       what is submitted waits; `go_on` lets it be carried out, in any order
    go         each opening is lost: what is in flight ends with EIO, and has happened or not.
               The disk cannot be opened until it `comes_back`; then it has forgotten what was
               not flushed, or not, by `fate`
    forget     what was not flushed meets its `fate`, what is in flight ends with EIO, and each
               opening goes on, having noted a loss: as one that has connected again by itself
    exchange   the disk that comes back is another one, with other content

`Openings` opens disks by name; it is what a registry under test gets.
"""

import errno as errnos
import random
from collections.abc import Collection
from typing import Final

from nbdtarget.bio import FUA, OP_FLUSH, OP_NAMES, OP_READ, Bio
from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.base import Device, Extent
from nbdtarget.devices.health import HealthState
from nbdtarget.targets.powercut.volatile_cache import Fate
from nbdtarget_metadata.disks import Evidence
from tests.support.devices import CrashDevice

__all__ = ["Opening", "Openings"]

GONE: Final = "cannot connect: connection refused"


class Opening(Device):
    """One opening of a crash device. See the module head."""

    def __init__(self, disk: CrashDevice, *, read_only: bool) -> None:
        super().__init__(disk.name, disk.size, read_only=read_only)
        self.disk = disk
        self.can_discard = disk.can_discard
        self.can_write_zeroes = disk.can_write_zeroes
        self.can_fast_zero = disk.can_fast_zero
        self.is_hung = False
        self.is_closed = False
        self._held: list[Bio] = []
        self._under_way: dict[Bio, Bio] = {}  # ours, and whose it is

    def submit(self, bio: Bio) -> None:
        assert not self.is_closed, f"{self.name}: used after it was closed"
        state = self.health.state
        durable = bio.op == OP_FLUSH or bool(bio.flags & FUA and bio.op != OP_READ)
        status = self.check_bounds(bio)
        if state is HealthState.LOST or (durable and state is HealthState.LATCHED):
            status = errnos.EIO
        if status:
            bio.end(status)
            return
        bio.own()
        ours = Bio(bio.op, bio.offset, bio.length, bio.payload, bio.flags, self._ended)
        self._under_way[ours] = bio
        if self.is_hung:
            self._held.append(ours)
        else:
            self.disk.submit(ours)

    async def close(self) -> None:
        self.is_closed = True
        self.let_go(errnos.EIO)

    async def identify(self, role: str) -> Evidence:
        """Tell the name and nothing else, so that targets compare the content."""
        return Evidence("crash device", self.name, self.size)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await self.disk.extents(offset, length)

    def go_on(self, rng: random.Random) -> None:
        """End the hang: carry out the requests that were held back."""
        self.is_hung = False
        held, self._held = self._held, []
        rng.shuffle(held)
        for ours in held:
            if ours in self._under_way:
                self.disk.submit(ours)

    def let_go(self, errno: int) -> None:
        """The connection is gone: the requests in flight end, and each has been carried out or not."""
        self.health.lose(errno)
        self.break_off()

    def break_off(self) -> None:
        """End the requests in flight. Each has been carried out or not."""
        under_way, self._under_way = self._under_way, {}
        self._held.clear()
        self.disk.abandon(under_way.keys())
        for bio in under_way.values():
            bio.end(errnos.EIO)

    def _ended(self, ours: Bio) -> None:
        bio = self._under_way.pop(ours, None)
        if bio is None:
            return  # it was let go before
        if ours.status:
            self.health.note_error(OP_NAMES[ours.op], ours.status)
            if ours.op == OP_FLUSH or (ours.flags & FUA and ours.op != OP_READ):
                self.health.latch(ours.status)
        bio.end(ours.status)


class Openings:
    """A `DeviceOpener` of crash devices, each as often as it is asked to. See the module head.

    Attributes:
        disks: by name.
        live: the openings that are not closed.
    """

    def __init__(self, disks: Collection[CrashDevice]) -> None:
        self.disks = {disk.name: disk for disk in disks}
        self.live: list[Opening] = []
        self._gone: set[str] = set()
        self._hung: set[str] = set()
        for disk in disks:
            disk.latches = False

    async def open_device(self, name: str, *, read_only: bool) -> Device:
        disk = self.disks.get(name)
        if disk is None:
            raise ResolveError(name, "No such file or directory", errnos.ENOENT)
        if name in self._gone:
            raise ResolveError(name, GONE, errnos.ECONNREFUSED)
        self.live = [each for each in self.live if not each.is_closed]
        opening = Opening(disk, read_only=read_only)
        opening.is_hung = name in self._hung
        self.live.append(opening)
        return opening

    async def create_device(self, name: str, size: int) -> Device:
        raise ResolveError(name, "cannot be created here", errnos.EPERM)

    def may_create(self, name: str) -> bool:
        return False

    def identity(self, name: str) -> str:
        return name

    async def remove_created(self, name: str) -> None:
        raise AssertionError("nothing is created here")

    # ---- what may happen to a disk ----

    def of(self, disk: CrashDevice) -> list[Opening]:
        """The openings of a disk."""
        return [each for each in self.live if each.disk is disk and not each.is_closed]

    def hang(self, disk: CrashDevice) -> None:
        self._hung.add(disk.name)
        for opening in self.of(disk):
            opening.is_hung = True

    def go_on(self, disk: CrashDevice, rng: random.Random) -> None:
        self._hung.discard(disk.name)
        for opening in self.of(disk):
            opening.go_on(rng)

    def go(self, disk: CrashDevice) -> None:
        """The disk, or the way to it, is gone."""
        self._gone.add(disk.name)
        self._hung.discard(disk.name)
        for opening in self.of(disk):
            opening.is_hung = False
            opening.let_go(errnos.ECONNRESET)

    def come_back(self, disk: CrashDevice, seed: int, fate: Fate) -> None:
        """Let the disk be opened again; `fate` is that of the unflushed writes."""
        self._gone.discard(disk.name)
        disk.lose_power(seed, fate)

    def forget(self, disk: CrashDevice, seed: int, fate: Fate) -> None:
        """The disk loses its power, and its openings go on."""
        openings = self.of(disk)
        for opening in openings:
            opening.break_off()
        disk.lose_power(seed, fate)
        for opening in openings:
            opening.health.note_loss()

    def exchange(self, disk: CrashDevice, other: CrashDevice) -> None:
        """Another disk has come back under the name of this one."""
        assert other.name == disk.name
        self.go(disk)
        self._gone.discard(disk.name)
        self.disks[disk.name] = other
        other.latches = False

    def die(self) -> None:
        """The process that had the disks open is dead: each request in flight has been carried out or not."""
        for opening in self.live:
            opening.let_go(errnos.EIO)
        self.live.clear()
