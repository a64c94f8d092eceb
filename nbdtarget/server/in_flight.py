# SPDX-License-Identifier: Apache-2.0
"""`InFlight`: the requests of one connection that have begun, from the device's `submit` to their replies.

Theory of operation. `Requests` decodes, refuses and admits; what it starts is here until it has ended:

    start_read       a READ with a buffer of its own; a long one goes in slices
    start_large      a WRITE whose payload is complete
    start_range      FLUSH, TRIM, WRITE_ZEROES, CACHE; a long one goes in slices
    start_status     BLOCK_STATUS, which is a task and no bio
    adopt            a bio of the hot loop that did not end inside `submit`

Each has a `Request` that says how to answer it, and what it holds. `Flow` counts it; `ended` gives back what it holds, and
queues the reply. A FLUSH also tells what the device has lost since this connection was told last.

Hand-over. While the connection is frozen, ranges that go in slices stand still between two of them (`begun`). The process that goes on
with the connection goes on with them, too (`start_begun`).

Ends. Bios that are in flight when the connection closes end into `ended`, which drops them. The last
one tells the connection that it may release the device.
"""

import errno as errnos
import logging
from collections.abc import Callable, Iterator, Sequence

from nbdtarget.bio import OP_FLUSH, OP_READ, Bio
from nbdtarget.common.clock import perf_counter_ns
from nbdtarget.common.errors import DeviceError
from nbdtarget.common.turns import Tasks
from nbdtarget.devices.base import Device
from nbdtarget.devices.losses import ConnectionObserver
from nbdtarget.server.block_status import Asked, describe
from nbdtarget.server.buffers import HEADER_ROOM
from nbdtarget.server.commands import OPS, bio_flags_of
from nbdtarget.server.flow import Flow
from nbdtarget.server.large_write import LargeWrite
from nbdtarget.server.moving import BegunRange
from nbdtarget.server.output import Output
from nbdtarget.server.replies import Answers
from nbdtarget.server.request import WRITING, Request
from nbdtarget.server.shared import Host, Shared
from nbdtarget.server.sliced_range import SlicedRange, Slicing, first_slice
from nbdtarget.server.sliced_read import SlicedRead
from nbdtarget.server.traffic import Traffic, new_request
from nbdtarget_protocol.consts import (
    CMD_BLOCK_STATUS,
    CMD_FLAG_DF,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_NAMES,
    CMD_READ,
)
from nbdtarget_protocol.replies import Replies

__all__ = ["InFlight"]

log = logging.getLogger(__name__)


