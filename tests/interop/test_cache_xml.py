# SPDX-License-Identifier: Apache-2.0
"""A cache moves between the kernel's tools and ours, both ways, without a difference."""

from pathlib import Path

import pytest

from tests.support.clients import client, needs
from tests.support.metadata.cache_contents import content_of, lives
from tests.support.metadata_tool import Tool

pytestmark = [
    pytest.mark.interop,
    needs("cache_restore"),
    needs("cache_dump"),
    needs("cache_check"),
]

KERNEL_SIZE = 4 << 20
LIVES = sorted(lives())


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Tool:
    return Tool(capsys, tmp_path)


@pytest.mark.parametrize("life", LIVES)
def test_cache_goes_to_the_kernels_format_and_back(tool: Tool, life: str) -> None:
    before = lives()[life].content
    ours, theirs = tool.file(lives()[life].image), str(tool.directory / "theirs")
    xml, back = str(tool.directory / "xml"), str(tool.directory / "back")
    tool("dump", ours, "--format", "xml", "-o", xml)
    Path(theirs).write_bytes(bytes(KERNEL_SIZE))
    client("cache_restore", "-i", xml, "-o", theirs)
    client("cache_check", theirs)
    dumped = client("cache_dump", theirs)
    text = Path(xml).read_text()
    if before.hints is None:  # for which the kernel's tools put zeroes, of no policy
        dumped, text = (each.partition("<hints>")[0] for each in (dumped, text))
        dumped += "<hints/></superblock>"
        text += "<hints/></superblock>"
    assert dumped == text
    Path(xml).write_text(dumped)
    options = ["--origin-size", str(before.origin_size), "--trust-dirty"]
    tool("restore", "-i", xml, "-o", back, *options)
    after = content_of(Path(back).read_bytes())
    assert [each >> 16 for each in after.values] == [
        each >> 16 for each in before.values
    ]
    assert (after.dirty, after.hints) == (before.dirty, before.hints)
    assert after.block_size == before.block_size


@pytest.mark.parametrize("name", ["check", "dump", "info", "repair"])
def test_metadata_of_the_kernel_are_named_and_the_way_here_told(
    tool: Tool, name: str
) -> None:
    xml, theirs = str(tool.directory / "xml"), str(tool.directory / "theirs")
    tool("dump", tool.file(lives()["clean"].image), "--format", "xml", "-o", xml)
    Path(theirs).write_bytes(bytes(KERNEL_SIZE))
    client("cache_restore", "-i", xml, "-o", theirs)
    before = Path(theirs).read_bytes()
    line = tool.fails(*tool.reads(name, theirs))
    assert "holds the kernel's dm-cache metadata" in line
    assert "`nbdtarget metadata import` makes metadata of this program of it" in line
    assert Path(theirs).read_bytes() == before


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("life", ["clean", "compacted_clean", "full"])
def test_what_the_kernels_tools_wrote_is_imported(
    tool: Tool, life: str, version: str
) -> None:
    before = lives()[life].content
    xml, theirs = str(tool.directory / "xml"), str(tool.directory / "theirs")
    tool("dump", tool.file(lives()[life].image), "--format", "xml", "-o", xml)
    Path(theirs).write_bytes(bytes(KERNEL_SIZE))
    client("cache_restore", "--metadata-version", version, "-i", xml, "-o", theirs)
    back = str(tool.directory / "back")
    tool("import", theirs, "-o", back, "--origin-size", str(before.origin_size))
    after = content_of(Path(back).read_bytes())
    assert [each >> 16 for each in after.values] == [
        each >> 16 for each in before.values
    ]
    assert after.dirty == before.dirty
    # cache_restore 0.9.0 records no size of hints, so the kernel would not believe them either.
    assert after.hints is None


def test_dirty_bits_of_a_kernel_dump_of_format_2_are_not_believed(
    tool: Tool,
) -> None:
    before = lives()["clean"].content
    assert before.dirty.any()
    xml, theirs = str(tool.directory / "xml"), str(tool.directory / "theirs")
    tool("dump", tool.file(lives()["clean"].image), "--format", "xml", "-o", xml)
    Path(theirs).write_bytes(bytes(KERNEL_SIZE))
    client("cache_restore", "--metadata-version", "2", "-i", xml, "-o", theirs)
    Path(xml).write_text(client("cache_dump", theirs))
    back = str(tool.directory / "back")
    tool("restore", "-i", xml, "-o", back, "--origin-size", str(before.origin_size))
    after = content_of(Path(back).read_bytes())
    assert after.dirty.count() == after.nr_mapped
