# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget metadata writeback` on the command line, over files."""

import errno
import json
import os
import random
from pathlib import Path

import pytest

from nbdtarget.cli.progress import writeback as progress_writeback
from nbdtarget.devices.file import open as file_open
from nbdtarget_metadata.cache.content import CacheContent
from tests.support.metadata.cache_contents import content_of, journal_blocks, lives
from tests.support.metadata.damage import rot
from tests.support.metadata.small_cache import BLOCK_SIZE, NR_CBLOCKS, ORIGIN_SIZE
from tests.support.metadata_tool import Tool


class Files:
    """Metadata, cache and origin."""

    def __init__(self, tool: Tool, life: str = "clean", *, offset: int = 0) -> None:
        rng = random.Random(3)
        self.before = rng.randbytes(offset + ORIGIN_SIZE)
        self.cached = rng.randbytes(offset + NR_CBLOCKS * BLOCK_SIZE)
        self.metadata = tool.file(lives()[life].image, "meta")
        self.cache = tool.file(self.cached, "cache")
        self.origin = tool.file(self.before, "origin")
        self.offset = offset
        self.argv = ["writeback", self.metadata, self.cache, self.origin]

    def content(self) -> CacheContent:
        return content_of(Path(self.metadata).read_bytes())

    def check_home(self, life: str) -> None:
        content = lives()[life].content
        expected = bytearray(self.before)
        for cblock in content.dirty.search(1):
            to = self.offset + (content.values[cblock] >> 16) * BLOCK_SIZE
            at = self.offset + cblock * BLOCK_SIZE
            expected[to : to + BLOCK_SIZE] = self.cached[at : at + BLOCK_SIZE]
        assert Path(self.origin).read_bytes() == expected
        assert Path(self.cache).read_bytes() == self.cached


@pytest.mark.parametrize("life", ["clean", "journal", "logged", "compacted_clean"])
def test_dirty_blocks_are_written_back(tool: Tool, life: str) -> None:
    files = Files(tool, life)
    nr = lives()[life].content.dirty.count()
    out, err = tool(*files.argv)
    assert (out, err) == (f"{nr}/{nr} blocks successfully copied\n", "")
    files.check_home(life)
    assert not files.content().dirty.any()
    assert tool("check", files.metadata)[1] == ""
    assert tool(*files.argv)[0] == "0/0 blocks successfully copied\n"


@pytest.mark.parametrize("offset", ["2048", "1M", "1048576B"])
def test_offsets_are_sectors_or_sizes(tool: Tool, offset: str) -> None:
    files = Files(tool, offset=1 << 20)
    options = ["--origin-device-offset", offset, "--fast-device-offset", offset]
    tool(*files.argv, *options)
    files.check_home("clean")


def test_offset_that_is_no_number_is_refused(tool: Tool) -> None:
    files = Files(tool)
    options = ["--origin-device-offset", "1X"]
    assert "not a size" in tool(*files.argv, *options, status=2)[1]


def test_crooked_offset_is_refused(tool: Tool) -> None:
    files = Files(tool)
    line = tool.fails(*files.argv, "--origin-device-offset", "1")
    assert "offset 512 of the origin is not a multiple of 4096" in line


def test_no_metadata_update(tool: Tool) -> None:
    files = Files(tool)
    before = Path(files.metadata).read_bytes()
    os.chmod(files.metadata, 0o400)
    tool(*files.argv, "--no-metadata-update")
    files.check_home("clean")
    assert Path(files.metadata).read_bytes() == before


def test_json(tool: Tool) -> None:
    files = Files(tool)
    answer = json.loads(tool(*files.argv, "--json")[0])
    assert (answer["nr_blocks"], answer["nr_copied"], answer["failed"]) == (5, 5, [])
    assert (answer["clean_shutdown"], answer["recorded"]) == (True, True)


@pytest.mark.parametrize("name", ["metadata", "cache", "origin"])
def test_device_in_use_is_refused(tool: Tool, name: str) -> None:
    files = Files(tool)
    path = getattr(files, name)
    fd, _ = file_open.open_fd(path, read_only=False)  # as a server does
    try:
        line = tool.fails(*files.argv)
    finally:
        os.close(fd)
    assert f"{path}: in use by another process" in line
    assert Path(files.origin).read_bytes() == files.before


