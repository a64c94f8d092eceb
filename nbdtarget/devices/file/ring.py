# SPDX-License-Identifier: Apache-2.0
"""`RingReader`: reads that the page cache cannot answer, by io_uring, for all files of one event loop.

Theory of operation. A read that waits for the disk must not hold the loop up. A worker thread costs two switches and the
interpreter's lock for each read; the ring takes all reads of a turn of the loop in one system call, and
tells of all that have ended by one wake-up. At depth 32 that is less than a third of the CPU.

The compiled fast path of the server uses the same ring by itself, for reads without bios.

Where there is no compiled module, or io_uring is not allowed (as in many containers), `maybe_reader` returns
None, and reads go to worker threads as before.
"""

import asyncio
import logging
from collections.abc import Callable
from threading import Lock
from typing import Final

from nbdtarget.common.clock import LoopClock
from nbdtarget.common.say_rarely import SayRarely
from nbdtarget.common.turns import Soon
from nbdtarget.fast.compiled import IS_COMPILED, Ring, is_available

__all__ = ["RingReader", "find_out", "maybe_reader"]

log = logging.getLogger(__name__)

RETRY_S: Final = 0.001  # from reads that the kernel did not take to the next try
READS_MAX: Final = 256  # under way at once; more go to worker threads

_Done = Callable[[int], None]


class RingReader:
    """See the module head. Context: the loop in which it was made."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Raises: OSError: io_uring is not allowed. MemoryError."""
        self.loop = loop
        self.ring = Ring(READS_MAX)
        self._flush_soon = Soon(self.flush)
        self._clock = LoopClock()
        self._refused = SayRarely(self._clock)
        self.ring.left_over = self._flush_soon.ask
        self.watch()

    def watch(self) -> None:
        """Have the loop call when reads have ended."""
        self.loop.add_reader(self.ring.event_fd, self._reap)

    def read(self, fd: int, buffer: memoryview, offset: int, done: _Done) -> bool:
        """Fill `buffer`; `done` gets the number of bytes read, or minus the errno. Returns False if it has no room.

        The caller keeps `fd` open until then, and does not touch the buffer.
        """
        if not self.ring.read(fd, buffer, offset, done):
            return False
        self._flush_soon.ask()
        return True

    def flush(self) -> None:
        """Let the kernel begin what was asked for in this turn of the loop."""
        try:
            all_taken = self.ring.flush()
        except OSError as error:
            # The reads stay in the ring, and must not wait for ever: they are offered again.
            all_taken = False
            if nr := self._refused.count():
                log.error("io_uring: %s (%d times)", error, nr)
        if not all_taken:
            # Not in the next turn: what has ended is reaped first, and the loop has other work.
            self._clock.call_later(RETRY_S, self._flush_soon.ask)

    def _reap(self) -> None:
        ended = self.ring.reap()
        for nr, (done, result) in enumerate(ended):
            try:
                done(result)
            except BaseException:
                # A bug, which the loop reports. The others must not wait for it.
                for other, its_result in ended[nr + 1 :]:
                    self.loop.call_soon(other, its_result)
                raise

    def close(self) -> None:
        """Stop watching. Reads that are under way never end."""
        self._flush_soon.cancel()
        self.loop.remove_reader(self.ring.event_fd)


_readers: Final[dict[asyncio.AbstractEventLoop, RingReader]] = {}
_is_allowed: bool | None = None  # not tried yet
_finding_out = Lock()


def find_out() -> None:
    """Find out whether io_uring is allowed, the first time; `maybe_reader` answers None before that.

    Context: a worker. It is tried in a child process, whose start takes long in a large process.
    """
    global _is_allowed
    with _finding_out:
        if _is_allowed is None:
            _is_allowed = IS_COMPILED and is_available()
            if IS_COMPILED and not _is_allowed:
                log.info("io_uring is not allowed: reads go to worker threads")


def maybe_reader() -> RingReader | None:
    """Return the reader of the running loop, or None: there is no io_uring for us."""
    global _is_allowed
    if not _is_allowed:
        return None
    loop = asyncio.get_running_loop()
    reader = _readers.get(loop)
    if reader is not None:
        return reader
    for other in list(_readers):
        if other.is_closed():
            _readers.pop(other, None)
    try:
        reader = _readers[loop] = RingReader(loop)
    except (OSError, MemoryError) as error:  # refused, or no memory for the rings
        _is_allowed = False
        log.info("no io_uring: reads go to worker threads: %s", error)
        return None
    return reader
