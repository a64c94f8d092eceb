# SPDX-License-Identifier: Apache-2.0
"""`Gate`: requests of a new connection to a device are carried out after older requests that they overlap.

Theory of operation. NBD leaves open in which order requests are carried out that are in flight at the
same time. But a client that has lost its connection, or has closed it, assumes that the requests of that connection have
ended. It connects again, writes the same place again, flushes, and relies on the answer. If a worker thread or a
slow device carries out a write of the old connection after that, acknowledged data is destroyed. So there is one
gate for each device that has clients, and it knows the **elders**: the writes (WRITE, WRITE_ZEROES, TRIM) that are in flight

    on a connection, when its client leaves (EOF, DISC, a lost peer, an abort)
    on any connection, when a new client attaches: it may be the same client, whose old connection is not
        known to be dead yet (for example, a cable was pulled, or its FIN is still on its way)

A later request that overlaps an elder is *held* until the elder has ended, whichever
connection it comes from. A write is held so that the younger data stays; a READ or a BLOCK_STATUS, so that no client
reads the new content first and the old content later. A held request that becomes an elder itself is waited for in
turn, so overlapping requests are carried out in the order in which they came. A request only ever waits for earlier ones, so
there is no deadlock. A request that overlaps no elder is not held, even if the elder never ends; a line in the log
says after `HELD_LOG_S` that requests wait. A held write is dropped when its connection closes: it had
not begun, and no client waits for it. FLUSH is never held, because it covers only writes that have ended.

Nearly always there is no elder, and the members submit straight to the device. Only while there
is one, they submit to the gate, so the hot path pays nothing for it.

Requests that lie unread in the socket of a client that has gone are older than the requests of a new client,
too: each member `settle`s before a new one joins.

Out of reach are requests that are still in the network, or in the memory of the other machine, when their client
has already connected again: NBD has nothing that tells them from requests of a living client.
A client that waits for the end of the old connection before it connects again is safe (the client of this project does:
`nbdtarget.devices.nbd.connection`). Requests of two living connections are not ordered either. A client
that gives one connection up and repeats its requests on another that was open all along, as the kernel does
after a timeout, is safe as soon as this server has seen the end of the first; both may happen in one turn of the loop.

Bounds. Elders and held requests are counted as in flight on their connections, which are bounded, and
which are kept as long as anything of theirs is in flight.
"""

import asyncio
import errno as errnos
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, Protocol

from nbdtarget.bio import OP_CACHE, OP_FLUSH, Bio
from nbdtarget.common.clock import Clock, Timer
from nbdtarget.devices.base import Device

__all__ = ["Gate", "Gates", "Member"]

log = logging.getLogger(__name__)

HELD_LOG_S: Final = 10.0  # from the first held request to a line in the log

_Write = tuple[Bio, int, int]  # offset and length: those that the client asked for


class Member(Protocol):
    """A connection that is attached to the device."""

    def settle(self) -> None:
        """If the client has gone, take the requests that it sent before, and notice that it has gone."""

    def writes_in_flight(self) -> Iterable[_Write]: ...

    def route(self, submit: Callable[[Bio], None]) -> None:
        """Submit bios this way from now on."""


class _Held:
    """A request that waits for elders: how many are left, and what to do after the last one."""

    __slots__ = ("go", "left")

    def __init__(self, left: int, go: Callable[[], None]) -> None:
        self.left = left
        self.go = go


