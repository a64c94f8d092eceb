# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget_copy`: chunks from a server's replies into a file, and what becomes of a copy when either fails."""

import errno
import os
import random
import select
import socket
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest

from nbdtarget.fast import compiled
from nbdtarget_protocol import completion, consts
from tests.support.patience import PATIENCE_S

if compiled.IS_COMPILED:
    from nbdtarget_copy import PIECE_BYTES, SPANS_MAX, Copies, CopyStream

pytestmark = pytest.mark.skipif(not compiled.IS_COMPILED, reason=compiled.describe())

CHUNK = 64 << 10
CONTENT = random.Random(8).randbytes(4 * CHUNK)
BASE = 1 << 33  # where copies begin


class Ended(NamedTuple):
    """What `take_ended` returns of a copy."""

    number: int
    status: int
    is_read: bool
    offset: int
    length: int
    stream: int


class Rig:
    """A file, one stream with its thread, and the server's end of it."""

    def __init__(self, kind: str = "structured", *, flags: int = os.O_RDWR) -> None:
        self.kind = kind
        memory = os.memfd_create("destination")
        self.fd = os.open(f"/proc/self/fd/{memory}", flags)
        os.close(memory)
        self.copies = Copies(self.fd, CHUNK)
        self.ours, self.server = socket.socketpair()
        self.server.settimeout(PATIENCE_S)
        self.stream = CopyStream(
            self.ours.fileno(), kind == "structured", kind == "extended"
        )
        self.broken: tuple[str, int] | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)

    def start(self, *, timeout_us: int = 0) -> "Rig":
        timeval = (0).to_bytes(8, "little") + timeout_us.to_bytes(8, "little")
        self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self.thread.start()
        return self

    def _work(self) -> None:
        self.broken = self.copies.work(self.stream, 7, 2)

    def requests(self, nr: int) -> list[tuple[int, int, int]]:
        """Receive READs: the cookie, offset and length of each."""
        layout = consts.EXTENDED_REQUEST if self.kind == "extended" else consts.REQUEST
        found = []
        for _ in range(nr):
            data = self.server.recv(layout.size, socket.MSG_WAITALL)
            magic, flags, command, *rest = layout.unpack(data)
            assert (flags, command) == (0, consts.CMD_READ)
            assert magic == (
                consts.EXTENDED_REQUEST_MAGIC
                if self.kind == "extended"
                else consts.REQUEST_MAGIC
            )
            found.append(tuple(rest))
        return found

    def chunk(
        self, kind: int, cookie: int, payload: bytes, *, done: bool = False
    ) -> bytes:
        flags = consts.REPLY_FLAG_DONE if done else 0
        if self.kind == "extended":
            magic = consts.EXTENDED_REPLY_MAGIC
            head = (magic, flags, kind, cookie, BASE + CHUNK * (cookie - 1))
            return consts.EXTENDED_CHUNK.pack(*head, len(payload)) + payload
        magic = consts.STRUCTURED_REPLY_MAGIC
        return consts.CHUNK.pack(magic, flags, kind, cookie, len(payload)) + payload

    def data(self, cookie: int, at: int, data: bytes, *, done: bool = False) -> bytes:
        payload = (BASE + at).to_bytes(8, "big") + data
        return self.chunk(consts.REPLY_TYPE_OFFSET_DATA, cookie, payload, done=done)

    def hole(self, cookie: int, at: int, length: int, *, done: bool = False) -> bytes:
        payload = (BASE + at).to_bytes(8, "big") + length.to_bytes(4, "big")
        return self.chunk(consts.REPLY_TYPE_OFFSET_HOLE, cookie, payload, done=done)

    def error(self, cookie: int, number: int, text: bytes = b"") -> bytes:
        payload = number.to_bytes(4, "big") + len(text).to_bytes(2, "big") + text
        return self.chunk(consts.REPLY_TYPE_ERROR, cookie, payload, done=True)

    def ended(self, nr: int = 1) -> list[Ended]:
        found: list[Ended] = []
        while len(found) < nr:
            assert select.select([self.copies.event_fd], [], [], PATIENCE_S)[0]
            found += map(Ended._make, self.copies.take_ended())
        return found

    def until_broken(self) -> tuple[str, int] | None:
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        return self.broken

    def written(self, length: int, at: int = 0) -> bytes:
        return os.pread(self.fd, length, BASE + at)

    def close(self) -> None:
        self.copies.close()
        if self.thread.is_alive():
            self.ours.shutdown(socket.SHUT_RDWR)
        self.thread.join(PATIENCE_S)
        self.ours.close()
        self.server.close()
        os.close(self.fd)


