# SPDX-License-Identifier: Apache-2.0
"""Bulk copies: threads that read from one device and write to another, beside the event loop.

Theory of operation. A copy by the loop costs it two bios, and two hand-overs to other threads, for each chunk. A
background that copies gigabytes needs none of that. So a source lends *streams*, each of which a thread may block on
(a connection to a server, or a file), and a destination has a *writer* that any thread may call:

    loop      maybe_copy(range): cut into chunks, which go into one queue for all threads
    thread    take chunks, as many as it has buffers for; ask the stream for them; whatever
              comes first is written, and its buffer is used again
    loop      the future of the copy ends with its last chunk

Only the last chunk of a copy wakes the loop up. Where all streams and the writer have compiled halves, the threads are in C for all of this
(`bulk_compiled.py`). Otherwise Python's lock is released in each receive and each write; between
them a thread needs it for some 30 microseconds a chunk, and the loop waits for a thread that loses its processor meanwhile.

A source that lends nothing (one connection only, a mapped device, a file without the compiled half), a destination without a writer, and a
range that a stream cannot ask for are no matter for this module: `maybe_copy` returns None, and the caller copies by bios.

*Priority.* The threads of a copy come after those who serve clients: `background_threads.py`. While clients are active, compiled
copies take fewer processors, too, and hold them for a shorter time: `bulk_compiled.py`.

*Bounds.* Each thread has `CHUNKS_PER_STREAM` buffers of `CHUNK_BYTES`, and no other memory. Its requests are as many.

*Failures.* A chunk that cannot be read or written ends its copy with that error; chunks of that copy that have not
begun are left out. A stream that breaks fails what was asked of it with EIO, and its device is told, which then
counts as lost, as by any of its connections. Nothing is tried again here. `maybe_copy` borrows streams anew when the
device has them again.

*The end.* `rest` gives the streams back as soon as nothing is under way, and the threads end. A thread that hangs in
a receive is freed by its device (`BulkStream` and `Device.give_up_reads`); one that hangs in a write of the disk
keeps nothing from ending but its own copy: all threads are daemons.

*Correctness.* As for the copies of `targets.copier`: the caller holds the range on the destination until the copy
has ended, and flushes the destination before anything vouches for the copy. A copy has ended when
the last system call of its chunks has returned, also after a failure.
"""

import asyncio
import errno as errnos
import threading
from collections import deque
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final

from nbdtarget.devices.background_threads import begin_to_give_way
from nbdtarget.devices.base import Device
from nbdtarget.devices.bulk_compiled import CompiledCopies
from nbdtarget.devices.bulk_streams import (
    BulkCopy,
    BulkFailure,
    BulkStream,
    BulkWriter,
    Chunk,
    StreamLostError,
)

__all__ = ["CHUNKS_PER_STREAM", "CHUNK_BYTES", "BulkCopies"]

# Measured: at 256 KiB the threads hand Python's lock to each other twice as often, and need a quarter more CPU. A
# client's write to the same file waits while a chunk is written, so a chunk is not longer than need be.
CHUNK_BYTES: Final = 512 << 10
CHUNKS_PER_STREAM: Final = 2


