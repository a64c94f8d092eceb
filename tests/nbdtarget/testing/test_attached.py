# SPDX-License-Identifier: Apache-2.0
"""A disk as a file: what a program syncs survives a power cut, and what it does not is lost."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.api.blocking import BlockingDisk, BlockingServer
from nbdtarget.testing import attached
from nbdtarget.testing.attached import AttachedDisk, AttachError, why_not

needs_nbdfuse = pytest.mark.skipif(bool(why_not("nbdfuse")), reason=why_not("nbdfuse"))
KEPT, LOST = b"kept" * 128, b"lost" * 128


@pytest.fixture
def disk() -> Iterator[BlockingDisk]:
    with BlockingServer() as server:
        yield server.create("d", "powercut", size="1M")


def write(path: Path, data: bytes, *, sync: bool) -> None:
    with path.open("r+b") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())


@needs_nbdfuse
def test_only_what_was_synced_survives_a_crash(disk: BlockingDisk) -> None:
    with AttachedDisk(disk, via="nbdfuse") as file:
        assert file.path.stat().st_size == 1 << 20
        write(file.path, KEPT, sync=True)
        write(file.path, LOST, sync=False)
        assert file.path.read_bytes()[:512] == LOST
        cut = file.crash()
        assert (cut.nr_writes_at_risk, cut.nr_sectors_left) == (1, 0)
        assert file.path.read_bytes()[:512] == KEPT
        directory = file.path.parent
        with pytest.raises(AttachError, match="is attached"):
            file.attach()
    assert not directory.exists()
    file.detach()


@needs_nbdfuse
def test_file_in_use_is_not_detached(disk: BlockingDisk) -> None:
    with AttachedDisk(disk, via="nbdfuse") as file:
        with (
            file.path.open("rb"),
            pytest.raises(AttachError, match=r"fusermount3: .*busy"),
        ):
            file.detach()
        assert file.path.stat().st_size == 1 << 20


@needs_nbdfuse
def test_missing_export_is_said_and_nothing_is_left(
    disk: BlockingDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    disk.remove()
    with pytest.raises(AttachError, match=r"nbdfuse: .*no export named 'd'"):
        AttachedDisk(disk, via="nbdfuse")
    assert os.listdir(tmp_path) == []


def test_missing_programs_are_named(
    disk: BlockingDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert why_not("nbdfuse").startswith("not installed: nbdfuse, fusermount3")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert why_not("kernel") == "not installed: nbd-client"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    reason = r"d: cannot be attached: kernel: only root .*; nbdfuse: not installed"
    with pytest.raises(AttachError, match=reason):
        AttachedDisk(disk)


def test_kernels_devices_in_use_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nbd0", "nbd2", "nbd10", "vda"):
        (tmp_path / name).mkdir()
    (tmp_path / "nbd0/pid").touch()
    monkeypatch.setattr(attached, "BLOCK_DEVICES", tmp_path)
    tried: list[tuple[str, ...]] = []

    def run(*command: str) -> None:
        tried.append(command)
        if command[-1] == "/dev/nbd2":
            raise AttachError("nbd-client: busy")

    monkeypatch.setattr(attached, "_run", run)
    path = attached._connect_kernel("nbd+unix:///d?socket=/run/s")
    assert path == Path("/dev/nbd10")
    assert tried[-1] == ("nbd-client", "-unix", "/run/s", "-N", "d", "/dev/nbd10")
    monkeypatch.setattr(attached, "BLOCK_DEVICES", tmp_path / "none")
    with pytest.raises(AttachError, match="no free /dev/nbdN"):
        attached._connect_kernel("nbd://127.0.0.1/d")


def test_kernels_client_cannot_be_asked_for_vsock() -> None:
    with pytest.raises(attached.AttachError, match="speaks no vsock"):
        attached._connect_kernel("nbd+vsock://1/d")
