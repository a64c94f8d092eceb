# SPDX-License-Identifier: Apache-2.0
"""The offline metadata tools on the command line, over a cache's metadata."""

import json
import os
import sys
from pathlib import Path

import pytest

from nbdtarget.devices.file import open as file_open
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.cache.records import NR_CBLOCKS_MAX
from tests.support.metadata.cache_contents import (
    content_of,
    journal_blocks,
    live_blocks,
    lives,
    needing_check,
)
from tests.support.metadata.cache_dumps import text_of
from tests.support.metadata.damage import rot
from tests.support.metadata.small_cache import NR_CBLOCKS
from tests.support.metadata_tool import Tool
from tests.support.places import FIXTURES

IMAGE = lives()["clean"].image
DUMP = text_of(lives()["clean"].content)
DAMAGED = rot(IMAGE, journal_blocks("clean")[0])
UNDIRTY = rot(IMAGE, live_blocks("clean")[-1])  # dirty bits and hints are gone
READING = ["check", "dump", "info", "repair"]


@pytest.mark.parametrize("name", READING)
def test_metadata_in_use_is_refused(tool: Tool, name: str) -> None:
    path = tool.file(IMAGE)
    fd, _ = file_open.open_fd(path, read_only=False)  # as a server does
    try:
        line = tool.fails(*tool.reads(name, path))
    finally:
        os.close(fd)
    assert f"{path}: in use by another process" in line


@pytest.mark.parametrize("name", READING)
def test_read_only_input_is_enough(tool: Tool, name: str) -> None:
    path = tool.file(IMAGE)
    os.chmod(path, 0o400)
    before = os.stat(path).st_mtime_ns
    tool(*tool.reads(name, path))
    assert os.stat(path).st_mtime_ns == before


@pytest.mark.parametrize("name", ["check", "repair"])
def test_quiet_prints_nothing(tool: Tool, name: str) -> None:
    assert tool(*tool.reads(name, tool.file(IMAGE)), "-q") == ("", "")
    assert tool(*tool.reads(name, tool.file(DAMAGED)), "-q", status=1) == ("", "")


# info, check


def test_info_exactly(tool: Tool) -> None:
    out, err = tool("info", tool.file(IMAGE))
    assert err == ""
    size = CacheMetadata.device_size_min(NR_CBLOCKS)
    assert out == (
        "Kind:           cache, format version 1\n"
        "UUID:           000102030405060708090a0b0c0d0e0f\n"
        "Generation:     9\n"
        "Flags:          clean_shutdown\n"
        "Block size:     96 KiB (98304 bytes)\n"
        "Origin size:    9830912 bytes\n"
        "Mapped:         11/40 (27.5 %)\n"
        "Dirty:          5\n"
        "Dirty log:      none\n"
        "Hints:          of smq\n"
        "Reads:          5 hits, 0 misses\n"
        "Writes:         0 hits, 0 misses\n"
        "Commits:        8, of which 0 compacted\n"
        f"Metadata size:  {size // 1024} KiB ({size} bytes)\n"
        "Arena:          0, of 18 blocks\n"
        "Snapshot:       0 blocks\n"
        "Journal:        6 of 18 blocks\n"
    )


def test_info_of_an_unclean_stop_says_how_many_may_be_dirty(tool: Tool) -> None:
    assert (
        "Dirty:          11 at most"
        in tool("info", tool.file(lives()["journal"].image))[0]
    )
    out, _ = tool("info", tool.file(lives()["logged"].image))
    assert "Dirty:          5 at most" in out
    assert "Dirty log:      5 logged" in out
    answer = json.loads(tool("info", tool.file(lives()["logged"].image), "--json")[0])
    assert (answer["kind"], answer["nr_dirty"], answer["dirty_log"]) == (
        "cache",
        None,
        True,
    )


