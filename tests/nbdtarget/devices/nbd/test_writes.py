# SPDX-License-Identifier: Apache-2.0
import asyncio

from nbdtarget.bio import OP_READ, OP_WRITE, OP_WRITE_ZEROES, Bio
from nbdtarget.devices.nbd.writes import Writes

BLOCK = 8


class Server:
    """Carries out what `Writes` sends, when it is told to."""

    def __init__(self) -> None:
        self.disk = bytearray(b"." * 4 * BLOCK)
        self.sent: list[Bio] = []
        self.writes = Writes(BLOCK, self._send)

    def _send(self, bio: Bio, offset: int, length: int) -> None:
        assert (offset % BLOCK, length % BLOCK) == (0, 0)
        assert (bio.offset, bio.length) == (offset, length)
        self.sent.append(bio)

    def answer(self) -> None:
        """Carry out the oldest request."""
        bio = self.sent.pop(0)
        end = bio.offset + bio.length
        if bio.op == OP_READ:
            assert bio.payload is not None
            bio.payload[:] = self.disk[bio.offset : end]
        else:
            data = bytes(bio.length) if bio.payload is None else bio.payload
            self.disk[bio.offset : end] = data
            self.writes.ended()
        bio.end(0)

    async def answer_all(self) -> None:
        for _ in range(50):
            await asyncio.sleep(0)
            if self.sent:
                self.answer()


def write(offset: int, data: bytes, ended: list[int] | None = None) -> Bio:
    def endio(bio: Bio) -> None:
        assert bio.status == 0
        if ended is not None:
            ended.append(offset)

    return Bio(OP_WRITE, offset, len(data), memoryview(data), 0, endio)


async def test_write_of_whole_blocks_is_sent_at_once() -> None:
    server = Server()
    server.writes.take(write(BLOCK, b"w" * BLOCK))
    assert [bio.op for bio in server.sent] == [OP_WRITE]


async def test_write_of_parts_of_blocks_leaves_the_rest_of_them() -> None:
    server = Server()
    server.writes.take(write(3, b"w" * (2 * BLOCK + 2)))
    await server.answer_all()
    assert server.disk == b"..." + b"w" * (2 * BLOCK + 2) + b"." * (2 * BLOCK - 5)


async def test_zeroes_of_a_part_of_a_block_leave_the_rest_of_it() -> None:
    server = Server()
    server.writes.take(Bio(OP_WRITE_ZEROES, 2, 3, None, 0, lambda _: None))
    await server.answer_all()
    assert server.disk[:BLOCK] == b"..\0\0\0..."


async def test_a_patch_waits_for_what_is_sent_and_holds_back_what_comes_later() -> None:
    server = Server()
    ended: list[int] = []
    server.writes.take(write(0, b"1" * BLOCK, ended))
    server.writes.take(write(2, b"2", ended))
    server.writes.take(write(BLOCK, b"3" * BLOCK, ended))
    await asyncio.sleep(0)
    sent_first = len(server.sent)
    await server.answer_all()
    assert (sent_first, ended) == (1, [0, 2, BLOCK])
    assert server.disk[: 2 * BLOCK] == b"11211111" + b"3" * BLOCK


async def test_write_that_comes_just_when_the_queue_is_empty_is_carried_out() -> None:
    server = Server()
    ended: list[int] = []
    part = write(1, b"p", ended)
    # The endio runs in the task that works through the queue, in its last step.
    part.on_end(lambda _: server.writes.take(write(BLOCK, b"w" * BLOCK, ended)))
    server.writes.take(part)
    late = asyncio.get_running_loop()

    def come_late(_: Bio) -> None:
        late.call_soon(
            lambda: server.writes.take(write(2 * BLOCK, b"l" * BLOCK, ended))
        )

    part.on_end(come_late)
    await server.answer_all()
    assert sorted(ended) == [1, BLOCK, 2 * BLOCK]
