# SPDX-License-Identifier: Apache-2.0
"""The Debian that the virtual machines of `make vm-test` run: made once, and kept in a cache.

    python -m scripts.vm.image      make it, if it is missing, and print its folder

It is made by mmdebstrap from the packages in `PACKAGES`, needs root, apt and about a gigabyte, and takes some minutes. In the folder:

    vmlinuz    the kernel
    initrd     loads the modules of the root disk and starts what `init=` names
    root.img   the root disk, with the scripts of `guest/` in /vm. Machines write to overlays of it

The cache is $XDG_CACHE_HOME/nbdtarget-vm, or /var/cache/nbdtarget-vm. Its folders are named after what they are made from, so a
change of the packages or the scripts makes a new one.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Image", "ImageError", "PackagesError", "debian", "image"]

RELEASE: Final = "bookworm"
KERNEL: Final = "linux-image-6.12-cloud-amd64"
PACKAGES: Final = (
    *("systemd-sysv", "udev", "dbus", "kmod", "procps", "iproute2", "busybox-static"),
    *("nbd-client", "libnbd-bin", "e2fsprogs", "xfsprogs", "btrfs-progs"),
    *("lvm2", "cryptsetup-bin", "dmsetup", "python3", "python3-venv", KERNEL),
)
TOOLS: Final = {  # program: package, on this machine
    "mmdebstrap": "mmdebstrap",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "mke2fs": "e2fsprogs",
    "cpio": "cpio",
    "depmod": "kmod",
}
ROOT_SIZE: Final = "3G"  # sparse
FETCH_PAUSES_S: Final = (10, 30, 0)  # after each attempt that has failed
INITRD_MODULES: Final = ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic")
GUEST: Final = Path(__file__).with_name("guest")


class ImageError(Exception):
    """The image could not be made; the text says why."""


class PackagesError(ImageError):
    """The packages could not be had: the archive does not answer, or this user may not install them."""


class Image(NamedTuple):
    kernel: Path
    initrd: Path
    root: Path


def image() -> Image:
    """Return the image, and make it first if it is missing. Raises: ImageError."""
    with _cache() as cache:
        folder = cache / _recipe()
        if not folder.exists():
            print(f"making a Debian {RELEASE} in {folder}", file=sys.stderr)
            _make(folder)
    return Image(folder / "vmlinuz", folder / "initrd", folder / "root.img")


def debian() -> Path:
    """Return a tar archive of a Debian with `PACKAGES`, and make it first if it is missing. Raises: ImageError."""
    with _cache() as cache:
        return _archive(cache)


@contextmanager
def _cache() -> Iterator[Path]:
    """The folder of the cache, for this process alone. Raises: ImageError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "/var/cache") / "nbdtarget-vm"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield cache
    except OSError as error:
        raise ImageError(f"{cache}: {error.strerror or error}") from None


def _recipe() -> str:
    """A digest of all that the image is made from."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for script in sorted(GUEST.iterdir()):
        digest.update(script.name.encode() + script.read_bytes())
    return digest.hexdigest()[:16]


def _make(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = Path(name)
        made, root = work / "made", work / "root"
        made.mkdir()
        base = _archive(folder.parent)
        root.mkdir()
        _run("tar", "-xpf", str(base), "-C", str(root), "--exclude=./dev/*")
        (kernel,) = (root / "boot").glob("vmlinuz-*")
        shutil.copy(kernel, made / "vmlinuz")
        _make_initrd(work / "tree", root, kernel.name.removeprefix("vmlinuz-"), made)
        _finish_root(root)
        size = ["-d", str(root), str(made / "root.img"), ROOT_SIZE]
        _run("mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", *size)
        made.rename(folder)


def _archive(cache: Path) -> Path:
    """Return the tree that mmdebstrap makes. That takes most of the time, so the tree is kept for the next image."""
    digest = hashlib.sha256(repr((RELEASE, PACKAGES)).encode()).hexdigest()[:16]
    base = cache / f"{RELEASE}-{digest}.tar"
    _install_tools()
    if not base.exists():
        part = base.with_suffix(".part")
        words = ["--variant=minbase", "--mode=root", "--format=tar", "--quiet"]
        words.append(f"--include={','.join(PACKAGES)}")
        _fetch("mmdebstrap", *words, RELEASE, str(part))
        part.rename(base)
    return base


def _install_tools() -> None:
    missing = {package for tool, package in TOOLS.items() if not shutil.which(tool)}
    if os.geteuid() != 0:
        raise PackagesError("only root can make the image of the virtual machines")
    if missing:
        _fetch("apt-get", "-qq", "update")
        words = ["-qq", "-y", "--no-install-recommends"]
        _fetch("apt-get", "install", *words, *sorted(missing))


def _make_initrd(tree: Path, root: Path, release: str, made: Path) -> None:
    modules = tree / "lib/modules" / release
    for each in ("bin", "dev", "proc", "sys", "disk", "lib/modules"):
        (tree / each).mkdir(parents=True)
    _run("depmod", "-b", str(root), release)
    shown = _run(
        *("modprobe", "-d", str(root), "-S", release, "--show-depends", "-a"),
        *INITRD_MODULES,
    )
    for line in shown.splitlines():
        words = line.split()
        if words[0] == "insmod":
            target = modules / Path(words[1]).name
            target.parent.mkdir(exist_ok=True)
            shutil.copy(words[1], target)
            if target.suffix == ".xz":
                _run("xz", "-df", str(target))
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(root / "lib/modules" / release / name, modules / name)
    _run("depmod", "-b", str(tree), release)
    shutil.copy(root / "bin/busybox", tree / "bin/busybox")
    shutil.copy(GUEST / "initrd-init", tree / "init")
    (tree / "init").chmod(0o755)
    with (made / "initrd").open("wb") as out:
        names = subprocess.run(["find", "."], cwd=tree, stdout=subprocess.PIPE)
        pack = ["cpio", "-o", "-H", "newc", "-R", "0:0", "--quiet"]
        subprocess.run(pack, cwd=tree, input=names.stdout, stdout=out, check=True)


def _finish_root(root: Path) -> None:
    shutil.copytree(GUEST, root / "vm")
    for script in (root / "vm").iterdir():
        script.chmod(0o755)
    unit = root / "etc/systemd/system/vm-test.service"
    shutil.copy(GUEST / "vm-test.service", unit)
    (root / "etc/systemd/system/multi-user.target.wants").mkdir(exist_ok=True)
    wanted = root / "etc/systemd/system/multi-user.target.wants/vm-test.service"
    wanted.symlink_to("../vm-test.service")
    # No service of the test hangs on a terminal or on the network.
    for name in ("getty@tty1.service", "serial-getty@hvc0.service"):
        (root / "etc/systemd/system" / name).symlink_to("/dev/null")
    (root / "etc/fstab").write_text("")
    (root / "etc/hostname").write_text("vm\n")


def _fetch(*argv: str) -> None:
    """Run a program that fetches packages. Raises: PackagesError: it fails again and again."""
    for pause_s in FETCH_PAUSES_S:
        try:
            _run(*argv)
        except ImageError as error:
            reason = str(error)
            time.sleep(pause_s)
        else:
            return
    raise PackagesError(reason)


def _run(*argv: str) -> str:
    """Run a program and return what it prints. Raises: ImageError: it fails."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
    )
    if done.returncode != 0:
        raise ImageError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    try:
        print(image().root.parent)
    except ImageError as error:
        sys.exit(f"vm image: {error}")
