# SPDX-License-Identifier: Apache-2.0
"""The plain client against a server that is not ours."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.plain_client import FLAG_FUA, PlainClient, PlainClientError
from tests.support.processes import nbdkit_file

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is missing"),
]


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[Path]:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with nbdkit_file(image, tmp_path / "nbd.sock", tmp_path / "log"):
        yield tmp_path / "nbd.sock"


def test_client_reads_what_it_wrote(socket_path: Path) -> None:
    with PlainClient(socket_path) as client:
        assert client.size == 1 << 20
        client.write(4096, b"a" * 512, flags=FLAG_FUA)
        client.flush()
        assert client.read(4095, 514) == b"\0" + b"a" * 512 + b"\0"
        client.disconnect()


def test_client_names_the_error_of_a_bad_request(socket_path: Path) -> None:
    with PlainClient(socket_path) as client, pytest.raises(PlainClientError):
        client.read(1 << 20, 512)