class BulkCopies:
    """Copies from `source` to the same place on `destination`. See the module head.

    Context: the event loop, but for what `_work` calls.
    """

    def __init__(self, source: Device, destination: Device) -> None:
        self._source = source
        self._destination = destination
        self._writer: BulkWriter | None = None
        self._streams: list[BulkStream] = []
        self._queue: SimpleQueue[Chunk | None] = SimpleQueue()
        self._compiled: CompiledCopies | None = None
        self._nr_copies = 0
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        # The messages of the threads to the loop, in their order: an ended copy, or a stream with the
        # reason for its end.
        self._told: deque[BulkCopy | tuple[BulkStream, str]] = deque()
        self._wakeup_is_due = False

    @property
    def nr_streams(self) -> int:
        return len(self._streams)

    def maybe_copy(
        self, offset: int, length: int
    ) -> "asyncio.Future[BulkFailure | None] | None":
        """Copy a range; the future's result is None, or why it has failed. None: it must be copied by bios.

        Durable: nothing before a flush of the destination.
        """
        end = offset + length
        if end > self._source.size or end > self._destination.size:
            return None  # a bio says what is wrong
        if any(stream.is_broken for stream in self._streams):
            self.rest()  # its device has taken them back; not while copies fail on them
            if self._streams:
                return None
        if not self._streams and not self._borrow():
            return None
        if not self._streams[0].can_read(offset, length):
            return None
        assert self._loop is not None
        starts = range(offset, end, CHUNK_BYTES)
        copy = BulkCopy(self._loop.create_future(), len(starts), length)
        if self._compiled is not None:
            self._compiled.put(copy, offset, length)
        else:
            for at in starts:
                self._queue.put(Chunk(copy, at, min(CHUNK_BYTES, end - at)))
        self._nr_copies += 1
        return copy.future

    def rest(self) -> None:
        """Give the streams back, if nothing is under way; the next copy borrows them again."""
        if self._nr_copies:
            return
        for _ in self._streams:
            self._queue.put(None)
        if self._compiled is not None:
            self._compiled.close()
            self._compiled = None
        # Their threads end on their own. A copy meanwhile uses other streams, or none.
        self._streams = []
        self._queue = SimpleQueue()

    def _borrow(self) -> bool:
        self._writer = self._destination.maybe_bulk_writer()
        if self._writer is None:
            return False
        self._loop = asyncio.get_running_loop()
        self._streams = self._source.lend_streams()
        self._compiled = CompiledCopies.maybe(
            self._streams, self._writer, CHUNK_BYTES, self._compiled_ended
        )
        for nr, stream in enumerate(self._streams):
            work = partial(self._work, stream, self._writer, self._queue)
            if self._compiled is not None:
                work = partial(self._work_compiled, stream, self._compiled)
            name = f"{self._source.name}-bulk-{nr}"
            # A daemon: a server or a disk that never answers must not keep the process from ending.
            threading.Thread(target=work, name=name, daemon=True).start()
        return bool(self._streams)

    # ---- in a thread ----

    def _work(
        self,
        stream: BulkStream,
        writer: BulkWriter,
        queue: "SimpleQueue[Chunk | None]",
    ) -> None:
        """Copy chunks until None comes, or the stream breaks. Context: a thread of its own."""
        buffers = [memoryview(bytearray(CHUNK_BYTES)) for _ in range(CHUNKS_PER_STREAM)]
        under_way: set[Chunk] = set()
        reason = ""
        begin_to_give_way()
        try:
            while True:
                chunks = self._take(queue, len(buffers), may_wait=not under_way)
                for chunk in chunks:
                    chunk.buffer = buffers.pop()[: chunk.length]
                under_way.update(chunks)
                if chunks:
                    stream.start(chunks)
                elif not under_way:
                    break
                for chunk in stream.wait():
                    if not chunk.status and not chunk.copy.is_over:
                        self._write(writer, chunk)
                    elif chunk.status:
                        self._note_failure(chunk, chunk.status, stream)
                    under_way.remove(chunk)
                    buffers.append(_whole(chunk.buffer))
                    self._end(chunk)
        except StreamLostError as error:
            reason = str(error)
        except (
            Exception
        ) as error:  # our bug, which must not leave a copy without an end
            reason = f"internal error: {error!r}"
            self._report(error)
        # The device first: who learns that a copy has failed may try again, and must not find it usable.
        self._tell((stream, reason))
        for chunk in under_way:
            self._note_failure(chunk, errnos.EIO, stream)
            self._end(chunk)

    def _work_compiled(self, stream: BulkStream, copies: CompiledCopies) -> None:
        """As `_work`, in C. Context: a thread of its own."""
        begin_to_give_way()
        try:
            reason = copies.work(stream, CHUNKS_PER_STREAM)
        except Exception as error:  # no memory, or our bug
            reason = f"internal error: {error!r}"
            self._report(error)
        # The device first, as above.
        self._tell((stream, reason))
        if reason:
            copies.fail_chunks(stream)

    def _take(
        self, queue: "SimpleQueue[Chunk | None]", nr_max: int, *, may_wait: bool
    ) -> list[Chunk]:
        """Return chunks to begin with; none: nothing is there now, or, if we may wait, this is the end."""
        taken: list[Chunk] = []
        while len(taken) < nr_max:
            try:
                chunk = queue.get(may_wait and not taken)
            except Empty:
                break
            if chunk is None:
                break
            if chunk.copy.is_over:
                self._end(chunk)
            else:
                taken.append(chunk)
        return taken

    def _write(self, writer: BulkWriter, chunk: Chunk) -> None:
        try:
            status = writer.write(chunk.buffer, chunk.offset)
        except OSError as error:
            status = error.errno or errnos.EIO
        if status:
            self._note_failure(chunk, status, None)

    def _note_failure(
        self, chunk: Chunk, status: int, stream: BulkStream | None
    ) -> None:
        """Args: stream: that has failed to read; None: it is the write that failed."""
        copy = chunk.copy
        with self._lock:
            if copy.failure is None:
                copy.stream = stream
                copy.failure = BulkFailure(
                    status, stream is not None, chunk.offset, chunk.length
                )

    def _end(self, chunk: Chunk) -> None:
        copy = chunk.copy
        with self._lock:
            copy.left -= 1
            is_last = copy.left == 0
        if is_last:
            self._tell(copy)

    def _tell(self, news: BulkCopy | tuple[BulkStream, str]) -> None:
        # The order matters: first the entry, then the flag. `_drain` clears the flag before it looks.
        self._told.append(news)
        if self._wakeup_is_due:
            return
        self._wakeup_is_due = True
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            return  # the loop is closed: no task waits for a copy any more

    def _report(self, error: Exception) -> None:
        assert self._loop is not None
        context = {"message": "a bulk copy raised", "exception": error}
        self._loop.call_soon_threadsafe(self._loop.call_exception_handler, context)

    # ---- on the loop again ----

    def _drain(self) -> None:
        self._wakeup_is_due = False
        try:
            while self._told:
                news = self._told.popleft()
                if isinstance(news, BulkCopy):
                    self._copy_ended(news)
                else:
                    self._stream_ended(*news)
        finally:
            # Something is left only if one of them raised: the others must not wait for the next.
            if self._told and not self._wakeup_is_due:
                self._wakeup_is_due = True
                asyncio.get_running_loop().call_soon(self._drain)

    def _compiled_ended(self, copies: list[BulkCopy]) -> None:
        # Behind the streams that broke before: their devices are told first.
        self._told.extend(copies)
        self._drain()

    def _copy_ended(self, copy: BulkCopy) -> None:
        self._nr_copies -= 1
        failure = copy.failure
        if failure is not None and copy.stream is not None:
            status = copy.stream.read_failed(failure.status)
            failure = failure._replace(status=status)
        elif failure is not None:
            assert self._writer is not None
            self._writer.write_failed(failure.status)
        else:
            self._source.note_bulk_read(copy.nr_chunks, copy.length)
        if not copy.future.cancelled():
            copy.future.set_result(failure)

    def _stream_ended(self, stream: BulkStream, reason: str) -> None:
        if stream in self._streams:
            self._streams.remove(stream)
            if not self._streams:
                self._fail_queued(stream)
        stream.give_back(reason)

    def _fail_queued(self, stream: BulkStream) -> None:
        """The last stream has broken: what waits for one will not be read."""
        if self._compiled is not None:
            self._compiled.fail_queued(stream)
            self._compiled.close()
            self._compiled = None
        while True:
            try:
                chunk = self._queue.get_nowait()
            except Empty:
                return
            if chunk is not None:
                self._note_failure(chunk, errnos.EIO, stream)
                self._end(chunk)


def _whole(buffer: memoryview) -> memoryview:
    """Return the whole of what `buffer` is the beginning of."""
    return memoryview(buffer.obj)
