# SPDX-License-Identifier: Apache-2.0
"""The file in which a server keeps the devices of `create --persist`: its text, and how it is replaced.

The text is that of a configuration file, below three lines of comments:

    # Devices of `nbdtarget create --persist`. The server writes this file. A changed one is refused.
    # format 1, and the SHA-256 of what stands below the next line:
    # 1f2e...

`replace_file` puts a new text in the place of the old one. After a crash at any moment the file has one of the two, complete:

    1 a temporary file in the same directory gets the new text
    2 it is flushed         else the name could be durable before the text is
    3 it gets the name      at once, in the place of the old one
    4 the directory is flushed: from now on the new text survives a power cut

A temporary file that a crash has left behind is overwritten by the next replacement.
"""

import hashlib
import os
import re
from collections.abc import Container, Iterable, Mapping
from typing import Final

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.config.file import (
    FILE_SIZE_MAX,
    Config,
    ConfigError,
    DeviceConfig,
    parse,
)
from nbdtarget.config.render import render_devices
from nbdtarget.devices.file.open import sync_directory
from nbdtarget.targets.base import Target

__all__ = ["StateError", "read_state", "render_state", "replace_file"]

FORMAT: Final = 1
HEADER: Final = (
    "# Devices of `nbdtarget create --persist`. The server writes this file. A changed one is refused.\n"
    "# format {format}, and the SHA-256 of what stands below the next line:\n"
    "# {digest}\n"
)
_HEADER: Final = re.compile(
    r"#[^\n]*\n# format (\d{1,9}),[^\n]*\n# ([0-9a-f]{64})\n(.*)", re.DOTALL
)


class StateError(NbdTargetError):
    """The file cannot be used. Nothing was changed, and no device was made."""


def render_state(devices: Iterable[DeviceConfig]) -> str:
    """Return the text of a file that holds `devices`."""
    body = render_devices(devices)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return HEADER.format(format=FORMAT, digest=digest) + body


def read_state(
    path: str, types: Mapping[str, type[Target]], existing: Container[str] = ()
) -> Config:
    """Return what a file says; no devices, if there is no file.

    Args: existing: names of devices that come from elsewhere, and on which those of the file may stand.
    Raises: StateError: it is damaged, of another version, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_SIZE_MAX + 1)
    except FileNotFoundError:
        return parse("", path, types)
    except OSError as error:
        raise _refused(path, error.strerror or str(error)) from None
    try:
        match = _HEADER.fullmatch(data.decode())
    except UnicodeDecodeError:
        match = None
    if match is None:
        raise _refused(path, "it does not begin as such a file does")
    version, digest, body = match.groups()
    if int(version) != FORMAT:
        raise _refused(
            path, f"it has format {version}, and this version knows {FORMAT}"
        )
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise _refused(path, "it does not fit its checksum")
    try:
        return parse(body, path, types, existing)
    except ConfigError as error:
        # For example, a type of targets that only another version has.
        raise _refused(path, error.lines()[0]) from None


def _refused(path: str, reason: str) -> StateError:
    return StateError(
        f"{path}: {reason}. No device was made from it, and it was not changed. Restore it from a"
        " backup; or move it away, start again, and create the devices anew"
    )


def replace_file(path: str, text: str) -> None:
    """Replace the file, or make it. It may block. Raises: OSError: the file has its old text, or the new one.

    Durable: the new text, and its name.
    """
    temporary = f"{path}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(temporary, flags, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o600)  # tables may hold passwords
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync_directory(os.path.dirname(path))
