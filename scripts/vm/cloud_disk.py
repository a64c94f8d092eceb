# SPDX-License-Identifier: Apache-2.0
"""A Debian as clouds have it: a qcow2 image of a whole disk, with partitions and a boot loader, which firmware boots by itself.

It is made of the image of `make vm-test`, without a mount: an EFI system partition with systemd-boot, kernel and initrd, and the root file system behind it. The
qcow2 is compressed, and lies in a cache beside the image that it is made of.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from scripts.vm.image import Image, ImageError
from scripts.vm.machine import FIRMWARE, KERNEL_WORDS

__all__ = ["cloud_disk"]

MIB: Final = 1 << 20
ESP_AT: Final = 1 * MIB
ESP_SIZE: Final = 64 * MIB
ROOT_AT: Final = ESP_AT + ESP_SIZE
TAIL: Final = 1 * MIB  # for the second partition table
BOOT: Final = Path("/usr/lib/systemd/boot/efi/systemd-bootx64.efi")
PACKAGES: Final = {  # what is needed: its package
    str(FIRMWARE): "ovmf",
    str(BOOT): "systemd-boot-efi",
    "mcopy": "mtools",
    "mkfs.vfat": "dosfstools",
    "sfdisk": "fdisk",
    "qemu-img": "qemu-utils",
}
PARTITIONS: Final = """label: gpt
start={esp}, size={esp_size}, type=U
start={root}, size={root_size}, type=L
"""
ENTRY: Final = f"""title Debian
linux /vmlinuz
initrd /initrd
options root=/dev/vda2 init=/sbin/init {KERNEL_WORDS}
"""


def cloud_disk(image: Image) -> Path:
    """Return the qcow2 image, and make it first if it is missing. Raises: ImageError."""
    disk = image.root.with_name("debian-12.qcow2")
    if not disk.exists():
        _install_tools()
        with tempfile.TemporaryDirectory(dir=disk.parent) as name:
            work = Path(name)
            raw = _raw_disk(image, work)
            made = work / disk.name
            words = ["-q", "-c", "-f", "raw", "-O", "qcow2", str(raw), str(made)]
            _run("qemu-img", "convert", *words)
            made.rename(disk)
    return disk


def _raw_disk(image: Image, work: Path) -> Path:
    esp, raw = work / "esp", work / "disk"
    with esp.open("wb") as file:
        file.truncate(ESP_SIZE)
    _run("mkfs.vfat", "-n", "ESP", str(esp))
    loader, entry = work / "loader.conf", work / "debian.conf"
    loader.write_text("timeout 0\ndefault debian.conf\n")
    entry.write_text(ENTRY)
    folders = ["::/EFI", "::/EFI/BOOT", "::/loader", "::/loader/entries"]
    _run("mmd", "-i", str(esp), *folders)
    for source, target in (
        (BOOT, "::/EFI/BOOT/BOOTX64.EFI"),
        (loader, "::/loader/loader.conf"),
        (entry, "::/loader/entries/debian.conf"),
        (image.kernel, "::/vmlinuz"),
        (image.initrd, "::/initrd"),
    ):
        _run("mcopy", "-i", str(esp), str(source), target)
    root_size = image.root.stat().st_size
    with raw.open("wb") as file:
        file.truncate(ROOT_AT + root_size + TAIL)
    table = PARTITIONS.format(
        esp=ESP_AT // 512,
        esp_size=ESP_SIZE // 512,
        root=ROOT_AT // 512,
        root_size=root_size // 512,
    )
    _run("sfdisk", "-q", str(raw), text=table)
    for part, at in ((esp, ESP_AT), (image.root, ROOT_AT)):
        words = [f"if={part}", f"of={raw}", "bs=1M", f"seek={at // MIB}"]
        _run("dd", *words, "conv=notrunc,sparse", "status=none")
    return raw


def _install_tools() -> None:
    missing = {
        package
        for each, package in PACKAGES.items()
        if not (Path(each).exists() or shutil.which(each))
    }
    if not missing:
        return
    if os.geteuid() != 0:
        raise ImageError(f"not installed: {', '.join(sorted(missing))}")
    words = ["-qq", "-y", "--no-install-recommends", *sorted(missing)]
    _run("apt-get", "install", *words)


def _run(*argv: str, text: str = "") -> None:
    """Raises: ImageError: the program fails."""
    done = subprocess.run(
        argv,
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
    )
    if done.returncode != 0:
        raise ImageError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout}")
