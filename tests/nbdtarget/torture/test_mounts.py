# SPDX-License-Identifier: Apache-2.0
"""The needs of a mount of a file system, and the error if one of them is missing."""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from nbdtarget.torture.mounts import (
    MountError,
    make_file_system,
    mounted,
    why_no_mounts,
)

needs_mounts = pytest.mark.skipif(
    bool(why_no_mounts("ext4")), reason=why_no_mounts("ext4")
)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_no_mounts("fat") == "file system 'fat': is none of ext4, xfs"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert why_no_mounts("ext4").startswith("only root may mount a file system")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert "/dev/loop-control is missing" in why_no_mounts("ext4")
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert why_no_mounts("ext4") == "not installed: mkfs.ext4, mount, umount"


@needs_mounts
def test_file_system_is_made_mounted_and_unmounted(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    with pytest.raises(MountError, match="mount: "), mounted(image, tmp_path / "mnt"):
        pass
    make_file_system("ext4", image)
    with mounted(image, tmp_path / "mnt") as directory:
        (directory / "file").write_text("content")
    assert list((tmp_path / "mnt").iterdir()) == []
    with mounted(image, tmp_path / "mnt") as directory:
        assert (directory / "file").read_text() == "content"
        user = subprocess.Popen(["cat"], cwd=directory, stdin=subprocess.PIPE)
        # It is killed while the unmount waits for it.
        timer = threading.Timer(0.2, user.kill)
        timer.start()
    assert user.wait() == -9
    assert user.stdin is not None
    user.stdin.close()
    assert not (tmp_path / "mnt").is_mount()
