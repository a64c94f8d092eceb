# SPDX-License-Identifier: Apache-2.0
"""A file is closed in a thread: close(2) may wait for a server."""

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from nbdtarget.devices import resolve
from nbdtarget.devices.file.closing import close_descriptors
from nbdtarget.devices.file.device import FileDevice
from tests.support.patience import PATIENCE_S, until


class Closes:
    """Stands for close(2) of these descriptors: waits at a gate, and fails on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fds: set[int]) -> None:
        self.gate = threading.Event()
        self.began: list[int] = []
        self.fails_with = 0
        self._fds = fds
        self._close = os.close
        monkeypatch.setattr(os, "close", self.close)

    def close(self, fd: int) -> None:
        if fd not in self._fds:
            self._close(fd)
            return
        self.began.append(fd)
        assert self.gate.wait(PATIENCE_S)
        self._fds.remove(fd)
        self._close(fd)
        if self.fails_with:
            raise OSError(self.fails_with, os.strerror(self.fails_with))


async def test_loop_goes_on_while_a_disk_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    device = await resolve.open_device(str(path), read_only=False)
    assert isinstance(device, FileDevice)
    closes = Closes(monkeypatch, {device._fd})
    closing = asyncio.create_task(device.close())
    await until(lambda: bool(closes.began))
    assert not closing.done()
    closes.gate.set()
    await closing
    await device.close()  # idempotent
    assert len(closes.began) == 1


async def test_error_of_a_close_is_logged_and_the_others_are_closed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
    closes = Closes(monkeypatch, set(fds))
    closes.fails_with = errno.EDQUOT
    closes.gate.set()
    await close_descriptors("/disk", fds)
    assert closes.began == fds
    assert "/disk: closed with an error: Disk quota exceeded" in caplog.text


async def test_cancelled_close_returns_when_all_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
    closes = Closes(monkeypatch, set(fds))
    closing = asyncio.create_task(close_descriptors("/disk", fds))
    await until(lambda: bool(closes.began))
    closing.cancel()
    await asyncio.sleep(0)
    assert not closing.done()
    closes.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert closes.began == fds
