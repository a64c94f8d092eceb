# SPDX-License-Identifier: Apache-2.0
"""A client of the simulated server: real NBD bytes, and an oracle at its end of the wire.

Theory of operation. A client connects, shakes hands, keeps up to `depth` requests in flight and
holds every answer against the model, which all clients share. By seed it is slow to read, sends
in pieces, hangs up politely, or goes away in the middle of a request; then it connects again.

Writes that are in flight at the same time, anybody's, never overlap: NBD leaves their order open.
Reads overlap them freely. A client that comes back writes again where writes of its lost connection
were in flight, as the kernel's client does: these may land before, never after. Other clients
wait until it is back, or the server has let go of it.

An error is a Violation, unless the machine may fail just then (`Life.may_fail`) or might have since
the request was sent. What a request that was in flight at an outage proves by its answer: see
`ClientModel`.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nbdtarget_protocol.client import (
    ClientHandshake,
    ClientNegotiated,
    ClientTransmission,
    Completion,
)
from nbdtarget_protocol.consts import (
    BASE_ALLOCATION,
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_NAMES,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EIO,
    ENOTSUP,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_TRIM,
    REQUEST,
    REQUEST_MAGIC,
)
from nbdtarget_protocol.errors import ReplyError
from tests.sim.block_status import check_zeroes, clipped
from tests.sim.faults import stands_on_latched
from tests.sim.hydration import CONTEXT
from tests.sim.model import SECTOR, Violation
from tests.sim.sockets import SimSocket

if TYPE_CHECKING:
    from tests.sim.life import Life

__all__ = ["Client", "Habits"]

KINDS: Final = {
    CMD_WRITE: 8,
    CMD_READ: 6,
    CMD_FLUSH: 4,
    CMD_WRITE_ZEROES: 2,
    CMD_TRIM: 1,
    CMD_CACHE: 1,
    CMD_BLOCK_STATUS: 3,
}
CONTEXTS: Final = (
    (),
    (BASE_ALLOCATION,),
    (CONTEXT,),
    (BASE_ALLOCATION, CONTEXT),
    (BASE_ALLOCATION, CONTEXT),
)
CHANGES: Final = (CMD_WRITE, CMD_WRITE_ZEROES, CMD_TRIM)
RANGE_TRIES_MAX: Final = 4
RECEIVES_MAX: Final = 4  # in one turn of the loop


@dataclass(frozen=True)
class Habits:
    """How a client behaves.

    Args:
        think: how often it waits between two requests, for up to `think_s`.
        breaks: how often it goes away instead of sending a request.
        syncs: how often it sends a FLUSH as soon as a write is answered.
        lazy: how often it does not read though it could, for up to `lazy_s`.
    """

    depth: int
    structured: bool
    contexts: tuple[str, ...]
    think: float
    think_s: float
    breaks: float
    syncs: float
    lazy: float
    lazy_s: float
    extended: bool

    @classmethod
    def draw(cls, rng: random.Random) -> "Habits":
        return cls(
            depth=rng.choice((1, 2, 4, 16)),
            structured=rng.random() < 0.7,
            contexts=rng.choice(CONTEXTS),
            think=rng.choice((0.0, 0.2, 0.9)),
            think_s=rng.choice((1e-4, 0.02, 1.0)),
            breaks=rng.choice((0.0, 0.0, 0.02, 0.1)),
            syncs=rng.choice((0.0, 0.2, 0.7)),
            lazy=rng.choice((0.0, 0.0, 0.3)),
            lazy_s=rng.choice((1e-4, 0.5)),
            extended=rng.random() < 0.5,
        )


class _Op:
    """A request in flight, and the calls that tell the model of its end or its loss."""

    __slots__ = (
        "begin",
        "ended",
        "is_change",
        "is_told",
        "length",
        "loss_nr",
        "lost",
        "outages",
    )

    def __init__(
        self,
        begin: int,
        length: int,
        is_change: bool,
        ended: Callable[[Completion], object],
        lost: Callable[[], None],
    ) -> None:
        self.begin = begin
        self.length = length
        self.is_change = is_change
        self.ended = ended
        self.lost = lost
        self.outages = 0  # `Life.nr_outages` when it was sent
        self.is_told = False  # its connection, of the last loss, when it was sent
        self.loss_nr = 0

    def overlaps(self, begin: int, length: int) -> bool:
        """Whether a sector belongs to both."""
        mine = self.begin // SECTOR, -(-(self.begin + self.length) // SECTOR)
        return begin // SECTOR < mine[1] and mine[0] < -(-(begin + length) // SECTOR)


class _Transmission(ClientTransmission):
    """Keeps what each metadata context said, by cookie; the client takes it from there."""

    def __init__(self, negotiated: ClientNegotiated) -> None:
        super().__init__(negotiated)
        self.names = dict(negotiated.contexts)
        self.described: dict[int, dict[str, list[tuple[int, int]]]] = {}

    def _described(
        self, request: Completion, context_id: int, extents: list[tuple[int, int]]
    ) -> None:
        super()._described(request, context_id, extents)
        described = self.described.setdefault(request.cookie, {})
        described[self.names[context_id]] = extents


class Client:
    """See the module head.

    Args:
        left: how many requests it wants to make in all.
    """

    def __init__(
        self, life: "Life", name: str, rng: random.Random, habits: Habits, left: int
    ) -> None:
        self.life = life
        self.name = name
        self.left = left
        self._random = rng
        self._habits = habits
        self._cookie = 0
        self._changed = asyncio.Event()
        self._sock: SimSocket | None = None
        self._is_reading = False
        self._is_writing = False
        self._is_leaving = False  # DISC is sent
        self._loss_nr = 0
        self._is_told = False  # of that loss below, by a FLUSH that failed
        self._handshake: ClientHandshake | None = None
        self._transmission: _Transmission | None = None
        self._out = bytearray()
        self._ops: dict[int, _Op] = {}
        self._again: list[tuple[int, int]] = []  # where writes were in flight and lost

    @property
    def is_connected(self) -> bool:
        return self._sock is not None

    @property
    def is_attached(self) -> bool:
        """Whether the handshake has ended: requests of earlier connections are older than those sent now."""
        return self._sock is not None and self._transmission is not None

    @property
    def _may_send(self) -> bool:
        return self._sock is not None and not (
            self._is_leaving or self.life.is_stopping or self.life.is_over
        )

    def forget_losses(self) -> None:
        """Expect to be told of a loss again, because there may be another one."""
        self._is_told = False
        self._loss_nr += 1

    def changes(self) -> list[_Op]:
        """Return the writes in flight."""
        return [op for op in self._ops.values() if op.is_change]

    # ---- life ----

    async def run(self) -> None:
        """Make all requests, over as many connections as it takes."""
        while self.left > 0 and not self.life.is_stopping:
            if not await self.connect():
                return
            while self.is_connected and self.left > 0 and not self.life.is_stopping:
                if len(self._ops) >= self._habits.depth:
                    await self._change()
                    continue
                self.left -= 1
                if self._random.random() < self._habits.breaks:
                    self._break_off()
                    break
                self._issue()
                if self._random.random() < self._habits.think:
                    # The pause is so long that a server may go and come back unnoticed.
                    longest_s = self._habits.think_s * (8 if self.life.backends else 1)
                    await asyncio.sleep(self._random.random() * longest_s)
            await self.disconnect()

    async def connect(self) -> bool:
        """Connect and shake hands; False if the server is stopping."""
        life = self.life
        try:
            sock = life.network.connect()
        except ConnectionRefusedError:
            assert life.is_stopping, f"{self.name}: refused"
            return False
        self._sock = sock
        self._is_leaving = False
        self._is_told = False
        self._out.clear()
        self._transmission = None
        self._handshake = handshake = ClientHandshake(
            self._random.choice(("d", "") if len(life.rig.tables) == 1 else ("d",)),
            want_structured=self._habits.structured,
            want_extended=self._habits.extended,
            want_contexts=self._habits.contexts,
        )
        self._start_reading()
        while self.is_connected and handshake.negotiated is None:
            await self._change()
        return self.is_connected

    async def disconnect(self) -> None:
        """Wait for what is in flight, or ask the server to finish it; then hang up."""
        if not self.is_connected:
            return
        if self._random.random() < 0.5:
            while self.is_connected and self._ops:
                await self._change()
        if not self.is_connected:
            return
        assert self._transmission is not None
        self._note("disc")
        self._is_leaving = True
        self._send(self._transmission.request(CMD_DISC, 0, 0, 0, 0))
        while self.is_connected:
            await self._change()

    def _break_off(self) -> None:
        """Go away, by seed in the middle of a request."""
        rng = self._random
        choice = rng.randrange(3)
        self._note(f"breaks off ({choice})")
        if choice == 1:
            self._send(self._header(0, CMD_READ, 512)[: rng.randrange(28)])
        elif choice == 2:
            length = rng.randrange(1, 3 * self.life.rig.region_size)
            header = self._header(CMD_FLAG_PAYLOAD_LEN, CMD_WRITE, length)
            self._send(header + bytes(rng.randrange(length)))
        self._lost(reset=rng.random() < 0.5)

    def _header(self, flags: int, command: int, length: int) -> bytes:
        """A request that the transmission does not know of. `flags` are only for extended headers."""
        if self._transmission is not None and self._transmission.extended:
            magic = EXTENDED_REQUEST_MAGIC
            return EXTENDED_REQUEST.pack(magic, flags, command, 1, 0, length)
        return REQUEST.pack(REQUEST_MAGIC, 0, command, 1, 0, length)

    def power_cut(self) -> None:
        """The server is gone. Read the replies that it had sent: its promises in them count."""
        sock = self._sock
        if sock is None:
            return
        data = sock.left()
        if self._transmission is not None:
            with_luck = self._random.choice(
                (0, len(data), self._random.randrange(len(data) + 1))
            )
            for completion in self._transmission.receive_data(data[:with_luck]):
                self._completed(completion)
        self._sock = None
        self._drop_ops()

    # ---- requests ----

    async def read(self, offset: int, length: int) -> memoryview | None:
        """Read and wait; None if the connection is lost, nothing if it may fail, and has.

        For after a crash.
        """
        buffer = memoryview(bytearray(length))
        data: memoryview | None = None

        def ended(completion: Completion) -> None:
            nonlocal data
            data = buffer if self._is_done(op, completion) else buffer[:0]

        op = _Op(offset, length, False, ended, _nothing)

        self._request(CMD_READ, 0, offset, length, op, buffer)
        while self.is_connected and data is None:
            await self._change()
        return data

    def _issue(self) -> None:
        """Send one request, drawn from the seed."""
        rng = self._random
        transmission = self._transmission
        assert transmission is not None
        flags = transmission.negotiated.flags
        if self._again and rng.random() < 0.7:
            offset, length = self._again.pop(0)
            if self.life.may_change(offset, length):
                self._change_disk(CMD_WRITE, offset, length, flags)
                return
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == CMD_TRIM and not flags & FLAG_SEND_TRIM:
            kind = CMD_FLUSH
        if kind == CMD_BLOCK_STATUS and not transmission.context_ids:
            kind = CMD_READ
        if kind == CMD_FLUSH:
            self._flush()
            return
        for _ in range(RANGE_TRIES_MAX):
            offset, length = self._draw_range()
            if kind not in CHANGES or self.life.may_change(offset, length):
                break
        else:
            self._flush()
            return
        if kind in CHANGES:
            self._change_disk(kind, offset, length, flags)
        elif kind == CMD_READ:
            df = CMD_FLAG_DF if transmission.structured and rng.random() < 0.2 else 0
            self._read(offset, length, df)
        elif kind == CMD_BLOCK_STATUS:
            self._block_status(offset, length)
        else:
            self._cache(offset, length)

    def _draw_range(self) -> tuple[int, int]:
        """Whole regions, whole sectors or ragged bytes, the ends of the disk among them."""
        rng, size = self._random, self.life.model.size
        region = self.life.rig.region_size
        unit = rng.choice((region, SECTOR, SECTOR, 1))
        begin = rng.randrange(-(-size // unit)) * unit
        length = rng.randrange(1, rng.choice((1, 3)) * region // unit + 1) * unit
        return begin, min(length, size - begin)

    def _cache(self, offset: int, length: int) -> None:
        def ended(completion: Completion) -> None:
            self._is_done(op, completion)

        op = _Op(offset, length, False, ended, _nothing)
        self._request(CMD_CACHE, 0, offset, length, op)

    def _flush(self) -> None:
        life, model = self.life, self.life.model
        owner = self._sock
        promised = model.start_flush_of(owner)
        told = life.hydration.start()
        must_fail = life.flushes_fail
        losses = model.nr_losses

        def ended(completion: Completion) -> None:
            ok = self._is_done(op, completion)
            # An outage meanwhile: another table may have taken the place of the one that latched.
            may_be_well = life.nr_outages or not stands_on_latched(
                life.registry, life.disks
            )
            if ok and must_fail and not may_be_well:
                raise Violation(f"{self.name}: FLUSH after one that has failed: ok")
            if ok and losses == model.nr_losses:
                model.end_flush_of(owner, promised)
                life.hydration.end_flush(told)
            if ok:
                life.promised()
            else:
                life.flush_failed()
                if life.is_hurt:
                    model.doubt(owner)

        op = _Op(0, 0, False, ended, _nothing)
        self._request(CMD_FLUSH, 0, 0, 0, op)

    def _change_disk(self, kind: int, offset: int, length: int, server: int) -> None:
        rng, model = self._random, self.life.model
        flags = CMD_FLAG_FUA if rng.random() < 0.25 else 0
        data: bytes | None = None
        if kind == CMD_WRITE:
            data = self.life.stamped(offset, length)
        elif kind == CMD_WRITE_ZEROES:
            data = bytes(length)
            flags |= CMD_FLAG_NO_HOLE if rng.random() < 0.3 else 0
            if server & FLAG_SEND_FAST_ZERO and rng.random() < 0.3:
                flags |= CMD_FLAG_FAST_ZERO
        label = f"{CMD_NAMES[kind].lower()}#{self.name}.{self._cookie + 1}"
        started = model.start_write(offset, data, length, label)
        for _, write in started:
            write.owner = self._sock
        losses = model.nr_losses

        def ended(completion: Completion) -> None:
            ok, fua = self._is_done(op, completion), bool(flags & CMD_FLAG_FUA)
            stays = ok and (fua or losses == model.nr_losses)
            model.end_write(started, ok=stays, fua=fua)
            if ok and fua:
                self.life.promised()
            elif self._may_send and rng.random() < self._habits.syncs:
                self._flush()

        op = _Op(offset, length, True, ended, _nothing)
        payload = data if kind == CMD_WRITE and data is not None else b""
        self._request(kind, flags, offset, length, op, payload=payload)

    def _read(self, offset: int, length: int, flags: int) -> None:
        model = self.life.model
        running = model.start_read(offset, length)
        buffer = memoryview(bytearray(b"\xdd" * length))

        def ended(completion: Completion) -> None:
            model.drop_read(running)
            if self._is_done(op, completion):
                model.check_piece(running, offset, buffer)

        op = _Op(offset, length, False, ended, lambda: model.drop_read(running))
        self._request(CMD_READ, flags, offset, length, op, buffer)

    def _block_status(self, offset: int, length: int) -> None:
        """Send BLOCK_STATUS. Ranges told to be zeroes must read as zeroes, and hydrated regions must stay hydrated."""
        model, hydration = self.life.model, self.life.hydration
        running = model.start_read(offset, length)
        told = hydration.start()

        def ended(completion: Completion) -> None:
            model.drop_read(running)
            assert self._transmission is not None
            described = self._transmission.described.pop(completion.cookie, {})
            if not self._is_done(op, completion):
                return
            for name, extents in described.items():
                extents = clipped(extents, length, flags)
                if name == CONTEXT:
                    hydration.check(told, offset, extents)
                else:
                    check_zeroes(model, running, offset, extents)

        flags = CMD_FLAG_REQ_ONE if self._random.random() < 0.3 else 0
        op = _Op(offset, length, False, ended, lambda: model.drop_read(running))
        self._request(CMD_BLOCK_STATUS, flags, offset, length, op)

    def _is_done(self, op: _Op, completion: Completion) -> bool:
        """Whether the request succeeded. Raises: Violation: it had to."""
        error, life = completion.error, self.life
        if not error:
            return True
        if error == ENOTSUP and completion.flags & CMD_FLAG_FAST_ZERO:
            return False
        may_fail = life.may_fail or op.outages != life.nr_outages
        may_tell = life.is_hurt or life.owes_flush_error
        if completion.command == CMD_FLUSH and may_tell and not op.is_told:
            # Each connection is told of a loss, by a FLUSH that fails, and by those beside it.
            may_fail = True
            self._is_told = self._is_told or op.loss_nr == self._loss_nr
        if not life.is_stopping and not (may_fail and error == EIO):
            raise Violation(f"{self.name}: {completion} {completion.message}")
        return False

    def _request(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        op: _Op,
        buffer: memoryview | None = None,
        payload: bytes = b"",
    ) -> None:
        assert self._transmission is not None
        self._cookie += 1
        cookie = self._cookie
        self._note(CMD_NAMES[command], offset, length, flags, cookie)
        header = self._transmission.request(
            command, flags, cookie, offset, length, buffer
        )
        op.outages = self.life.nr_outages
        op.is_told, op.loss_nr = self._is_told, self._loss_nr
        self._ops[cookie] = op
        self._send(header + payload)

    # ---- the socket ----

    async def _change(self) -> None:
        """Wait until something came."""
        self._changed.clear()
        await self._changed.wait()

    def _send(self, data: bytes) -> None:
        self._out += data
        self._flush_out()

    def _flush_out(self) -> None:
        sock = self._sock
        if sock is None:
            return
        try:
            while self._out:
                sent = sock.send(memoryview(bytes(self._out)))
                del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()  # the data still to be read tells why
        if bool(self._out) != self._is_writing:
            self._is_writing = not self._is_writing
            loop = self.life.loop
            if self._is_writing:
                loop.add_writer(sock.fileno(), self._flush_out)
            else:
                loop.remove_writer(sock.fileno())

    def _start_reading(self) -> None:
        if self._sock is not None and not self._is_reading:
            self._is_reading = True
            self.life.loop.add_reader(self._sock.fileno(), self._readable, self._sock)

    def _stop_watching(self) -> None:
        assert self._sock is not None
        fd, loop = self._sock.fileno(), self.life.loop
        if self._is_reading:
            loop.remove_reader(fd)
        if self._is_writing:
            loop.remove_writer(fd)
        self._is_reading = self._is_writing = False

    def _readable(self, sock: SimSocket) -> None:
        habits, rng = self._habits, self._random
        if habits.lazy and rng.random() < habits.lazy:
            self.life.loop.remove_reader(sock.fileno())
            self._is_reading = False
            self.life.loop.call_later(
                rng.random() * habits.lazy_s, self._read_again, sock
            )
            return
        for _ in range(RECEIVES_MAX):
            try:
                if not self._receive(sock):
                    self._hung_up()
            except BlockingIOError:
                break
            except ConnectionResetError:
                self._hung_up()
            if self._sock is not sock:
                break
        self._changed.set()

    def _read_again(self, sock: SimSocket) -> None:
        if self._sock is sock:
            self._start_reading()

    def _receive(self, sock: SimSocket) -> bool:
        """Receive once; False at the end."""
        transmission = self._transmission
        if transmission is not None:
            received = sock.recv_into(transmission.get_buffer())
            if received:
                self._take(transmission.buffer_updated, received)
            return bool(received)
        handshake = self._handshake
        assert handshake is not None
        data = sock.recv(4096)
        if not data:
            return False
        handshake.receive_data(data)
        if handshake.error is not None and not self.life.is_stopping:
            raise Violation(f"{self.name}: {handshake.error}")
        for piece in handshake.data_to_send():
            self._send(piece)
        if handshake.negotiated is not None:
            self._note("attached")
            assert handshake.negotiated.size == self.life.model.size
            self._transmission = _Transmission(handshake.negotiated)
            self._take(self._transmission.receive_data, handshake.trailing_data())
        return True

    def _take(self, parse: Callable[[Any], list[Completion]], data: object) -> None:
        try:
            completed = parse(data)
        except ReplyError as error:
            raise Violation(f"{self.name}: {error}") from error
        for completion in completed:
            self._completed(completion)

    def _completed(self, completion: Completion) -> None:
        self.life.nr_requests += 1
        self._note("answer", completion.cookie, completion.error)
        self._ops.pop(completion.cookie).ended(completion)

    def _hung_up(self) -> None:
        """The server has closed its end."""
        if not self.life.is_stopping:
            if not self._is_leaving:
                raise Violation(f"{self.name}: the server hung up")
            if self._ops:
                raise Violation(
                    f"{self.name}: unanswered after DISC: {list(self._ops)}"
                )
        self._lost(reset=False)

    def _lost(self, *, reset: bool) -> None:
        """End the connection: the fate of the requests in flight stays unknown."""
        sock = self._sock
        assert sock is not None
        self._note("gone")
        self._stop_watching()
        self._sock = None
        if reset:
            sock.reset()
        else:
            sock.close()
        self._again += [(op.begin, op.length) for op in self.changes()]
        self.life.put_in_limbo(self, sock, self.changes())
        self._drop_ops()
        self._changed.set()

    def _drop_ops(self) -> None:
        for op in self._ops.values():
            op.lost()
        self._ops.clear()

    def _note(self, *what: object) -> None:
        self.life.note(self.name, *what)


def _nothing() -> None:
    """Do nothing when a request is lost: the model does not depend on it."""