@pytest.fixture(params=["structured", "extended", "simple"])
def each_kind(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(request.param).start()
    yield rig
    rig.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig().start()
    yield rig
    rig.close()


def whole(rig: Rig, cookie: int, at: int, data: bytes) -> bytes:
    if rig.kind == "simple":
        return consts.SIMPLE_REPLY.pack(consts.SIMPLE_REPLY_MAGIC, 0, cookie) + data
    return rig.data(cookie, at, data, done=True)


def test_copies_are_exact_and_requests_bounded(each_kind: Rig) -> None:
    rig = each_kind
    rig.copies.put(1, BASE, 3 * CHUNK + 512)
    first, second = rig.requests(2)
    assert first == (1, BASE, CHUNK)
    assert second == (2, BASE + CHUNK, CHUNK)
    assert not select.select([rig.server], [], [], 0.01)[0]  # no more than its buffers
    assert rig.stream.nr_in_flight == 2
    rig.server.sendall(whole(rig, 2, CHUNK, CONTENT[CHUNK : 2 * CHUNK]))
    assert rig.requests(1) == [(3, BASE + 2 * CHUNK, CHUNK)]
    rig.server.sendall(whole(rig, 1, 0, CONTENT[:CHUNK]))
    assert rig.requests(1) == [(4, BASE + 3 * CHUNK, 512)]
    rig.server.sendall(whole(rig, 3, 2 * CHUNK, CONTENT[2 * CHUNK : 3 * CHUNK]))
    assert not rig.copies.take_ended()
    rig.server.sendall(whole(rig, 4, 3 * CHUNK, CONTENT[3 * CHUNK :][:512]))
    assert rig.ended() == [(1, 0, False, 0, 0, -1)]
    assert rig.written(4 * CHUNK) == CONTENT[: 3 * CHUNK + 512]
    assert rig.stream.nr_in_flight == 0
    rig.copies.close()
    assert rig.until_broken() == ("", 0)


@pytest.mark.parametrize("cut", [1, 37, 4096])
@pytest.mark.parametrize("kind", ["structured", "extended"])
def test_replies_in_pieces_with_holes_and_out_of_order(kind: str, cut: int) -> None:
    rig = Rig(kind).start()
    rig.copies.put(1, BASE, 2 * CHUNK)
    rig.requests(2)
    said = b"".join(
        (
            rig.data(2, CHUNK + 30_000, CONTENT[: CHUNK - 30_000]),
            rig.hole(1, 0, 20_000),
            rig.hole(2, CHUNK, 30_000),
            rig.chunk(consts.REPLY_TYPE_NONE, 2, b"", done=True),
            rig.data(1, 20_000, CONTENT[: CHUNK - 20_000], done=True),
        )
    )
    pieces = [said[at : at + cut] for at in range(0, len(said), cut)]
    # One byte at a time would take long: a few, and then the rest.
    pieces[300:] = [b"".join(pieces[300:])]
    for piece in pieces:
        rig.server.sendall(piece)
    assert rig.ended() == [(1, 0, False, 0, 0, -1)]
    assert rig.written(CHUNK) == bytes(20_000) + CONTENT[: CHUNK - 20_000]
    assert rig.written(CHUNK, CHUNK) == bytes(30_000) + CONTENT[: CHUNK - 30_000]
    rig.close()


def test_pieces_in_any_order_are_put_together(rig: Rig) -> None:
    pick = random.Random(3)
    for cookie in range(1, 21):
        at = (cookie - 1) * CHUNK % (2 * CHUNK)
        data = pick.randbytes(CHUNK)
        rig.copies.put(cookie, BASE + at, CHUNK)
        rig.requests(1)
        borders = sorted({0, CHUNK, *pick.sample(range(CHUNK), pick.randrange(60))})
        parts = list(pairwise(borders))
        pick.shuffle(parts)
        for begin, end in parts:
            rig.server.sendall(rig.data(cookie, at + begin, data[begin:end]))
        rig.server.sendall(rig.chunk(consts.REPLY_TYPE_NONE, cookie, b"", done=True))
        assert rig.ended() == [(cookie, 0, False, 0, 0, -1)]
        assert rig.written(CHUNK, at) == data


def with_large_chunks(size: int) -> Rig:
    rig = Rig()
    rig.copies = Copies(rig.fd, size)
    rig.copies.put(1, BASE, size)
    rig.start()
    assert rig.requests(1) == [(1, BASE, size)]
    return rig


@pytest.mark.parametrize("order", ["backwards", "inwards", "at random"])
def test_many_pieces_that_lie_apart_are_put_together(order: str) -> None:
    nr_pieces, size = 5000, 4
    rig = with_large_chunks(nr_pieces * size)
    data = random.Random(4).randbytes(nr_pieces * size)
    odd_first = [*range(1, nr_pieces, 2), *range(0, nr_pieces, 2)]
    if order == "backwards":
        odd_first.reverse()
    elif order == "at random":
        random.Random(5).shuffle(odd_first)
    pieces = [
        rig.data(1, at * size, data[at * size : (at + 1) * size]) for at in odd_first
    ]
    rig.server.sendall(b"".join(pieces))
    rig.server.sendall(rig.chunk(consts.REPLY_TYPE_NONE, 1, b"", done=True))
    assert rig.ended() == [(1, 0, False, 0, 0, -1)]
    assert rig.written(len(data)) == data
    rig.close()


def test_pieces_that_lie_apart_are_bounded_as_in_python() -> None:
    assert completion.SPANS_MAX == SPANS_MAX
    rig = with_large_chunks(4 * SPANS_MAX)
    said = [rig.data(1, 2 * nr, b"x") for nr in range(SPANS_MAX + 1)]
    rig.server.sendall(b"".join(said))
    broken = rig.until_broken()
    assert broken is not None
    assert "too many scattered chunks" in broken[0]
    rig.copies.fail_chunks(rig.stream, errno.EIO)
    rig.close()


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (consts.EIO, errno.EIO),
        (consts.ESHUTDOWN, errno.ESHUTDOWN),
        (4711, errno.EINVAL),
    ],
)
def test_an_error_is_the_status_of_its_copy_alone(number: int, status: int) -> None:
    rig = Rig()
    rig.copies.put(1, BASE, CHUNK)
    rig.copies.put(2, BASE + CHUNK, CHUNK)
    rig.start()
    rig.requests(2)
    rig.server.sendall(
        rig.data(1, 0, bytes(1000))
        + rig.error(1, number, b"bad")
        + rig.data(2, CHUNK, CONTENT[:CHUNK], done=True)
    )
    assert rig.ended(2) == [
        (1, status, True, BASE, CHUNK, 7),
        (2, 0, False, 0, 0, -1),
    ]
    assert rig.written(CHUNK, CHUNK) == CONTENT[:CHUNK]
    assert rig.written(CHUNK) == bytes(CHUNK)  # nothing of the other one
    rig.close()


