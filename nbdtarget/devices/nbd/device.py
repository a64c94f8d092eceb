# SPDX-License-Identifier: Apache-2.0
"""`NbdDevice`: an export of another NBD server.

Theory of operation. A bio becomes one request, or several pieces, on one of the device's
connections (several if the server says CAN_MULTI_CONN; some of them are lent to bulk copies, see `lent.py`). At most IN_FLIGHT_MAX requests are
with the server; what is beyond waits its turn in a queue whose length the submitters bound.

    READ, WRITE    pieces of at most the server's payload_max
    WRITE + FUA    FUA if the server has it; else the write, then a FLUSH
    FLUSH          one at a time; those that come meanwhile share the next one
    DISCARD        TRIM, or nothing
    WRITE_ZEROES   WRITE_ZEROES, or WRITE of zeroes in pieces
    CACHE          CACHE, or nothing
    extents        BLOCK_STATUS of base:allocation, or data; no other metadata context is
                   asked for, whatever the server may offer

What carries no payload is one request, however long it is, if the server speaks extended headers. Otherwise it is
cut into pieces of RANGE_MAX.

*Alignment.* A server with a minimum block size gets only whole blocks. A READ is widened into a buffer of its own.
For a write that begins or ends inside a block see `writes.py`.

*Durability.* A write that has ended is in the hands of the server; what a FLUSH covers is as durable as the server
makes it. A server without FLUSH promises nothing, and is refused as a device to write to. After a failed FLUSH, a
failed write with FUA, or another failed write (but for want of space), FLUSH and FUA fail until the device is opened
again, because the server's own file may have latched as ours would.

*Loss.* A connection is lost when the server hangs up, when it does not answer in time, and when it answers ESHUTDOWN.
(nbdkit, for one, refuses everything from then on, but keeps the connection for as long as the client does.) When any
connection is lost, the device is lost: everything in flight ends with EIO, on every connection, and so does all that comes
until it is connected again.

*Connecting again.* The device tries by itself, at first after `RECONNECT_S_MIN`, then after twice as long each time, up
to `RECONNECT_S_MAX`. (`connection.py` tells how writes that were under way on the lost connection are kept from
overtaking those on the new one.) No request is sent again: those that were answered need not be, and the others have
ended with EIO, so that their senders know.

*Lost writes.* A server that crashed may have forgotten what it had answered. So if a write has ended that no FLUSH has
covered since, the device counts a loss (`nbdtarget.devices.health`), and the next FLUSH of each client fails, once. If
there was no such write, the device just goes on. A device that was latched counts a loss in any case, because being
connected again is for it what being opened again is.

Requests that come while the device is lost end with EIO at once, and do not wait for the server. A mirror, a cache or
a file system above it wants to know at once, and a client that wants to wait can ask again. The kernel
(`dead_conn_timeout`) and QEMU (`reconnect-delay`) do the same by default. A device that says `holds_reads` keeps its reads instead
(`held.py`).

A server that comes back with another disk (another size, minimum block size or maximum payload), or that may not be
written to any more, is refused. The log says so once, and the device goes on trying: the right one may come back
later. Whether the content is what it was is up to the server.
"""

