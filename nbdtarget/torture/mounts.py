# SPDX-License-Identifier: Apache-2.0
"""File systems in files, mounted by the kernel. That takes root and loop devices, and this module says so.

A mount is one of the whole machine. In a mount namespace of its own, the last process of a command that was killed would unmount it:
if that is nbdfuse, which serves the disk below, it waits for itself for ever, and so does each later `mount -o loop` of the machine.
"""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from nbdtarget.common.errors import NbdTargetError

__all__ = [
    "FILE_SYSTEMS",
    "MountError",
    "make_file_system",
    "mounted",
    "why_no_mounts",
]

# No work is left to the kernel's background: the record has what the program did.
FILE_SYSTEMS: Final[dict[str, tuple[str, ...]]] = {
    "ext4": (
        *("mkfs.ext4", "-q", "-F", "-E"),
        "lazy_itable_init=0,lazy_journal_init=0,nodiscard",
    ),
    "xfs": ("mkfs.xfs", "-q", "-f", "-K"),
}

BUSY_S_MAX: Final = 5.0
RETRY_S: Final = 0.05


class MountError(NbdTargetError):
    """A file system cannot be made, mounted or unmounted."""


def why_no_mounts(file_system: str) -> str:
    """Return why file systems cannot be mounted here; "" if they can."""
    if file_system not in FILE_SYSTEMS:
        return f"file system {file_system!r}: is none of {', '.join(FILE_SYSTEMS)}"
    if os.geteuid() != 0:
        return "only root may mount a file system: run it as root, for example in a virtual machine"
    if not os.path.exists("/dev/loop-control"):
        return "there are no loop devices: /dev/loop-control is missing"
    missing = [
        each
        for each in (FILE_SYSTEMS[file_system][0], "mount", "umount")
        if shutil.which(each) is None
    ]
    return f"not installed: {', '.join(missing)}" if missing else ""


def make_file_system(file_system: str, image: Path) -> None:
    """Make a file system in a file. Raises: MountError."""
    _run(*FILE_SYSTEMS[file_system], str(image))


@contextmanager
def mounted(image: Path, directory: Path) -> Iterator[Path]:
    """Mount a file or a block device at `directory`, which is made. Raises: MountError."""
    directory.mkdir(exist_ok=True)
    options = ["-o", "loop"] if image.is_file() else []
    _run("mount", *options, str(image), str(directory))
    try:
        yield directory
    finally:
        _unmount(directory)


def _unmount(directory: Path) -> None:
    """Unmount. A process that was killed a moment ago may still have a file open: then wait for it.

    Raises: MountError: it is in use after BUSY_S_MAX.
    """
    for _ in range(round(BUSY_S_MAX / RETRY_S)):
        try:
            _run("umount", str(directory))
        except MountError as error:
            if "busy" not in str(error):
                raise
            threading.Event().wait(RETRY_S)
        else:
            return
    _run("umount", str(directory))


def _run(*command: str) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,  # Ctrl-C must not end an unmount
    )
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise MountError(f"{command[0]}: {said or f'status {done.returncode}'}")
