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
from typing import TYPE_CHECKING, Final

from nbdtarget_protocol import consts
from scripts.fuzz_fast_files import FlakyFile

if TYPE_CHECKING:
    from nbdtarget_copy import Copies, CopyStream

__all__ = ["CopyRound"]

SIZE: Final = 1 << 20
TIMEOUT_S: Final = 120
ANSWERS_MAX: Final = 300  # of the servers of one `Copies`
COPIES_MAX: Final = 6  # at a time
# The errors with which a source and a file that misbehave may fail.
STATUSES: Final = {
    errno.EIO,
    errno.ENOMEM,
    errno.EBADF,
    errno.EISDIR,
    errno.EFBIG,
    errno.ENOSPC,
}


class _Server:
    """The server's end of one stream, and its thread that copies.

    Attributes:
        is_good: it has said nothing wrong.
    """

    def __init__(self, it: "CopyRound", copies: "Copies", number: int) -> None:
        import nbdtarget_copy

        self.it, self.copies, self.number = it, copies, number
        pick = it.random
        self.kind = pick.choice(("structured", "structured", "extended", "simple"))
        self.ours, self.sock = socket.socketpair()
        self.sock.settimeout(TIMEOUT_S)
        self.stream: CopyStream = nbdtarget_copy.CopyStream(
            self.ours.fileno(), self.kind == "structured", self.kind == "extended"
        )
        self.nr_buffers = pick.randint(1, 4)
        self.is_good = True
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        sentence, error = self.copies.work(self.stream, self.number, self.nr_buffers)
        if sentence or error:
            self.copies.fail_chunks(self.stream, errno.EIO)
            self.ours.shutdown(socket.SHUT_RDWR)

    def answer_one(self) -> bool:
        """Receive a READ, if there is one, and answer it. False: the stream has broken, or will soon."""
        layout = consts.EXTENDED_REQUEST if self.kind == "extended" else consts.REQUEST
        try:
            request = self.sock.recv(layout.size, socket.MSG_WAITALL)
            if len(request) < layout.size:
                return False
            _, _, _, cookie, offset, length = layout.unpack(request)
            self.sock.sendall(self._reply(cookie, offset, length))
        except (BrokenPipeError, ConnectionResetError):
            return False
        if not self.is_good:
            self.sock.shutdown(socket.SHUT_WR)  # the other side may wait for more
        return self.is_good

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


class _Reader:
    """A stream that reads a file, in a thread of its own. The file may be shorter than it should be, or none at all."""

    def __init__(self, it: "CopyRound", copies: "Copies", number: int) -> None:
        import nbdtarget_copy

        pick = it.random
        name = it.folder if pick.random() < 0.05 else it.folder / "source"
        self.fd = os.open(name, os.O_RDONLY)
        self.stream = nbdtarget_copy.CopyStream.of_file(self.fd)
        call = copies.work, (self.stream, number, pick.randint(1, 4))
        self.thread = threading.Thread(target=call[0], args=call[1], daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive()
        os.close(self.fd)


class CopyRound:
    """A file, and copies into it over several streams, which break now and then; more servers take the place of those that broke.

    Attributes:
        nr_errors: READs that were answered with an error.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        pick = self.random
        self.content = b"".join(
            pick.choice((bytes(4096), pick.randbytes(4096)))
            for _ in range(SIZE // 4096)
        )
        self.folder = folder
        is_short = pick.random() < 0.2
        source = self.content[: pick.randrange(SIZE)] if is_short else self.content
        (folder / "source").write_bytes(source)
        self.file = FlakyFile(folder / "copy", bytes(SIZE), pick)
        self.chunk_bytes = pick.choice((512, 4096, 65_536, 100_000))
        self.nr_errors = 0
        self.number = 0

    def run(self, nr_messages: int) -> int:
        """Answer about so many READs; return how many it were."""
        answered = 0
        while answered < nr_messages:
            answered += self._copy()
        return answered

    def _copy(self) -> int:
        """One `Copies`, until it has answers enough or its servers have broken."""
        import nbdtarget_copy

        pick = self.random
        copies = nbdtarget_copy.Copies(self.file.fd, self.chunk_bytes)
        servers = [_Server(self, copies, nr) for nr in range(pick.randint(1, 3))]
        readers = [_Reader(self, copies, 9)] if pick.random() < 0.2 else []
        running, under_way, answered = list(servers), dict[int, tuple[int, int]](), 0
        while running and answered < ANSWERS_MAX:
            self._begin(copies, under_way)
            self._disturb(copies, under_way)
            watched: list[socket.socket | int] = [each.sock for each in running]
            ready = select.select([*watched, copies.event_fd], [], [], TIMEOUT_S)[0]
            assert ready, "neither a READ nor the end of a copy has come"
            self._take(copies, under_way, servers)
            for server in [each for each in running if each.sock in ready]:
                answered += 1
                if not server.answer_one():
                    running.remove(server)
        copies.fail_queued(errno.EIO, 0)
        copies.close()
        for server in servers:
            if server.is_good:
                server.sock.shutdown(socket.SHUT_WR)  # a server that leaves
        for server in servers:
            server.close()
        for reader in readers:
            reader.close()
        while under_way:
            assert select.select([copies.event_fd], [], [], TIMEOUT_S)[0]
            self._take(copies, under_way, servers)
        return answered

    def _begin(self, copies: "Copies", under_way: dict[int, tuple[int, int]]) -> None:
        pick = self.random
        while len(under_way) < COPIES_MAX:
            offset = pick.randrange(SIZE - 1)
            length = pick.randint(1, 20) * self.chunk_bytes
            length = min(length, SIZE - offset, 1 << 19)
            self.number += 1
            under_way[self.number] = (offset, length)
            copies.put(self.number, offset, length)

    def _disturb(self, copies: "Copies", under_way: dict[int, tuple[int, int]]) -> None:
        """Leave a copy out, let the copies give way, or not any more."""
        pick = self.random
        if pick.random() < 0.02:
            number = pick.choice((*under_way, self.number + 1))
            failed = (errno.EIO, 0) if pick.random() < 0.3 else ()
            copies.leave_out(number, *failed)
            if number in under_way:
                under_way[number] = (0, 0)
        if pick.random() < 0.02:
            copies.give_way(pick.randrange(3), pick.randint(1, self.chunk_bytes))

    def _take(
        self,
        copies: "Copies",
        under_way: dict[int, tuple[int, int]],
        servers: list[_Server],
    ) -> None:
        are_good = all(each.is_good for each in servers)
        for number, status, is_read, at, size, stream in copies.take_ended():
            offset, length = under_way.pop(number)
            if status:
                # A server whose bytes were exchanged may have said any errno.
                assert not are_good or status in STATUSES
                assert 0 < size <= self.chunk_bytes
                assert at < SIZE
                assert is_read or stream == -1
            elif are_good:  # others may have said the wrong data
                with (self.folder / "copy").open("rb") as written:
                    written.seek(offset)
                    found = written.read(length)
                assert found == self.content[offset : offset + length]

    def close(self) -> None:
        self.file.close()
