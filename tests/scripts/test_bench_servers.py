# SPDX-License-Identifier: Apache-2.0
"""scripts/bench_servers.py: what a sample begins with, and that the floor's CPU is counted in the sample that used it."""

import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from nbdtarget.devices.file.pieces import WRITE_PIECE
from scripts.bench_servers import Contender, Floor
from tests.support.patience import PATIENCE_S
from tests.support.processes import ServerProcess


class Serverless(Contender):
    """As a server that drops the image from the page cache when it opens it."""

    name = "serverless"
    tool = "true"

    def launch(self) -> ServerProcess:
        self.cool()
        return None  # type: ignore[return-value]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(3 * WRITE_PIECE + 512))
    return path


def test_image_is_written_anew_after_it_was_dropped_from_the_page_cache(
    tmp_path: Path, source: Path
) -> None:
    """Pages that are read and not written lie in larger pieces: then small writes cost another server three times as much."""
    contender = Serverless(tmp_path, source)
    contender.start()
    before = contender.image.stat().st_mtime_ns
    contender.warm()
    written = contender.image.stat().st_mtime_ns
    assert written > before
    assert contender.image.read_bytes() == source.read_bytes()
    contender.warm()
    assert contender.image.stat().st_mtime_ns == written
    contender.cool()
    contender.warm()
    assert contender.image.stat().st_mtime_ns > written


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_floor_has_the_cpu_time_of_a_client_as_soon_as_it_has_left(
    tmp_path: Path, source: Path
) -> None:
    floor = Floor(tmp_path, source)
    floor.start()
    pid = floor.running().pid
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(floor.socket))
        assert client.recv(18) == b"NBDMAGICIHAVEOPT\0\3"
    children = Path(f"/proc/{pid}/task/{pid}/children")
    deadline = time.monotonic() + PATIENCE_S
    while children.read_text() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert children.read_text() == ""
    floor.kill()
