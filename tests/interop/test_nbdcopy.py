# SPDX-License-Identifier: Apache-2.0
"""Whole disks through libnbd's nbdcopy, with many requests on several connections."""

import random
from pathlib import Path

import pytest

from tests.support.clients import CloneUnderTest, client, needs, serving
from tests.support.processes import ServerProcess

pytestmark = [pytest.mark.interop, needs("nbdcopy")]


@pytest.mark.parametrize(
    "kind",
    [
        "file",
        pytest.param("nbdkit", marks=[needs("nbdkit"), pytest.mark.long]),
        pytest.param("qemu-nbd", marks=[needs("qemu-nbd"), pytest.mark.long]),
    ],
)
def test_disk_reads_whole_while_it_hydrates(
    kind: str, tmp_path: Path, content: bytes, source_image: Path
) -> None:
    copy = tmp_path / "copy.img"
    with serving(kind, source_image, tmp_path) as source:
        clone = CloneUnderTest(tmp_path, content, source)
        with clone.serve():
            client("nbdcopy", clone.uri, str(copy))
        assert copy.read_bytes() == content
        clone.hydrate()
    assert clone.dest.read_bytes() == content
    assert source_image.read_bytes() == content


def test_disk_reads_whole_when_nothing_is_hydrated(
    shared: CloneUnderTest, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.img"
    client("nbdcopy", shared.uri, str(copy))
    assert copy.read_bytes() == shared.content


@pytest.mark.parametrize(
    "extra",
    [(), pytest.param(("--no-hydration",), marks=pytest.mark.long)],
    ids=["hydrating", "not"],
)
def test_disk_written_whole_is_what_the_destination_holds(
    clone: CloneUnderTest, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    new = random.Random(8).randbytes(len(clone.content))
    (tmp_path / "new.img").write_bytes(new)
    with clone.serve(*extra):
        client("nbdcopy", "--flush", str(tmp_path / "new.img"), clone.uri)
        client("nbdcopy", clone.uri, str(tmp_path / "back.img"))
    assert (tmp_path / "back.img").read_bytes() == new
    clone.hydrate()
    assert clone.dest.read_bytes() == new


def test_copy_between_two_clones(
    clone: CloneUnderTest, served: ServerProcess, tmp_path: Path, source_image: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = CloneUnderTest(
        tmp_path / "other", clone.content, str(source_image), name="other"
    )
    with other.serve("--no-hydration"):
        client("nbdcopy", "--flush", "--connections=2", clone.uri, other.uri)
        client("nbdcopy", other.uri, str(tmp_path / "back.img"))
    assert (tmp_path / "back.img").read_bytes() == clone.content
