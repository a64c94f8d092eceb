# SPDX-License-Identifier: Apache-2.0
"""Image formats are recognized: real files of each format, and disks that only look like one."""

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

from nbdtarget.devices.image_format import HEAD_BYTES, maybe_image_format, tail_start
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
    told = f"write qemu:{name}:/a b for the disk in it"
    assert found.advice_for("/a b", "/a b") == told


@needs("qemu-img")
@pytest.mark.parametrize("options", ["", ",force_size=on"], ids=["rounded", "exact"])
def test_vhd_of_a_fixed_size_that_qemu_makes(tmp_path: Path, options: str) -> None:
    path = tmp_path / "image"
    argv = ["qemu-img", "create", "-q", "-f", "vpc", "-o", f"subformat=fixed{options}"]
    subprocess.run([*argv, str(path), "16M"], check=True, capture_output=True)
    data = path.read_bytes()
    start = tail_start(len(data))
    assert start is not None
    found = maybe_image_format(data[:HEAD_BYTES], data[start:])
    assert found is not None
    assert found.name == "vpc"
    told = found.refusal("/a", "/a")
    assert told.startswith("ends like a vpc image (a VHD of a fixed size), and would")
    assert "write qemu:vpc:/a for the disk in it; raw:/a if" in told
    # It is the disk with a footer: what the footer says decides, and where it stands.
    footer = data[-512:]
    assert maybe_image_format(b"", footer[:511])  # as old programs wrote it
    assert maybe_image_format(b"", bytes(513) + footer[:511])
    assert maybe_image_format(b"", footer + bytes(511))  # its size was rounded up
    assert maybe_image_format(b"", footer + bytes(512)) is None
    assert maybe_image_format(b"", footer + b"x") is None
    assert maybe_image_format(b"", b"x" + footer[1:]) is None
    assert maybe_image_format(b"", footer[:-1] + b"x") is None  # the checksum
    dynamic = footer[:63] + b"\3" + footer[64:]
    assert maybe_image_format(b"", dynamic) is None


def test_dmg_is_known_by_its_trailer() -> None:
    trailer = b"koly\0\0\0\4\0\0\2\0".ljust(512, b"\1")
    found = maybe_image_format(bytes(512), bytes(700) + trailer)
    assert found is not None
    assert (found.name, found.verb) == ("dmg", "ends")
    assert maybe_image_format(b"", b"koly\0\0\0\4".ljust(512, b"\0")) is None


@pytest.mark.parametrize(
    ("size", "start"),
    [
        (0, None),
        (1 << 30, None),
        (100, 0),
        (512, 0),
        ((1 << 30) + 512, (1 << 30) - 4096),
        ((1 << 30) + 1024, 1 << 30),
        ((1 << 30) + 4096, 1 << 30),
    ],
)
def test_end_of_disks_of_unusual_sizes_is_looked_at(
    size: int, start: int | None
) -> None:
    assert tail_start(size) == start


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
    assert found.advice_for("/x", "/x") == "`tar -xf /x box-disk1.vmdk' unpacks it"
    raw = maybe_image_format(in_tar("disk.raw")[:HEAD_BYTES])
    assert raw is not None
    word = "nbdkit:file?file=/x&filter=tar&tar-entry=disk.raw"
    assert word in raw.advice_for("/x", "/x")


@pytest.mark.parametrize("format_", ["gnu", "posix"])
def test_sparse_member_of_a_tar_has_to_be_unpacked(
    tmp_path: Path, format_: str
) -> None:
    with (tmp_path / "disk.img").open("wb") as disk:
        disk.write(b"d" * 4096)
        disk.truncate(1 << 20)
    argv = ["tar", f"--format={format_}", "--sparse", "-cf", "a.tar", "disk.img"]
    subprocess.run(argv, cwd=tmp_path, check=True)
    found = maybe_image_format((tmp_path / "a.tar").read_bytes()[:HEAD_BYTES])
    assert found is not None
    advice = found.advice_for("/x", "/x")
    assert advice == "`tar -xf /x disk.img' unpacks it"


def test_advice_names_the_word_for_what_it_is() -> None:
    qcow2 = maybe_image_format(b"QFI\xfb\0\0\0\3")
    xz = maybe_image_format(lzma.compress(b"x"))
    zip_ = maybe_image_format(in_zip())
    assert qcow2 is not None
    assert xz is not None
    assert zip_ is not None
    path = "/50%#.img"
    assert "write qemu:qcow2:/50%25%23.img " in qcow2.advice_for(path, path)
    url = "https://h/d.qcow2#pin=size"
    # The options belong to the file that the image lies in.
    assert "qemu:qcow2:https://h/d.qcow2%23pin=size " in qcow2.advice_for(url, None)
    assert "qemu:qcow2:s3://b/k " in qcow2.advice_for("s3://b/k", None)
    assert qcow2.advice_for("nbd://h/d", None) == "give the disk in it"
    assert "write xz:/d.xz " in xz.advice_for("/d.xz", "/d.xz")
    assert zip_.advice_for("/d.zip", "/d.zip") == "`unzip /d.zip' unpacks it"
    told = qcow2.refusal("/raw.img", "/raw.img")
    assert "raw:/raw.img if it is a raw disk" in told


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