def test_a_simple_error() -> None:
    rig = Rig("simple").start()
    rig.copies.put(1, BASE, CHUNK)
    rig.requests(1)
    error = consts.SIMPLE_REPLY.pack(consts.SIMPLE_REPLY_MAGIC, consts.ENOMEM, 1)
    rig.server.sendall(error)
    assert rig.ended() == [(1, errno.ENOMEM, True, BASE, CHUNK, 7)]
    rig.close()


def test_after_an_error_the_rest_of_the_copy_is_not_begun(rig: Rig) -> None:
    rig.copies.put(1, BASE, 4 * CHUNK)
    rig.requests(2)
    rig.server.sendall(rig.error(1, consts.EIO))
    assert not rig.copies.take_ended()  # one is under way
    rig.server.sendall(rig.data(2, CHUNK, CONTENT[:CHUNK], done=True))
    assert rig.ended() == [(1, errno.EIO, True, BASE, CHUNK, 7)]
    assert rig.written(4 * CHUNK) == b""  # nor what had come behind the failure
    rig.copies.put(2, BASE, CHUNK)
    assert rig.requests(1) == [(3, BASE, CHUNK)]


def test_a_write_that_fails_ends_its_copy() -> None:
    rig = Rig(flags=os.O_RDONLY).start()
    rig.copies.put(1, BASE, 4 * CHUNK)
    rig.requests(2)
    rig.server.sendall(rig.data(2, CHUNK, CONTENT[:CHUNK], done=True))
    rig.server.sendall(rig.data(1, 0, CONTENT[:CHUNK], done=True))
    assert rig.ended() == [(1, errno.EBADF, False, BASE + CHUNK, CHUNK, -1)]
    assert not select.select([rig.server], [], [], 0)[0]
    assert rig.thread.is_alive()  # the stream is whole
    rig.close()


