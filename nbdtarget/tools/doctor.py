# SPDX-License-Identifier: Apache-2.0
"""Checks what this machine can do for nbdtarget, and names the packages that are missing: `nbdtarget doctor`.

Each check looks at one thing and says what it found, what that is for, and what to do if it is missing. Checks about disks try
things out in one folder, in a file that has no name and is gone afterwards. Nothing else is changed.

    yes        it is there
    no         it is missing, and something does not work or is slower without it; all else works
    trouble    servers will fail because of it
"""

import errno as errnos
import fcntl
import importlib.util
import os
import platform
import resource
import shutil
import ssl
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec

from nbdtarget import __version__
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.units import describe_bytes
from nbdtarget.control.paths import runtime_directory
from nbdtarget.devices.file.page_cache import cached_pages
from nbdtarget.devices.file.syscalls import can_punch_holes, direct_unit
from nbdtarget.fast import compiled
from nbdtarget.server.admission import DESCRIPTORS_RESERVE
from nbdtarget.server.limits import Limits

__all__ = ["DoctorAnswer", "Finding", "State", "examine"]

State = Literal["yes", "no", "trouble"]

PROBE_BYTES: Final = 1 << 16
_FICLONE: Final = 0x40049409  # ioctl of linux/fs.h

# Programs, and what each is for.
PROGRAMS: Final = {
    "nbd-client": "attach the kernel's NBD client",
    "nbdinfo": "look at exports",
    "nbdcopy": "copy whole disks",
    "nbdfuse": "use a disk as a file without root",
    "qemu-system-x86_64": "run virtual machines on disks",
    "qemu-img": "look at and convert images",
    "qemu-nbd": "open images of other formats",
    "nbdkit": "serve other kinds of sources",
}
# Optional Python packages, and what each is for. `zstd` is in the standard library from Python 3.14 on.
PACKAGES: Final = {
    "obstore": "sources in object stores",
    "backports.zstd": "sources that are compressed with zstd",
    "matplotlib": "pictures of hit ratios",
}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check.

    Attributes:
        about: one of "program", "kernel", "disks", "limits", "clients", "packages".
        what: the thing.
        detail: what was found of it.
        needed_for: what it is for.
        advice: what to do if it is missing; "" if it is there.
    """

    about: str
    what: str
    state: State
    detail: str
    needed_for: str
    advice: str = ""


class DoctorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The results of all checks. `folder`: where the checks of disks were made."""

    version: str
    python: str
    kernel: str
    folder: str
    findings: list[Finding]

    @property
    def has_trouble(self) -> bool:
        return any(each.state == "trouble" for each in self.findings)


def examine(folder: str) -> DoctorAnswer:
    """Check the machine, and the file system of `folder`. Raises: NbdTargetError: no file can be made there."""
    findings = [
        *_program(),
        *_kernel(),
        *_disks(folder),
        *_limits(),
        *_clients(),
        *_packages(),
    ]
    return DoctorAnswer(
        version=__version__,
        python=platform.python_version(),
        kernel=platform.release(),
        folder=os.path.abspath(folder),
        findings=findings,
    )


def _program() -> Iterator[Finding]:
    is_compiled = compiled.IS_COMPILED
    yield Finding(
        about="program",
        what="compiled fast path",
        state="yes" if is_compiled else "no",
        detail=compiled.describe().removeprefix("fast path: "),
        needed_for="speed",
        advice="" if is_compiled else "install a wheel with it, or a C compiler first",
    )
    has_psk = sys.version_info >= (3, 13)
    why_not = compiled.describe_tls()
    carrier = f"Python ({why_not})" if why_not else "compiled code"
    yield Finding(
        about="program",
        what="TLS",
        state="yes",
        detail=f"{ssl.OPENSSL_VERSION}; records carried by {carrier}",
        needed_for="clients and disks across a network",
    )
    yield Finding(
        about="program",
        what="pre-shared keys",
        state="yes" if has_psk else "no",
        detail=f"Python {platform.python_version()}",
        needed_for="TLS without certificates",
        advice="" if has_psk else "run nbdtarget with Python 3.13 or later",
    )


def _kernel() -> Iterator[Finding]:
    has_ring = compiled.IS_COMPILED and compiled.is_available()
    why = "" if has_ring else "forbidden or not in this kernel"
    if not compiled.IS_COMPILED:
        why = "only the compiled fast path uses it"
    yield Finding(
        about="kernel",
        what="io_uring",
        state="yes" if has_ring else "no",
        detail=why or "allowed",
        needed_for="fast reads from the disk; threads read without it",
        advice=""
        if has_ring
        else "see kernel.io_uring_disabled, or the container's rules",
    )
    yield _nbd_module()
    has_vsock = os.path.exists("/dev/vsock")
    yield Finding(
        about="kernel",
        what="vsock",
        state="yes" if has_vsock else "no",
        detail="/dev/vsock" if has_vsock else "no /dev/vsock",
        needed_for="--listen vsock:, for virtual machines of this host",
        advice="" if has_vsock else "modprobe vhost_vsock",
    )
    has_systemd = os.path.isdir("/run/systemd/system")
    yield Finding(
        about="kernel",
        what="systemd",
        state="yes" if has_systemd else "no",
        detail="it runs" if has_systemd else "it does not run this machine",
        needed_for="the units: start at boot, restart after a crash",
        advice="" if has_systemd else "start servers by other means",
    )


