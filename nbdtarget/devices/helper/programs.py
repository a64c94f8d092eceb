# SPDX-License-Identifier: Apache-2.0
"""Which programs helpers are, and how they are installed. It is light, so that the command line can use it."""

import shutil
from typing import Final

__all__ = ["missing"]

# The packages to install, on Debian and its kin, and on Fedora and its kin.
_PACKAGES: Final = {
    "qemu-nbd": ("qemu-utils", "qemu-img"),
    "qemu-img": ("qemu-utils", "qemu-img"),
    "nbdkit": ("nbdkit", "nbdkit"),
    "rbd": ("ceph-common", "ceph-common"),
}


def missing(program: str) -> str:
    """Say what to do if there is no such program; empty: there is."""
    if shutil.which(program) is not None:
        return ""
    if program not in _PACKAGES:
        return f"the program {program} is not there"
    debian, fedora = _PACKAGES[program]
    return (
        f"the program {program} is not installed: `apt install {debian}' or `dnf install"
        f" {fedora}' installs it"
    )
