# SPDX-License-Identifier: Apache-2.0
"""Runs the program once, on a file system whose disk records what it is asked to write and to flush.

The disk is an export of a server in this process: the target `log-writes` over a file, attached by nbdfuse or by the kernel's
client, and mounted. For each line that the program prints, a mark is put into the log. The line was printed after the flush that it
tells of had been answered, so the mark stands behind that flush, perhaps a little later. A promise is never
believed too early.
"""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from nbdtarget.api.blocking import BlockingDisk, BlockingServer
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.units import SECTOR
from nbdtarget.common.words import join_words
from nbdtarget.testing.attached import AttachedDisk
from nbdtarget.torture.mounts import make_file_system, mounted
from nbdtarget.torture.recording import (
    END_TEXT,
    LINE_TEXT,
    Recording,
    RecordingFiles,
)
from nbdtarget.torture.trials import copy_sparse

__all__ = ["LINES_MAX", "record"]

LINES_MAX: Final = 100_000
LOG_PER_DISK: Final = 64  # the log is a sparse file, so many times as large as the disk


def record(
    files: RecordingFiles,
    *,
    size: int,
    file_system: str,
    setup: str | None,
    command: Sequence[str],
    check: str,
    timeout_s: float,
) -> Recording:
    """Make a file system, run `setup` on it, and then `command`, which is recorded.

    Args: as of `nbdtarget.torture.session.TortureOptions`.
    Raises: NbdTargetError: one of them has failed, or cannot be run.
    """
    _make_file(files.base, size)
    make_file_system(file_system, files.base)
    directory = files.directory / "mnt"
    if setup is not None:
        with mounted(files.base, directory):
            _run_setup(setup, directory)
    copy_sparse(files.base, files.disk)
    _make_file(files.log, LOG_PER_DISK * size)
    words = join_words([str(files.disk), str(files.log)])
    with BlockingServer() as server:
        table = f"0 {size // SECTOR} log-writes {words}"
        disk = server.create("torture", table=table)
        with (
            AttachedDisk(disk) as attached,
            mounted(attached.path, directory) as place,
        ):
            lines = _run_command(command, place, disk, timeout_s)
            disk.message("mark", END_TEXT)
    files.disk.unlink()
    recording = Recording(size, file_system, tuple(command), check, tuple(lines))
    recording.save(files)
    return recording


def _make_file(path: Path, size: int) -> None:
    """Make a sparse file for this user alone."""
    path.touch(mode=0o600)
    with path.open("r+b") as file:
        file.truncate(size)


def _run_setup(setup: str, directory: Path) -> None:
    process = subprocess.Popen(
        ["/bin/sh", "-c", setup],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate()
    except BaseException:  # a signal: its children would keep the file system mounted
        _kill(process.pid)
        process.wait()
        raise
    if process.returncode:
        said = " ".join(output.split())
        raise NbdTargetError(f"--setup: status {process.returncode}: {said}")


def _run_command(
    command: Sequence[str], directory: Path, disk: BlockingDisk, timeout_s: float
) -> list[str]:
    """Run the program to its end; return the lines that it has printed."""
    try:
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise NbdTargetError(f"{command[0]}: {error.strerror or error}") from None
    is_late = threading.Event()

    def stop() -> None:
        is_late.set()
        _kill(process.pid)

    timer = threading.Timer(timeout_s, stop)
    timer.start()
    lines: list[str] = []
    try:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if len(lines) == LINES_MAX:
                    raise NbdTargetError(
                        f"{command[0]}: printed more than {LINES_MAX} lines"
                    )
                lines.append(line.rstrip("\n"))
                disk.message("mark", LINE_TEXT)
        status = process.wait()
    finally:
        timer.cancel()
        # Also what it has left running: that would keep the file system mounted.
        _kill(process.pid)
        process.wait()
    if is_late.is_set():
        raise NbdTargetError(f"{command[0]}: did not end within {timeout_s:g} s")
    if status:
        raise NbdTargetError(
            f"{command[0]}: status {status}, although the power was never cut"
        )
    return lines


def _kill(group: int) -> None:
    """Kill a process and its children, if there are any left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
