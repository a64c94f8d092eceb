# SPDX-License-Identifier: Apache-2.0
"""`Writes`: writes to a server that takes only whole blocks, and how many are under way.

A write that begins and ends at a border of blocks is sent as it is. Another one needs the rest of its first and last
block, so it is *patched*: these blocks are read, changed and written back. A write to the rest of the block
that is under way meanwhile would be undone by this. So before a write is patched, all writes must have ended, and those
that come later wait in a queue until it has ended. That is slow, but rare: file systems write whole blocks.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from nbdtarget.bio import FAST_ZERO, FUA, NO_UNMAP, OP_READ, OP_WRITE, Bio
from nbdtarget.common.turns import Tasks
from nbdtarget_protocol import consts

__all__ = ["Writes", "zero_flags"]


def zero_flags(flags: int) -> int:
    """Return the flags on the wire of a WRITE_ZEROES with the flags of a bio."""
    wire = consts.CMD_FLAG_NO_HOLE if flags & NO_UNMAP else 0
    return wire | (consts.CMD_FLAG_FAST_ZERO if flags & FAST_ZERO else 0)


class Writes:
    """The writes of one device.

    Args:
        block: bytes; the server's minimum block size.
        send: sends a bio for a range of whole blocks; `ended` is called when that has been answered.
    """

    def __init__(self, block: int, send: Callable[[Bio, int, int], None]) -> None:
        self._block = block
        self._send = send
        self._zeroes = memoryview(bytes(block))
        self._nr_sent = 0
        self._none_is_sent = asyncio.Event()
        self._held: deque[Bio] = (
            deque()
        )  # those that are patched, and those behind them
        self._tasks = Tasks(
            ended=self._carry_on
        )  # one at most: it works through the queue

    def widened(self, bio: Bio) -> tuple[int, int]:
        """Offset and length of the whole blocks that the bio touches."""
        block = self._block
        if block == 1:
            return bio.offset, bio.length
        begin = bio.offset // block * block
        end = -(-(bio.offset + bio.length) // block) * block
        return begin, end - begin

    def take(self, bio: Bio) -> None:
        """Carry out a WRITE or WRITE_ZEROES, now or when it is its turn."""
        is_whole = self.widened(bio) == (bio.offset, bio.length)
        if is_whole and not self._tasks:
            self.send(bio, bio.offset, bio.length)
            return
        self._held.append(bio)
        self._carry_on()

    def send(self, bio: Bio, offset: int, length: int) -> None:
        """Send a bio that changes the disk, for a range of whole blocks."""
        self._nr_sent += 1
        self._send(bio, offset, length)

    def ended(self) -> None:
        """The write that `send` has sent has been answered."""
        self._nr_sent -= 1
        if self._nr_sent == 0:
            self._none_is_sent.set()

    def _carry_on(self) -> None:
        # Also asked when the task has ended: something may have come after it had looked.
        if self._held and not self._tasks:
            self._tasks.start(self._carry_out_held())

    async def _carry_out_held(self) -> None:
        """Carry out the queue in order."""
        while self._held:
            bio = self._held.popleft()
            if self.widened(bio) == (bio.offset, bio.length):
                self.send(bio, bio.offset, bio.length)
                continue
            # A write that is under way may touch the same blocks: the patch would undo it.
            while self._nr_sent:
                self._none_is_sent.clear()
                await self._none_is_sent.wait()
            bio.end(await self._patch(bio))

    async def _patch(self, bio: Bio) -> int:
        """Write the whole blocks inside the bio's range and patch those at its ends; its errno."""
        data = bio.payload if bio.op == OP_WRITE else None
        offset, block = bio.offset, self._block
        at, end = offset, bio.offset + bio.length
        status = 0
        while at < end and not status:
            begin = at // block * block
            if at == begin and end - at >= block:
                stop = end // block * block
                whole = None if data is None else data[at - offset : stop - offset]
                status = await self._whole(bio.op, at, stop - at, whole, bio.flags)
            else:
                stop = min(begin + block, end)
                patched = memoryview(bytearray(block))
                status = await self._whole(OP_READ, begin, block, patched, 0)
                if status:
                    break
                piece = (
                    self._zeroes[: stop - at]
                    if data is None
                    else data[at - offset : stop - offset]
                )
                patched[at - begin : stop - begin] = piece
                fua = bio.flags & FUA
                status = await self._whole(OP_WRITE, begin, block, patched, fua)
            at = stop
        return status

    async def _whole(
        self, op: int, offset: int, length: int, payload: memoryview | None, flags: int
    ) -> int:
        """Carry out an operation on whole blocks; its errno."""
        done: asyncio.Future[Bio] = asyncio.get_running_loop().create_future()
        bio = Bio(op, offset, length, payload, flags, done.set_result)
        if op == OP_READ:
            self._send(bio, offset, length)
        else:
            self.send(bio, offset, length)
        await done
        return bio.status
