# SPDX-License-Identifier: Apache-2.0
"""The interface between devices and bulk copies: streams that read, a writer, and the chunks of a copy.

The copies themselves: `nbdtarget.devices.bulk`.
"""

import asyncio
from typing import Final, NamedTuple, Protocol

from nbdtarget.fast.compiled import CopyStream

__all__ = [
    "BulkCopy",
    "BulkFailure",
    "BulkStream",
    "BulkWriter",
    "Chunk",
    "StreamLostError",
]


class StreamLostError(Exception):
    """A stream has broken; the text is a sentence that says why."""


class BulkStream(Protocol):
    """Reads of one thread. Lent by a device; `give_back` ends that.

    Attributes:
        is_broken: nothing can be read any more. Context: the loop.
        is_near: the server that is read from uses the processors of this machine, as far as can be seen.
    """

    @property
    def is_broken(self) -> bool: ...

    @property
    def is_near(self) -> bool: ...

    def can_read(self, offset: int, length: int) -> bool:
        """Whether a copy of this range may be cut into chunks of this stream. Context: the loop."""
        ...

    def start(self, chunks: "list[Chunk]") -> None:
        """Ask for chunks, each into its buffer. Context: the thread. Raises: StreamLostError."""
        ...

    def wait(self) -> "list[Chunk]":
        """Block until chunks have come, or failed (`status`), and return them. Context: the thread.

        Raises: StreamLostError.
        """
        ...

    def maybe_compiled(self) -> CopyStream | None:
        """Return what compiled code reads from, instead of `start` and `wait`; None: there is no such thing.

        Context: the loop, before the thread begins.
        """
        ...

    def lost_reason(self, sentence: str, error: int) -> str:
        """Return a sentence for what `nbdtarget_copy.Copies.work` tells of a broken stream."""
        ...

    def read_failed(self, status: int) -> int:
        """A chunk has failed with `status`; return what its copy fails with. Context: the loop."""
        ...

    def give_back(self, reason: str) -> None:
        """The thread has ended; with a `reason`, because the stream has broken. Context: the loop."""
        ...


class BulkWriter(Protocol):
    """Writes of any thread to one device."""

    def write(self, data: memoryview, offset: int) -> int:
        """Write all of `data`; return 0 or an errno. It may block. Context: any thread."""
        ...

    def maybe_fd(self) -> int | None:
        """Return the open file that compiled code writes to, instead of `write`; None: there is none."""
        ...

    def write_failed(self, status: int) -> None:
        """A write has failed: the device may have to latch. Context: the loop."""
        ...


class BulkFailure(NamedTuple):
    """Why a copy has failed: at a chunk, with an errno."""

    status: int
    is_read: bool
    offset: int
    length: int


class Chunk:
    """A part of a copy. `buffer` has `length` bytes, while a thread works on it."""

    __slots__ = ("buffer", "copy", "length", "offset", "status")

    def __init__(self, copy: "BulkCopy", offset: int, length: int) -> None:
        self.copy = copy
        self.offset = offset
        self.length = length
        self.buffer = _NO_BUFFER
        self.status = 0


_NO_BUFFER: Final = memoryview(b"")


class BulkCopy:
    """One copy.

    Attributes:
        nr_chunks, length: what it consists of.
        left: chunks that have not ended; changed under the lock of all copies.
    """

    __slots__ = ("failure", "future", "left", "length", "nr_chunks", "stream")

    def __init__(
        self,
        future: "asyncio.Future[BulkFailure | None]",
        nr_chunks: int,
        length: int,
    ) -> None:
        self.future = future
        self.nr_chunks = self.left = nr_chunks
        self.length = length
        self.failure: BulkFailure | None = None
        self.stream: BulkStream | None = None  # that has failed to read

    @property
    def is_over(self) -> bool:
        """Whether chunks that have not begun need not begin any more."""
        return self.failure is not None or self.future.cancelled()
