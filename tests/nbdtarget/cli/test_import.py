# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget metadata import` on the command line, and what becomes of the disk afterwards."""

import gzip
import json
import os
from pathlib import Path

import pytest

from tests.support.metadata.kernel_images import CACHED, DIRTY, FOLDER, MADE
from tests.support.metadata.kernel_writer import KernelWriter
from tests.support.metadata_tool import Tool

BLOCK = 32 << 10
ORIGIN = 48 << 20


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Tool:
    return Tool(capsys, tmp_path)


def kernels(tool: Tool, name: str) -> str:
    return tool.file(gzip.decompress((FOLDER / f"{name}.gz").read_bytes()), "kernel")


def test_a_clean_cache_is_imported_and_reported(tool: Tool) -> None:
    source, output = kernels(tool, "6.12-2-clean"), str(tool.directory / "ours")
    out, err = tool("import", source, "-o", output, "--origin-size", "48M")
    first, second = out.splitlines()
    assert first.startswith(f"{output}: cache metadata ")
    assert "7 of 128 cache blocks mapped, 3 dirty" in first
    assert second == (
        f"{source}: dm-cache, format 2, shut down cleanly: its dirty bits are believed"
    )
    assert err == ""
    out, _ = tool("info", output, "--json")
    assert json.loads(out)["origin_size"] == ORIGIN
    tool("check", output)


def test_after_a_crash_of_the_kernel_all_counts_as_dirty(tool: Tool) -> None:
    source, output = kernels(tool, "6.1-1-crash"), str(tool.directory / "ours")
    out, _ = tool("import", source, "-o", output, "--origin-size", "48M")
    assert "it was not shut down cleanly, so each mapped block counts as dirty" in out


@pytest.mark.parametrize("name", MADE)
def test_what_was_imported_is_written_back(tool: Tool, name: str) -> None:
    """The origin then holds the data that the kernel would have served."""
    source, ours = kernels(tool, name), str(tool.directory / "ours")
    tool("import", source, "-o", ours, "--origin-size", "48M")
    held = _held(tool, ours)
    cache, origin = tool.directory / "cache", tool.directory / "origin"
    fast = bytearray(4 << 20)
    for oblock, cblock in held.items():
        fast[cblock * BLOCK : (cblock + 1) * BLOCK] = bytes([oblock & 0xFF]) * BLOCK
    cache.write_bytes(fast)
    with open(origin, "wb") as slow:
        slow.truncate(ORIGIN)
    tool("writeback", ours, str(cache), str(origin), "-q")
    written = CACHED if name.endswith("crash") else DIRTY
    slow_bytes = origin.read_bytes()
    for oblock in range(ORIGIN // BLOCK):
        block = slow_bytes[oblock * BLOCK : (oblock + 1) * BLOCK]
        expected = oblock & 0xFF if oblock in written else 0
        assert block == bytes([expected]) * BLOCK, oblock


def _held(tool: Tool, path: str) -> dict[int, int]:
    dumped = json.loads(tool("dump", path)[0])
    return {oblock: cblock for cblock, oblock, *_ in dumped["mappings"]}


def test_a_clone_says_its_sizes_itself(tool: Tool) -> None:
    writer = KernelWriter()
    writer.clone_superblock([True, False, True], region_sectors=8, target_sectors=24)
    source, output = tool.file(writer.image(), "kernel"), str(tool.directory / "ours")
    line = tool.fails("import", source, "-o", output, "--origin-size", "48M")
    assert "which has no origin: leave --origin-size out" in line
    out, _ = tool("import", source, "-o", output)
    assert "2 of 3 regions hydrated" in out


def test_what_cannot_be_imported_is_refused_and_nothing_is_made(tool: Tool) -> None:
    source, output = kernels(tool, "6.1-2-clean"), str(tool.directory / "ours")
    line = tool.fails("import", source, "-o", output)
    assert "does not say how large the origin is: give --origin-size" in line
    line = tool.fails("import", source, "-o", output, "--origin-size", "1M")
    assert "before 32 (the origin has 1048576 bytes)" in line
    line = tool.fails("import", source, "-o", output, "--origin-size", "1000")
    assert "more than 0, not 1000" in line
    line = tool.fails("import", source, "-o", source, "--origin-size", "48M")
    assert "is the input" in line
    other = tool.file(b"x" * 8192, "other")
    line = tool.fails("import", other, "-o", output, "--origin-size", "48M")
    assert "is not metadata of the kernel's dm-cache or dm-clone" in line
    assert not os.path.exists(output)


def test_other_content_of_the_output_stays(tool: Tool) -> None:
    source = kernels(tool, "6.1-2-clean")
    output = tool.file(b"precious".ljust(1 << 20, b"\0"), "ours")
    before = Path(output).read_bytes()
    tool.fails("import", source, "-o", output, "--origin-size", "48M")
    assert Path(output).read_bytes() == before
    tool("import", source, "-o", output, "--origin-size", "48M", "--overwrite")
    tool("check", output)


def test_json_has_every_field_by_name(tool: Tool) -> None:
    source, output = kernels(tool, "6.1-2-crash"), str(tool.directory / "ours")
    out, _ = tool("import", source, "-o", output, "--origin-size", "48M", "--json")
    answer = json.loads(out)
    assert (answer["clean"], answer["needs_check"], answer["format_version"]) == (
        False,
        False,
        2,
    )
    assert answer["restored"]["nr_dirty"] == len(CACHED)
