# SPDX-License-Identifier: Apache-2.0
"""`write_rest`, compiled and in Python: the rest is written where it belongs, and what the file does not take is told."""

import errno
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.devices.file import pieces
from nbdtarget.fast.compiled import IS_COMPILED

DATA = bytes(range(256)) * 1024  # 256 KiB


@pytest.fixture(params=["compiled", "python"], autouse=True)
def path_taken(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    if request.param == "compiled" and not IS_COMPILED:
        pytest.skip("the compiled fast path has not been built")
    monkeypatch.setattr(pieces, "IS_COMPILED", request.param == "compiled")
    return iter([None])


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("put", [0, 1, 65_536, 100_000, len(DATA)])
@pytest.mark.parametrize("piece", [1000, 64 << 10, 1 << 20])
def test_rest_is_written_where_it_belongs(fd: int, put: int, piece: int) -> None:
    assert pieces.write_rest(fd, memoryview(DATA), 512, put, piece=piece) == 0
    assert os.pread(fd, len(DATA), 512 + put) == DATA[put:]
    assert os.pread(fd, 512 + put, 0) in (bytes(512 + put), b"")


def test_error_is_raised_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        pieces.write_rest(fd, memoryview(DATA), 0, 0)
    os.close(fd)
    assert caught.value.errno == errno.EBADF


def test_full_disk_is_told_after_what_it_took(fd: int) -> None:
    """A file may grow no further than 100,000 bytes: two pieces, and a part of the third one."""
    caught: list[int | None] = []

    def write() -> None:
        try:
            pieces.write_rest(fd, memoryview(DATA), 0, 0, piece=40_000)
        except OSError as error:
            caught.append(error.errno)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught == [errno.EFBIG]
    assert os.pread(fd, len(DATA), 0) == DATA[:100_000]