class Gate:
    """See the module head.

    Attributes:
        elders: each with the begin and end of its range, in bytes.
    """

    def __init__(self, device: Device, clock: Clock) -> None:
        self.elders: dict[Bio, tuple[int, int]] = {}
        self._device = device
        self._clock = clock
        self._members: list[Member] = []
        self._held: dict[Bio, _Held] = {}
        self._behind: dict[Bio, list[_Held]] = {}  # the elder: what waits for it
        self._timer: Timer | None = None

    @property
    def is_idle(self) -> bool:
        """Whether this gate has neither members nor elders."""
        return not self._members and not self.elders

    def join(self, member: Member) -> None:
        """A client attaches: the writes in flight now are older than all of its requests."""
        older = tuple(self._members)
        # The new member is added first: if the last of the others leaves below, the gate must not be idle.
        self._members.append(member)
        for each in older:
            each.settle()
        for each in older:
            if each in self._members:
                self._make_elders(each)
        if self.elders:
            member.route(self.submit)

    def leave(self, member: Member) -> None:
        """The client sends no more requests; those in flight go on. Idempotent."""
        if member in self._members:
            self._members.remove(member)
            self._make_elders(member)

    def drop(self, bios: Iterable[Bio]) -> None:
        """The connection of these bios is closed: end those of them that are held."""
        for bio in bios:
            held = self._held.pop(bio, None)
            if held is not None:
                held.go = _nothing
                bio.end(errnos.EIO)

    def submit(self, bio: Bio) -> None:
        """Submit a bio to the device, after the elders that it overlaps if there are some."""
        op = bio.op
        elders = [] if op in (OP_FLUSH, OP_CACHE) else self._overlapped(bio)
        if not elders:
            self._device.submit(bio)
            return
        bio.own()
        release = partial(self._release, bio, partial(self._device.submit, bio))
        self._held[bio] = self._hold(elders, release)

    def pass_by(self, bio: Bio, go: Callable[[], None]) -> None:
        """Call `go` after the elders that `bio` overlaps, now if there are none. The bio is not submitted here.

        It is for a bio that goes to the device in slices: it is one member's write in flight, and may become an elder.
        """
        elders = [] if bio.op == OP_CACHE else self._overlapped(bio)
        if elders:
            self._held[bio] = self._hold(elders, partial(self._release, bio, go))
        else:
            go()

    async def passed(self, offset: int, length: int) -> None:
        """Wait for the elders that overlap this range now."""
        asked = Bio(OP_CACHE, offset, length, None, 0, _not_a_request)
        elders = self._overlapped(asked)
        if elders:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._hold(elders, partial(_set, done))
            await done

    def ended(self, bio: Bio) -> None:
        """A bio of a present or former member has ended. It may be an elder."""
        if self.elders.pop(bio, None) is None:
            return
        for held in self._behind.pop(bio, ()):
            held.left -= 1
            if not held.left:
                held.go()
        if not self.elders:
            for member in self._members:
                member.route(self._device.submit)

    def _overlapped(self, bio: Bio) -> list[Bio]:
        begin, end = bio.offset, bio.offset + bio.length
        return [
            elder
            for elder, (elder_begin, elder_end) in self.elders.items()
            if begin < elder_end and elder_begin < end
        ]

    def _hold(self, elders: list[Bio], go: Callable[[], None]) -> _Held:
        held = _Held(len(elders), go)
        for elder in elders:
            self._behind.setdefault(elder, []).append(held)
        if self._timer is None:
            self._timer = self._clock.call_later(HELD_LOG_S, self._log_held)
        return held

    def _release(self, bio: Bio, go: Callable[[], None]) -> None:
        del self._held[bio]
        go()

    def _make_elders(self, member: Member) -> None:
        had_none = not self.elders
        for bio, offset, length in member.writes_in_flight():
            self.elders[bio] = offset, offset + length
        if had_none and self.elders:
            for each in self._members:
                each.route(self.submit)

    def _log_held(self) -> None:
        self._timer = None
        if self._held:
            log.warning(
                "%s: requests wait for %d earlier writes that have not ended for %g s",
                self._device.name,
                len(self._behind),
                HELD_LOG_S,
            )


class Gates:
    """The gates of all devices that have clients."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._gates: dict[Device, Gate] = {}

    def of(self, device: Device) -> Gate:
        gate = self._gates.get(device)
        if gate is None:
            gate = self._gates[device] = Gate(device, self._clock)
        return gate

    def forget_idle(self, device: Device) -> None:
        """A connection has released the device: drop the gate if nothing needs it any more."""
        gate = self._gates.get(device)
        if gate is not None and gate.is_idle:
            del self._gates[device]


def _set(done: asyncio.Future[None]) -> None:
    if not done.done():  # it is done if the waiting task was cancelled
        done.set_result(None)


def _nothing() -> None:
    """The held request was dropped."""


def _not_a_request(_: Bio) -> None:
    raise AssertionError("this bio only describes a range, and is never submitted")
