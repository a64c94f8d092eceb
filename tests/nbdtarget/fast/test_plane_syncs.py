# SPDX-License-Identifier: Apache-2.0
"""Requests that the compiled path carries out but for a FLUSH of the device: WRITE with FUA, and FLUSH."""

import errno
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from nbdtarget.fast import compiled
from tests.support import plane
from tests.support.patience import PATIENCE_S
from tests.support.plane import SIZE, Bench

if compiled.IS_COMPILED:
    from nbdtarget_fast import DONE, SLOW, FastFile, Route
    from nbdtarget_sync import Syncer

pytestmark = pytest.mark.skipif(not compiled.IS_COMPILED, reason=compiled.describe())

WRITE, FLUSH = 1, 3
LONE_ALL: Final = 2  # see `Plane.turn`
FUA: Final = 1
DATA: Final = os.urandom(512)


def request(
    command: int, offset: int, length: int, cookie: int, flags: int = 0
) -> bytes:
    payload = DATA[:length] if command == WRITE else b""
    return plane.request(command, offset, length, payload, flags=flags, cookie=cookie)


class Rig(Bench):
    """A plane whose connection has room for so many more syncs, and waits for none."""

    def __init__(self, path: Path) -> None:
        self.nr_room = 1000
        self.not_begun: list[int] = []
        self.odd_file: FastFile | None = None
        super().__init__(
            path,
            length_max=SIZE,
            poison=True,
            ring_reads=self,  # it is only asked for room
            flush_for=lambda *_: None,
        )

    def room(self) -> tuple[int, int]:
        return self.nr_room, 0

    def turn(self, sent: bytes = b"", *, poll_ns: int = 50_000, lone: int = 0) -> int:
        """Forget what the turn before has left."""
        self.peer.sendall(sent)
        return self.plane.turn(self.route, poll_ns, False, 0, 0, 0, 0, lone)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "disk")
    yield made
    made.close()


def test_they_are_done_and_left_to_be_answered_together(rig: Rig) -> None:
    wire = request(WRITE, 0, 512, 1, FUA) + request(FLUSH, 0, 0, 2)
    wire += request(WRITE, 4096, 512, 3) + request(WRITE, 8192, 512, 1 << 63, FUA)
    assert rig.turn(wire) == DONE
    # Only the plain WRITE is answered.
    assert rig.replies() == plane.simple(3)
    assert rig.plane.nr_syncs == 3
    assert rig.plane.take_syncs() == ([1, 1 << 63], [2])
    assert rig.plane.nr_syncs == 0
    content = rig.on_disk()
    assert [content[at : at + 512] for at in (0, 4096, 8192)] == [DATA] * 3


def test_so_many_of_them_and_the_rest_is_left_to_python(rig: Rig) -> None:
    rig.nr_room = 2
    assert rig.turn(b"".join(request(FLUSH, 0, 0, nr) for nr in range(3))) == SLOW
    assert rig.plane.end - rig.plane.begin == len(request(FLUSH, 0, 0, 0))
    assert rig.plane.take_syncs() == ([], [0, 1])
    rig.nr_room = -1
    assert rig.turn(request(WRITE, 0, 512, 1, FUA)) == SLOW
    assert rig.on_disk() == rig.content


@pytest.mark.parametrize(
    "odd",
    [
        request(FLUSH, 1, 0, 0),
        request(FLUSH, 0, 1, 0),
        request(FLUSH, 0, 0, 0, FUA),
        bytes(4) + request(FLUSH, 0, 0, 0)[4:],
        request(WRITE, 0, 512, 0, FUA | 2),
        request(0, 0, 512, 0, FUA),
    ],
)
def test_odd_ones_are_left_to_python(rig: Rig, odd: bytes) -> None:
    assert rig.turn(odd) == SLOW
    assert rig.plane.nr_syncs == 0


def test_more_than_there_is_room_for_comes_in_several_turns(rig: Rig) -> None:
    rig.nr_room = 1000
    wire = b"".join(request(FLUSH, 0, 0, nr) for nr in range(300))
    assert rig.turn(wire) == SLOW
    assert rig.plane.take_syncs() == ([], list(range(256)))
    left = rig.plane
    assert left.turn(rig.route, 0, True, left.begin, left.end, 0, 0) == DONE
    assert left.take_syncs() == ([], list(range(256, 300)))


# ---- writing back begins at once ----


@pytest.fixture
def odd_rig(rig: Rig) -> Iterator[Rig]:
    """Its file takes all that is written, but is none that can be written back: that tells when the kernel was asked to."""
    fd = os.open("/dev/null", os.O_RDWR)
    file = FastFile(
        fd,
        10**9,
        lambda: None,
        lambda *_: None,
        None,
        lambda: None,
        rig.not_begun.append,
    )
    file.size = file.read_max = file.write_max = SIZE
    rig.odd_file = file
    regular, rig.route = rig.route, Route.flat(file, 0, SIZE)
    rig.route.can_read = rig.route.can_write = True
    yield rig
    rig.route.close()
    rig.route = regular
    os.close(fd)


def test_data_of_a_fua_write_begins_to_be_written_back(odd_rig: Rig) -> None:
    assert odd_rig.turn(request(WRITE, 0, 512, 1) + request(FLUSH, 0, 0, 2)) == DONE
    assert not odd_rig.not_begun
    assert odd_rig.turn(request(WRITE, 0, 512, 3, FUA)) == DONE
    assert odd_rig.not_begun == [errno.ESPIPE]
    # It is not tried again where that is not known.
    assert odd_rig.turn(request(WRITE, 0, 512, 4, FUA)) == DONE
    assert len(odd_rig.not_begun) == 1


@pytest.mark.parametrize(
    "before",
    [request(WRITE, 4096, 512, 2), request(FLUSH, 0, 0, 2)],
    ids=["reply", "flush"],
)
def test_data_of_a_fua_write_that_is_not_alone_after_all_begins_to_be_written_back(
    odd_rig: Rig, tmp_path: Path, before: bytes
) -> None:
    with (tmp_path / "synced").open("wb") as synced:
        syncer = Syncer(synced.fileno())
        syncer.begin()
        assert select.select([syncer.event_fd], [], [], PATIENCE_S)[0]
        assert syncer.take() == 0
        file = odd_rig.odd_file
        assert file is not None
        file.syncer, file.sync_wait_ns = syncer, int(PATIENCE_S * 10**9)
        odd_rig.route.may_sync = lambda: True
        wire = before + request(WRITE, 0, 512, 3, FUA)
        assert odd_rig.turn(wire, lone=LONE_ALL) == DONE
        assert odd_rig.not_begun == [errno.ESPIPE]
        assert odd_rig.plane.take_syncs()[0] == [3]
        file.syncer = None
        syncer.close()


def test_data_of_a_write_that_a_flush_follows_begins_to_be_written_back(
    odd_rig: Rig,
) -> None:
    pair = request(WRITE, 0, 512, 1) * 2 + request(FLUSH, 0, 0, 2)
    for _ in range(8):
        assert odd_rig.turn(pair) == DONE
        assert not odd_rig.not_begun
        odd_rig.plane.take_syncs()
    assert odd_rig.turn(request(WRITE, 0, 512, 1)) == DONE
    assert odd_rig.not_begun == [errno.ESPIPE]


def test_data_of_many_writes_is_left_to_the_flush(odd_rig: Rig) -> None:
    for _ in range(40):
        wire = request(WRITE, 0, 512, 1) * 10 + request(FLUSH, 0, 0, 2)
        assert odd_rig.turn(wire) == DONE
        odd_rig.plane.take_syncs()
    assert not odd_rig.not_begun