def test_info_and_check_report_an_origin_that_is_complete(
    tool: Tool,
) -> None:
    path = tool.file((FIXTURES / "cache-v1-complete.img").read_bytes())
    out, _ = tool("info", path)
    assert "Flags:          origin_complete" in out
    assert "Dirty:          none: the origin has everything" in out
    out, _ = tool("check", path)
    assert (
        "3 of 40 cache blocks mapped, not shut down cleanly; the origin has"
        " everything, and the next start gives the mappings up"
    ) in out
    answer = json.loads(tool("check", path, "--json")[0])
    assert (answer["nr_dirty"], answer["gives_up_mappings"]) == (0, True)
    assert "<mapping " not in tool("dump", path, "--format", "xml")[0]


def test_check_of_healthy_metadata(tool: Tool) -> None:
    path = tool.file(IMAGE)
    out, err = tool("check", path)
    assert err == ""
    assert out.splitlines()[0] == (
        f"{path}: cache metadata 000102030405060708090a0b0c0d0e0f, generation 9:"
        " no damage"
    )
    assert "  11 of 40 cache blocks mapped, 5 dirty\n" in out
    out, _ = tool("check", tool.file(lives()["journal"].image))
    assert "  11 of 40 cache blocks mapped, not shut down cleanly\n" in out


@pytest.mark.parametrize("life", sorted(lives()))
def test_healthy_metadata_is_identical_after_all_options(tool: Tool, life: str) -> None:
    path = tool.file(lives()[life].image)
    before = os.stat(path).st_mtime_ns
    os.chmod(path, 0o400)
    options = ["--auto-repair", "--clear-needs-check", "--ignore-non-fatal-errors"]
    tool("check", path, *options)
    assert Path(path).read_bytes() == lives()[life].image
    assert os.stat(path).st_mtime_ns == before


def test_damage_is_reported_and_left_alone(tool: Tool) -> None:
    path = tool.file(DAMAGED)
    out, err = tool("check", path, "--auto-repair", status=1)
    assert "cache metadata is damaged" in out
    assert err.splitlines()[0].startswith(f"nbdtarget: {path}: corrupt metadata: ")
    assert err.splitlines()[1].startswith(f"nbdtarget: {path}: no intact record in ")
    assert Path(path).read_bytes() == DAMAGED
    answer = json.loads(tool("check", path, "--json", status=1)[0])
    assert (len(answer["damage"]), answer["nr_mapped"]) == (2, 11)
    assert "no damage so far" in tool("check", path, "--super-block-only")[0]


def test_check_where_no_superblock_can_be_believed(tool: Tool) -> None:
    path = tool.file(rot(IMAGE, 0, 2))
    answer = json.loads(tool("check", path, "--json", status=1)[0])
    assert (answer["kind"], answer["nr_mapped"]) == ("cache", None)
    assert "cache blocks mapped" not in tool("check", path, status=1)[0]


@pytest.mark.parametrize("option", ["--clear-needs-check-flag", "--auto-repair"])
@pytest.mark.parametrize("life", ["clean", "journal"])
def test_needs_check_is_cleared_and_clean_shutdown_untouched(
    tool: Tool, life: str, option: str
) -> None:
    path = tool.file(needing_check(life))
    assert "needs_check is set; --clear-needs-check clears it" in tool("check", path)[0]
    assert "needs_check is cleared" in tool("check", path, option)[0]
    flags = json.loads(tool("info", path, "--json")[0])["flags"]
    assert flags == (["clean_shutdown"] if life == "clean" else [])


def test_needs_check_of_damaged_metadata_stays(tool: Tool) -> None:
    image = rot(needing_check("clean"), journal_blocks("clean")[0])
    path = tool.file(image)
    tool("check", path, "--clear-needs-check", status=1)
    assert Path(path).read_bytes() == image


# dump, restore


