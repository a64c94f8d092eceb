# SPDX-License-Identifier: Apache-2.0
"""A disk image worth cloning, made in a second: an ext4 file system with files in it."""

import random
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["PATH_SBIN", "fill_directory", "make_sample_source", "write_pattern"]

MIB: Final = 1 << 20
PATH_SBIN: Final = "/usr/local/sbin:/usr/sbin:/sbin"  # not in everybody's PATH


def fill_directory(directory: Path, *, data_size: int) -> None:
    """Write files of all sizes, the same ones each time, `data_size` bytes in sum."""
    rng = random.Random(1)
    (directory / "README").write_text(
        "A sample disk, made to be cloned. Write here: the source does not change.\n"
    )
    left = data_size
    number = 0
    while left > 0:
        size = min(left, rng.choice((4096, 64 * 1024, MIB, 8 * MIB)))
        folder = directory / f"folder-{number % 7}"
        folder.mkdir(exist_ok=True)
        (folder / f"file-{number:03}.bin").write_bytes(rng.randbytes(size))
        left -= size
        number += 1


def write_pattern(path: Path, *, size: int) -> None:
    """Write 1 MiB of data after each 3 MiB hole."""
    rng = random.Random(1)
    with path.open("r+b") as file:
        for offset in range(0, size - MIB + 1, 4 * MIB):
            file.seek(offset)
            file.write(rng.randbytes(MIB))


def make_sample_source(path: Path, *, size: int) -> str:
    """Create the image whole or not at all. Returns what it holds, for a person."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.truncate(size)
    mkfs = shutil.which("mkfs.ext4") or shutil.which("mkfs.ext4", path=PATH_SBIN)
    if mkfs is None:
        write_pattern(partial, size=size)
        kind = "patterned data (no mkfs.ext4 here)"
    else:
        with tempfile.TemporaryDirectory(dir=path.parent) as name:
            fill_directory(Path(name), data_size=size // 4)
            argv = [mkfs, "-q", "-F", "-L", "sample", "-d", name, str(partial)]
            subprocess.run(argv, check=True)
        kind = "an ext4 file system"
    partial.rename(path)
    return kind
