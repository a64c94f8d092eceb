# SPDX-License-Identifier: Apache-2.0
"""A clone of a small disk with data, holes and zeroes in it, served by the real program."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import MIB, CloneUnderTest
from tests.support.processes import ServerProcess

SIZE = 8 * MIB
HOLE = range(2 * MIB, 4 * MIB)  # never allocated
ZEROES = range(5 * MIB, 5 * MIB + 256 * 1024)  # written


@pytest.fixture(scope="module")
def content() -> bytes:
    data = bytearray(random.Random(7).randbytes(SIZE))
    for part in (HOLE, ZEROES):
        data[part.start : part.stop] = bytes(len(part))
    return bytes(data)


@pytest.fixture
def source_image(tmp_path: Path, content: bytes) -> Path:
    return write_source(tmp_path / "source.img", content)


def write_source(image: Path, content: bytes) -> Path:
    with image.open("wb") as file:
        file.write(content[: HOLE.start])
        file.seek(HOLE.stop)
        file.write(content[HOLE.stop :])
    return image


@pytest.fixture
def clone(
    tmp_path: Path, content: bytes, source_image: Path
) -> Iterator[CloneUnderTest]:
    yield CloneUnderTest(tmp_path, content, str(source_image))
    assert source_image.read_bytes() == content, "the source has changed"


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> Iterator[CloneUnderTest]:
    """A clone that is served to all tests of a module. They only read, and only the regions that they read are copied."""
    work = tmp_path_factory.mktemp("shared")
    source = write_source(work / "source.img", content)
    clone = CloneUnderTest(work, content, str(source), name="shared")
    with clone.serve("--no-hydration"):
        yield clone
    assert source.read_bytes() == content, "the source has changed"


@pytest.fixture
def served(clone: CloneUnderTest) -> Iterator[ServerProcess]:
    """The clone, served while it hydrates."""
    with clone.serve() as process:
        yield process


@pytest.fixture
def served_unhydrated(clone: CloneUnderTest) -> Iterator[ServerProcess]:
    """The clone, served. Only the regions that clients touch are copied."""
    with clone.serve("--no-hydration") as process:
        yield process
