# SPDX-License-Identifier: Apache-2.0
"""`CompiledCopies`: the bulk copies that compiled threads carry out, as `nbdtarget.devices.bulk` sees them.

Theory of operation. One object for each time that streams are borrowed; `nbdtarget/fast/nbdtarget_copy.pyx` has its queue and its threads' work. The loop
watches an eventfd, and takes the copies that have ended. That goes on after `close`, until the last copy has ended: a thread whose
connection has broken may be late to say so, when other streams have been borrowed already.

*Giving way.* Whenever a copy begins or ends, the loop looks whether clients of any device were served lately (within QUIET_S). If so, the
copies give way, and until clients are quiet again they take what processors are left. Each chunk under way keeps
one busy: one of our threads, or a thread of the source's server, if that is on this machine. So there are as many chunks at a time as there are
processors, less one for the loop and its clients. A source elsewhere is asked for as many as ever, or its distance would count. In
both cases each system call is short.
"""

import asyncio
import errno as errnos
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from nbdtarget.common.activity import all_batches
from nbdtarget.common.clock import loop_time_s
from nbdtarget.devices.bulk_streams import (
    BulkCopy,
    BulkFailure,
    BulkStream,
    BulkWriter,
)
from nbdtarget.fast.compiled import (
    IS_COMPILED,
    Copies,
    CopyStream,
)

__all__ = ["QUIET_S", "SMALL_CHUNK_BYTES", "CompiledCopies"]

QUIET_S: Final = 0.010
# Of a chunk while clients are active: the source's server keeps its processor for as long as it reads and sends one.
SMALL_CHUNK_BYTES: Final = 256 << 10

_NO_STREAM: Final = -1
_ALL: Final = 1 << 30  # chunks at once: as many as there are buffers


class CompiledCopies:
    """See the module head. Made by `maybe`. Context: the event loop, but for `work` and `fail_chunks`.

    Args:
        ended: takes copies that have ended, with their failures.
        chunk_bytes: of one READ and one write, while clients are quiet.
    """

    def __init__(
        self,
        copies: Copies,
        streams: Sequence[tuple[BulkStream, CopyStream]],
        ended: Callable[[list[BulkCopy]], None],
        chunk_bytes: int,
    ) -> None:
        self._copies = copies
        self._shares = _shares(streams[0][0], chunk_bytes)
        self._gives_way = False
        self._nr_batches = all_batches()
        self._active_until_s = 0.0
        self._streams = streams
        self._ended = ended
        self._under_way: dict[int, BulkCopy] = {}
        self._number = 0
        self._is_closed = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(copies.event_fd, self._reap)

    @classmethod
    def maybe(
        cls,
        streams: Sequence[BulkStream],
        writer: BulkWriter,
        chunk_bytes: int,
        ended: Callable[[list[BulkCopy]], None],
    ) -> "CompiledCopies | None":
        """Return None if not all of these have compiled halves; then Python copies."""
        fd = writer.maybe_fd()
        if not IS_COMPILED or fd is None or not streams:
            return None
        halves = [(each, each.maybe_compiled()) for each in streams]
        compiled = [(each, half) for each, half in halves if half is not None]
        if len(compiled) < len(streams):
            return None
        return cls(Copies(fd, chunk_bytes), compiled, ended, chunk_bytes)

    def put(self, copy: BulkCopy, offset: int, length: int) -> None:
        self._look_for_clients()
        self._number += 1
        self._copies.put(self._number, offset, length)
        self._under_way[self._number] = copy
        copy.future.add_done_callback(partial(self._leave_out, self._number))

    def fail_queued(self, stream: BulkStream) -> None:
        """The last stream has broken: what has not begun fails, because it cannot be read."""
        self._copies.fail_queued(errnos.EIO, self._number_of(stream))

    def close(self) -> None:
        """End the threads: no more chunks are put."""
        self._is_closed = True
        self._copies.close()
        self._maybe_end()

    def work(self, stream: BulkStream, nr_buffers: int) -> str:
        """Copy, until the end or until the stream breaks; return why it has broken. Context: a thread of its own.

        What it has under way then is failed by `fail_chunks`, and not before.
        """
        number = self._number_of(stream)
        sentence, error = self._copies.work(
            self._streams[number][1], number, nr_buffers
        )
        return stream.lost_reason(sentence, error) if sentence or error else ""

    def fail_chunks(self, stream: BulkStream) -> None:
        """The stream has broken: what it had under way was not copied. Context: its thread."""
        self._copies.fail_chunks(self._streams[self._number_of(stream)][1], errnos.EIO)

    def _number_of(self, stream: BulkStream) -> int:
        return next(nr for nr, (each, _) in enumerate(self._streams) if each is stream)

    def _leave_out(
        self, number: int, future: "asyncio.Future[BulkFailure | None]"
    ) -> None:
        if future.cancelled():
            self._copies.leave_out(number)

    def _look_for_clients(self) -> None:
        """Give way, or take all there is again; see *Giving way* above."""
        now_s, nr_batches = loop_time_s(), all_batches()
        if nr_batches != self._nr_batches:
            self._nr_batches = nr_batches
            self._active_until_s = now_s + QUIET_S
        gives_way = now_s < self._active_until_s
        if gives_way != self._gives_way:
            self._gives_way = gives_way
            self._copies.give_way(*self._shares if gives_way else (0, 0))

    def _reap(self) -> None:
        self._look_for_clients()
        ended = []
        for number, status, is_read, offset, length, nr in self._copies.take_ended():
            copy = self._under_way.pop(number)
            if status:
                copy.failure = BulkFailure(status, is_read, offset, length)
                copy.stream = None if nr == _NO_STREAM else self._streams[nr][0]
            ended.append(copy)
        self._maybe_end()
        self._ended(ended)

    def _maybe_end(self) -> None:
        if self._is_closed and not self._under_way:
            self._loop.remove_reader(self._copies.event_fd)


def _shares(stream: BulkStream, chunk_bytes: int) -> tuple[int, int]:
    """Return how many chunks may be under way while clients are active, and their size in bytes."""
    nr_chunks = _ALL
    if stream.is_near:
        nr_chunks = max(1, len(os.sched_getaffinity(0)) - 1)
    if stream.is_near and stream.can_read(0, SMALL_CHUNK_BYTES):
        chunk_bytes = min(chunk_bytes, SMALL_CHUNK_BYTES)
    return nr_chunks, chunk_bytes