LIES: list[tuple[str, str]] = [
    ("b'garbage, and no reply at all'", "bad reply magic 0x67617262"),
    ("rig.data(1, 0, CONTENT[:2000], done=True)", "only 2000 bytes"),
    ("rig.data(9, 0, CONTENT[:2000], done=True)", "unknown cookie 0x9"),
    ("rig.data(1, CHUNK - 1000, CONTENT[:2000])", "outside of a READ"),
    ("rig.data(1, -1, CONTENT[:2000])", "outside of a READ"),
    ("rig.data(1, 0, bytes(CHUNK + 1))", "outside of a READ"),
    ("rig.hole(1, 0, (1 << 32) - 1)", "outside of a READ"),
    ("rig.hole(1, 0, 0)", "OFFSET_HOLE chunk of no bytes"),
    ("rig.data(1, 0, b'')", "OFFSET_DATA chunk of 8 bytes"),
    ("rig.chunk(2, 1, bytes(13))", "OFFSET_HOLE chunk of 13 bytes"),
    ("rig.chunk(1, 1, b'')", "OFFSET_DATA chunk of 0 bytes"),
    ("rig.chunk(0, 1, b'x', done=True)", "NONE chunk with a payload"),
    ("rig.chunk(0, 1, b'')", "without DONE"),
    ("rig.chunk(5, 1, bytes(12), done=True)", "unknown chunk type 5"),
    ("rig.chunk(32769, 1, bytes(6), done=True)", "error chunk with error 0"),
    ("rig.chunk(32769, 1, bytes(5), done=True)", "error chunk of 5 bytes"),
    ("rig.chunk(32769, 1, bytes(5000), done=True)", "error chunk of 5000 bytes"),
    ("rig.chunk(32769, 1, b'\\0\\0\\0\\5\\0\\1', done=True)", "longer than its chunk"),
    ("rig.chunk(32770, 1, b'\\0\\0\\0\\5\\0\\0' + bytes(8), done=True)", "error at 0"),
    ("rig.data(1, 0, b'abc') + rig.data(1, 2, b'c')", "overlapping chunks"),
    ("rig.data(1, 5, b'abc') + rig.data(1, 0, b'abcdef')", "overlapping chunks"),
    ("bytes.fromhex('67446698' + 12 * '00')", "unknown cookie 0x0"),
]


