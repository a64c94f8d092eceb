# SPDX-License-Identifier: Apache-2.0
"""Devices as they are, written as a configuration file."""

import json
import re
from collections.abc import Iterable

from nbdtarget.config.file import DeviceConfig

__all__ = ["render_devices"]


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
