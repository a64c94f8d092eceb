# SPDX-License-Identifier: Apache-2.0
"""Checklist 11.1, item 11: a file system keeps its files through all states of its clone.

The tests do not run as root, so they mount nothing: file systems are made and filled by their mkfs,
trimmed by discarding what their own tools call free, and checked and read by those tools.
"""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nbdtarget.devices.base import Device
from tests.support.clone_battery import MIB, Lab

REGION = 64 << 10
BLOCK = 4096
SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB}  # mkfs.xfs takes no less than 300 MiB
ZEROES = bytes(MIB)
TOOLS = {
    "ext4": ("mkfs.ext4", "e2fsck", "debugfs", "dumpe2fs"),
    "xfs": ("mkfs.xfs", "xfs_repair", "xfs_db"),
}


def run(*argv: str | Path) -> str:
    words = [str(word) for word in argv]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return done.stdout


def make_file_system(kind: str, lab: Lab) -> str:
    """Make a file system with a file in it on the source; return the digest of the file."""
    content = hashlib.shake_128(kind.encode()).digest(5 * MIB)
    files = lab.work / "files"
    files.mkdir()
    (files / "file").write_bytes(content)
    source = lab.work / "source"
    if kind == "ext4":
        run("mkfs.ext4", "-q", "-F", "-b", str(BLOCK), "-d", files, source)
    else:
        prototype = lab.work / "prototype"
        prototype.write_text(f"/\n0 0\nd--755 0 0\nfile ---644 0 0 {files}/file\n$\n")
        run("mkfs.xfs", "-q", "-f", "-p", prototype, source)
    return hashlib.sha256(content).hexdigest()


def free_extents(kind: str, image: Path) -> list[tuple[int, int]]:
    """Return the ranges that the file system does not use: (offset, length) in bytes."""
    extents = []
    if kind == "ext4":
        for line in re.findall(r"^  Free blocks: (.*)$", run("dumpe2fs", image), re.M):
            for first, last in re.findall(r"(\d+)(?:-(\d+))?", line):
                end = int(last or first) + 1
                extents.append((int(first) * BLOCK, (end - int(first)) * BLOCK))
        return extents
    geometry = run("xfs_db", "-r", "-c", "sb 0", "-c", "p agblocks", image)
    ag_blocks = int(geometry.split("=")[1])
    listed = run("xfs_db", "-r", "-c", "freesp -d", image)
    for ag, begin, count in re.findall(r"^ *(\d+) +(\d+) +(\d+)$", listed, re.M):
        block = int(ag) * ag_blocks + int(begin)
        extents.append((block * BLOCK, int(count) * BLOCK))
    return extents


def digest_of_file(kind: str, image: Path) -> str:
    """Check the file system; return the digest of its file, read from the image."""
    if kind == "ext4":
        run("e2fsck", "-fn", image)
        copy = image.with_name("copy")
        run("debugfs", "-R", f"dump /file {copy}", image)
        return hashlib.sha256(copy.read_bytes()).hexdigest()
    run("xfs_repair", "-n", "-f", image)
    listed = run("xfs_db", "-r", "-c", "path /file", "-c", "bmap", image)
    size = run("xfs_db", "-r", "-c", "path /file", "-c", "p core.size", image)
    data = bytearray(int(size.split("=")[1]))
    geometry = run("xfs_db", "-r", "-c", "sb 0", "-c", "p agblocks agblklog", image)
    ag_blocks, log = (int(line.split("=")[1]) for line in geometry.splitlines())
    extent = r"offset (\d+) startblock (\d+) \(\d+/\d+\) count (\d+)"
    with image.open("rb") as file:
        for words in re.findall(extent, listed):
            offset, start, count = map(int, words)
            block = (start >> log) * ag_blocks + (start & ((1 << log) - 1))
            file.seek(block * BLOCK)
            piece = file.read(count * BLOCK)
            data[offset * BLOCK : (offset + count) * BLOCK] = piece
    return hashlib.sha256(data).hexdigest()


async def read_out(device: Device, path: Path) -> Path:
    """Read the whole device into a sparse file, as a client would."""
    with path.open("wb") as file:
        for at in range(0, device.size, MIB):
            piece = bytes(await device.read(at, min(MIB, device.size - at)))
            if piece != ZEROES:
                file.seek(at)
                file.write(piece)
        file.truncate(device.size)
    return path


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
async def test_11_1_11_filesystem_test(lab: Lab, kind: str) -> None:
    missing = [tool for tool in TOOLS[kind] if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    size = SIZES[kind]
    lab.make_files(size, content=False)
    digest = make_file_system(kind, lab)
    before = digest_of_file(kind, lab.work / "source")
    assert before == digest
    device = await lab.create(size, f"{REGION // 512} 1 no_hydration")
    seen = lab.work / "seen"
    assert digest_of_file(kind, await read_out(device, seen)) == digest
    # fstrim: regions that the file system does not use are hydrated without a copy.
    for offset, length in free_extents(kind, lab.work / "source"):
        await device.discard(offset, length)
    trimmed, regions = map(int, (await lab.status())[3].split("/"))
    assert trimmed > regions // 2
    assert lab.asked("dest", "write") == []
    assert digest_of_file(kind, await read_out(device, seen)) == digest
    await lab.hydrate()
    assert digest_of_file(kind, await read_out(device, seen)) == digest
    await lab.registry.remove("c")
    assert digest_of_file(kind, lab.work / "dest") == digest