@pytest.mark.parametrize(("said", "reason"), LIES, ids=[f"{x}" for x, _ in LIES])
def test_a_server_that_breaks_a_rule_breaks_the_stream(
    rig: Rig, said: str, reason: str
) -> None:
    rig.copies.put(1, BASE, CHUNK)
    rig.requests(1)
    rig.server.sendall(eval(said, globals(), {"rig": rig}))
    broken = rig.until_broken()
    assert broken is not None
    assert reason in broken[0]
    assert broken[1] == 0
    # Its device is told first; only then the copy ends.
    assert not rig.copies.take_ended()
    rig.copies.fail_chunks(rig.stream, errno.EIO)
    assert rig.ended() == [(1, errno.EIO, True, BASE, CHUNK, 7)]


def test_a_simple_reply_where_chunks_were_agreed(rig: Rig) -> None:
    rig.copies.put(1, BASE, CHUNK)
    rig.requests(1)
    rig.server.sendall(consts.SIMPLE_REPLY.pack(consts.SIMPLE_REPLY_MAGIC, 0, 1))
    broken = rig.until_broken()
    assert broken is not None
    assert "simple reply to a READ" in broken[0]
    rig.copies.fail_chunks(rig.stream, errno.EIO)


def test_a_chunk_for_another_offset() -> None:
    rig = Rig("extended").start()
    rig.copies.put(1, BASE + 512, CHUNK)
    rig.requests(1)
    rig.server.sendall(rig.data(1, 512, CONTENT[:CHUNK], done=True))
    broken = rig.until_broken()
    assert broken is not None
    assert broken[0].startswith(f"chunk for offset {BASE} in reply")
    rig.copies.fail_chunks(rig.stream, errno.EIO)
    rig.close()


def test_a_server_that_leaves(rig: Rig) -> None:
    rig.copies.put(1, BASE, CHUNK)
    rig.requests(1)
    rig.server.sendall(rig.data(1, 0, CONTENT[:CHUNK], done=True)[:30_000])
    rig.server.shutdown(socket.SHUT_WR)
    assert rig.until_broken() == ("", -1)
    rig.copies.fail_chunks(rig.stream, errno.EIO)
    assert rig.ended() == [(1, errno.EIO, True, BASE, CHUNK, 7)]


def test_a_server_that_is_silent() -> None:
    rig = Rig().start(timeout_us=20_000)
    rig.copies.put(1, BASE, CHUNK)
    assert rig.until_broken() == ("", errno.EAGAIN)
    rig.copies.fail_chunks(rig.stream, errno.EIO)
    rig.close()


def test_what_is_left_out_is_not_begun(rig: Rig) -> None:
    rig.copies.put(1, BASE, 4 * CHUNK)
    rig.requests(2)
    rig.copies.put(2, BASE, CHUNK)
    rig.copies.leave_out(1)
    rig.copies.leave_out(2)
    rig.copies.leave_out(3)  # there is none
    assert rig.ended() == [(2, 0, False, 0, 0, -1)]
    for cookie in (1, 2):
        rig.server.sendall(rig.hole(cookie, (cookie - 1) * CHUNK, CHUNK, done=True))
    assert rig.ended() == [(1, 0, False, 0, 0, -1)]
    assert rig.written(4 * CHUNK) == b""  # what had come was not written, either


def test_the_last_stream_has_broken_and_what_is_queued_fails(rig: Rig) -> None:
    rig.copies.put(1, BASE, 4 * CHUNK)
    rig.copies.put(2, BASE, 512)
    rig.requests(2)
    rig.server.close()
    assert rig.until_broken() == ("", -1)
    rig.copies.fail_queued(errno.EIO, 7)
    assert rig.ended() == [(2, errno.EIO, True, BASE, 512, 7)]
    rig.copies.fail_chunks(rig.stream, errno.EIO)
    assert rig.ended() == [(1, errno.EIO, True, BASE + 2 * CHUNK, CHUNK, 7)]


def test_what_makes_no_sense_is_refused(rig: Rig) -> None:
    for offset, length in ((0, 0), ((1 << 64) - 512, 1024)):
        with pytest.raises(ValueError, match="no range"):
            rig.copies.put(1, offset, length)
    with pytest.raises(ValueError, match="a chunk has no bytes"):
        Copies(rig.fd, 0)
    with pytest.raises(ValueError, match="so many buffers"):
        rig.copies.work(CopyStream(rig.ours.fileno(), True, False), 1, 17)


