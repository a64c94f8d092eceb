# SPDX-License-Identifier: Apache-2.0
"""What a raw disk may not begin like: real files of each format, and what only looks like one."""

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from backports import zstd

from nbdtarget.devices.image_format import HEAD_BYTES, maybe_image_format
from tests.support.clients import needs

QEMU_FORMATS = [
    ("qcow", "qcow", ""),
    ("qcow2", "qcow2", ""),
    ("qed", "qed", ""),
    ("vdi", "vdi", ""),
    ("vhdx", "vhdx", ""),
    ("vpc", "vpc", "subformat=dynamic"),
    ("vmdk", "vmdk", "subformat=monolithicSparse"),
    ("vmdk", "vmdk", "subformat=streamOptimized"),
    ("vmdk", "vmdk", "subformat=monolithicFlat"),
    ("parallels", "parallels", ""),
]


@needs("qemu-img")
@pytest.mark.parametrize(("given", "name", "options"), QEMU_FORMATS)
def test_images_that_qemu_makes(
    tmp_path: Path, given: str, name: str, options: str
) -> None:
    path = tmp_path / "image"
    argv = ["qemu-img", "create", "-q", "-f", given, str(path), "16M"]
    if options:
        argv[3:3] = ["-o", options]
    subprocess.run(argv, check=True, capture_output=True)
    found = maybe_image_format(path.read_bytes()[:HEAD_BYTES])
    assert found is not None
    assert found.name == name
    assert "{path}" in found.advice


def in_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("disk.img", bytes(4096))
    return file.getvalue()


def in_tar(*names: str, size: int = 5000) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(bytes(size)))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("xz", lzma.compress(bytes(4096))),
        ("gzip", gzip.compress(bytes(4096))),
        ("bzip2", bz2.compress(bytes(4096))),
        ("zstd", zstd.compress(bytes(4096))),
        ("zip", in_zip()),
        ("tar", in_tar("notes.txt")),
    ],
    # Not the heads: some hold the time of day, and each worker of the suite would name its tests otherwise.
    ids=["xz", "gzip", "bzip2", "zstd", "zip", "tar"],
)
def test_packed_files(name: str, head: bytes) -> None:
    found = maybe_image_format(head[:HEAD_BYTES])
    assert found is not None
    assert found.name == name


def test_disk_in_a_tar_is_named() -> None:
    found = maybe_image_format(in_tar("box.ovf", "box-disk1.vmdk")[:HEAD_BYTES])
    assert found is not None
    assert "box-disk1.vmdk" in found.what
    assert found.advice == "`tar -xf {path} box-disk1.vmdk' unpacks it"


def test_tar_whose_disk_lies_behind_the_head_is_a_tar_all_the_same() -> None:
    head = in_tar("a.txt", "disk.raw", size=HEAD_BYTES)[:HEAD_BYTES]
    found = maybe_image_format(head)
    assert found is not None
    assert found.what == "a tar archive"


@pytest.mark.parametrize(
    "head",
    [
        b"",
        bytes(HEAD_BYTES),
        b"LUKS\xba\xbe\0\2" + bytes(4096),
        bytes(510) + b"\x55\xaa" + bytes(512),
        bytes(1) + b"QFI\xfb" + bytes(4096),
        b"BZh9 is not what follows in a bzip2 file",
        b"KDM",
        bytes(257) + b"usta",
        bytes(257) + b"ustar"[:3] + bytes(600),
    ],
    ids=[
        "nothing",
        "zeroes",
        "luks",
        "mbr",
        "elsewhere",
        "text",
        "short",
        "short-tar",
        "no-tar",
    ],
)
def test_raw_disks(head: bytes) -> None:
    assert maybe_image_format(head) is None