def _nbd_module() -> Finding:
    release = platform.release()
    modules = Path("/lib/modules") / release
    built_in = modules / "modules.builtin"
    if os.path.isdir("/sys/module/nbd"):
        state: State = "yes"
        detail = "loaded"
    elif any(modules.glob("kernel/drivers/block/nbd.ko*")):
        state, detail = "yes", "can be loaded: modprobe nbd"
    elif built_in.exists() and "/nbd.ko" in built_in.read_text():
        state, detail = "yes", "built in"
    else:
        state, detail = "no", f"Linux {release} has no module nbd here"
    return Finding(
        about="kernel",
        what="NBD client",
        state=state,
        detail=detail,
        needed_for="disks as /dev/nbd0 on this machine",
        advice=""
        if state == "yes"
        else "use QEMU, libnbd or nbdfuse, or another kernel",
    )


def _disks(folder: str) -> Iterator[Finding]:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            fd = file.fileno()
            yield from _disks_of(fd, folder)
    except OSError as error:
        raise NbdTargetError(
            f"{folder}: a file cannot be made here: {error.strerror or error}"
        ) from None


def _disks_of(fd: int, folder: str) -> Iterator[Finding]:
    def finding(what: str, detail: str, needed_for: str, advice: str) -> Finding:
        state: State = "no" if advice else "yes"
        return Finding(
            about="disks",
            what=what,
            state=state,
            detail=detail,
            needed_for=needed_for,
            advice=advice,
        )

    other = "keep disks on another file system: ext4, XFS or btrfs"
    unit = direct_unit(fd)
    yield finding(
        "direct I/O",
        f"in units of {unit} bytes" if unit else "not on this file system",
        "disks that are named direct:PATH",
        "" if unit else other,
    )
    can_punch = can_punch_holes(fd, PROBE_BYTES)
    yield finding(
        "holes in files",
        "can be made" if can_punch else "cannot be made",
        "discards that give space back",
        "" if can_punch else other,
    )
    clone_errno = _try(lambda: _reflink(fd, folder))
    yield finding(
        "reflinks",
        "files can share blocks" if not clone_errno else os.strerror(clone_errno),
        "copies of images in no time: cp --reflink",
        "" if not clone_errno else "XFS and btrfs have them",
    )
    mark_errno = _try(lambda: os.setxattr(fd, "user.nbdtarget.doctor", b"1"))
    yield finding(
        "extended attributes",
        "can be set" if not mark_errno else os.strerror(mark_errno),
        "finding out that a renamed disk is still the same",
        "" if not mark_errno else other,
    )
    can_see = cached_pages(fd, 0, PROBE_BYTES) > 0  # it has just been written
    yield finding(
        "cachestat",
        "there" if can_see else "not in this kernel",
        "certainty that what is read is what the disk has",
        "" if can_see else "Linux 6.5 and later have it",
    )


def _try(call: Callable[[], object]) -> int:
    """The errno of a call that may fail, or 0."""
    try:
        call()
    except OSError as error:
        return error.errno or errnos.EIO
    return 0


def _reflink(fd: int, folder: str) -> None:
    with tempfile.TemporaryFile(dir=folder) as other:
        fcntl.ioctl(other.fileno(), _FICLONE, fd)


def _limits() -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # From TCP and on unix sockets; each may have a second descriptor for a poll.
    wanted = 2 * Limits().connections_max + DESCRIPTORS_RESERVE
    is_enough = hard == resource.RLIM_INFINITY or hard >= wanted
    yield Finding(
        about="limits",
        what="open files",
        state="yes" if is_enough else "no",
        detail=f"{_limit(hard)}; {wanted} are used at most by default",
        needed_for="as many clients as connections_max",
        advice="" if is_enough else "raise the hard limit: LimitNOFILE=, ulimit -Hn",
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield Finding(
        about="limits",
        what="locked memory",
        state="yes",
        detail="no limit"
        if soft == resource.RLIM_INFINITY
        else f"{describe_bytes(soft)}; only kernels before 5.12 count io_uring's",
        needed_for="io_uring on old kernels",
    )
    yield _runtime()


def _limit(number: int) -> str:
    return "no limit" if number == resource.RLIM_INFINITY else str(number)


def _runtime() -> Finding:
    directory = runtime_directory()
    nearest = next(each for each in (directory, *directory.parents) if each.exists())
    is_writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return Finding(
        about="limits",
        what="runtime directory",
        state="yes" if is_writable else "trouble",
        detail=str(directory) if is_writable else f"{nearest}: cannot be written to",
        needed_for="sockets, unless --listen and --control name others",
        advice="" if is_writable else "set XDG_RUNTIME_DIR to a directory of yours",
    )


def _clients() -> Iterator[Finding]:
    for program, purpose in PROGRAMS.items():
        # Root's programs are not on the path of other users, and can be run by sudo.
        path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
        yield Finding(
            about="clients",
            what=program,
            state="yes" if path else "no",
            detail=path or "not installed",
            needed_for=purpose,
        )


def _packages() -> Iterator[Finding]:
    for package, purpose in PACKAGES.items():
        is_there = _has_package(package)
        if package == "backports.zstd" and sys.version_info >= (3, 14):
            is_there = True
        yield Finding(
            about="packages",
            what=package,
            state="yes" if is_there else "no",
            detail="installed" if is_there else "not installed",
            needed_for=purpose,
        )


def _has_package(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