class InFlight:
    """See the module head.

    Args:
        host: the connection.
        device: acquired; every bio goes to it.

    Attributes:
        submit: where bios go: the device, or the gate in front of it.
        observer: what the device has lost, for this connection.
        is_shutting_down: what takes long is given up.
    """

    __slots__ = (
        "_answers",
        "_bios",
        "_device",
        "_flow",
        "_gate",
        "_host",
        "_output",
        "_replies",
        "_shared",
        "_standing",
        "_tasks",
        "_traffic",
        "is_shutting_down",
        "observer",
        "submit",
    )

    def __init__(
        self,
        host: Host,
        shared: Shared,
        output: Output,
        flow: Flow,
        device: Device,
        replies: Replies,
        answers: Answers,
        traffic: Traffic,
    ) -> None:
        self._host, self._shared = host, shared
        self._output, self._flow = output, flow
        self._replies, self._answers, self._traffic = replies, answers, traffic
        self._device = device
        self._gate = shared.gates.of(device)
        self.submit: Callable[[Bio], None] = device.submit
        self._bios: set[Bio] = set()
        self._standing: list[SlicedRange] = []
        self.observer = ConnectionObserver(device)
        self._tasks, self.is_shutting_down = Tasks(), False

    def drop(self) -> None:
        """The connection is closed: forget what the gate holds."""
        self.observer.close()
        standing, self._standing = self._standing, []
        # First all of them: one that ends must find no other one, for which the socket would be shut down.
        self._bios.difference_update(each.bio for each in standing)
        for each in standing:
            each.bio.end(errnos.ESHUTDOWN)
        self._gate.drop(tuple(self._bios))

    def adopt(self, bio: Bio, command: int, cookie: int, offset: int) -> None:
        """A bio of the hot loop has not ended inside `submit`."""
        bio.private = new_request(cookie, command, 0, offset, bio.length, None)
        self._flow.begin_request(bio.length)
        # The receive buffer and the arena are used again: a device that keeps the payload must have copied it.
        if bio.borrowed:
            raise AssertionError(f"{self._device.name} kept a borrowed payload: {bio}")
        self._bios.add(bio)

    def writes(self) -> Iterator[tuple[Bio, int, int]]:
        """Yield each write in flight, with the offset and length that the client asked for."""
        for bio in self._bios:
            request = bio.private
            assert isinstance(request, Request)
            if request.command in WRITING:
                yield bio, request.offset, bio.length

    @property
    def kinds(self) -> str:
        """The commands of the requests in flight, each once. READs of the compiled fast path have no bio."""
        requests = [bio.private for bio in self._bios]
        names = {CMD_NAMES[it.command] for it in requests if isinstance(it, Request)}
        if len(self._tasks):
            names.add(CMD_NAMES[CMD_BLOCK_STATUS])
        return ", ".join(sorted(names or {CMD_NAMES[CMD_READ]}))

    def start(self, bio: Bio) -> None:
        self._flow.begin_request(0)
        self._bios.add(bio)
        self.submit(bio)
        output = self._output
        if output.nr_queued >= self._shared.limits.flush_at and not output.is_blocked:
            self._host.flush()  # a large reply: the client can begin with it

    def start_read(self, cookie: int, flags: int, offset: int, length: int) -> None:
        """Start a READ that has a buffer of its own."""
        pool, slice_max = self._shared.pool, self._shared.limits.read_slice
        # A new bytearray is filled with zeroes at once: 64 MiB of them take 90 ms.
        take = pool.take if length <= slice_max else pool.take_untouched
        buffer = take(length)
        self._flow.take(len(buffer))
        request = new_request(cookie, CMD_READ, flags, offset, len(buffer), buffer)
        payload = memoryview(buffer)[HEADER_ROOM : HEADER_ROOM + length]
        bio = Bio(OP_READ, offset, length, payload, 0, self.ended, request)
        if length <= slice_max:
            self.start(bio)
            return
        self._flow.begin_request(0)
        looks = length >= self._answers.zero_min and not flags & CMD_FLAG_DF
        SlicedRead(bio, slice_max, self, self._shared.turns, looks=looks).go_on()

    def start_large(self, large: LargeWrite) -> None:
        """The payload of a large WRITE is complete."""
        if large.grown:
            large.leave()
            request = large.bio.private
            assert isinstance(request, Request)
            large.bio.private = request._replace(charge=large.charge)
        self.start(large.bio)

    def submit_slice(self, bio: Bio) -> None:
        self._bios.add(bio)
        self.submit(bio)

    def slice_ended(self, bio: Bio) -> int:
        self._bios.discard(bio)
        return bio.status or (errnos.ESHUTDOWN if self._host.is_closed else 0)

    def start_range(self, request: Request, length: int, done: int = 0) -> None:
        """Start a request without payload; a FLUSH also tells what the device has lost meanwhile.

        Args: done: so many bytes at its beginning have been carried out already.
        """
        command, flags, offset = request.command, request.flags, request.offset
        if command == CMD_FLUSH:
            mark = self.observer.mark()

            def ended(bio: Bio) -> None:
                bio.status = self.observer.end(mark, bio.status)
                self.ended(bio)

            self.start(Bio(OP_FLUSH, 0, 0, None, 0, ended, request))
            return
        op, bio_flags = OPS[command], bio_flags_of(command, flags)
        bio = Bio(op, offset, length, None, bio_flags, self.ended, request)
        if length <= first_slice(op, self._shared.limits) and not done:
            self.start(bio)
            return
        self._flow.begin_request(0)
        # In flight is all of it, and not its slices: what overlaps the range is held until the last has ended.
        self._bios.add(bio)
        ways = self._slicing(), self._stand_still
        ranges = SlicedRange(bio, self._device, *ways, done)
        self._gate.pass_by(bio, ranges.go_on)

    # ---- while the connection is frozen ----

    def _stand_still(self, ranges: SlicedRange) -> bool:
        """Before a slice: whether it has to wait.

        Not for one that younger connections wait for (`gate.py`): the other process would not know that they have to wait.
        """
        stands = self._host.may_stand_still and ranges.bio not in self._gate.elders
        if stands:
            self._standing.append(ranges)
        return stands

    @property
    def nr_standing(self) -> int:
        """How many requests have begun and stand still."""
        return len(self._standing)

    def begun(self) -> tuple[BegunRange, ...]:
        """Return the requests that stand still, for another process."""
        begun = []
        for each in self._standing:
            request, length = each.bio.private, each.bio.length
            assert isinstance(request, Request)
            words = request.cookie, request.command, request.flags, request.offset
            begun.append(BegunRange(*words, length, each.done))
        return tuple(begun)

    def start_begun(self, begun: BegunRange) -> None:
        """Go on with a request that another process has begun."""
        it = begun
        request = new_request(it.cookie, it.command, it.flags, it.offset, 0, None)
        self.start_range(request, it.length, it.done)

    def go_on(self) -> None:
        """The connection is not frozen any more."""
        standing, self._standing = self._standing, []
        for each in standing:
            self._shared.turns.ask(each.go_on)

    def _slicing(self) -> Slicing:
        shared = self._shared
        # Not kept: it refers to this object.
        turns, host = shared.turns, self._host
        return Slicing(
            *(shared.clock, shared.limits, turns, self._reason_to_stop),
            is_frozen=lambda: host.is_frozen,
        )

    def _reason_to_stop(self) -> int:
        """Return the errno with which a request ends that takes long, if its client has gone or the server stops; else 0."""
        has_gone = self._host.is_closed or self._host.has_hung_up()
        return errnos.ESHUTDOWN if has_gone or self.is_shutting_down else 0

    def start_status(
        self,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        contexts: Sequence[tuple[int, str]],
    ) -> None:
        self._flow.begin_request(0)
        request = new_request(cookie, CMD_BLOCK_STATUS, flags, offset, 0, None)
        self._tasks.start(self._block_status(request, length, contexts))

    async def _block_status(
        self, request: Request, length: int, contexts: Sequence[tuple[int, str]]
    ) -> None:
        device, offset, flags = self._device, request.offset, request.flags
        status = 0
        reply = b""
        try:
            await self._shared.turns.wait()
            await self._gate.passed(offset, length)
            asked = Asked(device, self._slicing(), offset, length)
            is_one = bool(flags & CMD_FLAG_REQ_ONE)
            replies = self._replies
            reply = await describe(
                asked, contexts, replies, request.cookie, req_one=is_one
            )
        except DeviceError as error:
            status = error.errno
        except Exception:
            log.exception("%s: %s: block status", self._host.peer, device.name)
            status = errnos.EIO
        self._flow.end_request()
        self._traffic.note(CMD_BLOCK_STATUS, 1, 0, perf_counter_ns() - request.begun_ns)
        if not self._host.is_closed:
            if status:
                at = request.cookie, offset
                self._answers.fail(at, CMD_BLOCK_STATUS, flags, status)
            else:
                self._output.push(reply)
            self._host.flush_soon()
        else:
            self._host.maybe_release()

    def ended(self, bio: Bio) -> None:
        """A bio has ended."""
        request = bio.private
        if request is None:
            return  # inside `submit`: `serve` goes on with it
        assert isinstance(request, Request)
        self._traffic.note_ended(request, bio)
        self._flow.end_request()
        self._bios.discard(bio)  # not in it, if its device broke the rules
        if self._host.is_closed:
            self._give_back(request)
            self._host.maybe_release()
        else:
            at = request.cookie, request.offset
            if bio.status:
                self._give_back(request)
                self._answers.fail(at, request.command, request.flags, bio.status)
            elif request.command == CMD_READ:
                self._answers.read(bio, request)
            else:
                self._give_back(request)
                self._answers.done(at, request.command)
            self._host.flush_soon()
        if self._gate.elders:
            self._gate.ended(bio)

    def _give_back(self, request: Request) -> None:
        self._flow.give_back(request.charge, request.buffer)
