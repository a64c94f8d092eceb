# SPDX-License-Identifier: Apache-2.0
"""Rounds of `make fuzz-fast` in which Python calls a `Plane`: random batches, routes, buffers and files."""

import errno as errnos
import functools
import random
import select
import socket
import struct
from bisect import bisect_left
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bitarray import bitarray

from nbdtarget.common.tls_socket import TlsSocket
from nbdtarget.policies.smq.block_table import BlockTable
from scripts.fuzz_fast_files import FlakyFile

if TYPE_CHECKING:
    from nbdtarget_fast import FastFile, Plane, Route
    from nbdtarget_map import Windows
    from nbdtarget_ring import Ring

__all__ = ["HEADER", "MAGIC", "POLL_NS", "SIZE", "Round"]

SIZE: Final = 1 << 20
BLOCK: Final = 1 << 16
MAGIC: Final = 0x25609513
HEADER: Final = struct.Struct(">IHHQQI")
EXTENDED_MAGIC: Final = 0x21E41C71
EXTENDED_HEADER: Final = struct.Struct(">IHHQQQ")
PAYLOAD_LEN: Final = 1 << 5
PAYLOAD_MAX: Final = 1 << 18  # a longer WRITE is sent without its payload
REPLY_HEAD_MAX: Final = 44
BATCH_MAX: Final = 200
MESSAGES: Final = 400  # different ones, of a round
POLL_NS: Final = 50_000
POLLED: Final = 0.05  # of the turns: on a busy machine each gives the processor away
SYNCS_MAX: Final = 256  # of `Plane`


@functools.cache
def is_available() -> bool:
    """Whether io_uring may be used here."""
    import nbdtarget_ring

    return nbdtarget_ring.is_available()


