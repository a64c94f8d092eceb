# SPDX-License-Identifier: Apache-2.0
"""One run of a virtual machine: a script as root in a real Linux, with or without systemd.

A machine has the root disk of `scripts.vm.image`, a disk with the script and its files, and no network but one NBD server of the
host. What the script prints is passed on line by line. A line `HOST:WORDS` asks the host for something; the script reads `done`
when it has happened. The last line is `VM-EXIT:STATUS`.

KVM is used where the machine has it. Without it QEMU translates the guest's code, and all takes several times as long.
"""

import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from scripts.vm.image import Image

__all__ = ["FIRMWARE", "KERNEL_WORDS", "has_kvm", "run"]

# Without the last ones a guest whose code is translated takes longer, or stops for a clock that it does not trust.
KERNEL_WORDS: Final = (
    "console=ttyS0 loglevel=5 panic=-1 oops=panic net.ifnames=0"
    " mitigations=off nokaslr no_timer_check"
)
FIRMWARE: Final = Path("/usr/share/ovmf/OVMF.fd")  # of Debian's package ovmf

BARE: Final = "/vm/bare-init"
SYSTEMD: Final = "/sbin/init"
SERVER: Final = "10.0.2.100:10809"  # as common.sh has it
MEMORY_MIB: Final = 1024
# Only a machine that hangs takes so long: the host may be busy with other things.
RUN_S_MAX: Final = 600.0
TRANSLATED_RUN_S_MAX: Final = 2400.0
TIMED_OUT: Final = 124
NO_STATUS: Final = 125
COMMON: Final = Path(__file__).with_name("common.sh")
RELAY: Final = Path(__file__).with_name("relay.py")


def has_kvm() -> bool:
    """Whether the machine's processor can run guests. (The module kvm_pvm alone runs only kernels that know of it.)"""
    modules = [Path("/sys/module") / name for name in ("kvm_intel", "kvm_amd")]
    has_module = any(each.is_dir() for each in modules)
    return has_module and os.access("/dev/kvm", os.R_OK | os.W_OK)


def run(
    image: Image,
    script: Path,
    *,
    files: Sequence[Path] = (),
    server: str | None = None,
    disks: Sequence[str] = (),
    has_systemd: bool = False,
    root: Path | None = None,
    root_node: str | None = None,
    boots_itself: bool = False,
    serve: Callable[[str], None] = lambda words: None,
    show: Callable[[str], None] = print,
    console: Path,
    timeout_s: float | None = None,
) -> int:
    """Run `script` and return its exit status: 124 after a timeout, 125 if the machine ended without one.

    Args:
        files: copied beside the script.
        server: the unix socket of an NBD server, or its HOST:PORT, that the guest reaches at `SERVER`.
        disks: of QEMU's `-blockdev`, for /dev/vdc and so on.
        root: an overlay of the root disk that is kept for the next machine; None: a new one.
        root_node: of QEMU's `-blockdev`, for a root disk that is none of the image's.
        boots_itself: the root disk has a boot loader (`scripts.vm.cloud_disk`), which firmware starts; systemd runs.
        serve: called with the words of a `HOST:` line; what it raises ends the machine.
        show: called with each other line.
        console: a file that gets what the kernel says.
        timeout_s: None: `RUN_S_MAX`, and without KVM `TRANSLATED_RUN_S_MAX`.
    """
    with tempfile.TemporaryDirectory(prefix="vm-") as name:
        work = Path(name)
        if root_node is None:
            root = root or work / "root.qcow2"
            _make_overlay(image, root)
            # Syncs of the guest are not carried out here: the host does not lose power, and dpkg makes thousands.
            file = f"file.driver=file,file.filename={root}"
            root_node = f"driver=qcow2,cache.no-flush=on,{file}"
        _pack(work / "payload.tar", script, files)
        nodes = [
            root_node,
            f"driver=file,read-only=on,filename={work}/payload.tar",
            *disks,
        ]
        init = SYSTEMD if has_systemd else BARE
        boot = ["-bios", str(FIRMWARE)] if boots_itself else _kernel_words(image, init)
        argv = _command(boot, nodes, server, console)
        child = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        if timeout_s is None:
            timeout_s = RUN_S_MAX if has_kvm() else TRANSLATED_RUN_S_MAX
        timer = threading.Timer(timeout_s, child.kill)
        timer.start()
        try:
            status = _converse(child, serve, show)
            child.wait()
        finally:
            child.kill()
            child.wait()
            is_late = not timer.is_alive()
            timer.cancel()
    return TIMED_OUT if is_late else NO_STATUS if status is None else status


def _make_overlay(image: Image, root: Path) -> None:
    """Make `root`, if it is missing: a disk like the image's, to which a machine may write."""
    if not root.exists():
        backing = ["-b", str(image.root), "-F", "raw"]
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(root)]
        subprocess.run(argv, check=True)


def _pack(path: Path, script: Path, files: Sequence[Path]) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(script, "script")
        archive.add(COMMON, "common.sh")
        for each in files:
            archive.add(each, each.name)


def _kernel_words(image: Image, init: str) -> list[str]:
    append = f"{KERNEL_WORDS} init={init}"
    return [
        "-kernel",
        str(image.kernel),
        "-initrd",
        str(image.initrd),
        "-append",
        append,
    ]


def _command(
    boot: Sequence[str], nodes: Sequence[str], server: str | None, console: Path
) -> list[str]:
    accel = ["kvm"] if has_kvm() else ["tcg,thread=multi"]
    cpu = "host" if has_kvm() else "max,la57=off"
    argv = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"]
    argv += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    argv += ["-machine", "pc", "-m", str(MEMORY_MIB), "-smp", "2"]
    argv += ["-accel", *accel, "-cpu", cpu]
    argv += [*boot, "-serial", f"file:{console}"]
    argv += ["-chardev", "stdio,id=out,signal=off", "-device", "virtio-serial-pci"]
    argv += ["-device", "virtconsole,chardev=out", "-device", "virtio-rng-pci"]
    # Not 0: that is the kernel's, where QEMU is given one.
    for nr, node in enumerate(nodes):
        argv += ["-blockdev", f"{node},node-name=d{nr}"]
        argv += ["-device", f"virtio-blk-pci,drive=d{nr},bootindex={nr + 1}"]
    if server is not None:
        relay = shlex.join([sys.executable, "-I", str(RELAY), server])
        forward = f"guestfwd=tcp:{SERVER}-cmd:{relay}"
        argv += ["-netdev", f"user,id=n,restrict=on,ipv6=off,{forward}"]
        argv += ["-device", "virtio-net-pci,netdev=n"]
    return argv


def _converse(
    child: "subprocess.Popen[str]",
    serve: Callable[[str], None],
    show: Callable[[str], None],
) -> int | None:
    """Pass on lines until the guest ends. Returns the script's status, if it told one."""
    assert child.stdout is not None
    assert child.stdin is not None
    status = None
    for line in child.stdout:
        line = line.rstrip("\r\n")
        if line.startswith("HOST:"):
            serve(line.removeprefix("HOST:"))
            print("done", file=child.stdin, flush=True)
        elif line.startswith("VM-EXIT:"):
            status = int(line.removeprefix("VM-EXIT:"))
        else:
            show(line)
    return status
