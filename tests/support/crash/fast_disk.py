# SPDX-License-Identifier: Apache-2.0
"""Power cuts over the compiled fast path: disks that it can write to, and a driver that goes through it.

Theory of operation. A `FastCrashDevice` is a `CrashDevice` of which a copy, as a running machine reads it, lies in a file in
memory. The compiled code reads and writes that file, and knows nothing of this module. After each of its turns
`absorb` compares: a sector that differs was written just now, and is pending until a flush, as if the device had been
sent a bio. Nothing else runs during a turn, so no write can be missed or come at another moment. (Bytes that are written
over by the same bytes change nothing, whatever the power does.)

A `FastDriver` encodes each plain READ and WRITE as an NBD request, sends it through a socket to a `Plane` of its own, and
has it served over the route that the mapped device offers at that moment. A WRITE with FUA, and a FLUSH, are taken by the compiled code, too; then a FLUSH of
the device follows, as in `nbdtarget.server.shared_flush`. Or the compiled code syncs the file by itself, as for a client that is alone: then all that
the device had taken is stable before the reply is looked at. What the compiled code leaves to Python goes the usual way.
"""

import contextlib
import os
import select
import socket
import weakref
from collections import Counter
from typing import Any, Final

from nbdtarget.bio import FUA, OP_FLUSH, OP_READ, OP_WRITE, Bio
from nbdtarget.fast.compiled import IS_COMPILED, FastFile, Plane
from nbdtarget.targets.powercut.volatile_cache import split_sectors
from nbdtarget_protocol.consts import (
    CMD_FLAG_FUA,
    CMD_FLUSH,
    CMD_READ,
    CMD_WRITE,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
)
from tests.support.crash.machine import Driver, Rig
from tests.support.devices import CrashDevice
from tests.support.model import SECTOR

if IS_COMPILED:
    from nbdtarget_fast import DONE, SLOW
    from nbdtarget_sync import RUNS, Syncer

__all__ = ["DURABLE", "LONE", "FastCrashDevice", "FastDriver"]

NEVER_NS: Final = 1 << 62
BUFFER_BYTES: Final = 256 << 10
LENGTH_MAX: Final = 64 << 10
COOKIE: Final = 7
DURABLE: Final = -1  # in `FastDriver.nr_served`: those that needed a FLUSH
LONE: Final = -2  # those that needed a sync of the compiled code, and no Python
NR_LONE: Final = 3  # what a client that is alone may be: see `Plane.turn`
_COMMANDS: Final = {OP_READ: CMD_READ, OP_WRITE: CMD_WRITE, OP_FLUSH: CMD_FLUSH}