# ---- giving way ----

SMALL = CHUNK // 4


class Further:
    """A second stream of a rig's copies."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.ours, self.server = socket.socketpair()
        self.server.settimeout(PATIENCE_S)
        self.stream = CopyStream(self.ours.fileno(), True, False)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        self.rig.copies.work(self.stream, 8, 2)

    def requests(self, nr: int) -> list[tuple[int, int, int]]:
        data = self.server.recv(nr * consts.REQUEST.size, socket.MSG_WAITALL)
        assert len(data) == nr * consts.REQUEST.size
        return [each[3:] for each in consts.REQUEST.iter_unpack(data)]

    def has_ended(self) -> bool:
        self.thread.join(PATIENCE_S)
        return not self.thread.is_alive()

    def close(self) -> None:
        self.rig.copies.close()
        self.ours.shutdown(socket.SHUT_RDWR)
        assert self.has_ended()
        self.ours.close()
        self.server.close()


def asked(rig: Rig, further: Further) -> tuple[bool, bool]:
    """Which of the two servers were asked for something, as soon as one was."""
    found = select.select([rig.server, further.server], [], [], PATIENCE_S)[0]
    assert found
    return rig.server in found, further.server in found


def answer_all(rig: Rig, further: Further, nr: int, size: int) -> None:
    """Answer `nr` chunks of `size` bytes, of which one at a time is under way."""
    for _ in range(nr):
        found = asked(rig, further)
        assert found.count(True) == 1
        side: Rig | Further = rig if found[0] else further
        ((cookie, offset, length),) = side.requests(1)
        assert length == size
        assert rig.stream.nr_in_flight + further.stream.nr_in_flight == 1
        at = offset - BASE
        side.server.sendall(rig.data(cookie, at, CONTENT[at:][:length], done=True))


def test_copies_that_give_way_have_fewer_and_smaller_chunks_under_way() -> None:
    rig = Rig()
    rig.copies.give_way(1, SMALL)
    rig.copies.put(1, BASE, CHUNK)
    rig.copies.put(2, BASE + CHUNK, CHUNK)
    rig.start()
    further = Further(rig)
    answer_all(rig, further, 8, SMALL)
    assert rig.ended(2) == [(1, 0, False, 0, 0, -1), (2, 0, False, 0, 0, -1)]
    assert rig.written(2 * CHUNK) == CONTENT[: 2 * CHUNK]
    further.close()
    rig.close()


def test_the_end_of_the_bound_wakes_all_streams() -> None:
    rig = Rig().start()
    further = Further(rig)
    rig.copies.give_way(1, SMALL)
    rig.copies.put(1, BASE, 4 * CHUNK)
    asked(rig, further)
    rig.copies.give_way(0, 0)
    for side in (rig, further):
        assert select.select([side.server], [], [], PATIENCE_S)[0]
    further.close()
    rig.close()


def test_a_closed_copy_ends_threads_that_the_bound_lets_sleep() -> None:
    rig = Rig().start()
    further = Further(rig)
    rig.copies.give_way(1, SMALL)
    rig.copies.put(1, BASE, 2 * SMALL)
    rig.copies.close()
    answer_all(rig, further, 2, SMALL)
    assert rig.ended() == [(1, 0, False, 0, 0, -1)]
    assert rig.until_broken() == ("", 0)
    assert further.has_ended()
    further.ours.close()
    further.server.close()
    rig.close()


@pytest.mark.parametrize("how", ["leave_out", "fail_queued", "failure"])
def test_a_closed_copy_whose_queue_is_emptied_ends_threads_that_sleep(how: str) -> None:
    rig = Rig().start()
    rig.copies.give_way(1, SMALL)
    rig.copies.put(1, BASE, 4 * CHUNK)
    ((cookie, _, _),) = rig.requests(1)
    further = Further(rig)
    rig.copies.close()
    if how == "leave_out":
        rig.copies.leave_out(1)
    elif how == "fail_queued":
        rig.copies.fail_queued(errno.EIO, 8)
    if how == "failure":
        rig.server.sendall(rig.error(cookie, consts.EIO))
    assert further.has_ended()
    further.ours.close()
    further.server.close()
    rig.close()


def test_a_stream_that_breaks_leaves_its_place_to_another_one() -> None:
    rig = Rig().start()
    rig.copies.give_way(1, SMALL)
    rig.copies.put(1, BASE, SMALL)
    rig.requests(1)
    further = Further(rig)
    rig.copies.put(2, BASE + CHUNK, SMALL)
    rig.server.shutdown(socket.SHUT_RDWR)
    assert rig.until_broken() == ("", -1)
    assert not select.select([further.server], [], [], 0)[0]
    rig.copies.fail_chunks(rig.stream, errno.EIO)
    ((cookie, offset, length),) = further.requests(1)
    assert (offset, length) == (BASE + CHUNK, SMALL)
    data = CONTENT[CHUNK : CHUNK + SMALL]
    further.server.sendall(rig.data(cookie, CHUNK, data, done=True))
    assert rig.ended(2) == [
        (1, errno.EIO, True, BASE, SMALL, 7),
        (2, 0, False, 0, 0, -1),
    ]
    further.close()
    rig.close()


def test_chunks_that_take_several_system_calls_are_exact() -> None:
    size = 3 * PIECE_BYTES + 512
    rig = with_large_chunks(size)
    rig.copies.give_way(1 << 20, size)
    data = random.Random(9).randbytes(size)
    rig.server.sendall(rig.data(1, 0, data, done=True))
    assert rig.ended() == [(1, 0, False, 0, 0, -1)]
    assert rig.written(size) == data
    rig.close()


@pytest.mark.parametrize("bad", [(-1, 1), (1, 0), (1, CHUNK + 1)])
def test_chunks_that_cannot_be_are_refused(rig: Rig, bad: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        rig.copies.give_way(*bad)


# ---- from a file ----


def of_file(content: bytes, chunk_bytes: int) -> Rig:
    """A rig whose copies are read from a file that begins at BASE."""
    rig = Rig()
    rig.copies = Copies(rig.fd, chunk_bytes)
    memory = os.memfd_create("source")
    os.pwrite(memory, content, BASE)
    os.dup2(memory, rig.server.fileno())  # which closes it
    os.close(memory)
    rig.stream = CopyStream.of_file(rig.server.fileno())
    return rig


@pytest.mark.parametrize("gives_way", [False, True])
def test_chunks_of_a_file_are_exact(gives_way: bool) -> None:
    size = 3 * PIECE_BYTES + 512
    data = random.Random(9).randbytes(2 * size + 1)
    rig = of_file(data, size)
    if gives_way:
        rig.copies.give_way(1, size)
    rig.copies.put(1, BASE, 2 * size + 1)
    rig.start()
    assert rig.ended() == [(1, 0, False, 0, 0, -1)]
    assert rig.written(len(data)) == data
    rig.copies.close()
    assert rig.until_broken() == ("", 0)
    rig.close()


def test_what_a_file_does_not_have_fails_its_copy_alone() -> None:
    rig = of_file(CONTENT[:CHUNK], CHUNK)
    rig.copies.put(1, BASE, CHUNK + 512)
    rig.copies.put(2, BASE, CHUNK)
    rig.start()
    assert rig.ended(2) == [
        (1, errno.EIO, True, BASE + CHUNK, 512, 7),
        (2, 0, False, 0, 0, -1),
    ]
    rig.copies.close()
    assert rig.until_broken() == ("", 0)
    rig.close()


def test_a_file_that_cannot_be_read_fails_the_copy() -> None:
    rig = Rig()
    rig.stream = CopyStream.of_file(rig.server.fileno())
    rig.start()
    rig.copies.put(1, BASE, CHUNK)
    assert rig.ended() == [(1, errno.ESPIPE, True, BASE, CHUNK, 7)]
    rig.copies.close()
    assert rig.until_broken() == ("", 0)
    rig.close()
