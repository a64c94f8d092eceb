# SPDX-License-Identifier: Apache-2.0
"""`CompiledCopies`: the bulk copies that compiled threads carry out, as `nbdtarget.devices.bulk` sees them.

Theory of operation. One object for each time that streams are borrowed; `nbdtarget/fast/nbdtarget_copy.pyx` has its queue and its threads' work. The loop
watches an eventfd, and takes the copies that have ended. That goes on after `close`, until the last copy has ended: a thread whose
connection has broken may be late to say so, when other streams have been borrowed already.
"""

import asyncio
import errno as errnos
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from nbdtarget.devices.bulk_streams import (
    BulkCopy,
    BulkFailure,
    BulkStream,
    BulkWriter,
)
from nbdtarget.fast.compiled import IS_COMPILED, Copies, CopyStream

__all__ = ["CompiledCopies"]

_NO_STREAM: Final = -1


class CompiledCopies:
    """See the module head. Made by `maybe`. Context: the event loop, but for `work` and `fail_chunks`.

    Args:
        ended: takes copies that have ended, with their failures.
    """

    def __init__(
        self,
        copies: Copies,
        streams: Sequence[tuple[BulkStream, CopyStream]],
        ended: Callable[[list[BulkCopy]], None],
    ) -> None:
        self._copies = copies
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
        return cls(Copies(fd, chunk_bytes), compiled, ended)

    def put(self, copy: BulkCopy, offset: int, length: int) -> None:
        self._number += 1
        self._copies.put(self._number, offset, length)
        self._under_way[self._number] = copy
        copy.future.add_done_callback(partial(self._leave_out, self._number))

    def fail_queued(self, stream: BulkStream) -> None:
        """The last stream has broken: what has not begun fails, because it cannot be read."""
        self._copies.fail_queued(errnos.EIO, self._number_of(stream))

    def close(self) -> None:
        """Nothing more is put: the threads end."""
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

    def _reap(self) -> None:
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
