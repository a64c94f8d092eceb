# SPDX-License-Identifier: Apache-2.0
"""A trial: make the disk that a power cut leaves, mount it, and run the check.

The disk is a sparse file: the base, all epochs before the cut, and what survives of the epoch of the cut. One file follows the
epochs, and each trial works on a copy of it, because to mount a file system and to check it writes to it.
"""

import contextlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.units import SECTOR
from nbdtarget.torture.cuts import Cut, keep_all
from nbdtarget.torture.mounts import MountError, mounted
from nbdtarget.torture.recording import Epoch, Recording, RecordingFiles, Write

__all__ = ["ACKNOWLEDGED", "Outcome", "Trials", "copy_sparse"]

ACKNOWLEDGED: Final = "TORTURE_ACKNOWLEDGED"
COPY_BYTES: Final = 1 << 20
OUTPUT_BYTES_MAX: Final = 4000


class Outcome(NamedTuple):
    """The result of a trial.

    Attributes:
        reason: why the check failed, in one line; "": it did not.
        output: what it printed; the end of it, if it is long.
    """

    reason: str
    output: str

    @property
    def has_passed(self) -> bool:
        return not self.reason


class Trials:
    """Makes trials of one recording.

    Args:
        work: a directory for the disks, best in memory.
        check_timeout_s: how long a check may take; after that it has failed.
    """

    def __init__(
        self,
        files: RecordingFiles,
        recording: Recording,
        epochs: Sequence[Epoch],
        work: Path,
        *,
        check_timeout_s: float,
    ) -> None:
        self._files = files
        self._recording = recording
        self._epochs = epochs
        self._work = work
        self._check_timeout_s = check_timeout_s
        self._history = work / "history.img"
        self._nr_applied = -1  # epochs that are in it; -1: there is none yet
        self._log = os.open(files.log, os.O_RDONLY)

    def close(self) -> None:
        os.close(self._log)

    def run(self, cut: Cut) -> Outcome:
        """Make the disk of `cut`, mount it and run the check."""
        image = self._work / "trial.img"
        self.make_image(cut, image)
        nr_lines = self._epochs[cut.flush - 1].nr_lines
        acknowledged = self._work / "acknowledged"
        acknowledged.write_text(
            "".join(f"{line}\n" for line in self._recording.lines[:nr_lines])
        )
        try:
            with mounted(image, self._work / "mnt") as directory:
                return self._check(directory, acknowledged)
        except MountError as error:
            return Outcome(f"the file system cannot be mounted: {error}", "")
        finally:
            image.unlink()

    def make_image(self, cut: Cut, image: Path) -> None:
        """Make the disk that `cut` leaves."""
        if not 1 <= cut.flush <= len(self._epochs):
            raise NbdTargetError(
                f"flush {cut.flush}: the recording has {len(self._epochs)}"
            )
        self._follow(cut.flush - 1)
        copy_sparse(self._history, image)
        writes = {write.nr: write for write in self._epochs[cut.flush - 1].writes}
        fd = os.open(image, os.O_WRONLY)
        try:
            for first, nr, write_nr in cut.holds:
                self._apply(fd, writes[write_nr], first, nr)
        finally:
            os.close(fd)

    def _follow(self, nr_epochs: int) -> None:
        """Bring the history to the end of so many epochs."""
        if not 0 <= self._nr_applied <= nr_epochs:
            copy_sparse(self._files.base, self._history)
            self._nr_applied = 0
        fd = os.open(self._history, os.O_WRONLY)
        try:
            for epoch in self._epochs[self._nr_applied : nr_epochs]:
                writes = {write.nr: write for write in epoch.writes}
                for first, nr, write_nr in Cut.of(epoch.nr, "", keep_all(epoch)).holds:
                    self._apply(fd, writes[write_nr], first, nr)
        finally:
            os.close(fd)
        self._nr_applied = nr_epochs

    def _apply(self, fd: int, write: Write, first: int, nr: int) -> None:
        """Write sectors of one write."""
        length = nr * SECTOR
        if write.at is None:
            data = bytes(length)
        else:
            at = write.at + (first - write.sector) * SECTOR
            data = os.pread(self._log, length, at)
        if os.pwrite(fd, data, first * SECTOR) != length:
            raise NbdTargetError(f"{self._work}: is full")

    def _check(self, directory: Path, acknowledged: Path) -> Outcome:
        environment: Mapping[str, str] = {
            **os.environ,
            ACKNOWLEDGED: str(acknowledged),
        }
        printed = self._work / "printed"
        with printed.open("wb") as output:
            process = subprocess.Popen(
                ["/bin/sh", "-c", self._recording.check],
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(self._check_timeout_s)
                reason = f"the check ended with status {status}" if status else ""
            except subprocess.TimeoutExpired:
                reason = f"the check did not end within {self._check_timeout_s:g} s"
            finally:
                # A process that it has left running would keep the file system mounted.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)
                process.wait()
        text = printed.read_bytes()[-OUTPUT_BYTES_MAX:].decode(errors="replace")
        return Outcome(reason, text)


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file; holes stay holes."""
    size = source.stat().st_size
    fd = os.open(source, os.O_RDONLY)
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.ftruncate(out, size)
        at = 0
        while at < size:
            try:
                begin = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:  # only a hole is left
                break
            at = os.lseek(fd, begin, os.SEEK_HOLE)
            while begin < at:
                data = os.pread(fd, min(COPY_BYTES, at - begin), begin)
                begin += os.pwrite(out, data, begin)
    finally:
        os.close(fd)
        os.close(out)
