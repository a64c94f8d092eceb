# SPDX-License-Identifier: Apache-2.0
"""Names of devices: what they mean, what is refused, and that refusing changes nothing."""

import asyncio
import errno
import os
import stat
from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.devices.registry import SCHEMES
from nbdtarget.devices.resolve import (
    absolute_name,
    create_device,
    identity,
    is_volatile,
    may_create,
    open_device,
)


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


async def test_memory_has_the_size_and_the_name() -> None:
    device = await open_device("memory:1T")
    assert isinstance(device, MemoryDevice)
    assert (device.size, device.name) == (1 << 40, "memory:1T")
    await device.close()


async def test_create_makes_a_file_of_zeroes(tmp_path: Path) -> None:
    path = tmp_path / "new"
    device = await create_device(str(path), 8192)
    assert path.read_bytes() == bytes(8192)
    assert (device.size, device.read_only) == (8192, False)
    await device.close()


async def test_create_that_is_cancelled_leaves_no_file(tmp_path: Path) -> None:
    creating = asyncio.create_task(create_device(str(tmp_path / "new"), 8192))
    await asyncio.sleep(0)  # a worker is at it now
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert not names(tmp_path)


async def test_open_that_is_cancelled_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(8192))
    opening = asyncio.create_task(open_device(str(path)))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await (await open_device(str(path))).close()


@pytest.mark.parametrize("sparse", [False, True])
async def test_created_file_has_its_space_unless_it_is_sparse(
    tmp_path: Path, sparse: bool
) -> None:
    path = tmp_path / "new"
    device = await create_device(str(path), 1 << 20, sparse=sparse)
    assert device.size == 1 << 20
    assert path.stat().st_blocks * 512 == (0 if sparse else 1 << 20)
    await device.close()


async def test_create_refuses_what_exists(tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.write_bytes(b"precious")
    with pytest.raises(ResolveError) as caught:
        await create_device(str(path), 8192)
    assert str(caught.value) == f"{path}: file exists"
    assert caught.value.errno == errno.EEXIST
    assert path.read_bytes() == b"precious"


async def test_create_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ResolveError):
        await create_device(str(tmp_path / "huge"), (1 << 63) - 1)
    assert not names(tmp_path)


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file or directory"),
        ("directory", "is a directory"),
        ("fifo", "is not a regular file or block device"),
        ("empty", "is empty"),
        ("null", "is not a regular file or block device"),
        ("loop", "too many levels of symbolic links"),
        ("under_a_file", "not a directory"),
    ],
)
async def test_open_refuses_in_one_line(
    tmp_path: Path, kind: str, reason: str, read_only: bool
) -> None:
    path = tmp_path / kind
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    elif kind == "null":
        path = Path("/dev/null")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "under_a_file":
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "x"
    before = names(tmp_path)
    with pytest.raises(ResolveError) as caught:
        await open_device(str(path), read_only=read_only)
    assert str(caught.value) == f"{path}: {reason}"
    assert names(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open anything")
async def test_open_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    path.chmod(stat.S_IRUSR)
    with pytest.raises(ResolveError, match="permission denied"):
        await open_device(str(path))


@pytest.mark.parametrize(
    "name",
    [
        "gopher://example.org/disk",
        "frob://bucket/disk",
        "memory:",
        "memory:0",
        "memory:lots",
        "",
        "nul\0byte",
    ],
)
async def test_open_refuses_names_that_mean_nothing(name: str) -> None:
    with pytest.raises(ResolveError) as caught:
        await open_device(name)
    assert "\n" not in str(caught.value)


async def test_unknown_scheme_is_refused_with_the_list_of_those_that_exist() -> None:
    with pytest.raises(ResolveError) as caught:
        await open_device("gopher://example.org/disk")
    reason = caught.value.reason
    assert reason.startswith("gopher: is not supported; write PATH, ")
    assert reason.endswith("; if it is a file, write ./gopher://example.org/disk")
    for scheme in SCHEMES.values():
        assert scheme.syntax in reason


async def test_path_with_a_colon_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a:b"
    path.write_bytes(bytes(512))
    device = await open_device(str(path))
    assert device.size == 512
    await device.close()


def test_may_create_needs_the_directory_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert may_create(str(tmp_path / "new"))
    for name in ("there", "dangling", "no/dir", "slash/", "."):
        assert not may_create(f"{tmp_path}/{name}"), name
    for name in ("", "memory:1G", "nbd://h/x", "a\0b"):
        assert not may_create(name), name


def test_identity_is_one_for_all_names_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    missing = identity(str(path))
    assert identity(f"{tmp_path}/./disk") == missing
    path.touch()
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "hard")
    assert identity(str(path)) == identity(str(tmp_path / "link"))
    assert identity(str(path)) == identity(str(tmp_path / "hard"))
    assert identity(str(path)) != missing


def test_identity_of_memory_is_never_shared() -> None:
    assert identity("memory:1G") != identity("memory:1G")


@pytest.mark.parametrize(
    ("name", "directory", "path"),
    [
        ("a.img", "/srv", "/srv/a.img"),
        ("../a.img", "/srv/x", "/srv/a.img"),
        ("/a.img", "/srv", "/a.img"),
        ("./nbd:x", "/srv", "/srv/nbd:x"),
        ("nbd://host/x", "/srv", "nbd://host/x"),
        ("nbd+unix:///x?socket=s", "/srv", "nbd+unix:///x?socket=/srv/s"),
        ("nbd+unix:///?a=b&socket=../s", "/a b", "nbd+unix:///?a=b&socket=/a%20b/../s"),
        ("nbd+unix:///x?socket=/s", "/srv", "nbd+unix:///x?socket=/s"),
        ("nbd+unix:///x?socket=%2Fs", "/srv", "nbd+unix:///x?socket=%2Fs"),
        ("nbd+unix:///x?socket=%00s", "/srv", "nbd+unix:///x?socket=%00s"),
        ("nbd+unix:///x?socket=", "/srv", "nbd+unix:///x?socket="),
        ("nbd+unix:///socket=s", "/srv", "nbd+unix:///socket=s"),
        ("memory:1M", "/srv", "memory:1M"),
        ("a b", "/srv", "/srv/a b"),
        ("a b:c", "/srv", "/srv/a b:c"),
        ("gopher://host/x", "/srv", "gopher://host/x"),
    ],
)
def test_absolute_name(name: str, directory: str, path: str) -> None:
    assert absolute_name(name, directory) == path


@pytest.mark.parametrize(
    ("name", "volatile"),
    [("memory:1M", True), ("MEMORY:1M", True), ("/srv/x", False), ("nbd://h/x", False)],
)
def test_only_what_is_in_memory_is_volatile(name: str, volatile: bool) -> None:
    assert is_volatile(name) == volatile


@pytest.mark.parametrize(
    ("name", "directory"), [("/srv/\udcff.img", "/"), ("a.img", "/srv/\udcff")]
)
def test_name_that_is_no_utf_8_is_refused(name: str, directory: str) -> None:
    """It could be served, and then no message, no table and no JSON could have it."""
    with pytest.raises(ResolveError, match="is not UTF-8"):
        absolute_name(name, directory)
