# SPDX-License-Identifier: Apache-2.0
"""`Gate`: what clients ask of one device is carried out after what they have given up.

Theory of operation. NBD leaves open in which order requests are carried out that are in flight at the
same time. But a client that has lost its connection, or has closed it, takes its requests for ended. It
comes back, writes the same place again, flushes, and relies on the answer. A write of the old
connection that is carried out after that, by a worker thread or by a slow device, destroys
acknowledged data. So there is one gate for each device that clients are attached to, and it knows
the **elders**: the writes (WRITE, WRITE_ZEROES, TRIM) that are in flight

    on a connection, when its client leaves (EOF, DISC, a lost peer, an abort)
    on any connection, when a new client attaches: it may be the same client, whose old connection we
        do not know to be dead yet (a cable was pulled, or its FIN is still on its way)

What is asked for later and overlaps an elder is *held* until the elder has ended, whatever
connection it comes from: a write, so that the younger one stays; a READ or a BLOCK_STATUS, so that nobody
reads the new content and then the old one. A held request that becomes an elder itself is waited for in
turn, so what overlaps goes in the order in which it came. Waiting is only ever for what came earlier, so
nothing waits in a circle. What does not overlap an elder is not held, even if the elder never ends; that
something waits is then logged after `HELD_LOG_S`. A held write whose connection closes is dropped: it had
not begun, and nobody waits for it. FLUSH is never held: it covers what has ended.

Nearly always there is no elder, and the members submit straight to the device. While there
is one, the gate is put in between, so the hot path pays nothing for it.

Requests that lie unread in the socket of a client that has gone are older than what a new client
sends, too: each member `settle`s before a new one joins.

Beyond our reach is what is still in the network, or in the memory of the other machine, when its client
has already connected again: NBD has nothing by which it could be told from what a living client sends.
A client that waits for the end of the old connection before it connects again is safe (our own does:
`nbdtarget.devices.nbd.connection`). Requests of two connections that live are not ordered either. A client
that gives one of them up, and sends its requests again by another that it has had open all along, as the kernel
does after a timeout, is safe as soon as we have seen the end of the first; both may come in one turn of the loop.

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
        """If the client has gone, take what it has sent before, and notice that it has gone."""

    def writes_in_flight(self) -> Iterable[_Write]: ...

    def route(self, submit: Callable[[Bio], None]) -> None:
        """Submit bios this way from now on."""


class _Held:
    """Something that waits for elders."""

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
        """Whether nobody needs this gate any more."""
        return not self._members and not self.elders

    def join(self, member: Member) -> None:
        """A client attaches: what is in flight now is older than what it will ask for."""
        older = tuple(self._members)
        # First: if the last of the others goes, it must not take the gate with it.
        self._members.append(member)
        for each in older:
            each.settle()
        for each in older:
            if each in self._members:
                self._make_elders(each)
        if self.elders:
            member.route(self.submit)

    def leave(self, member: Member) -> None:
        """The client asks for nothing more; what it has in flight may go on. Idempotent."""
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
        """Submit a bio to the device, perhaps after the elders that it overlaps."""
        op = bio.op
        elders = [] if op in (OP_FLUSH, OP_CACHE) else self._overlapped(bio)
        if not elders:
            self._device.submit(bio)
            return
        bio.own()
        self._held[bio] = self._hold(elders, partial(self._release, bio))

    async def passed(self, offset: int, length: int) -> None:
        """Wait for the elders that overlap this range now."""
        asked = Bio(OP_CACHE, offset, length, None, 0, _not_a_request)
        elders = self._overlapped(asked)
        if elders:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._hold(elders, partial(_set, done))
            await done

    def ended(self, bio: Bio) -> None:
        """A bio of a member has ended, or of one that has left; it may be an elder."""
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

    def _release(self, bio: Bio) -> None:
        del self._held[bio]
        self._device.submit(bio)

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
    """The gates of all devices that clients are attached to."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._gates: dict[Device, Gate] = {}

    def of(self, device: Device) -> Gate:
        gate = self._gates.get(device)
        if gate is None:
            gate = self._gates[device] = Gate(device, self._clock)
        return gate

    def forget_idle(self, device: Device) -> None:
        """A connection has gone for good: drop the gate, if it was the last one."""
        gate = self._gates.get(device)
        if gate is not None and gate.is_idle:
            del self._gates[device]


def _set(done: asyncio.Future[None]) -> None:
    if not done.done():  # cancelled: nobody waits any more
        done.set_result(None)


def _nothing() -> None:
    """What was held has been dropped."""


def _not_a_request(_: Bio) -> None:
    raise AssertionError("only a range: it is submitted to nobody")
