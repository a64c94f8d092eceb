# SPDX-License-Identifier: Apache-2.0
"""`PackedDevice`: the image in a packed file, which is read once from the front to the end.

Theory of operation. Such a file cannot be read at random: to know its last byte, all others have to be unpacked first. A clone does not mind, as
it copies in order. So the file is unpacked in a thread, a piece at a time, and the pieces of the last `WINDOW_BYTES` are kept. A READ of
what is not unpacked yet waits until it is.

*Who decides how far it is unpacked.* A background copy (`submit_ahead`): it is unpacked as far as one waits. A client's read far ahead, for
example of the backup of a partition table at the end, must wait, because what is passed meanwhile would be lost for the copy. Only if
there was no background copy for `ALONE_S` does a client's read alone drive it on.

*What is gone.* A READ of what has left the window begins the file again, when no other READ waits further ahead. That is slow, and right. So is the
start of a clone that was stopped: what it has already is unpacked again and skipped.

*The size* is known from the file or from `#size=` (`size.py`). The last piece is given out only when the file has ended there. A file that is
damaged, or has another size, fails all further reads with EIO; `changed` and `health.last_error` say why, and a clone copies nothing more. One that cannot be read now fails those
that wait, and is begun again by the next read.

*Identity.* The packed file's, with its format; equal ids count as equal content, because samples would unpack all of it.
"""

import asyncio
import errno as errnos
import logging
from collections import deque
from typing import Final

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.common.clock import LoopClock, Timer, loop_time_s, sleep
from nbdtarget.common.redaction import has_secrets, redacted
from nbdtarget.common.turns import Tasks
from nbdtarget.common.units import SECTOR
from nbdtarget.devices.base import Device
from nbdtarget.devices.packed.feed import Feed, UnreadableError
from nbdtarget.devices.packed.size import split_size, with_size
from nbdtarget.devices.packed.unpack import DamagedError, Unpacker
from nbdtarget_metadata.disks import Evidence

__all__ = ["PACKED", "PackedDevice"]

log = logging.getLogger(__name__)

PACKED: Final = "packed"
PIECE_BYTES: Final = 1 << 20
WINDOW_BYTES: Final = 64 << 20
ALONE_S: Final = 5.0


