# SPDX-License-Identifier: Apache-2.0
"""`AttachedDisk`: an export as a file of this machine, for programs that do not speak NBD.

    nbdfuse    a file in a FUSE mount, without root. Debian's packages nbdfuse and fuse3; /dev/fuse must be there
    kernel     /dev/nbdN, with root: the module nbd, and Debian's package nbd-client

Both pass a sync of the file (fsync) on as a FLUSH, and nothing else makes one: to close the file does not.

A power cut takes the program away, too, so what it had open must not be used any more: `crash` detaches
between the cut and the return of the power, and attaches anew, as a machine does that starts again.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

from nbdtarget.api.blocking import BlockingDisk
from nbdtarget.api.disk import PowerCut
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.devices.nbd.uri import parse_nbd_uri

__all__ = ["AttachError", "AttachedDisk", "Via", "why_not"]

Via = Literal["nbdfuse", "kernel"]

ATTACH_S_MAX: Final = 30.0
DETACH_S_MAX: Final = 30.0
LOOK_PERIOD_S: Final = 0.01
BLOCK_DEVICES: Final = Path("/sys/block")


class AttachError(NbdTargetError):
    """A disk cannot be attached, or not be detached."""


def why_not(via: Via) -> str:
    """Return why disks cannot be attached in this way on this machine; "" if they can."""
    if via == "nbdfuse":
        missing = [
            each for each in ("nbdfuse", "fusermount3") if not shutil.which(each)
        ]
        if missing:
            return f"not installed: {', '.join(missing)} (Debian: nbdfuse, fuse3)"
        if not os.access("/dev/fuse", os.R_OK | os.W_OK):
            return "/dev/fuse is missing, or may not be opened by this user"
        return ""
    if os.geteuid() != 0:
        return "only root may use the kernel's client"
    if shutil.which("nbd-client") is None:
        return "not installed: nbd-client"
    if not any(BLOCK_DEVICES.glob("nbd*")):
        return "there is no /dev/nbd0: load the module nbd"
    return ""


class AttachedDisk:
    """A disk as a file, in a `with` block or until `detach`.

    Args: via: None: the kernel, where it can; else nbdfuse.
    Attributes:
        path: the file; it is another one after each `attach`.
        disk: what is attached.
    Raises: AttachError: no way is there; its text says what is missing for each.
    """

    def __init__(self, disk: BlockingDisk, *, via: Via | None = None) -> None:
        ways: list[Via] = ["kernel", "nbdfuse"] if via is None else [via]
        reasons = {each: why_not(each) for each in ways}
        possible = [each for each in ways if not reasons[each]]
        if not possible:
            said = "; ".join(f"{each}: {reason}" for each, reason in reasons.items())
            raise AttachError(f"{disk.name}: cannot be attached: {said}")
        self.disk = disk
        self.via: Via = possible[0]
        self.path = Path()
        self._directory: Path | None = None
        self._nbdfuse: subprocess.Popen[bytes] | None = None
        self._is_attached = False
        self.attach()

    def __enter__(self) -> "AttachedDisk":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def attach(self) -> None:
        """Attach it again, after `detach`. Raises: AttachError."""
        if self._is_attached:
            raise AttachError(f"{self.disk.name}: is attached")
        if self.via == "kernel":
            self.path = _connect_kernel(self.disk.uri)
        else:
            self._start_nbdfuse()
        self._is_attached = True

    def detach(self) -> None:
        """Detach it; nothing is flushed. Idempotent. Raises: AttachError: a program has it open."""
        if not self._is_attached:
            return
        if self.via == "kernel":
            _run("nbd-client", "-d", str(self.path))
        else:
            self._end_nbdfuse()
        self._is_attached = False

    def crash(
        self, fate: str = "drop", *, tear: int | None = None, mixed: int | None = None
    ) -> PowerCut:
        """Cut the power of a powercut disk, detach, switch it on, attach anew.

        Args: as of `BlockingDisk.power_cut`.
        Raises: TableError: it is no powercut disk; AttachError: a program has the file open.
        """
        cut = self.disk.power_cut(fate, tear=tear, mixed=mixed, stay_off=True)
        self.detach()
        self.disk.power_on()
        self.attach()
        return cut

    def _start_nbdfuse(self) -> None:
        directory = Path(tempfile.mkdtemp(prefix="nbdtarget-file-"))
        path = directory / "disk"
        path.touch()
        errors = directory / "errors"
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                ["nbdfuse", str(path), self.disk.uri],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C must not take the disk from a program
            )
        try:
            _wait_for_mount(process, path, errors)
        except (
            BaseException
        ):  # it may be interrupted, and then no program and no folder is left
            process.kill()
            process.wait()
            shutil.rmtree(directory, ignore_errors=True)
            raise
        self.path, self._directory, self._nbdfuse = path, directory, process

    def _end_nbdfuse(self) -> None:
        assert self._nbdfuse is not None
        assert self._directory is not None
        _run("fusermount3", "-u", str(self.path))
        try:
            self._nbdfuse.wait(DETACH_S_MAX)
        except subprocess.TimeoutExpired:
            self._nbdfuse.kill()
            self._nbdfuse.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._nbdfuse = self._directory = None


def _wait_for_mount(
    process: "subprocess.Popen[bytes]", path: Path, errors: Path
) -> None:
    """Return when the disk is there instead of the empty file. Raises: AttachError."""
    waited_s = 0.0
    while not path.stat().st_size:
        # Waits for its end, which would be an error.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LOOK_PERIOD_S)
            said = " ".join(errors.read_text(errors="replace").split())
            raise AttachError(f"nbdfuse: {said or f'status {process.returncode}'}")
        waited_s += LOOK_PERIOD_S
        if waited_s > ATTACH_S_MAX:
            raise AttachError(f"nbdfuse: is not ready after {ATTACH_S_MAX:g} s")


def _run(*command: str) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise AttachError(f"{command[0]}: {said or f'status {done.returncode}'}")


def _free_kernel_devices() -> Iterator[Path]:
    for block in sorted(
        BLOCK_DEVICES.glob("nbd*"), key=lambda each: int(each.name[3:])
    ):
        if not (block / "pid").exists():
            yield Path("/dev") / block.name


def _connect_kernel(uri: str) -> Path:
    where = parse_nbd_uri(uri)
    if where.cid is not None:
        raise AttachError(f"{uri}: the kernel's client speaks no vsock")
    server = (
        ["-unix", where.socket_path]
        if where.socket_path
        else [where.host, str(where.port)]
    )
    reason = "all of them are in use"
    for path in _free_kernel_devices():
        try:
            _run("nbd-client", *server, "-N", where.export_name, str(path))
        except AttachError as error:
            # Another process may have been faster: the next one is tried.
            reason = str(error)
        else:
            return path
    raise AttachError(f"no free /dev/nbdN: {reason}")