@pytest.mark.parametrize("life", sorted(lives()))
def test_dump_restore_dump(tool: Tool, life: str) -> None:
    text, _ = tool("dump", tool.file(lives()[life].image))
    assert text == text_of(lives()[life].content)
    dump, output = tool.file(text.encode(), "dump"), str(tool.directory / "new")
    out, err = tool("restore", "-i", dump, "-o", output)
    assert (out.count("\n"), err) == (1, "")
    assert tool("dump", output)[0] == text
    assert os.path.getsize(output) == CacheMetadata.device_size_for(NR_CBLOCKS)
    assert tool("check", output)[1] == ""


def test_restore_says_what_it_made(tool: Tool) -> None:
    dump, output = tool.file(DUMP.encode(), "dump"), str(tool.directory / "new")
    assert tool("restore", "-i", dump, "-o", output)[0] == (
        f"{output}: cache metadata 000102030405060708090a0b0c0d0e0f, generation 9:"
        " 11 of 40 cache blocks mapped, 5 dirty\n"
    )


@pytest.mark.parametrize(("life", "dirty"), [("clean", 11), ("logged_clean", 5)])
def test_omitted_clean_shutdown_leaves_dirty_what_may_be(
    tool: Tool, life: str, dirty: int
) -> None:
    text, _ = tool("dump", tool.file(lives()[life].image))
    dump, output = tool.file(text.encode(), "dump"), str(tool.directory / "new")
    tool("restore", "-i", dump, "-o", output, "--omit-clean-shutdown", "-q")
    content = content_of(Path(output).read_bytes())
    assert (content.flags, content.dirty.count()) == (0, dirty)
    assert (content.hints, content.discarded) == (None, None)


def test_bad_dump_names_its_line_and_writes_nothing(tool: Tool) -> None:
    dump = tool.file(DUMP.replace('"dirty"', '"muddy"').encode(), "dump")
    line = tool.fails(*tool.reads("restore", dump))
    assert f"{dump}: line " in line
    assert "mappings: unknown state 'muddy'" in line
    assert os.listdir(tool.directory) == ["dump"]


def test_clone_is_not_restored_over_a_cache(tool: Tool) -> None:
    dump, output = tool.file(DUMP.encode(), "dump"), tool.file(IMAGE)
    assert "holds cache metadata, generation 9" in tool.fails(
        "restore", "-i", dump, "-o", output
    )
    assert Path(output).read_bytes() == IMAGE
    tool("restore", "-i", dump, "-o", output, "--overwrite")
    assert tool("dump", output)[0] == DUMP


# XML


def test_xml_out_and_in_and_out(tool: Tool) -> None:
    xml, _ = tool("dump", tool.file(IMAGE), "--format", "xml")
    assert xml.startswith('<superblock uuid="" block_size="192" nr_cache_blocks="40"')
    dump, output = tool.file(xml.encode(), "dump"), str(tool.directory / "new")
    options = ["--origin-size", "9830912", "--trust-dirty"]
    tool("restore", "-i", dump, "-o", output, *options)
    assert tool("dump", output, "--format", "xml")[0] == xml
    content, before = content_of(Path(output).read_bytes()), lives()["clean"].content
    assert (content.values, content.dirty) == (before.values, before.dirty)
    assert content.hints == before.hints
    assert content.uuid != before.uuid
    tool("dump", output, "--format", "xml", "-o", dump)
    assert Path(dump).read_text() == xml


