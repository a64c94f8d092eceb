# SPDX-License-Identifier: Apache-2.0
"""A Plane whose client talks in TLS."""

import errno
import select
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from nbdtarget.fast import compiled
from tests.support.certificates import needs_openssl
from tests.support.patience import PATIENCE_S
from tests.support.plane import SIZE, Bench, data_chunk, request, simple
from tests.support.tls_ends import encrypted

if compiled.IS_COMPILED:
    from nbdtarget_fast import (
        BLOCKED,
        CLOSED,
        DONE,
        FAILED,
        TURN_OVER,
    )
    from nbdtarget_sync import Syncer

pytestmark = [
    needs_openssl,
    pytest.mark.skipif(bool(compiled.describe_tls()), reason=compiled.describe_tls()),
]

READ, WRITE, FLUSH = 0, 1, 3
LONE_ALL: Final = 2  # see `Plane.turn`
RECEIVED: Final = 4096  # bytes of the receive buffer


class Rig(Bench):
    """A plane in TLS, and its client, whose records Python carries."""

    def __init__(self, path: Path) -> None:
        ours, peer = encrypted(*socket.socketpair(), client=False)
        super().__init__(
            path,
            sockets=(ours, peer),
            received=RECEIVED,
            zero_min=SIZE,
            length_max=SIZE,
            poison=True,
            ring_reads=self,  # it is only asked for room
            flush_for=lambda *_: None,
            tls=ours.records,
        )

    def room(self) -> tuple[int, int]:
        return 1000, SIZE

    def turn(self, sent: bytes = b"", *, poll_ns: int = 0, lone: int = 0) -> int:
        if sent:
            assert self.peer.send(sent) == len(sent)
        return super().turn(poll_ns=poll_ns, lone=lone)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "disk")
    yield made
    made.close()


def test_batch_is_served(rig: Rig) -> None:
    batch = request(READ, 4096, 512) + request(WRITE, 0, 512, b"w" * 512)
    batch += request(READ, 0, 100_000)
    assert rig.turn(batch) == DONE
    now = b"w" * 512 + rig.content[512:]
    assert rig.replies() == b"".join(
        (data_chunk(4096, now[4096:4608]), simple(), data_chunk(0, now[:100_000]))
    )
    assert rig.turn() == DONE


def test_turn_goes_on_until_all_that_tls_has_received_is_served(rig: Rig) -> None:
    """The loop does not know of it, and would not call again."""
    nr = 5 * RECEIVED // 28
    assert rig.turn(request(READ, 0, 16) * nr) == DONE
    assert not rig.ours.has_pending
    assert rig.replies() == data_chunk(0, rig.content[:16]) * nr


def test_flush_in_front_of_what_tls_has_received_does_not_end_the_turn_for_good(
    rig: Rig,
) -> None:
    """The FLUSH is Python's, and comes before the rest. So the turn ends, and the rest has another one."""
    nr = 2 * RECEIVED // 28
    assert rig.turn(request(FLUSH, 0, 0) + request(READ, 0, 16) * nr) == TURN_OVER
    assert rig.ours.has_pending
    assert rig.plane.take_syncs()[1]
    assert rig.turn() == DONE
    assert rig.replies() == data_chunk(0, rig.content[:16]) * nr


def test_answer_to_a_durable_request_of_a_client_that_is_alone_is_encrypted(
    rig: Rig,
) -> None:
    syncer = Syncer(rig.fd)
    syncer.begin()
    assert select.select([syncer.event_fd], [], [], PATIENCE_S)[0]
    assert syncer.take() == 0
    rig.file.syncer, rig.file.sync_wait_ns = syncer, int(PATIENCE_S * 10**9)
    rig.route.may_sync = lambda: True
    for _ in range(2):
        assert rig.turn(request(FLUSH, 0, 0), lone=LONE_ALL) == DONE
        assert rig.replies() == simple()
    assert rig.file.nr_synced == 2
    assert not rig.told
    rig.file.syncer = None
    syncer.close()


def test_replies_that_the_client_does_not_take_are_continued(rig: Rig) -> None:
    nr_sent, stop = 0, DONE
    while stop == DONE:
        stop = rig.turn(request(READ, 0, 100_000))
        nr_sent += 1
    assert stop == BLOCKED
    assert rig.ours.sealed
    plane, came = rig.plane, b""
    left = memoryview(rig.arena)[plane.base : plane.out]
    while left:
        came += rig.replies()
        try:
            left = left[rig.ours.send(left) :]
        except BlockingIOError:
            continue
    came += rig.replies()
    assert came == data_chunk(0, rig.content[:100_000]) * nr_sent


def test_what_is_sealed_must_be_continued(rig: Rig) -> None:
    while rig.turn(request(READ, 0, 100_000)) == DONE:
        pass
    rig.replies()
    with pytest.raises(AssertionError, match="not sent to its end"):
        rig.ours.send(b"x")


def test_close_notify_is_the_end(rig: Rig) -> None:
    rig.peer.send(request(READ, 0, 512))
    rig.peer.shutdown(socket.SHUT_WR)
    assert rig.turn() == CLOSED
    assert rig.replies() == data_chunk(0, rig.content[:512])


def test_damaged_record_fails(rig: Rig) -> None:
    rig.peer._sock.send(b"\x17\x03\x03\0\x20" + bytes(32))
    assert rig.turn() == FAILED
    assert rig.plane.error == errno.EPROTO
    assert rig.ours.records is not None
    assert "bad record mac" in str(rig.ours.records.tls_failure())


def test_closed_socket_fails(rig: Rig) -> None:
    rig.ours.close()
    assert rig.turn() == FAILED
    assert rig.plane.error == errno.EBADF
