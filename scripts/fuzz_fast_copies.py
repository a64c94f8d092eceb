# SPDX-License-Identifier: Apache-2.0
"""Rounds of `make fuzz-fast` with bulk copies: a server that answers READs in good ways and in bad ones."""

import errno
import os
import random
import select
import socket
import threading
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from nbdtarget_protocol import consts

if TYPE_CHECKING:
    from nbdtarget_copy import CopyStream

__all__ = ["CopyRound"]

SIZE = 1 << 20
TIMEOUT_S = 20


class _Server:
    """The server's end of one stream, and its thread that copies.

    Attributes:
        is_good: it has said nothing wrong.
    """

    def __init__(self, it: "CopyRound", number: int) -> None:
        import nbdtarget_copy

        self.it, self.number = it, number
        pick = it.random
        self.kind = pick.choice(("structured", "structured", "extended", "simple"))
        self.ours, self.sock = socket.socketpair()
        self.sock.settimeout(TIMEOUT_S)
        self.stream: CopyStream = nbdtarget_copy.CopyStream(
            self.ours.fileno(), self.kind == "structured", self.kind == "extended"
        )
        self.nr_buffers = pick.randint(1, 4)
        self.is_good = True
        self.is_broken = False
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        sentence, error = self.it.copies.work(self.stream, self.number, self.nr_buffers)
        if sentence or error:
            self.is_broken = True
            self.it.copies.fail_chunks(self.stream, errno.EIO)
            self.ours.shutdown(socket.SHUT_RDWR)

    def answer_one(self) -> bool:
        """Receive a READ, if there is one, and answer it. False: the stream has broken."""
        layout = consts.EXTENDED_REQUEST if self.kind == "extended" else consts.REQUEST
        try:
            request = self.sock.recv(layout.size, socket.MSG_WAITALL)
            if len(request) < layout.size:
                return False
            _, _, _, cookie, offset, length = layout.unpack(request)
            self.sock.sendall(self._reply(cookie, offset, length))
        except (BrokenPipeError, ConnectionResetError):
            return False
        if not self.is_good and self.it.random.random() < 0.5:
            self.sock.shutdown(socket.SHUT_WR)
        return True

    def _reply(self, cookie: int, offset: int, length: int) -> bytes:
        pick = self.it.random
        good = self._good_reply(cookie, offset, length)
        if pick.random() > 0.01:
            return good
        self.is_good = False
        odd = pick.random()
        if odd < 0.2:
            return pick.randbytes(pick.randrange(100))
        if odd < 0.4:
            return good[: pick.randrange(len(good) + 1)]
        # A few bytes at the beginning of the reply become others.
        changed = bytearray(good)
        for _ in range(pick.randint(1, 4)):
            changed[pick.randrange(min(len(changed), 40))] = pick.randrange(256)
        return bytes(changed)

    def _good_reply(self, cookie: int, offset: int, length: int) -> bytes:
        pick, content = self.it.random, self.it.content[offset : offset + length]
        error = pick.choice((consts.EIO, consts.ENOMEM)) if pick.random() < 0.02 else 0
        if error:
            self.it.nr_errors += 1
        if self.kind == "simple":
            head = consts.SIMPLE_REPLY.pack(consts.SIMPLE_REPLY_MAGIC, error, cookie)
            return head if error else head + content
        at = (cookie, offset)
        borders = {0, length}
        if pick.random() < 0.3:
            borders |= {pick.randrange(length) for _ in range(pick.randrange(40))}
        ordered = sorted(borders)
        parts = list(pairwise(ordered))
        pick.shuffle(parts)
        chunks = []
        for begin, end in parts:
            place = (offset + begin).to_bytes(8, "big")
            piece = content[begin:end]
            if not any(piece) and pick.random() < 0.5:
                hole = place + (end - begin).to_bytes(4, "big")
                chunks.append((consts.REPLY_TYPE_OFFSET_HOLE, hole))
            else:
                chunks.append((consts.REPLY_TYPE_OFFSET_DATA, place + piece))
        if error:
            text = b"e" * pick.randrange(50)
            payload = error.to_bytes(4, "big") + len(text).to_bytes(2, "big") + text
            kind = consts.REPLY_TYPE_ERROR
            if pick.random() < 0.5:
                kind, payload = kind + 1, payload + offset.to_bytes(8, "big")
            chunks = [*chunks[: pick.randrange(3)], (kind, payload)]
        elif pick.random() < 0.2:
            chunks.append((consts.REPLY_TYPE_NONE, b""))
        return b"".join(
            self._chunk(kind, payload, at, is_last=nr == len(chunks) - 1)
            for nr, (kind, payload) in enumerate(chunks)
        )

    def _chunk(
        self, kind: int, payload: bytes, at: tuple[int, int], *, is_last: bool
    ) -> bytes:
        flags = consts.REPLY_FLAG_DONE if is_last else 0
        cookie, offset = at
        if self.kind == "extended":
            head = (consts.EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset)
            return consts.EXTENDED_CHUNK.pack(*head, len(payload)) + payload
        magic = consts.STRUCTURED_REPLY_MAGIC
        return consts.CHUNK.pack(magic, flags, kind, cookie, len(payload)) + payload

    def close(self) -> None:
        self.sock.close()
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive()
        self.ours.close()


