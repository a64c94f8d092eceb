# SPDX-License-Identifier: Apache-2.0
"""Fixtures that factories make; what a session of its own shows is in test_plugin.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.api.blocking import BlockingDisk, BlockingServer
from nbdtarget.testing import factories

running_server = factories.nbd_server(listen=["tcp:127.0.0.1:0"], scope="module")
disk_of_ours = factories.powercut_disk(size="1M", server="running_server")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"i" * 4096)
    return path


@pytest.fixture
def disk_on_a_file(
    running_server: BlockingServer, image: Path
) -> Iterator[BlockingDisk]:
    yield running_server.create("on-a-file", "powercut", disk=image)
    running_server.disk("on-a-file").remove()


def test_server_listens_where_it_is_told(disk_of_ours: BlockingDisk) -> None:
    assert disk_of_ours.uri.startswith("nbd://127.0.0.1:")
    assert disk_of_ours.info().size == 1 << 20


def test_each_disk_has_a_name_of_its_own(
    disk_of_ours: BlockingDisk, running_server: BlockingServer
) -> None:
    assert [each.name for each in running_server.disks()] == [disk_of_ours.name]


def test_disk_on_a_file_has_its_size_and_keeps_what_was_flushed(
    disk_on_a_file: BlockingDisk, image: Path
) -> None:
    with disk_on_a_file.connect() as client:
        assert client.size == 4096
        client.write(0, b"f" * 512, fua=True)
        client.write(512, b"l" * 512)
        disk_on_a_file.power_cut()
    assert image.read_bytes()[:1024] == b"f" * 512 + b"i" * 512
