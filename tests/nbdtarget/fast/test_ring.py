# SPDX-License-Identifier: Apache-2.0
"""io_uring by itself: reads of a file, without a loop."""

import contextlib
import ctypes
import errno as errnos
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.fast import compiled
from tests.support.patience import PATIENCE_S

if compiled.IS_COMPILED:
    from nbdtarget_ring import Ring

pytestmark = pytest.mark.skipif(
    not compiled.is_available(), reason="io_uring is not built, or not allowed"
)

CONTENT = os.urandom(1 << 20)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    opened = os.open(path, os.O_RDONLY)
    yield opened
    os.close(opened)


def ended(ring: "Ring", nr: int) -> dict[object, int]:
    found: dict[object, int] = {}
    while len(found) < nr:
        ready, _, _ = select.select([ring.event_fd], [], [], PATIENCE_S)
        assert ready, "nothing has ended in ten seconds"
        found.update(ring.reap())
    return found


def test_reads_fill_their_buffers(fd: int) -> None:
    ring = Ring(16)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    buffers = [bytearray(4096) for _ in range(10)]
    for nr, buffer in enumerate(buffers):
        assert ring.read(fd, buffer, nr * 50_000, nr)
    assert ring.nr_reads == 10
    assert ring.flush()
    assert ended(ring, 10) == dict.fromkeys(range(10), 4096)
    assert ring.nr_reads == 0
    for nr, buffer in enumerate(buffers):
        assert buffer == CONTENT[nr * 50_000 : nr * 50_000 + 4096]


def test_full_ring_takes_no_more_until_something_is_reaped(fd: int) -> None:
    ring = Ring(4)
    buffers = [bytearray(512) for _ in range(5)]
    assert [ring.read(fd, buffer, 0, 1) for buffer in buffers] == [True] * 4 + [False]
    ring.flush()
    while ring.nr_reads:
        select.select([ring.event_fd], [], [], PATIENCE_S)
        ring.reap()
    assert ring.read(fd, buffers[4], 0, 1)
    ring.flush()
    ended(ring, 1)


def test_slots_are_used_again_and_again(fd: int) -> None:
    ring = Ring(4)
    for nr in range(100):
        buffer = bytearray(16)
        assert ring.read(fd, buffer, nr * 16, nr)
        assert ring.flush()
        assert ended(ring, 1) == {nr: 16}
        assert buffer == CONTENT[nr * 16 : nr * 16 + 16]


def test_read_over_the_end_comes_short(fd: int) -> None:
    ring = Ring(4)
    assert ring.read(fd, bytearray(4096), len(CONTENT) - 100, "end")
    ring.flush()
    assert ended(ring, 1) == {"end": 100}


def test_error_is_minus_its_number(tmp_path: Path) -> None:
    ring = Ring(4)
    folder = os.open(tmp_path, os.O_RDONLY)
    assert ring.read(folder, bytearray(16), 0, "folder")
    ring.flush()
    assert ended(ring, 1) == {"folder": -errnos.EISDIR}
    os.close(folder)


def test_buffer_is_held_while_its_read_is_under_way(fd: int) -> None:
    ring = Ring(4)
    buffer = bytearray(16)
    assert ring.read(fd, buffer, 0, 1)
    with pytest.raises(BufferError):
        buffer.extend(b"more")
    ring.flush()
    ended(ring, 1)
    buffer.extend(b"more")


def test_buffer_that_cannot_be_written_is_refused(fd: int) -> None:
    ring = Ring(4)
    with pytest.raises(BufferError):
        ring.read(fd, b"constant", 0, 1)
    assert ring.nr_reads == 0
    for _ in range(4):
        assert ring.read(fd, bytearray(1), 0, 1)


def test_dropped_ring_lets_reads_under_way_alone(fd: int) -> None:
    """Their memory stays the kernel's: nothing here crashes, or overwrites what comes after."""
    for _ in range(50):
        ring = Ring(8)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for nr in range(8):
            assert ring.read(fd, bytearray(65536), nr * 65536, nr)
        ring.flush()
        del ring
    assert bytes(bytearray(1 << 20)) == bytes(1 << 20)


def test_probe_ends_although_children_are_not_told_of() -> None:
    """Where SIGCHLD is ignored, as a parent may have left it, no exit status of the child is there to wait for."""
    code = (
        "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
        "from nbdtarget.fast.compiled import is_available; print(is_available())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert done.stdout == b"False\n"


REGISTER, IOWQ_MAX_WORKERS = 427, 19  # the same number on every processor but alpha


def test_each_read_may_have_a_thread_of_the_kernel() -> None:
    """Otherwise a disk that hangs takes the few that there are, and no other disk is read."""
    ring = Ring(64)
    fd = next(fd for fd in ring_fds())
    numbers = (ctypes.c_uint * 2)(0, 0)  # 0: only tell
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(REGISTER, fd, IOWQ_MAX_WORKERS, numbers, 2) < 0:
        pytest.skip(f"this kernel cannot tell: {os.strerror(ctypes.get_errno())}")
    assert numbers[0] >= 64
    del ring


def ring_fds() -> Iterator[int]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "[io_uring]" in os.readlink(f"/proc/self/fd/{name}"):
                yield int(name)