class CopyRound:
    """A file, and copies into it over streams that break now and then; another stream takes the place of one that broke.

    Attributes:
        nr_errors: READs that were answered with an error.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        import nbdtarget_copy

        self.random = random.Random(seed)
        pick = self.random
        self.content = b"".join(
            pick.choice((bytes(4096), pick.randbytes(4096)))
            for _ in range(SIZE // 4096)
        )
        self.fd = os.open(folder / "copy", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.chunk_bytes = pick.choice((512, 4096, 65_536, 100_000))
        self.copies = nbdtarget_copy.Copies(self.fd, self.chunk_bytes)
        self.nr_errors = 0
        self.number = 0
        self.nr_good = 0

    def run(self, nr_messages: int) -> int:
        """Answer about so many READs; return how many copies have ended well."""
        answered = 0
        # Each answer is up to 100 KB: a tenth of the messages takes as long.
        while answered < nr_messages // 10:
            answered += self._copy_over_one_stream()
        return self.nr_good

    def _copy_over_one_stream(self) -> int:
        pick = self.random
        server = _Server(self, pick.randrange(3))
        answered = 0
        under_way: dict[int, tuple[int, int]] = {}
        while not server.is_broken and answered < 300:
            if len(under_way) < 3:
                offset = pick.randrange(SIZE - 1)
                length = min(
                    pick.randint(1, 20) * self.chunk_bytes, SIZE - offset, 1 << 19
                )
                self.number += 1
                under_way[self.number] = (offset, length)
                self.copies.put(self.number, offset, length)
            if pick.random() < 0.02 and self.number in under_way:
                self.copies.leave_out(self.number)
                under_way[self.number] = (0, 0)
            watched: list[socket.socket | int] = [server.sock, self.copies.event_fd]
            ready = select.select(watched, [], [], TIMEOUT_S)[0]
            assert ready, "neither a READ nor the end of a copy has come"
            self._take(under_way, server)
            if server.sock not in ready:
                continue
            if not server.answer_one():
                break
            answered += 1
            if not server.is_good:
                break
        if server.is_good and not server.is_broken:
            server.sock.shutdown(socket.SHUT_WR)  # a server that leaves
        server.close()
        self.copies.fail_queued(errno.EIO, 0)
        while under_way:
            assert select.select([self.copies.event_fd], [], [], TIMEOUT_S)[0]
            self._take(under_way, server)
        return answered

    def _take(self, under_way: dict[int, tuple[int, int]], server: _Server) -> None:
        for number, status, _, at, size, _ in self.copies.take_ended():
            offset, length = under_way.pop(number)
            if status:
                # A server whose bytes were exchanged may have said any errno.
                assert not server.is_good or status in (errno.EIO, errno.ENOMEM)
                assert 0 < size <= self.chunk_bytes
                assert at < SIZE
                continue
            if server.is_good:  # others may have said the wrong data
                found = os.pread(self.fd, length, offset)
                assert found == self.content[offset : offset + length]
            self.nr_good += 1

    def close(self) -> None:
        self.copies.close()
        os.close(self.fd)
