# SPDX-License-Identifier: Apache-2.0
"""A client of the simulated server: real NBD bytes, and an oracle at its end of the wire.

Theory of operation. A client connects, shakes hands, keeps up to `depth` requests in flight and
holds every answer against the model, which all clients share. By seed it is slow to read, sends
in pieces, hangs up politely, or goes away in the middle of a request; then it connects again.

Writes that are in flight at the same time, anybody's, never overlap: NBD leaves their order open.
Reads overlap them freely. A write whose connection was lost stays *in limbo*, and its range
untouched, until the server has let go of that connection: so long it may still land.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from protocol.client import ClientHandshake, ClientTransmission, Completion
from protocol.consts import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_NAMES,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    ENOTSUP,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_TRIM,
    REQUEST,
    STATE_ZERO,
)
from protocol.errors import ReplyError
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
    CMD_BLOCK_STATUS: 1,
}
CHANGES: Final = (CMD_WRITE, CMD_WRITE_ZEROES, CMD_TRIM)
RANGE_TRIES_MAX: Final = 4
RECEIVES_MAX: Final = 4  # in one turn of the loop


@dataclass(frozen=True)
class Habits:
    """What a client is like.

    Args:
        think: how often it waits between two requests, for up to `think_s`.
        breaks: how often it goes away instead of sending a request.
        syncs: how often it sends a FLUSH as soon as a write is answered.
        lazy: how often it does not read though it could, for up to `lazy_s`.
    """

    depth: int
    structured: bool
    contexts: bool
    think: float
    think_s: float
    breaks: float
    syncs: float
    lazy: float
    lazy_s: float

    @classmethod
    def draw(cls, rng: random.Random) -> "Habits":
        return cls(
            depth=rng.choice((1, 2, 4, 16)),
            structured=rng.random() < 0.7,
            contexts=rng.random() < 0.7,
            think=rng.choice((0.0, 0.2, 0.9)),
            think_s=rng.choice((1e-4, 0.02, 1.0)),
            breaks=rng.choice((0.0, 0.0, 0.02, 0.1)),
            syncs=rng.choice((0.0, 0.2, 0.7)),
            lazy=rng.choice((0.0, 0.0, 0.3)),
            lazy_s=rng.choice((1e-4, 0.5)),
        )


class _Op:
    """What the model must be told when the answer comes, or does not."""

    __slots__ = ("begin", "ended", "is_change", "length", "lost")

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

    def overlaps(self, begin: int, length: int) -> bool:
        """Whether a sector belongs to both."""
        mine = self.begin // SECTOR, -(-(self.begin + self.length) // SECTOR)
        return begin // SECTOR < mine[1] and mine[0] < -(-(begin + length) // SECTOR)


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
        self._handshake: ClientHandshake | None = None
        self._transmission: ClientTransmission | None = None
        self._out = bytearray()
        self._ops: dict[int, _Op] = {}

    @property
    def is_connected(self) -> bool:
        return self._sock is not None

    @property
    def _may_send(self) -> bool:
        return self._sock is not None and not (
            self._is_leaving or self.life.is_stopping or self.life.is_over
        )

    def changes(self) -> list[_Op]:
        """The writes in flight."""
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
                    await asyncio.sleep(self._random.random() * self._habits.think_s)
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
        self._out.clear()
        self._transmission = None
        self._handshake = handshake = ClientHandshake(
            "d" if self._random.random() < 0.5 else "",
            want_structured=self._habits.structured,
            want_contexts=("base:allocation",) if self._habits.contexts else (),
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
            self._send(
                REQUEST.pack(0x25609513, 0, CMD_READ, 1, 0, 512)[: rng.randrange(28)]
            )
        elif choice == 2:
            length = rng.randrange(1, 3 * self.life.rig.region_size)
            header = REQUEST.pack(0x25609513, 0, CMD_WRITE, 1, 0, length)
            self._send(header + bytes(rng.randrange(length)))
        self._lost(reset=rng.random() < 0.5)

    def power_cut(self) -> None:
        """The server is gone. What it had sent has still come, and is what it promised."""
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
        """Read and wait; None if the connection is lost. For after a crash."""
        buffer = memoryview(bytearray(length))
        done = False

        def ended(completion: Completion) -> None:
            nonlocal done
            self._check_error(completion)
            done = True

        self._request(
            CMD_READ,
            0,
            offset,
            length,
            _Op(offset, length, False, ended, _nothing),
            buffer,
        )
        while self.is_connected and not done:
            await self._change()
        return buffer if done else None

    def _issue(self) -> None:
        """Send one request, drawn from the seed."""
        rng = self._random
        transmission = self._transmission
        assert transmission is not None
        flags = transmission.negotiated.flags
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
            op = _Op(offset, length, False, self._check_error, _nothing)
            self._request(CMD_CACHE, 0, offset, length, op)

    def _draw_range(self) -> tuple[int, int]:
        """Whole regions, whole sectors or ragged bytes, the ends of the disk among them."""
        rng, size = self._random, self.life.model.size
        region = self.life.rig.region_size
        unit = rng.choice((region, SECTOR, SECTOR, 1))
        begin = rng.randrange(-(-size // unit)) * unit
        length = rng.randrange(1, rng.choice((1, 3)) * region // unit + 1) * unit
        return begin, min(length, size - begin)

    def _flush(self) -> None:
        model = self.life.model
        promised = model.start_flush()

        def ended(completion: Completion) -> None:
            model.end_flush(promised, ok=self._check_error(completion))
            self.life.promised()

        self._request(CMD_FLUSH, 0, 0, 0, _Op(0, 0, False, ended, _nothing))

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

        def ended(completion: Completion) -> None:
            ok = self._check_error(completion)
            model.end_write(started, ok=ok, fua=bool(flags & CMD_FLAG_FUA))
            if flags & CMD_FLAG_FUA:
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
            if self._check_error(completion):
                model.check_piece(running, offset, buffer)

        op = _Op(offset, length, False, ended, lambda: model.drop_read(running))
        self._request(CMD_READ, flags, offset, length, op, buffer)

    def _block_status(self, offset: int, length: int) -> None:
        """What is said to be zeroes must be zeroes."""
        model = self.life.model
        running = model.start_read(offset, length)

        def ended(completion: Completion) -> None:
            model.drop_read(running)
            if not self._check_error(completion):
                return
            at = offset
            assert completion.extents
            for part, state in completion.extents:
                if state & STATE_ZERO:
                    model.check_piece(running, at, bytes(part))
                at += part

        flags = CMD_FLAG_REQ_ONE if self._random.random() < 0.3 else 0
        op = _Op(offset, length, False, ended, lambda: model.drop_read(running))
        self._request(CMD_BLOCK_STATUS, flags, offset, length, op)

    def _check_error(self, completion: Completion) -> bool:
        """Whether the request succeeded. Raises: Violation: it had to."""
        error = completion.error
        if not error:
            return True
        if error == ENOTSUP and completion.flags & CMD_FLAG_FAST_ZERO:
            return False
        if not self.life.is_stopping:
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
            self._out.clear()  # what there is to read says why
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
            self._transmission = ClientTransmission(handshake.negotiated)
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
        """The connection is over: nothing more will be known of what is in flight."""
        sock = self._sock
        assert sock is not None
        self._note("gone")
        self._stop_watching()
        self._sock = None
        if reset:
            sock.reset()
        else:
            sock.close()
        self.life.put_in_limbo(sock, self.changes())
        self._drop_ops()
        self._changed.set()

    def _drop_ops(self) -> None:
        for op in self._ops.values():
            op.lost()
        self._ops.clear()

    def _note(self, *what: object) -> None:
        self.life.note(self.name, *what)


def _nothing() -> None:
    """Nobody needs to know."""