def test_xml_from_stdin(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    xml, _ = tool("dump", tool.file(IMAGE), "--format", "xml")
    output = str(tool.directory / "new")
    with open(tool.file(xml.encode(), "dump")) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        tool("restore", "-i", "-", "-o", output, "--origin-size", "10M")
    assert json.loads(tool("info", output, "--json")[0])["origin_size"] == 10 << 20


def test_xml_wants_the_size_of_the_origin_and_json_does_not(tool: Tool) -> None:
    xml, _ = tool("dump", tool.file(IMAGE), "--format", "xml")
    dump, output = tool.file(xml.encode(), "dump"), str(tool.directory / "new")
    line = tool.fails("restore", "-i", dump, "-o", output)
    assert "which does not contain the size of the origin: give --origin-size" in line
    line = tool.fails("restore", "-i", dump, "-o", output, "--origin-size", "1M")
    assert "the origin is too small" in line
    for size in ("0", "1000"):
        line = tool.fails("restore", "-i", dump, "-o", output, "--origin-size", size)
        assert (
            f"--origin-size must be a multiple of 512 and more than 0, not {size}"
            in line
        )
    dump = tool.file(DUMP.encode(), "dump")
    line = tool.fails("restore", "-i", dump, "-o", output, "--origin-size", "1M")
    assert (
        "is not XML: it contains the size of the origin, so omit --origin-size" in line
    )
    assert not os.path.exists(output)


def test_trust_dirty_is_refused_for_a_dump_in_json(tool: Tool) -> None:
    output = str(tool.directory / "new")
    dump = tool.file(DUMP.encode(), "dump")
    line = tool.fails("restore", "-i", dump, "-o", output, "--trust-dirty")
    assert (
        "is not XML: its dirty bits are always believed, so omit --trust-dirty" in line
    )


@pytest.mark.parametrize("words", [[], ["--omit-clean-shutdown", "--trust-dirty"]])
def test_xml_without_its_dirty_bits(tool: Tool, words: list[str]) -> None:
    xml, _ = tool("dump", tool.file(IMAGE), "--format", "xml")
    dump, output = tool.file(xml.encode(), "dump"), str(tool.directory / "new")
    options = ["--origin-size", "10M", *words]
    tool("restore", "-q", "-i", dump, "-o", output, *options)
    assert content_of(Path(output).read_bytes()).dirty.count() == 11


def test_xml_of_what_xml_cannot_express_is_refused(tool: Tool) -> None:
    from tests.support.metadata.clone_images import ages

    clone = tool.file(ages()["commits"].image)
    assert "only the metadata of a cache" in tool.fails(
        "dump", clone, "--format", "xml"
    )
    damaged = tool.file(DAMAGED)
    line = tool.fails("dump", damaged, "--repair", "--format", "xml")
    assert "XML cannot express this: dump it as JSON" in line
    out, err = tool("dump", damaged, "--format", "yaml", status=2)
    assert (out, "json or xml" in err) == ("", True)


@pytest.mark.parametrize("name", READING)
def test_xml_instead_of_metadata_is_named(tool: Tool, name: str) -> None:
    xml, _ = tool("dump", tool.file(IMAGE), "--format", "xml")
    path = tool.file(xml.encode(), "dump")
    assert "looks like a dump, not metadata" in tool.fails(*tool.reads(name, path))


# repair


def test_repair_of_intact_metadata_copies_it(tool: Tool) -> None:
    path, output = tool.file(IMAGE), str(tool.directory / "new")
    assert tool("repair", "-i", path, "-o", output, "")[1] == ""
    assert tool("dump", output)[0] == DUMP
    assert Path(path).read_bytes() == IMAGE


def test_lost_dirty_bits_are_set_and_need_no_force(tool: Tool) -> None:
    path, output = tool.file(UNDIRTY), str(tool.directory / "new")
    out, err = tool("repair", "-i", path, "-o", output)
    assert "11 of 40 cache blocks mapped, 11 dirty, nothing is lost" in out
    assert err.startswith(f"nbdtarget: {path}: corrupt metadata")
    assert tool("check", output)[1] == ""


def test_repair_that_loses_something_wants_force(tool: Tool) -> None:
    path, output = tool.file(DAMAGED), str(tool.directory / "new")
    line = tool.fails("repair", "-i", path, "-o", output)
    assert "cache blocks of generation 9 are lost" in line
    assert "--force accepts that" in line
    assert not os.path.exists(output)
    out, err = tool("repair", "-i", path, "-o", output, "--force")
    assert out.splitlines()[0].endswith(" are lost")
    assert out.endswith(f"Now use {output} in place of {path}.\n")
    assert err.startswith(f"nbdtarget: {path}: corrupt metadata")
    assert tool("check", output)[1] == ""
    assert Path(path).read_bytes() == DAMAGED


def test_doubtful_mappings_are_reported_and_marked(tool: Tool) -> None:
    path = tool.file(rot(lives()["journal"].image, journal_blocks("journal")[-1]))
    text, err = tool("dump", path, "--repair")
    assert "may hold other origin blocks by now" in err
    assert '"dirty doubtful"]' in text
    dump, output = tool.file(text.encode(), "dump"), str(tool.directory / "new")
    line = tool.fails("restore", "-i", dump, "-o", output)
    assert "doubtful ones may be written back to where they do not belong" in line
    out, _ = tool("restore", "-i", dump, "-o", output, "--force")
    assert "doubtful" in out
    assert tool("check", output)[1] == ""


def test_repair_is_repeatable(tool: Tool) -> None:
    path = tool.file(DAMAGED)
    outputs = [str(tool.directory / name) for name in ("one", "two", "three")]
    tool("repair", "-i", path, "-o", outputs[0], "--force")
    tool("repair", "-i", path, "-o", outputs[1], "--force")
    tool("repair", "-i", outputs[1], "-o", outputs[2])
    assert len({tool("dump", output)[0] for output in outputs}) == 1


def test_repair_into_its_input_is_refused(tool: Tool) -> None:
    path = tool.file(DAMAGED)
    os.symlink(path, tool.directory / "soft")
    options = ["-o", str(tool.directory / "soft"), "--force", "--overwrite"]
    assert "is the input" in tool.fails("repair", "-i", path, *options)
    assert Path(path).read_bytes() == DAMAGED


# size


@pytest.mark.parametrize(
    ("argv", "out"),
    [
        (["--nr-blocks", "1024"], "4304 sectors"),
        (["--device-size", "64M", "--block-size", "64K"], "4304 sectors"),
        (["--nr-blocks", "1024", "--max-hint-width", "4", "-n"], "4304"),
        (["--nr-blocks", "1024", "-u", "k"], "2152 kibibytes"),
        (["--nr-blocks", "67108864"], "7430992 sectors"),
        (["--nr-blocks", "40", "--smallest", "-u", "b", "-n"], "196608"),
    ],
)
def test_size_exactly(tool: Tool, argv: list[str], out: str) -> None:
    assert tool("size", *argv) == (out + "\n", "")


def test_size_is_what_creation_makes(tool: Tool) -> None:
    answer = json.loads(tool("size", "--nr-blocks", "5000", "--json")[0])
    assert answer == {
        "nr_cblocks": 5000,
        "smallest": CacheMetadata.device_size_min(5000),
        "preferred": CacheMetadata.device_size_for(5000),
    }


@pytest.mark.parametrize(
    "argv",
    [
        ["--block-size", "64K"],
        ["--nr-blocks", "5", "--block-size", "64K"],
        ["--nr-blocks", "5", "--device-size", "1G"],
        ["--nr-blocks", "5", "--nr-regions", "5"],
        ["--device-size", "1G", "--block-size", "64K", "--region-size", "64K"],
        ["--nr-blocks", "5", "--max-hint-width", "5"],
    ],
    ids=" ".join,
)
def test_size_argument_combinations(tool: Tool, argv: list[str]) -> None:
    out, err = tool("size", *argv, status=2)
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--device-size", "1G", "--block-size", "16K"], "Invalid data block size"),
        (["--device-size", "1G", "--block-size", "48K"], "Invalid data block size"),
        (["--device-size", "4G", "--block-size", "2G"], "Invalid data block size"),
        (["--device-size", "31K", "--block-size", "32K"], "at least one block"),
        (["--nr-blocks", "-1"], "at least one block"),
        (["--nr-blocks", str(NR_CBLOCKS_MAX + 1)], "use larger blocks"),
    ],
)
def test_sizes_that_no_cache_has(tool: Tool, argv: list[str], words: str) -> None:
    assert words in tool.fails("size", *argv)