class FastCrashDevice(CrashDevice):
    """See the module head.

    Attributes:
        nr_absorbed: sectors that the compiled code has changed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.nr_absorbed = 0
        self._nr_synced = 0
        self.fails_inline = False  # a cache on a device that may is left to Python
        self._file: FastFile | None = None
        self._fd = os.memfd_create(self.name.replace("/", "-"))
        weakref.finalize(self, os.close, self._fd)

    def maybe_fast_file(self) -> FastFile | None:
        assert self.lie is None, "the compiled code does not fail"
        if self._file is None:
            os.pwrite(self._fd, self.image(), 0)
            self._file = FastFile(
                self._fd, NEVER_NS, _never, _never, None, _never, _never
            )
            self._lend_syncer(self._file)
            self._file.size = self.size
            self._file.read_max = LENGTH_MAX
            self._file.write_max = 0 if self.read_only else LENGTH_MAX
        return self._file

    def _lend_syncer(self, file: FastFile) -> None:
        syncer = Syncer(self._fd)
        syncer.begin()
        while syncer.take() == RUNS:
            select.select([syncer.event_fd], [], [])
        file.syncer, file.sync_wait_ns = syncer, NEVER_NS // 2
        weakref.finalize(self, syncer.close)

    def was_synced(self) -> bool:
        """Whether the compiled code has synced since this was last called; if so, all that it has taken is stable now."""
        nr_synced = 0 if self._file is None else self._file.nr_synced
        if nr_synced == self._nr_synced:
            return False
        self._nr_synced = nr_synced
        flush = Bio(OP_FLUSH, 0, 0, None, 0, lambda _: None)
        for watcher in self.watchers:
            watcher.started(self, flush)
        self._make_stable(self._cache.mark)
        for watcher in self.watchers:
            watcher.finished(self, flush, 0)
        return True

    def absorb(self) -> int:
        """Take what the compiled code has written for pending; returns how many sectors it has changed."""
        if self._file is None:
            return 0
        live, found = self.image(), os.pread(self._fd, self.size, 0)
        if live == found:
            return 0
        nr = 0
        for at in range(0, self.size, SECTOR):
            if live[at : at + SECTOR] != found[at : at + SECTOR]:
                self._cache.write(split_sectors(at // SECTOR, found[at : at + SECTOR]))
                nr += 1
        self.nr_absorbed += nr
        return nr

    def _take_write(self, bio: Bio, data: bytes | memoryview) -> None:
        super()._take_write(bio, data)
        if self._file is not None:
            os.pwrite(self._fd, data, bio.offset)

    def reopen(self, image: bytes, seed: int | None = None) -> "FastCrashDevice":
        return type(self)(
            self.size,
            self._seed + 1 if seed is None else seed,
            content=image,
            name=self.name,
            inline_chance=self.inline_chance,
            read_only=self.read_only,
            border=self.border,
        )


class FastDriver(Driver):
    """See the module head.

    Attributes:
        nr_served: requests that the compiled code has served, by operation; DURABLE: those that needed a FLUSH.
    """

    def __init__(self, rig: Rig) -> None:
        self.nr_served: Counter[int] = Counter()
        self._nr_turns = 0
        self._client, self._server = socket.socketpair()
        self._server.setblocking(False)
        self._received = bytearray(BUFFER_BYTES)
        super().__init__(rig)
        self._plane = Plane(
            self._server.fileno(),
            self._received,
            bytearray(BUFFER_BYTES),
            structured=False,
            can_write=True,
            size=self.model.size,
            zero_min=LENGTH_MAX,
            length_max=LENGTH_MAX,
            turn_ns=NEVER_NS,
            flush_at=LENGTH_MAX,
            poison=True,
            ring_reads=_NoRing(),  # type: ignore[arg-type]  # it is only asked for room
            flush_for=_flush_for,
        )

    def close(self) -> None:
        """Close the sockets."""
        self._plane.release()
        self._client.close()
        self._server.close()

    def _submit(self, bio: Bio, offset: int, length: int) -> None:
        is_durable = bio.op == OP_FLUSH or (bio.op == OP_WRITE and bio.flags == FUA)
        if bio.op not in _COMMANDS or (bio.flags and not is_durable):
            super()._submit(bio, offset, length)
            return
        self.in_flight[bio] = (offset, length)

        def submit() -> None:
            if not self._is_served(bio):
                self.rig.disk.submit(bio)

        self.call_inside(submit)

    def _is_served(self, bio: Bio) -> bool:
        """Have the compiled code serve a plain request; False: it leaves it to Python."""
        route = self.rig.disk.maybe_route()
        if route is None:
            return False
        is_read, is_write = bio.op == OP_READ, bio.op == OP_WRITE
        flags = CMD_FLAG_FUA if bio.flags else 0
        head = (REQUEST_MAGIC, flags, _COMMANDS[bio.op], COOKIE)
        request = REQUEST.pack(*head, bio.offset, bio.length)
        self._client.sendall(request + (bytes(bio.payload or b"") if is_write else b""))
        self._nr_turns += 1
        lone = self._nr_turns % NR_LONE
        stop = self._plane.turn(route, 0, False, 0, 0, 0, 0, lone)
        for device in self.rig.at_risk:
            assert isinstance(device, FastCrashDevice)
            nr = device.absorb()
            assert not nr or (stop == DONE and is_write), "nothing else is written"
            if device.was_synced():
                self.nr_served[LONE] += 1
        if stop == SLOW:
            self._forget_request()
            return False
        assert stop == DONE
        self.nr_served[bio.op] += 1
        if self._plane.nr_syncs:
            writes, flushes = self._plane.take_syncs()
            assert writes + flushes == [COOKIE]
            self._flush_for(bio)
            return True
        reply = self._client.recv(BUFFER_BYTES)
        _, error, cookie = SIMPLE_REPLY.unpack_from(reply)
        assert (error, cookie) == (0, COOKIE)
        data = reply[SIMPLE_REPLY.size :]
        if is_read:
            assert bio.payload is not None
            assert len(data) == bio.length
            bio.payload[:] = data
        bio.end(0)
        return True

    def _flush_for(self, bio: Bio) -> None:
        """End a durable request when a FLUSH of the device has ended."""
        bio.own()  # it ends later

        def ended(flush: Bio) -> None:
            bio.end(flush.status)

        self.nr_served[DURABLE] += 1
        self.rig.disk.submit(Bio(OP_FLUSH, 0, 0, None, 0, ended))

    def _forget_request(self) -> None:
        """Python serves it. It may be in the buffer, or still in the socket."""
        with contextlib.suppress(BlockingIOError):
            self._server.recv(BUFFER_BYTES)


class _NoRing:
    """The part of a connection that a plane calls when no file has a ring."""

    def room(self) -> tuple[int, int]:
        return 1, 0

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"{name}: no read is in a ring")


def _flush_for(writes: list[int], flushes: list[int]) -> None:
    raise AssertionError("only a Receiver calls this")


def _never(*_: object) -> None:
    raise AssertionError("a file in memory is quick, and takes all of a write")