class PackedDevice(Device):
    """See the module head. Args: inner: the packed file, which is closed with this device; size: of the image."""

    io_min = PIECE_BYTES
    may_be_container = True
    has_lanes = True
    hides_zeroes = True
    is_forward_only = True
    can_resize = False

    def __init__(
        self,
        name: str,
        inner: Device,
        format_name: str,
        size: int,
        *,
        secret_name: str = "",
    ) -> None:
        super().__init__(name, -(-size // SECTOR) * SECTOR, read_only=True)
        self.secret_name = secret_name
        self.traffic = inner.traffic
        self._inner = inner
        self._format = format_name
        self._length = size
        self._waiting: list[Bio] = []  # of clients
        self._ahead: list[Bio] = []  # of background copies
        self._pieces: deque[tuple[int, bytes]] = deque()
        self._first = 0  # what is kept begins here
        self._position = 0  # and has been unpacked to here
        self._ahead_s = loop_time_s()  # a copy is likely to begin soon
        self._clock = LoopClock()
        self._alone_timer: Timer | None = None
        self._reason = ""  # why nothing is read any more
        self._damage = ""
        self._pump = Tasks(failed=self._broken)
        self._wanted = asyncio.Event()
        self.nr_starts = 0

    @property
    def changed(self) -> str:  # type: ignore[override]
        return self._inner.changed or self._damage

    def submit(self, bio: Bio) -> None:
        self._take(bio, self._waiting)

    def submit_ahead(self, bio: Bio) -> None:
        self._ahead_s = loop_time_s()
        self._take(bio, self._ahead)

    def _take(self, bio: Bio, waiting: list[Bio]) -> None:
        status = self.check_bounds(bio)
        if not status and bio.op == OP_READ and self._reason:
            status = errnos.EIO
        if status or bio.op != OP_READ or not bio.length:
            bio.end(status)
            return
        bio.own()
        if not self._serve(bio):
            waiting.append(bio)
            self._wanted.set()
            if not self._pump:
                self._pump.start(self._unpack())

    async def use_name(self, name: str) -> None:
        """Args: name: with or without the format before it, and the size behind it."""
        inner, _ = split_size(name.removeprefix(f"{self._format}:"))
        _, size_word = split_size(self.loadable_name)
        await self._inner.use_name(inner)
        full = f"{self._format}:{with_size(inner, size_word)}"
        self.secret_name = full if has_secrets(full) else ""
        self.name = self.bare_name = redacted(full)

    @property
    def nr_in_flight(self) -> int:
        return len(self._waiting) + len(self._ahead)

    async def check_again(self) -> None:
        await self._inner.check_again()

    def give_up_reads(self) -> None:
        self._fail_all()
        self._inner.give_up_reads()

    async def close(self) -> None:
        self._reason = self._reason or "is closed"
        self._fail_all()
        if self._alone_timer is not None:
            self._alone_timer.cancel()
        self._inner.give_up_reads()
        await self._pump.cancel()
        await self._inner.close()

    async def identify(self, role: str) -> Evidence:
        found = await self._inner.identify(role)
        ids = [f"packed={self._format}"]
        ids += [each for each in found.ids if not each.startswith("url=")]
        if found.mtime_ns:
            ids += [f"size={self._inner.exact_size}", f"last-modified={found.mtime_ns}"]
        return Evidence(PACKED, self.name, self.size, tuple(ids), is_pinned=True)

    # ---- serving ----

    def _serve(self, bio: Bio) -> bool:
        """End `bio` if all of it is kept; return whether it was."""
        end = min(bio.offset + bio.length, self._length)
        if bio.offset < self._first or end > self._position:
            return False
        payload = bio.payload
        assert payload is not None
        for begin, piece in self._pieces:
            low, high = max(begin, bio.offset), min(begin + len(piece), end)
            if low < high:
                payload[low - bio.offset : high - bio.offset] = piece[
                    low - begin : high - begin
                ]
        filled = max(0, end - bio.offset)
        payload[filled:] = bytes(bio.length - filled)
        bio.end(0)
        return True

    def _serve_all(self) -> None:
        for waiting in (self._ahead, self._waiting):
            bios = waiting.copy()
            waiting.clear()
            # A bio that ends may submit more, which are appended.
            left = [bio for bio in bios if not self._serve(bio)]
            waiting[:0] = left

    def _fail_all(self) -> None:
        bios = [*self._ahead, *self._waiting]
        self._ahead.clear()
        self._waiting.clear()
        for bio in bios:
            bio.end(errnos.EIO)

    # ---- unpacking ----

    def _is_driven(self) -> bool:
        """Whether it is to be unpacked further."""
        if any(self._is_ahead(bio) for bio in self._ahead):
            return True
        wanted = [bio for bio in self._waiting if self._is_ahead(bio)]
        if not wanted:
            return False
        near = self._position + PIECE_BYTES
        if any(bio.offset + bio.length <= near for bio in wanted):
            return True  # nothing is lost by one piece more
        left_s = self._ahead_s + ALONE_S - loop_time_s()
        if left_s <= 0:
            return True
        if self._alone_timer is None:
            self._alone_timer = self._clock.call_later(left_s, self._look_again)
        return False

    def _look_again(self) -> None:
        self._alone_timer = None
        self._wanted.set()

    def _is_ahead(self, bio: Bio) -> bool:
        return bio.offset >= self._first

    async def _unpack(self) -> None:
        while True:
            try:
                await self._unpack_once()
            except UnreadableError as error:
                self.health.note_error("read", errnos.EIO)
                self.health.last_error = str(error)
                self._fail_all()
                await sleep(0)  # those that ask again have their turn
            except DamagedError as error:
                self._refuse(str(error))
                return

    async def _unpack_once(self) -> None:
        """Unpack the file from its beginning, until a read of what is gone begins it again. Raises: DamagedError."""
        self.nr_starts += 1
        self._pieces.clear()
        self._first = self._position = 0
        unpacker = Unpacker(self._format)
        feed = Feed(self._inner)
        try:
            while True:
                while not self._is_driven():
                    bios = (*self._ahead, *self._waiting)
                    if bios and not any(map(self._is_ahead, bios)):
                        return
                    self._wanted.clear()
                    await self._wanted.wait()
                await self._unpack_piece(unpacker, feed)
                self._serve_all()
        finally:
            await feed.close()

    async def _unpack_piece(self, unpacker: Unpacker, feed: Feed) -> None:
        """Unpack the next piece, and keep it. Raises: DamagedError."""
        left = self._length - self._position
        piece = bytearray()
        while len(piece) < min(left, PIECE_BYTES):
            data = await self._next(unpacker, feed, PIECE_BYTES - len(piece))
            if not data:
                held = self._position + len(piece)
                raise DamagedError(
                    f"holds {held} bytes, and not {self._length}: it needs a clone of its own, with that #size"
                )
            piece += data
        if len(piece) >= left and (
            len(piece) > left or await self._next(unpacker, feed, 1)
        ):
            raise DamagedError(
                f"holds more than {self._length} bytes: it needs a clone of its own, with the right #size"
            )
        self._pieces.append((self._position, bytes(piece)))
        self._position += len(piece)
        while self._position - self._first > WINDOW_BYTES:
            begin, gone = self._pieces.popleft()
            self._first = begin + len(gone)

    async def _next(self, unpacker: Unpacker, feed: Feed, length: int) -> bytes:
        """Return the next bytes of the image; none: it has ended. Raises: DamagedError."""
        while True:
            if unpacker.needs_input:
                packed = await feed.next()
                if packed is None:
                    unpacker.finish()
                    return b""
                unpacker.feed(packed)
            data = await asyncio.to_thread(unpacker.take, length)
            if data:
                return data

    def _refuse(self, reason: str) -> None:
        self._reason = self._damage = reason
        self.health.last_error = reason
        log.error("%s: %s; nothing more is read from it", self.name, reason)
        self.health.note_error("read", errnos.EIO)
        self.health.last_error = reason
        self._fail_all()
        self.health.notify()

    def _broken(self, error: BaseException) -> None:
        self._refuse(f"cannot be unpacked: {error!r}")