class Round:
    """A plane with random sizes over a random route, and a file."""

    def __init__(self, seed: int, folder: Path) -> None:
        import nbdtarget_fast

        self.fast = nbdtarget_fast
        self.nr_reads = self.nr_bytes = self.nr_device_reads = 0
        self.nr_file_reads = self.nr_held = 0
        self.owed = 0  # bytes of a request that Python serves, which have not come yet
        self.nr_dropped = 0  # bytes of this batch
        self.messages: list[bytes] = []
        self.is_dropped = False
        self.random = random.Random(seed)
        pick = self.random
        self.flaky = FlakyFile(
            folder / "disk", pick.randbytes(SIZE), pick, may_change=True
        )
        self.fd = self.flaky.fd
        self.file: FastFile = nbdtarget_fast.FastFile(
            self.fd,
            10**9,
            lambda: None,
            lambda *_: None,
            self.note_reads,
            self.sync_left,
            lambda _: None,
        )
        self.file.size = SIZE
        self.file.read_max = self.file.write_max = pick.choice((SIZE, SIZE, 4096))
        self.ring = self._ring()
        self.windows = self._windows()
        self.kind = pick.choice(("flat", "bitmap", "table"))
        self.route: Route = self._route()
        self.route.can_read = self.route.can_write = True
        self.route.in_flight = (self,)
        if self.kind == "table":
            self.route.hold, self.route.let_go = self.hold, self.let_go
        self.ours: socket.socket | TlsSocket
        self.peer: socket.socket | TlsSocket
        self.ours, self.peer = self._sockets()
        self.received = bytearray(pick.choice((64, 300, 5000, 1 << 16, 1 << 19)))
        self.arena = bytearray(pick.choice((64, 300, 5000, 1 << 17, 1 << 20)))
        self.structured = pick.random() < 0.7
        self.extended = self.structured and pick.random() < 0.5
        self.header = EXTENDED_HEADER if self.extended else HEADER
        self.magic = EXTENDED_MAGIC if self.extended else MAGIC
        self.plane: Plane = nbdtarget_fast.Plane(
            self.ours.fileno(),
            self.received,
            self.arena,
            structured=self.structured,
            can_write=pick.random() < 0.9,
            size=pick.choice((SIZE, SIZE, SIZE // 2)),
            zero_min=pick.choice((1, 512, 32768)),
            length_max=pick.choice((4096, 1 << 32)),
            turn_ns=pick.choice((1000, 10**9)),
            flush_at=pick.choice((1, 4096, 1 << 17)),
            poison=pick.random() < 0.5,
            ring_reads=self,
            alone_max=pick.choice((0, 4096, SIZE)),
            flush_for=None
            if self.extended
            else pick.choice((None, self.flush_for, self.flush_for)),
            extended=self.extended,
            tls=self.ours.records if isinstance(self.ours, TlsSocket) else None,
        )

    def _sockets(self) -> tuple[socket.socket | TlsSocket, socket.socket | TlsSocket]:
        """Return the two ends, which do not block."""
        ours, peer = socket.socketpair()
        ours.setblocking(False)
        peer.setblocking(False)
        return ours, peer

    def _send_left(self, base: int, out: int) -> None:
        """Here, what is left of replies is forgotten."""

    def _ring(self) -> "Ring | None":
        """Have some READs, or all, go through a ring, which may be small."""
        import nbdtarget_ring

        pick = self.random
        if pick.random() < 0.2 or not is_available():
            return None
        ring = nbdtarget_ring.Ring(pick.choice((1, 4, 64, 256)))
        ring.left_over = lambda: None
        self.file.ring = ring
        self.file.ring_max = pick.choice((512, SIZE))
        self.file.align = pick.choice((1, 1, 1, 512))
        self.file.fake_misses = pick.choice((1 << 28, 1 << 31, (1 << 32) - 1))
        return ring

    def _windows(self) -> "Windows | None":
        """Have some READs be sent from windows, of which there may be few."""
        import nbdtarget_map

        pick = self.random
        if pick.random() < 0.3:
            return None
        windows = nbdtarget_map.Windows(
            pick.choice((0, SIZE // 4, SIZE, 1 << 30, 1 << 30)),
            lambda: None,
            pick.choice((4096, BLOCK, SIZE // 4)),
            pick.choice((1, 1, 512, 4096, BLOCK)),
        )
        if pick.random() < 0.7:
            self.file.fake_misses = pick.choice((0, 1 << 28))  # else few are sent
        if windows.takes(self.fd, SIZE):
            self.file.windows = windows
        self.file.fake_error = pick.choice((0, 0, 0, errnos.EIO))
        return windows

    def _sweep(self) -> None:
        """Windows are given back, by time or because their file is closed."""
        pick = self.random
        if self.windows is not None and pick.random() < 0.3:
            self.windows.sweep(pick.choice((0, 1, 100)))
        if self.windows is not None and pick.random() < 0.05:
            self.windows.drop(self.file.owner, pick.choice((1, 100)))

    # The calls of the plane to its connection, and to the mapped device.

    def is_alone(self) -> bool:
        return self.random.random() < 0.7

    def room(self) -> tuple[int, int]:
        nr = self.random.choice((0, 3, 50, *[1000] * 17))
        return nr, self.random.choice((10_000, 1 << 30, 1 << 30))

    def sync_left(self) -> None:
        raise AssertionError("only a Receiver has clients that are alone")

    def flush_for(self, writes: list[int], flushes: list[int]) -> None:
        raise AssertionError("only a Receiver calls this")

    def begun(self, nr: int, nr_bytes: int) -> None:
        self.nr_reads += nr
        self.nr_bytes += nr_bytes

    def may_send(self) -> bool:
        return self.random.random() < 0.7

    def push(self, data: bytes, charge: int) -> None:
        assert len(data) <= charge + REPLY_HEAD_MAX
        self.nr_bytes -= charge

    def ended(self, nr: int, nr_bytes: int) -> None:
        self.nr_reads -= nr
        self.nr_bytes -= nr_bytes

    def read_again(self, cookie: int, offset: int, length: int) -> None:
        assert self.flaky.kind != "whole"

    def begin_reads(self, nr: int) -> None:
        self.nr_device_reads += nr

    def end_reads(self, nr: int) -> None:
        self.nr_device_reads -= nr

    def note_reads(self, more: int) -> None:
        self.nr_file_reads += more

    def hold(self, block: int) -> None:
        self.nr_held += 1

    def let_go(self, block: int) -> None:
        self.nr_held -= 1

    def _reap(self) -> None:
        """The loop hears of what has ended."""
        if self.ring is not None:
            self.ring.flush()
            for done, result in self.ring.reap():
                done(result)

    def _route(self) -> "Route":
        pick, route = self.random, self.fast.Route
        if self.kind == "flat":
            return route.flat(
                self.file, pick.choice((0, 0, 4096, -4096, 1 << 62)), SIZE
            )
        if self.kind == "bitmap":
            bits = bitarray(endian="little")
            bits.frombytes(pick.randbytes(2))
            shift = pick.choice((16, 17, 20, 40))
            nr_bits = pick.choice((16, 16, 3))
            return route.by_bitmap(self.file, self.file, bits, nr_bits, shift, 0, SIZE)
        table = BlockTable(16)
        for entry, block in enumerate(pick.sample(range(16), 12)):
            table.insert(entry, block)
        if pick.random() < 0.3:  # nonsense
            for at in range(len(table.chain)):
                table.chain[at] = pick.choice((0, at, 1 << 20, 0xFFFFFFFF))
            for at in range(len(table.buckets)):
                table.buckets[at] = pick.choice((0, at, 1 << 31, 0xFFFFFFFF))
        return route.by_table(
            self.file,
            table.blocks,
            table.buckets,
            table.chain,
            table.shift,
            bytearray(pick.choices((0, 1), (1, 9), k=16)),
            pick.randbytes(2),
            pick.randbytes(2),
            pick.choice((16, 3)),
            pick.choice((0, 1, 63)),
            pick.choice((BLOCK, BLOCK, 1000, 1 << 40)),
            pick.choice((16, 16, 1 << 40)),
            pick.choice((0, 0, 4096)),
            SIZE,
        )

    def message(self) -> bytes:
        pick = self.random
        command = pick.choice((0, 0, 0, 1, 1, 3))
        length = pick.choice((1, 17, 512, 512, 4096, 4096))
        if pick.random() < 0.03:  # of several blocks or regions
            length = pick.choice((BLOCK, 2 * BLOCK, 100_000))
        offset, flags, magic = pick.randrange(SIZE - length), 0, self.magic
        if length >= BLOCK and pick.random() < 0.5:
            offset -= offset % BLOCK
        if command == 1 and pick.random() < 0.2:
            flags = 1  # FUA
        elif command == 3:
            offset = length = 0
        if pick.random() < 0.02:  # it is something else, in one way or several
            odd = pick.random()
            if odd < 0.2:
                command = pick.choice((2, 3, 6, 0xFFFF))
            elif odd < 0.4:
                flags = pick.randrange(1 << 16)
            elif odd < 0.6:
                length = pick.choice((0, 1 << 31, (1 << 32) - 1, 1 << 18, 70_000))
            elif odd < 0.9:
                offset = pick.choice((SIZE, (1 << 64) - 1, pick.randrange(1 << 64)))
            else:
                magic = pick.randrange(1 << 32)
            if self.extended and pick.random() < 0.2:
                length = pick.choice((1 << 32, (1 << 64) - 1, (1 << 32) + 512))
        if self.extended and command == 1 and pick.random() < 0.8:
            flags |= PAYLOAD_LEN
        head = self.header.pack(
            magic, flags, command, pick.randrange(1 << 64), offset, length
        )
        return head + bytes(_payload_bytes(command, length))

    def wire(self, nr: int, cut: float) -> tuple[bytes, list[int]]:
        """Return a batch of so many messages, and where each of them begins. It is cut somewhere, now and then."""
        pick = self.random
        if not self.messages:
            # To make them takes longer than to serve them.
            self.messages = [self.message() for _ in range(MESSAGES)]
        messages = pick.choices(self.messages, k=nr)
        if pick.random() < 0.02:
            messages = [pick.randbytes(pick.randrange(2000))]
        starts, at = [], 0
        for message in messages:
            starts.append(at)
            at += len(message)
        wire = b"".join(messages)
        self.is_cut = pick.random() < cut
        if self.is_cut:
            wire = wire[: pick.randrange(len(wire) + 1)]
        self.nr_dropped, self.is_dropped = 0, False
        return wire, starts

    def send(self, part: bytes) -> int:
        """Send as much as the socket takes, and let Python receive what it waits for. Returns how much was sent."""
        try:
            sent = self.peer.send(part)
        except BlockingIOError:
            sent = 0
        try:
            while self.owed:
                self.owed -= len(self.ours.recv(min(self.owed, 1 << 20)))
        except BlockingIOError:
            pass  # the rest comes with a later part
        return sent

    def nr_taken(self, sent: int, starts: list[int]) -> int:
        """How many messages of a batch, of which so many bytes were sent, were taken: served, or refused."""
        return bisect_left(starts, sent - self.nr_dropped)

    def run(self, nr_messages: int) -> int:
        """Send that many messages; return how many the compiled code has taken: served, or left to Python."""
        pick, plane, nr_taken = self.random, self.plane, 0
        begin = base = out = 0
        while nr_messages > 0:
            nr = pick.randint(1, BATCH_MAX)
            nr_messages -= nr
            wire, starts = self.wire(nr, cut=0.1)
            at = 0
            while at < len(wire) and not self.is_dropped:
                at += self.send(wire[at : at + 100_000])
                if self.owed:
                    continue
                stop = plane.turn(
                    self.route,
                    POLL_NS if pick.random() < POLLED else 0,
                    pick.random() < 0.5,
                    begin,
                    plane.end,
                    base,
                    out,
                )
                if pick.random() < 0.5:
                    self._reap()
                self._sweep()
                assert 0 <= plane.begin <= plane.end <= len(self.received)
                assert 0 <= plane.base <= plane.out <= len(self.arena)
                base, out = plane.base, plane.out
                begin = plane.begin
                nr_syncs = plane.nr_syncs
                assert 0 <= nr_syncs <= SYNCS_MAX
                writes, flushes = plane.take_syncs()
                assert len(writes) + len(flushes) == nr_syncs
                if stop in (self.fast.SLOW, self.fast.UNFINISHED):
                    self._take()
                    self._send_left(base, out)
                    base = out = 0
                    begin = self._skip()
                    if begin < 0:
                        self._drop()
                        begin = 0
                elif stop == self.fast.FAILED:
                    assert plane.is_cut
                    self._drop()
                    begin = base = out = 0
                elif pick.random() < 0.8 or stop == self.fast.BLOCKED:
                    self._take()
                    self._send_left(base, out)
                    base = out = 0
            nr_taken += self.nr_taken(at, starts)
            if self.is_cut:
                self._drop()
                begin = base = out = 0
        self._drop()
        return nr_taken

    def _skip(self) -> int:
        """Python serves the request at `begin`. Returns where the next one begins; -1: that is not known."""
        at, left = self.plane.begin, self.plane.end - self.plane.begin
        header = self.header
        if left < header.size:
            return -1
        magic, _, command, _, _, length = header.unpack_from(self.received, at)
        if magic != self.magic:
            return -1
        size = header.size + _payload_bytes(command, length)
        self.owed = max(0, size - left)
        return at + min(size, left)

    def _take(self) -> None:
        """Take all replies."""
        while True:
            try:
                if not self.peer.recv(1 << 18):
                    return
            except BlockingIOError:
                return

    def _drop(self) -> None:
        """Drop what was sent: after a broken message the next request cannot be found, or the rest of a message does not come."""
        self._take()
        self.nr_dropped += self.plane.end - self.plane.begin
        self.is_dropped = True
        self.owed = 0
        while True:
            try:
                self.nr_dropped += len(self.ours.recv(1 << 18))
            except BlockingIOError:
                break
        self._emptied()

    def _emptied(self) -> None:
        """Nothing is in the buffers any more: a turn over nothing sets the places back."""
        self.plane.turn(self.route, 0, False, 0, 0, 0, 0)

    def close(self) -> None:
        self.route.close()
        self.plane.release()  # reads may be under way
        if self.windows is not None:
            self.file.windows = None
            assert not self.windows.drop(self.file.owner, 1 << 20)
            assert self.windows.nr_mapped == 0
        while self.ring is not None and self.ring.nr_reads:
            select.select([self.ring.event_fd], [], [], 10)
            self._reap()
        counts = self.nr_reads, self.nr_bytes, self.nr_device_reads
        assert counts == (0, 0, 0)
        assert (self.nr_file_reads, self.nr_held) == (0, 0)
        self.ours.close()
        self.peer.close()
        self.flaky.close()


def _payload_bytes(command: int, length: int) -> int:
    """How many bytes are sent behind a header."""
    return length if command == 1 and length < PAYLOAD_MAX else 0