import asyncio
import contextlib
import errno as errnos
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from nbdtarget.bio import (
    FAST_ZERO,
    FUA,
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_NAMES,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.common.clock import sleep, timeout
from nbdtarget.common.errors import DeviceError, ResolveError
from nbdtarget.devices.base import EXTENT_DATA, Device, Extent
from nbdtarget.devices.bulk_streams import BulkStream
from nbdtarget.devices.identity import NBD, nbd_ids
from nbdtarget.devices.nbd.block_status import BlockStatus, Runs
from nbdtarget.devices.nbd.connect import (
    AnotherDisk,
    check_again,
    check_same,
    connect_all,
    usable_size,
)
from nbdtarget.devices.nbd.connection import NbdConnection, connect
from nbdtarget.devices.nbd.held import HeldReads
from nbdtarget.devices.nbd.lent import LentConnection
from nbdtarget.devices.nbd.uri import parse_nbd_uri
from nbdtarget.devices.nbd.writes import Writes, zero_flags
from nbdtarget.devices.ranged.traffic import Traffic
from nbdtarget_metadata.disks import Evidence
from nbdtarget_protocol import consts
from nbdtarget_protocol.client import ClientNegotiated, Completion

__all__ = ["NbdDevice", "open_nbd"]

log = logging.getLogger(__name__)

IN_FLIGHT_MAX: Final = 64  # requests, over all connections
PIECE_MAX: Final = 4 << 20  # bytes of payload in one request
RECONNECT_S_MIN: Final = (
    0.25  # from the loss to the first attempt, and twice as long to the next
)
RECONNECT_S_MAX: Final = 5.0
LENT_END_S_MAX: Final = 2.0  # for the threads of bulk copies to end, when it is closed
# Bytes of a request that carries no payload: with compact headers, and with extended ones (all that a disk can have).
RANGE_MAX: Final = 1 << 30
EXTENDED_RANGE_MAX: Final = 1 << 63

_COMMANDS: Final = (
    consts.CMD_READ,
    consts.CMD_WRITE,
    consts.CMD_FLUSH,
    consts.CMD_TRIM,
    consts.CMD_WRITE_ZEROES,
    consts.CMD_CACHE,
)
_READING: Final = (consts.CMD_READ, consts.CMD_CACHE, consts.CMD_BLOCK_STATUS)
_ZEROES: Final = memoryview(bytes(PIECE_MAX))
_NOTHING_LOST: Final = frozenset({errnos.ENOSPC, errnos.ENOTSUP, errnos.EPERM})

# command, flags, offset, length, payload, buffer, whose
_Request = tuple[
    int, int, int, int, memoryview | None, memoryview | None, "Bio | _Pieces | _Status"
]
_Status = asyncio.Future[tuple[int, Completion | None]]


class _Pieces:
    """The requests that one bio became."""

    __slots__ = ("bio", "error", "left")

    def __init__(self, bio: Bio, left: int) -> None:
        self.bio = bio
        self.left = left
        self.error = 0


class NbdDevice(Device):
    """An export behind one or more connections. Made by `open_nbd`.

    Attributes:
        holds_reads: what is read while the device is lost waits, for `hold_s_max` seconds; 0: for ever. Nothing is written then.
    """

    can_resize = False
    may_be_container = True
    holds_reads = False
    hold_s_max = 0.0

    def __init__(
        self,
        name: str,
        connections: list[NbdConnection],
        connect_anew: Callable[[], Awaitable[list[NbdConnection]]],
        *,
        read_only: bool,
    ) -> None:
        negotiated = connections[0].negotiated
        self._block = negotiated.block_size_min
        super().__init__(name, usable_size(negotiated), read_only=read_only)
        self._block_status = BlockStatus(self._block, self._ask_status)
        self._counted: Traffic = Traffic()
        self.traffic: Traffic = self._counted
        self._take_abilities(negotiated)
        self.logical_block_size = max(512, self._block)
        payload_max = negotiated.payload_max // self._block * self._block
        self._piece_max = min(PIECE_MAX, payload_max)
        self._connections = connections
        self._lent: set[LentConnection] = set()
        self._nr_borrowed = 0  # those included that were shut, and have not come back
        self._came_back = asyncio.Event()
        self._turn = 0
        self._in_flight = 0
        self._queue: deque[_Request] = deque()
        self._writes = Writes(self._block, self._start_pieces)
        self._flush_runs: list[Bio] = []
        self._flush_waiting: list[Bio] = []
        # Writes that have ended without being durable, and those that a FLUSH has covered.
        self._nr_written = 0
        self._nr_flushing = 0
        self._nr_flushed = 0
        # A copy of `health` for `submit`: set where that is set.
        self._is_latched = self._is_lost = False
        self._held = HeldReads()
        self._held.is_on = self.holds_reads
        self._refusal = ""  # why the server was not taken the last time
        self._connect_anew = connect_anew
        self._reconnecting: asyncio.Task[None] | None = None
        self._start_connections()

    def _take_abilities(self, negotiated: ClientNegotiated) -> None:
        """Take over what the server can do; it may be another when it comes back."""
        flags = negotiated.flags
        self.can_discard = bool(flags & consts.FLAG_SEND_TRIM)
        self.can_write_zeroes = bool(flags & consts.FLAG_SEND_WRITE_ZEROES)
        self.rotational = bool(flags & consts.FLAG_ROTATIONAL)
        self.can_fast_zero = bool(flags & consts.FLAG_SEND_FAST_ZERO)
        self._has_flush = bool(flags & consts.FLAG_SEND_FLUSH)
        self._has_fua = bool(flags & consts.FLAG_SEND_FUA)
        self._has_cache = bool(flags & consts.FLAG_SEND_CACHE)
        self._has_status = bool(negotiated.contexts)
        self._range_max = EXTENDED_RANGE_MAX if negotiated.extended else RANGE_MAX
        self._block_status.may_ask(self._range_max)

    @property
    def is_extended(self) -> bool:
        """Whether the server speaks extended headers."""
        return self._connections[0].negotiated.extended

    @property
    def nr_connections(self) -> int:
        return len(self._connections) + len(self._lent)

    def lend_streams(self) -> list[BulkStream]:
        """Lend each connection but one that is idle now, if nothing is written here.

        A server that takes one connection only is read through that one, by bios.
        """
        if self._is_lost or not self.read_only:
            return []
        lent = LentConnection.borrow_all(self, self._connections[1:], self._block)
        self._lent.update(lent)
        self._nr_borrowed += len(lent)
        self._connections = [
            each
            for each in self._connections
            if not any(each is other.connection for other in lent)
        ]
        return list(lent)

    def lent_came_back(self, lent: LentConnection, reason: str) -> None:
        """A bulk copy has ended, or with a `reason`: the connection is broken."""
        self._nr_borrowed -= 1
        self._came_back.set()
        is_ours = lent in self._lent
        self._lent.discard(lent)
        if is_ours and not reason and not self._is_lost:
            lent.connection.take_back()
            self._connections.append(lent.connection)
            return
        lent.connection.close()
        if is_ours:
            self._connection_lost(reason)

    def lent_read_failed(self, status: int) -> int:
        """A READ on a lent connection has failed with `status`; return what it means here."""
        if status == errnos.ESHUTDOWN:
            status = errnos.EIO
            self._connection_lost("the server is shutting down")
        if not self._is_lost:  # of which the reason is noted
            self.health.note_error(OP_NAMES[OP_READ], status)
        return status

    def note_bulk_read(self, nr_requests: int, nr_bytes: int) -> None:
        self._counted.requests += nr_requests
        self._counted.bytes_received += nr_bytes

    def _shut_lent(self) -> None:
        """Have the threads of bulk copies end; their connections are closed when they have."""
        lent, self._lent = self._lent, set()
        for each in lent:
            each.shut()

    def submit(self, bio: Bio) -> None:
        op = bio.op
        status = errnos.EIO if self._is_lost else self.check_bounds(bio)
        if self._is_lost and self._may_hold(bio):
            return self._held.hold(bio, self.hold_s_max)
        durable = op == OP_FLUSH or (op != OP_READ and bool(bio.flags & FUA))
        if not status and durable and self._is_latched:
            status = errnos.EIO
        if not status and bio.flags & FAST_ZERO and not self._zeroes_fast(bio):
            status = errnos.ENOTSUP
        if status:
            bio.end(status)
        elif op == OP_FLUSH:
            self._flush_waiting.append(bio)
            self._start_flush()
        elif not bio.length or (op == OP_CACHE and not self._has_cache):
            bio.end(0)
        elif op == OP_READ:
            bio.own()
            self._start_read(bio)
        elif op == OP_CACHE:
            self._start_pieces(bio, *self._writes.widened(bio))
        else:
            bio.own()
            self._submit_write(bio)

    def _may_hold(self, bio: Bio) -> bool:
        return self._held.is_on and bio.op == OP_READ and not self.check_bounds(bio)

    @property
    def nr_in_flight(self) -> int:
        nr_lent = sum(lent.nr_in_flight for lent in self._lent)
        return self._in_flight + len(self._queue) + nr_lent + len(self._held)

    def give_up_reads(self) -> None:
        self._held.give_up()
        if self._is_lost:
            return  # there are none
        if self.read_only:
            # Without a connection what follows fails at once, instead of hanging like the rest.
            if self.nr_in_flight:
                reason = f"{self.nr_in_flight} reads given up"
                self._connection_lost(reason, RECONNECT_S_MAX)
            return
        given_up = [c for conn in self._connections for c in conn.give_up_reads()]
        queued = [request for request in self._queue if request[0] in _READING]
        for request in queued:
            self._queue.remove(request)
            self._answer(request[-1], errnos.EIO, None)
        for completion in given_up:
            self._completed(completion)
        if nr := len(given_up) + len(queued):
            log.warning("%s: %d reads given up", self.name, nr)

    async def measure(self) -> int:
        # A server tells the size at the handshake, and never again.
        connection = await connect(self.name, parse_nbd_uri(self.bare_name))
        connection.close()
        return usable_size(connection.negotiated)

    async def check_again(self) -> None:
        uri, before = parse_nbd_uri(self.bare_name), self._connections[0].negotiated
        await check_again(self.name, uri, self.size, before, read_only=self.read_only)

    async def reopened(self, name: str, *, read_only: bool) -> Device | None:
        """Connect now, if the server has been lost. If it has another disk now, the name means that one."""
        if not self._is_lost or self.read_only is not read_only or self.changed:
            return None
        await self._stop_connecting()
        try:
            await self._connect_once()
        except AnotherDisk as error:
            self._note_refusal(error)
            return None
        finally:
            if self._is_lost:
                self._start_connecting(RECONNECT_S_MIN)
        return self

    async def close(self) -> None:
        self._is_lost = True
        self._held.give_up()
        self._shut_lent()
        await self._stop_connecting()
        with contextlib.suppress(TimeoutError):
            async with timeout(LENT_END_S_MAX):
                while self._nr_borrowed:
                    self._came_back.clear()
                    await self._came_back.wait()
        for connection in self._connections:
            connection.close()

    async def identify(self, role: str) -> Evidence:
        return Evidence(
            NBD, self.bare_name, self.size, nbd_ids(parse_nbd_uri(self.bare_name))
        )

    async def extents(self, offset: int, length: int) -> list[Extent]:
        found = []
        if self._has_status:
            found = await self._block_status.extents(offset, length)
        return found or [Extent(length, EXTENT_DATA)]

    async def _ask_status(self, offset: int, length: int) -> Runs | None:
        """Send a BLOCK_STATUS. Returns None if the server does not tell. Raises: DeviceError: it is lost."""
        future: _Status = asyncio.get_running_loop().create_future()
        command = consts.CMD_BLOCK_STATUS
        self._request((command, 0, offset, length, None, None, future))
        status, completion = await future
        if self._is_lost:
            raise DeviceError(errnos.EIO, self.name, "extents", offset, length)
        if status or completion is None:
            log.info("%s: no block status: errno %d", self.name, status)
            return None
        assert completion.extents is not None
        return completion.extents

    # ---- requests ----

    def _request(self, request: _Request) -> None:
        """Send a request, now or when it is its turn."""
        if self._is_lost:
            self._answer(request[-1], errnos.EIO, None)
        elif self._in_flight < IN_FLIGHT_MAX:
            self._send(request)
        else:
            self._queue.append(request)

    def _send(self, request: _Request) -> None:
        self._in_flight += 1
        self._counted.requests += 1
        connections = self._connections
        connection = connections[0]
        if len(connections) > 1:
            # The one with the fewest requests in flight; if several have as few, each in its turn.
            self._turn = (self._turn + 1) % len(connections)
            connection = connections[self._turn]
            for other in connections:
                if other.in_flight < connection.in_flight:
                    connection = other
        connection.send(*request)

    def _completed(self, completion: Completion) -> None:
        self._in_flight -= 1
        if self._queue and not self._is_lost:
            self._send(self._queue.popleft())
        status = completion.error
        if self._is_lost and not status and completion.command not in _READING:
            # The answer came together with the loss, and after the loss was counted: this write may be
            # lost, too, and no count tells of it. So it must not be acknowledged.
            status = errnos.EIO
        elif status:
            if completion.message:
                log.info("%s: %s", self.name, completion.message)
            if status == errnos.ESHUTDOWN:
                status = errnos.EIO
                # Such a server refuses everything from now on, and would not hang up by itself.
                self._connection_lost("the server is shutting down")
        self._answer(completion.private, status, completion)

    def _answer(
        self, whose: object, status: int, completion: Completion | None
    ) -> None:
        if type(whose) is Bio:
            self._finish(whose, status)
        elif type(whose) is _Pieces:
            whose.left -= 1
            whose.error = whose.error or status
            if whose.left == 0:
                self._finish(whose.bio, whose.error)
        else:
            assert isinstance(whose, asyncio.Future)
            if not whose.cancelled():
                whose.set_result((status, completion))

    def _finish(self, bio: Bio, status: int) -> None:
        """All requests of `bio` have been answered."""
        op = bio.op
        if status:
            self.health.note_error(OP_NAMES[op], status)
        elif op == OP_READ:
            self._counted.bytes_received += bio.length
        if op == OP_FLUSH:
            self._flush_done(status)
            return
        if op in (OP_READ, OP_CACHE):
            if status and self._is_lost and self._may_hold(bio):
                self._held.hold(bio, self.hold_s_max)
            else:
                bio.end(status)
            return
        self._writes.ended()
        if status:
            # A DISCARD promises nothing, so one that fails has lost nothing.
            if op != OP_DISCARD and (bio.flags & FUA or status not in _NOTHING_LOST):
                self._latch(bio, status)
            bio.end(status)
        elif bio.flags & FUA and not self._has_fua:
            self._flush_waiting.append(bio)
            self._start_flush()
        else:
            if not bio.flags & FUA and op != OP_DISCARD:
                self._nr_written += 1
            bio.end(0)

    def _latch(self, bio: Bio, status: int) -> None:
        if self._is_lost or status == errnos.ENOTSUP:
            return
        self._is_latched = True
        if self.health.latch(status):
            log.error(
                "%s: %s failed with errno %d: no flush will succeed until it is opened"
                " again",
                self.name,
                OP_NAMES[bio.op],
                status,
            )

    # ---- flush ----

    def _start_flush(self) -> None:
        if self._flush_runs or not self._flush_waiting:
            return
        bios, self._flush_waiting = self._flush_waiting, []
        if self._is_latched or self._is_lost or not self._has_flush:
            # Without FLUSH nothing was ever written here: the device is read-only.
            status = errnos.EIO if self._is_latched or self._is_lost else 0
            for bio in bios:
                bio.end(status)
            return
        self._flush_runs = bios
        # Only writes that have ended by now are covered.
        self._nr_flushing = self._nr_written
        # The request gets a bio of its own, because those that wait for it may also be writes with FUA, for
        # which this FLUSH makes up. `_flush_done` ends them all.
        rider = Bio(OP_FLUSH, 0, 0, None, 0, _no_endio)
        self._request((consts.CMD_FLUSH, 0, 0, 0, None, None, rider))

    def _flush_done(self, status: int) -> None:
        bios, self._flush_runs = self._flush_runs, []
        if not status:
            self._nr_flushed = self._nr_flushing
        elif bios:
            self._latch(bios[0], status)
        for bio in bios:
            bio.end(status)
        self._start_flush()

    # ---- reads ----

    def _start_read(self, bio: Bio) -> None:
        offset, length = bio.offset, bio.length
        begin, asked = self._writes.widened(bio)
        if begin == offset and asked == length:
            self._start_pieces(bio, offset, length)
            return
        payload = bio.payload
        assert payload is not None
        wide = memoryview(bytearray(asked))

        def read(inner: Bio) -> None:
            if not inner.status:
                payload[:] = wide[offset - begin : offset - begin + length]
            bio.end(inner.status)

        self._start_pieces(Bio(OP_READ, begin, asked, wide, 0, read), begin, asked)

    def _start_pieces(self, bio: Bio, offset: int, length: int) -> None:
        """Send `bio` for a range, in as many requests as it takes."""
        op = bio.op
        command, flags = _COMMANDS[op], 0
        if op not in (OP_READ, OP_CACHE):
            if bio.flags & FUA and self._has_fua:
                flags = consts.CMD_FLAG_FUA
            if op == OP_WRITE_ZEROES:
                if self.can_write_zeroes:
                    flags |= zero_flags(bio.flags)
                else:
                    command = consts.CMD_WRITE
        payload = bio.payload if op == OP_WRITE else None
        buffer = bio.payload if op == OP_READ else None
        carries = command in (consts.CMD_READ, consts.CMD_WRITE)
        piece_max = self._piece_max if carries else self._range_max
        if length <= piece_max:
            if command == consts.CMD_WRITE and payload is None:
                payload = _ZEROES[:length]
            self._request((command, flags, offset, length, payload, buffer, bio))
            return
        pieces = _Pieces(bio, -(-length // piece_max))
        for at in range(0, length, piece_max):
            part = slice(at, min(at + piece_max, length))
            size = part.stop - at
            data = _ZEROES[:size] if command == consts.CMD_WRITE else None
            if payload is not None:
                data = payload[part]
            into = None if buffer is None else buffer[part]
            self._request((command, flags, offset + at, size, data, into, pieces))

    # ---- writes ----

    def _zeroes_fast(self, bio: Bio) -> bool:
        aligned = (bio.offset | bio.length) % self._block == 0
        return self.can_fast_zero and self.can_write_zeroes and aligned

    def _submit_write(self, bio: Bio) -> None:
        if bio.op != OP_DISCARD:
            self._writes.take(bio)
            return
        # Of a DISCARD the parts of blocks at its ends are left out: it is only advice.
        block = self._block
        begin = -(-bio.offset // block) * block
        length = (bio.offset + bio.length) // block * block - begin
        if self.can_discard and length > 0:
            self._writes.send(bio, begin, length)
        else:
            bio.end(0)

    # ---- loss ----

    def _connection_lost(self, reason: str, delay_s: float | None = None) -> None:
        """Args: delay_s: before the first attempt to connect again; None: RECONNECT_S_MIN."""
        if self._is_lost:
            return
        # Set first: what is given up below asks for it, and what an endio submits meanwhile ends with EIO.
        self._is_lost = True
        log.error("%s: connection lost: %s", self.name, reason)
        self._counted.went_away()
        # Counted before any bio ends with EIO: a client that flushes in its endio must learn of it.
        if self._is_latched or self._nr_written != self._nr_flushed:
            log.error(
                "%s: writes since the last flush may be lost: the next FLUSH"
                " of each client fails",
                self.name,
            )
            self._nr_flushed = self._nr_written
            self.health.note_loss()
        self.health.lose(errnos.EIO)
        self._shut_lent()
        # All connections are given up, also those that work: the server has to be as it was for each of them.
        answers = [c for conn in self._connections for c in conn.give_up()]
        queued = list(self._queue)
        self._queue.clear()
        for completion in answers:
            self._completed(completion)
        for request in queued:
            self._answer(request[-1], errnos.EIO, None)
        self.health.last_error = f"connection lost: {reason}"
        self._refusal = ""
        self._start_connecting(RECONNECT_S_MIN if delay_s is None else delay_s)

    @property
    def looks_for_a_server(self) -> bool:
        return self._reconnecting is not None and not self._reconnecting.done()

    def give_up_for_good(self) -> None:
        """`changed` says why: nothing is read any more, and no server is looked for."""
        assert self.changed
        self._held.give_up()
        self._connection_lost(self.changed)
        self.health.notify()

    def _start_connecting(self, delay_s: float) -> None:
        self._reconnecting = asyncio.ensure_future(self._connect_again(delay_s))

    async def _stop_connecting(self) -> None:
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.wait([self._reconnecting])

    async def _connect_again(self, delay_s: float) -> None:
        """Connect until the server is back, and has the disk that it had."""
        while self._is_lost and not self.changed:
            await sleep(delay_s)
            self._held.expire()
            try:
                await self._connect_once()
            except Exception as error:
                # Also after a bug of ours: reads and writes wait for this loop, so it must go on.
                self._note_refusal(error)
                delay_s = min(2 * delay_s, RECONNECT_S_MAX)

    async def _connect_once(self) -> None:
        """Connect, and be usable again. Raises: ResolveError."""
        self._counted.retries += 1
        connections = await self._connect_anew()
        try:
            before, after = self._connections[0].negotiated, connections[0].negotiated
            check_same(self.name, self.size, before, after)
        except Exception:
            for connection in connections:
                connection.close()
            raise
        log.warning("%s: connected again", self.name)
        self._counted.came_back()
        self._connections = connections
        # The right disk is back, but perhaps on another server, which can do less or more.
        self._take_abilities(connections[0].negotiated)
        self._is_lost = self._is_latched = False
        self.health.recover()
        self._start_connections()
        self._held.is_on = self.holds_reads
        self._held.resume(self.submit)

    def _note_refusal(self, error: Exception) -> None:
        """Say why the server is not taken: once, as long as it stays the same."""
        bug = None if isinstance(error, ResolveError) else error
        reason = error.reason if isinstance(error, ResolveError) else repr(error)
        if reason != self._refusal:
            self._refusal = self.health.last_error = reason
            what = f"{self.name}: {reason}"
            log.warning("%s; trying again and again", what, exc_info=bug)

    def _start_connections(self) -> None:
        for connection in self._connections:
            # The one before it may have broken the protocol at once, and then the device is lost again.
            if not self._is_lost:
                connection.start(self._completed, self._connection_lost)


async def open_nbd(name: str, *, read_only: bool) -> NbdDevice:
    """Connect to the export that the URI `name` names.

    Raises: ResolveError: no such server or export, read-only, without FLUSH, ….
    """
    uri = parse_nbd_uri(name)
    connecting = partial(connect_all, name, uri, read_only=read_only)
    return NbdDevice(name, await connecting(), connecting, read_only=read_only)


def _no_endio(_: Bio) -> None:
    raise AssertionError("a rider is not ended: those that ride are")
