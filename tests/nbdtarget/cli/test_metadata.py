# SPDX-License-Identifier: Apache-2.0
"""The offline metadata tools on the command line: the battery of the tools for kernel caches."""

import json
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.file import open as file_open
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.log.superblock import superblock_block
from tests.support.metadata.clone_images import ages, live_blocks, needing_check
from tests.support.metadata.damage import rot
from tests.support.metadata.superblocks import area_of, make_superblock, put, put_body
from tests.support.metadata_tool import Tool
from tests.support.places import FIXTURES

DUMP = (FIXTURES / "clone-v1.json").read_text()
IMAGE = (FIXTURES / "clone-v1.img").read_bytes()
AGED = ages()["compacted"].image
DAMAGED = rot(AGED, live_blocks("compacted")[2])

READING = ["check", "dump", "info", "repair"]
TOOLS = [*READING, "restore", "size"]


def marked(image: bytes) -> bytes:
    """The image as a later format version, with digests that fit."""
    area = area_of(("old", "old"), ("old", "old"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nbdtarget_metadata.log.envelope.FORMAT_VERSION", 2)
        for slot in (0, 1):
            put(area, slot, 0, make_superblock(10 + slot))
    return bytes(area) + image[len(area) :]


# Inputs that are no metadata, and the words of the error.
BAD_INPUTS = {
    "empty": (b"", "is empty"),
    "tiny zeroes": (bytes(100), "metadata needs 16384 bytes, the device has 100"),
    "tiny": (b"x" * 100, "block 0 holds 7878787878787878"),
    "zeroes": (bytes(1 << 17), "metadata is not formatted"),
    "random": (
        random.Random(5).randbytes(1 << 17),
        "no nbdtarget metadata of this kind",
    ),
    "json": (DUMP.encode(), "looks like a dump, not metadata"),
    "small json": (b' {"a": 1}', "looks like a dump, not metadata"),
    "newer version": (marked(AGED), "metadata format version 2 is not supported"),
    "other kind": (
        bytes(put_body(msgspec.msgpack.encode(["thin", 1]))).ljust(1 << 17, b"\0"),
        "metadata of kind 'thin' is not supported",
    ),
}


# The battery


@pytest.mark.parametrize("name", TOOLS)
def test_help(tool: Tool, name: str) -> None:
    out, err = tool(name, "--help")
    assert out.startswith(f"Usage: nbdtarget metadata {name} [OPTIONS]")
    assert err == ""


@pytest.mark.parametrize("name", TOOLS)
def test_bad_option(tool: Tool, name: str) -> None:
    out, err = tool(name, "--nonsense", status=2)
    assert (out, "--nonsense" in err, err.count("\n")) == ("", True, 1)


@pytest.mark.parametrize("name", sorted({*TOOLS} - {"size"}))
def test_missing_argument(tool: Tool, name: str) -> None:
    out, err = tool(name, status=2)
    assert (out, "Missing" in err) == ("", True)


@pytest.mark.parametrize("name", [*READING, "restore"])
def test_missing_input(tool: Tool, name: str) -> None:
    path = str(tool.directory / "missing")
    assert f"{path}: no such file" in tool.fails(*tool.reads(name, path))
    assert os.listdir(tool.directory) == []


@pytest.mark.parametrize("name", [*READING, "restore"])
def test_directory_as_input(tool: Tool, name: str) -> None:
    path = tool.directory / "directory"
    path.mkdir()
    line = tool.fails(*tool.reads(name, str(path)))
    assert f"{path}: is a directory" in line


@pytest.mark.parametrize("name", READING)
def test_unreadable_input(
    tool: Tool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tool.file(IMAGE)

    def refuse(*args: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(file_open, "_open", refuse)  # root may read everything
    assert tool.fails(*tool.reads(name, path)).endswith(f"{path}: permission denied\n")


@pytest.mark.parametrize(("content", "words"), BAD_INPUTS.values(), ids=BAD_INPUTS)
@pytest.mark.parametrize("name", READING)
def test_bad_input(tool: Tool, name: str, content: bytes, words: str) -> None:
    path = tool.file(content)
    line = tool.fails(*tool.reads(name, path))
    assert f"{path}: " in line
    assert words in line
    assert os.listdir(tool.directory) == ["meta"]
    assert Path(path).read_bytes() == content


@pytest.mark.parametrize("name", ["check", "repair", "restore"])
@pytest.mark.parametrize("content", [b"x" * 9, DAMAGED], ids=["foreign", "damaged"])
def test_quiet_failure_prints_nothing(tool: Tool, name: str, content: bytes) -> None:
    path = tool.file(content)
    assert tool(*tool.reads(name, path), "-q", status=1) == ("", "")


@pytest.mark.parametrize("name", ["check", "repair"])
def test_quiet_success_prints_nothing(tool: Tool, name: str) -> None:
    assert tool(*tool.reads(name, tool.file(IMAGE)), "--quiet") == ("", "")


@pytest.mark.parametrize("name", READING)
def test_read_only_input_is_opened_read_only(
    tool: Tool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tool.file(IMAGE)
    os.chmod(path, 0o400)
    flags: list[int] = []
    real = os.open

    def note(name: str, how: int, *args: int) -> int:
        if name == path:
            flags.append(how & os.O_ACCMODE)
        return real(name, how, *args)

    monkeypatch.setattr(os, "open", note)
    tool(*tool.reads(name, path))
    assert flags == [os.O_RDONLY]
    assert Path(path).read_bytes() == IMAGE


@pytest.mark.parametrize("name", READING)
def test_metadata_in_use_is_refused(tool: Tool, name: str) -> None:
    path = tool.file(IMAGE)
    fd, _ = file_open.open_fd(path, read_only=False)  # as a server does
    try:
        line = tool.fails(*tool.reads(name, path))
    finally:
        os.close(fd)
    assert f"{path}: in use by another process" in line


def test_two_tools_may_look_at_once(tool: Tool) -> None:
    path = tool.file(IMAGE)
    fd, _ = file_open.open_fd(path, read_only=True)
    try:
        tool("check", path)
    finally:
        os.close(fd)


def test_broken_pipe_is_silent_and_fails() -> None:
    command = [sys.executable, "-c", "from nbdtarget.cli.app import main; main()"]
    argv = [*command, "metadata", "dump", str(FIXTURES / "clone-v1.img")]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(argv, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.fixture
def loop_device(tool: Tool) -> str:
    """A block device with the fixture on it; skips where there can be none."""
    path = tool.file(IMAGE)
    losetup = shutil.which("losetup")
    if losetup is None or os.geteuid() != 0:
        pytest.skip("no losetup, or not root")
    made = subprocess.run(
        [losetup, "--find", "--show", path], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    return made.stdout.strip()


def test_block_device_as_input_and_output(tool: Tool, loop_device: str) -> None:
    try:
        assert tool("dump", loop_device)[0] == DUMP
        tool("check", loop_device)
        dump = tool.file(DUMP.encode(), "dump")
        assert "generation 5" in tool.fails("restore", "-i", dump, "-o", loop_device)
        tool("restore", "-i", dump, "-o", loop_device, "--overwrite")
        assert tool("dump", loop_device)[0] == DUMP
        line = tool.fails("dump", loop_device, "-o", loop_device)
        assert "is the input" in line
    finally:
        subprocess.run(["losetup", "--detach", loop_device], check=True)


# info


def test_info_exactly(tool: Tool) -> None:
    out, err = tool("info", tool.file(IMAGE))
    assert err == ""
    assert out == (
        "Kind:           clone, format version 1\n"
        "UUID:           000102030405060708090a0b0c0d0e0f\n"
        "Generation:     5\n"
        "Flags:          clean_shutdown\n"
        "Region size:    4 KiB (4096 bytes)\n"
        "Target size:    286719488 bytes\n"
        "Hydrated:       4003/70000 (5.7 %)\n"
        "Commits:        4, of which 1 compacted\n"
        "Metadata size:  192 KiB (196608 bytes)\n"
        "Arena:          1, of 22 blocks\n"
        "Snapshot:       2 blocks\n"
        "Journal:        2 of 20 blocks\n"
    )


def test_info_in_json_and_of_what_is_degraded(tool: Tool) -> None:
    path = tool.file(rot(AGED, superblock_block(0, 1)))
    answer = json.loads(tool("info", path, "--json")[0])
    assert (answer["kind"], answer["nr_regions"]) == ("clone", 1200)
    assert "slot 0 copy 1" in answer["degraded"][0]
    assert "Degraded:       corrupt metadata: magic" in tool("info", path)[0]


# check


def test_check_of_healthy_metadata(tool: Tool) -> None:
    path = tool.file(IMAGE)
    out, err = tool("check", path)
    assert err == ""
    assert out.splitlines()[0] == (
        f"{path}: clone metadata 000102030405060708090a0b0c0d0e0f, generation 5:"
        " no damage"
    )
    assert "harmless: 1 orphaned records in 4 blocks, 0 leaked blocks" in out


@pytest.mark.parametrize("age", sorted({*ages()} - {"torn_commit"}))
def test_healthy_metadata_is_identical_after_all_options(tool: Tool, age: str) -> None:
    path = tool.file(ages()[age].image)
    before = os.stat(path).st_mtime_ns
    os.chmod(path, 0o400)
    tool("check", path, "--auto-repair", "--clear-needs-check")
    assert Path(path).read_bytes() == ages()[age].image
    assert os.stat(path).st_mtime_ns == before


@pytest.mark.parametrize("options", [[], ["--auto-repair", "--clear-needs-check"]])
def test_damage_is_reported_and_left_alone(tool: Tool, options: list[str]) -> None:
    path = tool.file(DAMAGED)
    out, err = tool("check", path, *options, status=1)
    assert "clone metadata is damaged" in out
    assert err.splitlines()[0].startswith(f"nbdtarget: {path}: corrupt metadata: ")
    assert err.splitlines()[1].startswith(f"nbdtarget: {path}: no intact record in ")
    assert Path(path).read_bytes() == DAMAGED


def test_check_in_json(tool: Tool) -> None:
    answer = json.loads(tool("check", tool.file(AGED), "--json")[0])
    assert (answer["damage"], answer["orphans"], answer["complete"]) == ([], 12, True)
    answer = json.loads(tool("check", tool.file(DAMAGED), "--json", status=1)[0])
    assert len(answer["damage"]) == 2


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("option", ["--clear-needs-check", "--auto-repair"])
def test_needs_check_is_cleared_after_a_full_pass(
    tool: Tool, option: str, clean: bool
) -> None:
    path = tool.file(needing_check("compacted", clean=clean))
    assert "needs_check is set; --clear-needs-check clears it" in tool("check", path)[0]
    assert "needs_check is cleared" in tool("check", path, option)[0]
    flags = json.loads(tool("info", path, "--json")[0])["flags"]
    assert flags == (["clean_shutdown"] if clean else [])


@pytest.mark.parametrize("option", ["--super-block-only", "--skip-unused"])
def test_needs_check_stays_without_a_full_pass(tool: Tool, option: str) -> None:
    image = needing_check("compacted")
    path = tool.file(image)
    out, _ = tool("check", path, option, "--clear-needs-check", "--auto-repair")
    assert "needs_check is set; only a full pass clears it" in out
    assert "not a full pass" in out
    assert Path(path).read_bytes() == image


def test_needs_check_of_a_file_in_use_by_a_reader_stays(tool: Tool) -> None:
    image = needing_check("compacted")
    path = tool.file(image)
    fd, _ = file_open.open_fd(path, read_only=True)
    try:
        assert "in use" in tool.fails("check", path, "--clear-needs-check")
    finally:
        os.close(fd)
    assert Path(path).read_bytes() == image


def test_auto_repair_heals_superblock_copies(tool: Tool) -> None:
    path = tool.file(rot(AGED, 0))
    assert (
        "slot 0 copy 0 (block 0): a bad copy does no harm: corrupt"
        in tool("check", path)[0]
    )
    assert "slot 0 has two good copies" in tool("check", path, "--auto-repair")[0]
    assert Path(path).read_bytes() == AGED


def test_super_block_only_reads_no_record(tool: Tool) -> None:
    assert (
        "no damage so far" in tool("check", tool.file(DAMAGED), "--super-block-only")[0]
    )


# dump


def test_dump_to_a_file_is_the_dump_to_stdout(tool: Tool) -> None:
    path, output = tool.file(IMAGE), tool.directory / "dump"
    assert tool("dump", path) == (DUMP, "")
    assert tool("dump", path, "-o", str(output)) == ("", "")
    assert output.read_text() == DUMP
    assert stat.S_IMODE(output.stat().st_mode) & 0o600 == 0o600
    assert sorted(os.listdir(tool.directory)) == ["dump", "meta"]


def test_failed_dump_leaves_its_output_as_it_was(tool: Tool) -> None:
    path, output = tool.file(DAMAGED), tool.file(b"precious", "dump")
    assert "corrupt metadata" in tool.fails("dump", path, "-o", output)
    assert Path(output).read_bytes() == b"precious"
    assert sorted(os.listdir(tool.directory)) == ["dump", "meta"]


def test_dump_never_goes_over_metadata(tool: Tool) -> None:
    path, other = tool.file(IMAGE), tool.file(AGED, "other")
    os.link(path, tool.directory / "link")
    for output in (path, str(tool.directory / "link")):
        assert "is the input" in tool.fails("dump", path, "-o", output)
    assert "holds metadata" in tool.fails("dump", path, "-o", other)
    assert "is not a file" in tool.fails("dump", path, "-o", str(tool.directory))
    nowhere = str(tool.directory / "no" / "dump")
    assert f"{nowhere}: no such file" in tool.fails("dump", path, "-o", nowhere)
    assert Path(other).read_bytes() == AGED


def test_dump_with_repair_says_what_is_lost(tool: Tool) -> None:
    path = tool.file(DAMAGED)
    assert "corrupt metadata" in tool.fails("dump", path)
    out, err = tool("dump", path, "--repair")
    nr_lost = json.loads(out)["nr_lost"]
    assert nr_lost > 0
    assert f"{nr_lost} hydrated regions of generation" in err
    assert tool("dump", tool.file(IMAGE), "-r") == (DUMP, "")


# restore


def test_dump_restore_dump(tool: Tool) -> None:
    dump, output = tool.file(DUMP.encode(), "dump"), str(tool.directory / "new")
    out, err = tool("restore", "-i", dump, "-o", output)
    assert err == ""
    assert out == (
        f"{output}: clone metadata 000102030405060708090a0b0c0d0e0f, generation 5:"
        " 4003 of 70000 regions hydrated\n"
    )
    assert tool("dump", output)[0] == DUMP
    assert os.path.getsize(output) == CloneMetadata.device_size_for(70_000)
    assert tool("check", output)[1] == ""


def test_restore_from_stdin_in_json(
    tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tool.directory / "new")
    with open(tool.file(DUMP.encode(), "dump")) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        out, _ = tool("restore", "-i", "-", "-o", output, "--json")
    assert json.loads(out)["nr_hydrated"] == 4003


def test_restore_into_files_that_are_there(tool: Tool) -> None:
    dump = tool.file(DUMP.encode(), "dump")
    for name, content in (("empty", b""), ("zeroes", bytes(1 << 20))):
        output = tool.file(content, name)
        tool("restore", "-q", "-i", dump, "-o", output)
        assert tool("dump", output)[0] == DUMP


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_metadata_that_restore_makes_are_not_sparse(tool: Tool, name: str) -> None:
    """The file must have all of its blocks. Otherwise a commit, years later, may find the file system full."""
    dump, output = tool.file(DUMP.encode(), "dump"), str(tool.directory / "new")
    if name == "empty":
        tool.file(b"", "new")
    tool("restore", "-q", "-i", dump, "-o", output)
    status = os.stat(output)
    assert status.st_blocks * 512 >= status.st_size > 0


def test_dump_into_a_file_makes_its_name_durable(
    tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted(fd: int) -> None:
        order.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def renamed(old: str, new: str) -> None:
        order.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", renamed)
    tool("dump", tool.file(AGED), "-o", str(tool.directory / "dump"))
    assert order == ["file", "rename", "directory"]


OUTPUTS = {
    "foreign": (b"x" * (1 << 20), "block"),
    "metadata": (AGED, "holds clone metadata, generation"),
    "tiny": (bytes(40960), "metadata needs"),
    "damaged": (DAMAGED, "generation"),
}


@pytest.mark.parametrize(("content", "words"), OUTPUTS.values(), ids=OUTPUTS)
def test_output_that_restore_refuses_is_untouched(
    tool: Tool, content: bytes, words: str
) -> None:
    dump, output = tool.file(DUMP.encode(), "dump"), tool.file(content)
    line = tool.fails("restore", "-i", dump, "-o", output)
    assert f"{output}: " in line
    assert words in line
    assert Path(output).read_bytes() == content


def test_restore_overwrites_when_told(tool: Tool) -> None:
    dump, output = tool.file(DUMP.encode(), "dump"), tool.file(b"x" * (1 << 20))
    tool("restore", "-i", dump, "-o", output, "--overwrite")
    assert tool("dump", output)[0] == DUMP
    tiny = tool.file(bytes(4096), "tiny")
    assert "needs" in tool.fails("restore", "-i", dump, "-o", tiny, "--overwrite")


def test_unwritable_output(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = tool.file(DUMP.encode(), "dump")
    assert "no such file" in tool.fails("restore", "-i", dump, "-o", "/nowhere/x")
    directory = str(tool.directory)
    assert "is a directory" in tool.fails("restore", "-i", dump, "-o", directory)
    output = tool.file(b"")
    real = file_open._open

    def refuse(name: str, path: str, read_only: bool) -> int:
        if path == output and not read_only:
            raise PermissionError(13, "Permission denied")
        return real(name, path, read_only)

    monkeypatch.setattr(file_open, "_open", refuse)
    assert "permission denied" in tool.fails("restore", "-i", dump, "-o", output)
    assert Path(output).read_bytes() == b""


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_failing_disk_leaves_no_output(
    tool: Tool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump, output = tool.file(DUMP.encode(), "dump"), str(tool.directory / "new")
    if name == "empty":
        tool.file(b"", "new")

    def fail(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    line = tool.fails("restore", "-i", dump, "-o", output)
    assert f"nbdtarget: {output}: write of " in line
    assert line.endswith("No space left on device\n")
    assert os.path.exists(output) == (name == "empty")
    assert name == "missing" or os.path.getsize(output) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "line 1: expected '{', found the end"),
        (b'{"kind": "thin"}', "line 1: kind: metadata of a 'thin' is not supported"),
        (DUMP.replace("4003", "4004").encode(), "line 15: nr_hydrated: expected 4003"),
        (DUMP[:-9].encode(), "line 2020: hydrated"),
        (IMAGE, "is metadata, not a dump of it"),
        (b"\xff\xfe", "line 1: expected '{'"),
    ],
)
def test_bad_dump_names_its_line_and_writes_nothing(
    tool: Tool, text: bytes, words: str
) -> None:
    dump = tool.file(text, "dump")
    line = tool.fails(*tool.reads("restore", dump))
    assert f"{dump}: {words}" in line
    assert os.listdir(tool.directory) == ["dump"]


# repair


@pytest.mark.parametrize("extra", [[], [""]], ids=["", "dummy argument"])
def test_repair_of_intact_metadata_copies_it(tool: Tool, extra: list[str]) -> None:
    path, output = tool.file(IMAGE), str(tool.directory / "new")
    assert tool("repair", "-i", path, "-o", output, *extra)[1] == ""
    assert tool("dump", output)[0] == DUMP
    assert Path(path).read_bytes() == IMAGE


def test_repair_that_loses_something_wants_force(tool: Tool) -> None:
    path, output = tool.file(DAMAGED), str(tool.directory / "new")
    line = tool.fails("repair", "-i", path, "-o", output)
    assert "corrupt metadata" in line
    assert "hydrated regions of generation" in line
    assert "--force accepts that" in line
    assert not os.path.exists(output)
    out, err = tool("repair", "-i", path, "-o", output, "--force")
    assert out.splitlines()[0].endswith(" are lost")
    assert out.endswith(f"Now use {output} in place of {path}.\n")
    assert err.startswith(f"nbdtarget: {path}: corrupt metadata")
    assert tool("check", output)[1] == ""
    assert Path(path).read_bytes() == DAMAGED


def test_repair_is_repeatable(tool: Tool) -> None:
    path = tool.file(DAMAGED)
    outputs = [str(tool.directory / name) for name in ("one", "two", "three")]
    tool("repair", "-i", path, "-o", outputs[0], "--force")
    tool("repair", "-i", path, "-o", outputs[1], "--force")
    tool("repair", "-i", outputs[1], "-o", outputs[2])
    dumps = {tool("dump", output)[0] for output in outputs}
    assert len(dumps) == 1
    tool("repair", "-i", path, "-o", outputs[2], "--force", "--overwrite", "-q")
    assert {tool("dump", outputs[2])[0]} == dumps


def test_repair_into_its_input_is_refused_by_any_name(tool: Tool) -> None:
    path = tool.file(DAMAGED)
    os.link(path, tool.directory / "hard")
    os.symlink(path, tool.directory / "soft")
    for name in ("meta", "hard", "soft"):
        output = str(tool.directory / name)
        options = ["-o", output, "--force", "--overwrite"]
        assert "is the input" in tool.fails("repair", "-i", path, *options)
    assert Path(path).read_bytes() == DAMAGED


@pytest.mark.parametrize(("block", "loses"), [(0, False), (-1, True)])
def test_repair_reads_around_bad_sectors(
    tool: Tool, block: int, loses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = tool.file(AGED), str(tool.directory / "new")
    bad = 4096 * (live_blocks("compacted")[block] if loses else block)
    real = os.preadv

    def read(fd: int, buffers: list[memoryview], offset: int) -> int:
        is_input = os.path.samestat(os.fstat(fd), os.stat(path))
        if is_input and offset <= bad < offset + len(buffers[0]):
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    for name in ("check", "dump") if loses else ():
        assert "Input/output error" in tool.fails(name, path)
    if not loses:  # one copy of a superblock: its sibling is enough
        for name in ("check", "dump", "info"):
            tool(name, path)
        assert "copy 0 (block 0) cannot be read" in tool("check", path)[0]
    words = f"1 blocks cannot be read, the first at byte {bad}"
    if loses:
        assert words in tool.fails("repair", "-i", path, "-o", output)
    force = ["--force"] if loses else []
    out, err = tool("repair", "-i", path, "-o", output, *force)
    assert f"nbdtarget: {path}: {words}" in err
    assert (" nothing is lost" in out) == (not loses)
    assert Path(path).read_bytes() == AGED


def test_restore_of_a_lossy_dump_wants_force(tool: Tool) -> None:
    dump, output = str(tool.directory / "dump"), str(tool.directory / "new")
    tool("dump", tool.file(DAMAGED), "--repair", "-o", dump)
    assert "--force accepts that" in tool.fails("restore", "-i", dump, "-o", output)
    assert not os.path.exists(output)
    tool("restore", "-i", dump, "-o", output, "--force")
    assert tool("check", output)[1] == ""


def test_repair_of_a_lost_slot_names_the_generations(tool: Tool) -> None:
    path = tool.file(rot(ages()["commits"].image, 0, 2))
    line = tool.fails("repair", "-i", path, "-o", str(tool.directory / "new"))
    assert "generation 4 may have been acknowledged and is lost" in line
    assert "this is generation 3" in line


# The opening that all of them share


def test_open_fd_closes_what_it_refuses(tool: Tool) -> None:
    path = tool.file(b"")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ResolveError, match="is empty"):
        file_open.open_fd(path, read_only=True)
    with pytest.raises(ResolveError, match="file exists"):
        file_open.create_fd(path, 4096)
    assert len(os.listdir("/proc/self/fd")) == before
