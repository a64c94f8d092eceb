# SPDX-License-Identifier: Apache-2.0
"""Rounds of `make fuzz-fast` in which a `Receiver` is called, as by the event loop, and its connection does what it is told."""

import errno
import os
import random
import select
import socket
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

from nbdtarget.server.poller import LATE_NS, Lateness
from scripts.fuzz_fast_plane import POLL_NS, Round

__all__ = ["ReceiverRound"]

PACKET_MAX = 50_000


class ReceiverRound(Round):
    """A Receiver over the plane of a `Round`; the other half of the connection is here."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.has_packets = random.Random(seed).random() < 0.5
        super().__init__(seed, folder)
        pick = self.random
        self.asked: list[bool] = []  # what `has_no_losses` told in this call
        self.received_places = SimpleNamespace(begin=0, end=0, served=self._served)
        self.output = SimpleNamespace(base=0, end=0, sent_to=self._sent_to)
        self.is_broken = False
        self.other = os.eventfd(0, os.EFD_NONBLOCK)
        self._lend()
        self.receiver = self.fast.Receiver(
            self.plane,
            maybe_route=lambda: self.route,
            is_plain=lambda: True,
            received=self.received_places,
            output=self.output,
            polling=SimpleNamespace(last=None),
            may_poll=lambda: pick.random() < 0.9,
            has_no_losses=self._has_no_losses,
            find_loop_fd=self._find_loop_fd,
            poll_ns=pick.choice((0, 0, 0, 0, 0, 0, 0, 1000, POLL_NS)),
            poll_streak=pick.choice((0, 1, 4)),
            poll_skip_max=8,
            poll_rest=pick.choice((0, 2)),
            late=Lateness(pick.choice((0, LATE_NS))),
            readable=self._drop,
            stopped=self._stopped,
            ended=lambda: None,
            failed=self._failed,
        )

    def _sockets(self) -> tuple[socket.socket, socket.socket]:
        """In half of the rounds each request is received by itself, though several are there: clients stay with the thread that syncs."""
        if not self.has_packets:
            return super()._sockets()  # type: ignore[return-value]  # without TLS
        ours, peer = socket.socketpair(type=socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        peer.setblocking(False)
        return ours, peer

    def _has_no_losses(self) -> bool:
        self.asked.append(self.random.random() < 0.9)
        return self.asked[-1]

    def _call(self) -> None:
        """Call the Receiver. It answers no FLUSH in a turn in which a loss must be told."""
        before = self.plane.counted()[2][0]
        self.asked.clear()
        self.receiver()
        nr_flushes = self.plane.counted()[2][0] - before
        assert any(self.asked) or not nr_flushes, "a FLUSH was answered after a loss"

    def _send_some(self, wire: bytes, at: int, starts: list[int]) -> int:
        """Send a part of `wire` from `at` on. Returns how much was sent."""
        if not self.has_packets:
            return self.send(wire[at : at + 100_000])
        sent, ends = 0, [*starts, len(wire)]
        for begin, end in pairwise(ends):
            if begin <= at + sent < end:
                part = wire[at + sent : min(end, at + sent + PACKET_MAX)]
                sent += self.send(part)
                if self.owed:
                    break  # `send` has Python receive it
        return sent

    def _find_loop_fd(self) -> int:
        """Of an event loop that has sometimes something else to do, or is unknown."""
        if self.random.random() < 0.3:
            return -1
        if self.random.random() < 0.3:
            os.eventfd_write(self.other, 1)
        return self.other

    def _served(self, begin: int, end: int) -> None:
        self.received_places.begin, self.received_places.end = begin, end

    def _sent_to(self, base: int, end: int) -> None:
        self.output.base, self.output.end = base, end

    def _lend(self) -> None:
        """Lend the thread of a Syncer, which may be slow, or fail, to clients that are alone."""
        import nbdtarget_sync

        pick = self.random
        self.pipe = os.pipe()
        fd = self.fd if pick.random() < 0.8 else self.pipe[0]
        self.syncer = nbdtarget_sync.Syncer(fd)
        self.syncer.begin()
        self._end_of_sync()
        self.syncer.fake_ns = pick.choice((*[0] * 14, 400_000, 600_000))
        self.file.syncer = self.syncer
        self.file.sync_wait_ns = pick.choice((0, 500_000, 500_000))
        if self.kind != "table":
            self.route.may_sync = lambda: pick.random() < 0.9

    def _end_of_sync(self) -> None:
        while self.syncer.take() < 0:
            select.select([self.syncer.event_fd], [], [])

    def sync_left(self) -> None:
        self.file.syncer = None
        self._end_of_sync()
        if self.random.random() < 0.7:
            self.file.syncer = self.syncer

    def flush_for(self, writes: list[int], flushes: list[int]) -> None:
        if self.random.random() < 0.05:
            self.receiver.python_ran()

    def _failed(self, error: Exception) -> None:
        raise error

    def _stopped(self, stop: int) -> None:
        """Do what Python would do: serve one request, or send what is left."""
        self._take()
        self.output.base = self.output.end = 0
        if stop in (self.fast.SLOW, self.fast.UNFINISHED):
            begin = self._skip()
            if begin < 0:
                self._drop()
            else:
                self.received_places.begin = begin
        elif stop == self.fast.FAILED and (self.plane.is_cut or self._is_too_long()):
            self._drop()
        elif stop in (self.fast.CLOSED, self.fast.FAILED):
            raise AssertionError(f"the peer is there: {stop}")

    def _is_too_long(self) -> bool:
        """Whether the replies were too long for one packet."""
        return self.has_packets and self.plane.error == errno.EMSGSIZE

    def _emptied(self) -> None:
        self.received_places.begin = self.received_places.end = 0
        self.output.base = self.output.end = 0
        self.receiver.python_ran()

    def run(self, nr_messages: int) -> int:
        pick, nr_taken = self.random, 0
        while nr_messages > 0:
            # Many clients ask for one thing at a time.
            nr = pick.choice((1, 1, 1, 1, pick.randint(1, 200)))
            nr_messages -= nr
            wire, starts = self.wire(nr, cut=0.05)
            at = 0
            while at < len(wire) and not self.is_dropped:
                at += self._send_some(wire, at, starts)
                if self.owed:
                    continue
                self._call()
                if pick.random() < 0.5:
                    self._reap()
                self._sweep()
                if pick.random() < 0.8:
                    self._take()
                self._check()
            nr_taken += self.nr_taken(at, starts)
            if self.is_cut or pick.random() < 0.01:
                self._drop()
        self._drop()
        return nr_taken

    def _check(self) -> None:
        plane = self.plane
        assert 0 <= plane.begin <= plane.end <= len(self.received)
        assert 0 <= plane.base <= plane.out <= len(self.arena)
        assert plane.nr_syncs == 0

    def close(self) -> None:
        self.receiver.close()
        self.file.syncer = None
        self.syncer.close()
        for fd in (*self.pipe, self.other):
            os.close(fd)
        super().close()
