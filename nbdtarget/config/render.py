# SPDX-License-Identifier: Apache-2.0
"""Writes the devices of a server as a configuration file."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import parse_qs, urlsplit

from nbdtarget.config.file import DeviceConfig

__all__ = ["listen_address", "render_config", "render_devices"]

HEADER: Final = """\
# The devices as they are now, and where the server listens. Other keys (access, control, limits,
# stop_timeout, tls, modes of sockets) are not in here: copy them from the file in use.
"""


def render_config(devices: Iterable[DeviceConfig], listen: Sequence[str]) -> str:
    """Return a whole file: a server that reads it has these devices, and listens on `listen`, if that is known."""
    addresses = ", ".join(map(_string, listen))
    where = f"listen = [{addresses}]\n" if listen else ""
    return f"{HEADER}{where}\n{render_devices(devices)}"


def listen_address(uri: str) -> str:
    """Return what to write under `listen` for an NBD URI that a server tells, with or without an export's name."""
    parts = urlsplit(uri)
    if sockets := parse_qs(parts.query).get("socket"):
        return f"unix:{sockets[0]}"
    if parts.scheme.endswith("+vsock"):
        cid, _, port = parts.netloc.partition(":")
        # A server that listens for all machines tells the host's number, which is how they reach it.
        return f"vsock:{'any' if cid == '2' else cid}:{port}"
    return f"tcp:{parts.netloc}"


def render_devices(devices: Iterable[DeviceConfig]) -> str:
    """Return TOML that `nbdtarget.config.file.parse` reads as the same devices."""
    return "\n".join(_render(device) for device in devices)


def _render(device: DeviceConfig) -> str:
    name = device.name
    if not re.fullmatch("[A-Za-z0-9_-]+", name):
        name = _string(name)
    lines = [f"[device.{name}]"]
    if device.uuid:
        lines.append(f"uuid = {_string(device.uuid)}")
    if device.read_only:
        lines.append("readonly = true")
    if device.rotational is not None:
        lines.append(f"rotational = {str(device.rotational).lower()}")
    if device.table:
        lines.append(f"table = {_text(device.table)}")
    return "\n".join(lines) + "\n"


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but for one character that only TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _text(table: str) -> str:
    if "'''" in table or not all(c.isprintable() or c == "\n" for c in table):
        return _string(table)
    return f"'''\n{table}\n'''"
