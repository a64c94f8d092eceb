# SPDX-License-Identifier: Apache-2.0
"""The identities that devices report. Reporting and marking a disk changes no data."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.devices import identity, resolve
from nbdtarget.devices.identity import block_ids, is_still_there, nbd_ids
from nbdtarget.devices.nbd.uri import parse_nbd_uri
from nbdtarget_metadata.disks import FILE, Evidence, Mark, record_of

SIZE = 1 << 20
MARK = Mark(bytes(range(16)), 7)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(SIZE))
    return path


def look_at(path: Path) -> tuple[bytes, int]:
    """Content and time of the last change."""
    return path.read_bytes(), path.stat().st_mtime_ns


async def evidence(path: Path, role: str = "origin") -> Evidence:
    device = await resolve.open_device(str(path), read_only=True)
    found = await device.identify(role)
    await device.close()
    return found


async def test_file_tells_its_place_and_time(path: Path) -> None:
    status = os.stat(path)
    found = await evidence(path)
    assert found.kind == FILE
    assert found.place == (status.st_dev, status.st_ino)
    assert found.mtime_ns == status.st_mtime_ns
    assert found.mark is None


async def test_mark_is_found_again_after_a_renaming_and_in_its_role(
    path: Path,
) -> None:
    before = look_at(path)
    device = await resolve.open_device(str(path))
    assert await device.mark("origin", MARK)
    await device.close()
    other = path.with_name("other")
    os.rename(path, other)
    assert (await evidence(other)).mark == MARK
    assert (await evidence(other, "cache")).mark is None
    assert look_at(other) == before


async def test_what_is_open_read_only_is_not_marked(path: Path) -> None:
    device = await resolve.open_device(str(path), read_only=True)
    assert not await device.mark("origin", MARK)
    await device.close()
    assert (await evidence(path)).mark is None


@pytest.mark.parametrize("known", [True, False])
async def test_opening_to_write_leaves_the_time_as_it_is(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, known: bool
) -> None:
    if not known:  # a file system that has to be tried
        from nbdtarget.devices.file import syscalls

        monkeypatch.setattr(syscalls, "_PUNCHING_MAGICS", frozenset())
    os.utime(path, ns=(1, 1_000_000_001))
    device = await resolve.open_device(str(path))
    await device.flush()
    await device.close()
    assert os.stat(path).st_mtime_ns == 1_000_000_001


async def test_mark_that_cannot_be_written_is_no_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other than one that cannot be synced: see the tests of `Syncs`."""

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    device = await resolve.open_device(str(path))
    monkeypatch.setattr(identity.os, "setxattr", refuse)  # type: ignore[attr-defined]
    assert not await device.mark("origin", MARK)
    monkeypatch.undo()
    await device.flush()
    assert device.health.is_usable
    await device.close()


@pytest.mark.parametrize(
    "value", [b"", b"x", b"00 1", b"zz 1", b"\xff\xff", b"0" * 32 + b" -1", b"0" * 70]
)
async def test_foreign_attribute_is_no_mark(path: Path, value: bytes) -> None:
    os.setxattr(path, "user.nbdtarget.origin", value)
    assert (await evidence(path)).mark is None


async def test_recorded_file_that_is_still_there_is_seen(path: Path) -> None:
    recorded = record_of("origin", await evidence(path))
    assert is_still_there(recorded)
    os.rename(path, path.with_name("other"))
    assert not is_still_there(recorded)
    shutil.copyfile(path.with_name("other"), path)
    assert not is_still_there(recorded)


async def test_memory_is_another_disk_each_time() -> None:
    first = await resolve.open_device("memory:1M")
    second = await resolve.open_device("memory:1M")
    assert await first.identify("cache") == await first.identify("cache")
    assert await first.identify("cache") != await second.identify("cache")


def test_export_is_known_by_its_name_and_server(tmp_path: Path) -> None:
    assert nbd_ids(parse_nbd_uri("nbd://Host/x")) == ("export=x", "server=host:10809")
    vsock = nbd_ids(parse_nbd_uri("nbd+vsock:///x"))
    assert vsock == ("export=x", "server=vsock:2:10809")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "s.sock")
    (direct, linked) = (
        nbd_ids(parse_nbd_uri(f"nbd+unix:///?socket={tmp_path}/{name}"))
        for name in ("s.sock", "link")
    )
    assert direct == linked == ("export=", f"server={tmp_path}/s.sock")


@pytest.fixture
def loop_device(path: Path) -> Iterator[str]:
    losetup = shutil.which("losetup")
    if losetup is None or os.geteuid() != 0:
        pytest.skip("no losetup, or not root")
    made = subprocess.run(
        [losetup, "--find", "--show", path], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    name = made.stdout.strip()
    yield name
    subprocess.run([losetup, "--detach", name], check=True)


async def test_block_device_tells_what_the_kernel_knows(
    path: Path, loop_device: str
) -> None:
    device = await resolve.open_device(loop_device)
    found = await device.identify("origin")
    assert found.kind == "block"
    assert f"backing-file={path}" in found.ids
    assert not await device.mark("origin", MARK)
    await device.close()


def test_block_device_that_is_not_there_tells_nothing() -> None:
    assert block_ids(os.makedev(4000, 4000)) == ()


def test_ids_of_a_partition_are_those_of_its_disk_and_its_number(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    (disk / "device").mkdir(parents=True)
    (disk / "device" / "wwid").write_text("naa.5000\n")
    (disk / "part").mkdir()
    (disk / "part" / "partition").write_text("2\n")
    assert dict(identity._sysfs_ids(disk)) == {"wwid": "naa.5000"}
    assert dict(identity._sysfs_ids(disk / "part")) == {"wwid-partition": "naa.5000 2"}
