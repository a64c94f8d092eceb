# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget_sync`: fdatasync in a thread of its own."""

import errno
import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.devices.file.page_cache import cached_pages
from nbdtarget.devices.file.syscalls import is_memory_file_system
from nbdtarget.fast import compiled
from tests.support.patience import PATIENCE_S

if compiled.IS_COMPILED:
    from nbdtarget_sync import PIECE_BYTES, RUNS, Syncer

pytestmark = pytest.mark.skipif(not compiled.IS_COMPILED, reason=compiled.describe())


def threads() -> set[str]:
    """Return the ids of this process's threads. Those of other tests may end at any time."""
    return set(os.listdir("/proc/self/task"))


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def wait(syncer: Syncer) -> int:
    assert select.select([syncer.event_fd], [], [], PATIENCE_S)[0]
    return syncer.take()


def test_one_sync_after_the_other(fd: int) -> None:
    before = threads()
    syncer = Syncer(fd)
    assert threads() <= before  # it is started by the first sync
    for _ in range(3):
        os.write(fd, b"x")
        syncer.begin()
        assert wait(syncer) == 0
        assert not select.select([syncer.event_fd], [], [], 0)[0]
    syncer.close()
    syncer.close()
    assert threads() <= before


def test_errors_are_told(fd: int) -> None:
    reading, writing = os.pipe()
    for bad, expected in ((reading, errno.EINVAL), (1 << 20, errno.EBADF)):
        syncer = Syncer(bad)
        syncer.begin()
        assert wait(syncer) == expected
        syncer.close()
    os.close(reading)
    os.close(writing)


def test_misuse_is_refused(fd: int) -> None:
    syncer = Syncer(fd)
    assert syncer.take() == RUNS
    syncer.begin()
    with pytest.raises(ValueError, match="one sync at a time"):
        syncer.begin()
    with pytest.raises(ValueError, match="a sync runs"):
        syncer.close()
    assert wait(syncer) == 0
    syncer.close()


def test_what_was_never_used_leaves_nothing(fd: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    syncer = Syncer(fd)
    syncer.close()
    del syncer
    assert len(os.listdir("/proc/self/fd")) == before


def test_ranges_are_written_back_and_dropped(tmp_path: Path, fd: int) -> None:
    os.write(fd, bytes(1 << 20))
    syncer = Syncer(fd)
    syncer.begin_behind([(0, 4096), (8192, 1 << 20)], [])
    assert wait(syncer) == 0
    syncer.begin_behind([], [(0, 1 << 20)])
    assert wait(syncer) == 0
    syncer.begin_behind([], [])
    assert wait(syncer) == 0
    syncer.begin()  # a sync again
    assert wait(syncer) == 0
    syncer.close()


def test_a_thread_that_gives_way_writes_all_pieces_back(
    tmp_path: Path, fd: int
) -> None:
    size = 3 * PIECE_BYTES + 4096
    os.write(fd, bytes(size))
    syncer = Syncer(fd, 5)
    syncer.begin_behind([(0, size)], [])
    assert wait(syncer) == 0
    syncer.begin_behind([], [(0, size)])
    assert wait(syncer) == 0
    if not is_memory_file_system(fd):
        # A page may be in another processor's hands for a moment, and then it stays.
        assert cached_pages(fd, 0, size) < size // 4096 // 4
    syncer.close()


def test_only_a_thread_that_is_to_give_way_does(fd: int) -> None:
    before = threads()
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    for step, expected in (
        (0, (nice, os.SCHED_OTHER)),
        (5, (min(nice + 5, 19), os.SCHED_BATCH)),
        (100, (19, os.SCHED_BATCH)),
    ):
        syncer = Syncer(fd, step)
        syncer.begin()
        assert wait(syncer) == 0
        (thread,) = threads() - before
        found = os.getpriority(os.PRIO_PROCESS, int(thread))
        assert (found, os.sched_getscheduler(int(thread))) == expected
        syncer.close()


@pytest.mark.parametrize("is_before", [False, True])
def test_the_first_range_that_fails_ends_it(fd: int, is_before: bool) -> None:
    bad = [(-4096, 4096)]  # no file has that
    syncer = Syncer(fd)
    syncer.begin_behind([] if is_before else bad, bad if is_before else [])
    assert wait(syncer) == errno.EINVAL
    syncer.begin()
    assert wait(syncer) == 0
    syncer.close()


def test_ranges_that_are_none_begin_nothing(fd: int) -> None:
    syncer = Syncer(fd)
    for bad in ([(1,)], ["ab"], [(1, 1 << 70)], [3]):
        with pytest.raises((TypeError, ValueError, OverflowError)):
            syncer.begin_behind(bad, [])  # type: ignore[arg-type]
    syncer.begin()
    assert wait(syncer) == 0
    with pytest.raises(ValueError, match="one sync"):
        _twice(syncer)
    assert wait(syncer) == 0
    syncer.close()


def _twice(syncer: "Syncer") -> None:
    syncer.begin()
    syncer.begin_behind([(0, 1)], [])