@pytest.mark.parametrize("name", ["metadata", "cache", "origin"])
def test_missing_device_is_named(tool: Tool, name: str) -> None:
    files = Files(tool)
    os.unlink(getattr(files, name))
    line = tool.fails(*files.argv)
    assert f"{getattr(files, name)}: no such file" in line
    assert not os.path.exists(getattr(files, name))


@pytest.mark.parametrize("name", ["cache", "origin"])
def test_small_device_is_refused(tool: Tool, name: str) -> None:
    files = Files(tool)
    path = getattr(files, name)
    os.truncate(path, os.path.getsize(path) - 1)
    line = tool.fails(*files.argv)
    assert f"{path}: has " in line
    assert "but the metadata belongs to" in line


def test_damaged_metadata_is_refused(tool: Tool) -> None:
    files = Files(tool)
    Path(files.metadata).write_bytes(
        rot(lives()["clean"].image, journal_blocks("clean")[0])
    )
    line = tool.fails(*files.argv)
    assert f"{files.metadata}: corrupt metadata" in line
    assert Path(files.origin).read_bytes() == files.before
    assert tool(*files.argv, "-q", status=1) == ("", "")


def test_same_file_twice_is_refused(tool: Tool) -> None:
    files = Files(tool)
    for argv in (
        ["writeback", files.metadata, files.cache, files.cache],
        ["writeback", files.metadata, files.metadata, files.origin],
    ):
        assert "in use by another process" in tool.fails(*argv)


@pytest.fixture
def bad_cache_block(monkeypatch: pytest.MonkeyPatch, tool: Tool) -> int:
    """A cache block that cannot be read, on any file called cache."""
    cblock = next(lives()["clean"].content.dirty.search(1))
    bad = cblock * BLOCK_SIZE
    path = tool.directory / "cache"
    real = os.preadv

    def read(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        is_cache = os.path.samestat(os.fstat(fd), os.stat(path))
        if is_cache and offset <= bad < offset + len(buffers[0]):
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset, flags)

    # Inline, and by a worker; io_uring would read without asking either.
    monkeypatch.setattr("nbdtarget.devices.file.ring._is_allowed", False)
    monkeypatch.setattr("nbdtarget.devices.file.device._preadv", read)
    monkeypatch.setattr(os, "preadv", read)
    return cblock


def test_block_that_was_not_copied_is_reported_and_stays_dirty(
    tool: Tool, bad_cache_block: int
) -> None:
    files = Files(tool)
    out, err = tool(*files.argv, "--list-failed", "--retry", "2", status=1)
    lines = out.splitlines()
    assert lines[0] == "4/5 blocks successfully copied"
    assert lines[1].startswith(f"cache block {bad_cache_block}, origin block ")
    assert lines[1].endswith("Input/output error")
    assert "origin: 1 blocks could not be written back and are still dirty" in err
    assert list(files.content().dirty.search(1)) == [bad_cache_block]
    out, _ = tool(*files.argv, status=1)
    assert out == "0/1 blocks successfully copied\n"
    assert tool(*files.argv, "-q", status=1) == ("", "")


def test_bar_is_shown_on_a_terminal_only(
    tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress_writeback.make_progress(quiet=False) as progress:
        progress(0, 1 << 20)
        progress(1 << 20, 1 << 20)
    files = Files(tool)
    out, err = tool(*files.argv)
    assert out == "5/5 blocks successfully copied\n"
    assert "writing back" in err
    with progress_writeback.make_progress(quiet=True) as progress:
        progress(1, 2)
    assert tool(*files.argv, "-q") == ("", "")


def test_help_and_bad_options(tool: Tool) -> None:
    out, _ = tool("writeback", "--help")
    assert out.startswith("Usage: nbdtarget metadata writeback [OPTIONS]")
    for argv in (["--nonsense"], ["m", "c"], ["m", "c", "o", "--retry", "-1"]):
        out, err = tool("writeback", *argv, status=2)
        assert (out, err.count("\n")) == ("", 1)
