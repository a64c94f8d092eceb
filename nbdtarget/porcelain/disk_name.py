# SPDX-License-Identifier: Apache-2.0
"""From what a user calls a disk to its name in a table.

`nbdtarget clone https://images.example/debian-12.qcow2 vm.img` means the disk in that image. An image on a web server or in an object store is
never written to, so no guest can have put its header there, and the one who types the name says with it what the file is. So a URL that
ends in the name of a format is taken for `qemu:FORMAT:URL`. If the file is in another format, it is refused when it is opened: what it begins with
decides nothing.

A file or a device of this machine is not named so: what is in it may come from a guest (`nbdtarget.devices.image_format`). And a table line says what it means.
"""

import logging
import re
from typing import Final

from nbdtarget.common.redaction import redacted
from nbdtarget.devices import resolve
from nbdtarget.devices.helper.words import REMOTE, qemu_name

__all__ = ["disk_name"]

_SUFFIXES: Final = {
    ".qcow2": "qcow2",
    ".vmdk": "vmdk",
    ".vhdx": "vhdx",
    ".vdi": "vdi",
    ".vhd": "vpc",
}
_REMOTE_NAME: Final = re.compile(rf"(?:{'|'.join(REMOTE)})://[^?#]+", re.IGNORECASE)

log = logging.getLogger(__name__)


def disk_name(given: str, directory: str) -> str:
    """Return the name of the disk as a table has it. Args: directory: where relative paths are meant."""
    name = resolve.absolute_name(given, directory)
    format_ = _format_said(name)
    if not format_:
        return name
    named = qemu_name(format_, name)
    log.info("%s: its name says %s: %s", redacted(given), format_, redacted(named))
    return named


def _format_said(name: str) -> str:
    match = _REMOTE_NAME.match(name)
    if match is None:
        return ""
    path = match[0].lower()
    return next((f for suffix, f in _SUFFIXES.items() if path.endswith(suffix)), "")
